"""Half precision, models spread over devices or left on a disk, and quantised weights, against the plain model.

Two devices are `fake_devices`; the disk is real. bitsandbytes is tried where it is installed (its CPU build will do).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from fake_devices import fake_devices
from helpers import N_NEW, PAD, Tiny, hf_model, text, tokenizer
from torch import nn

import npti_interp as npti
from npti_interp.backends import _kernels
from npti_interp.backends._sharing import sharing_twin
from npti_interp.errors import FingerprintMismatchError, NonFiniteActivationError, UnsupportedModelError
from npti_interp.experiments._replay import replay_answers, unembedding_rows, written_rows
from npti_interp.interventions import FrontSteering, HeadShift, ResidualSteering, stack
from npti_interp.methods import METHODS
from npti_interp.models import Model
from npti_interp.models._weights import (
    compute_dtype,
    execution_device,
    is_offloaded,
    layer_devices,
    multiply_out,
    plain_weight,
    stored_parameters,
)

BNB = importlib.util.find_spec("bitsandbytes") is not None
quantising = pytest.mark.skipif(not BNB, reason="needs bitsandbytes")

# ------------------------------------------------------------------------------------------------------ several devices

TWO = {"model.embed_tokens": "ve:0", "model.rotary_emb": "ve:0", "model.layers.0": "ve:0", "model.layers.1": "ve:1",
       "model.layers.2": "ve:1", "model.norm": "ve:1", "lm_head": "ve:0"}  # fmt: skip
DISK = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.layers.2": "disk", "model.norm": "disk", "lm_head": "disk"}  # fmt: skip


@pytest.fixture(params=["two devices", "disk"])
def spread(request: pytest.FixtureRequest, llama: Tiny, tmp_path: Path) -> Iterator[Model]:
    """The tiny Llama over two devices, or most of it on a disk."""
    plain = copy.deepcopy(llama.plain)
    if request.param == "disk":
        yield Model(dispatch_model(plain, DISK, offload_dir=tmp_path), tokenizer(), "disk")
        return
    with fake_devices():
        yield Model(dispatch_model(plain, TWO, skip_keys="past_key_values"), tokenizer(), "two devices")


def everything(x: Tiny) -> list[Any]:
    """Interventions at every site, one of them with a random mask."""
    rng = torch.Generator().manual_seed(0)

    def vectors(width: int, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        return {layer: torch.randn(width, generator=rng) for layer in layers}

    sites = x.model.sites
    return [
        None,
        x.pair(0).edit("high"),
        x.pair(1).edit("low", drop=0.4, seed=3),
        ResidualSteering(vectors(32, (0, 2))),
        HeadShift({k: v.view(sites.n_heads, -1) for k, v in vectors(sites.n_heads * sites.d_head, (1, 2)).items()}),
        FrontSteering({layer: torch.randn(1, 32, generator=rng) for layer in (0, 2)}),
        stack([x.pair(2).edit("high"), ResidualSteering(vectors(32, (1,)))]),
    ]


def test_fake_devices_hold_their_tensors_apart() -> None:
    with fake_devices():
        a, b = torch.ones(2, 3).to("ve:0"), torch.zeros(2, 3, device="ve:1")
        for mix in (lambda: a + b, lambda: a + torch.ones(2, 3), lambda: a[b[:, 0] == 0],
                    lambda: a.index_select(0, torch.tensor([0])), lambda: torch.cat([a, b])):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"same device|indices should be"):
                mix()
        a[:, 1:] = b[:, 1:]
        assert (a.device, (a + 1).sum().item(), a.tolist()) == (torch.device("ve:0"), 8.0, [[1.0, 0.0, 0.0]] * 2)


def test_the_fingerprint_does_not_depend_on_where_weights_are(spread: Model, llama: Tiny) -> None:
    assert spread.fingerprint == llama.model.fingerprint
    own = dict(stored_parameters(spread.hf_model))
    assert own.keys() == dict(llama.plain.named_parameters()).keys()
    for name, parameter in llama.plain.named_parameters():
        assert torch.equal(own[name].cpu(), parameter.detach()), name


def test_where_layers_are(spread: Model, llama: Tiny) -> None:
    assert spread.has_weights
    two = spread.name != "disk"
    assert list(map(str, layer_devices(spread.hf_model, spread.sites))) == (
        ["ve:0", "ve:1", "ve:1"] if two else ["cpu"] * 3
    )
    assert spread.device == ("ve" if two else "cpu")
    assert is_offloaded(spread.hf_model) is not two
    assert spread.dtype == llama.model.dtype == "torch.float32"
    edits = spread.backend._edits([llama.pair().edit("high")])  # pyright: ignore
    where = {layer: str(bound.device) for layer, (bound, _) in edits.tables["value"].items()}
    assert where == ({0: "ve:0", 1: "ve:1", 2: "ve:1"} if two else dict.fromkeys(range(3), "cpu"))


def test_tokens_under_every_kind_of_edit(spread: Model, llama: Tiny) -> None:
    edits = everything(llama)
    expected = llama.model.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW)
    assert [list(a.tokens) for a in expected[0]] == [r.tokens for r in llama.expected]
    assert len({tuple(a.tokens for a in own) for own in expected}) == len(edits), (
        "edits that change nothing test nothing"
    )
    for rows in (None, 2):
        got = spread.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW, batch_size=rows)
        assert [[a.tokens for a in own] for own in got] == [[a.tokens for a in own] for own in expected]


def test_sampling_and_penalty(spread: Model, llama: Tiny) -> None:
    for settings in ({"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"repetition_penalty": 1.4}):
        want = llama.model.generate(llama.texts, max_new_tokens=N_NEW, **settings)
        assert [a.tokens for a in spread.generate(llama.texts, max_new_tokens=N_NEW, **settings)] == [
            a.tokens for a in want
        ]


def test_statistics(spread: Model, llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPTI_REDUCE", "host")  # the devices are none on which anything could be computed
    want, answers = llama.model.collect(llama.texts, max_new_tokens=N_NEW, n_blocks=3)
    edit = llama.pair().edit("high")
    for given, intervention in ((None, None), (answers, None), (answers, edit)):
        if intervention is not None:
            want, _ = llama.model.collect(llama.texts, given, n_blocks=3, intervention=intervention)
        got, _ = spread.collect(llama.texts, given, max_new_tokens=N_NEW, n_blocks=3, intervention=intervention)
        np.testing.assert_array_equal(got.active_count, want.active_count)
        assert got.active_count.dtype == np.int32
        np.testing.assert_array_equal(got.n_tokens, want.n_tokens)
        np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
        np.testing.assert_allclose(got.p95, want.p95, rtol=0.03, atol=1e-4)
        want.require_comparable(got)


def test_what_is_read(spread: Model, llama: Tiny) -> None:
    answers = llama.model.generate(llama.texts, max_new_tokens=4)
    edit = stack([e for e in everything(llama)[3:5]])
    for site in ("residual", "heads", "product", "value"):
        for at in ("answer", "prompt_end"):
            given = answers if at == "answer" else None
            own = edit if at == "answer" else None
            want = llama.model.read(llama.texts, given, site=site, at=at, intervention=own)  # pyright: ignore
            got = spread.read(llama.texts, given, site=site, at=at, intervention=own)  # pyright: ignore
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    positions = spread.read_positions(["w5 w6", "w7"], pad="w8")
    torch.testing.assert_close(positions, llama.model.read_positions(["w5 w6", "w7"], pad="w8"), atol=2e-5, rtol=1e-5)


def test_likelihoods(spread: Model, llama: Tiny) -> None:
    texts = [["w5 w6 w7", "w9"], ["w10"], [], ["w11 w12"], ["w5"], ["w6 w6"]]
    for edit in (None, llama.pair().edit("high"), llama.pair().edit("low", edit_prompt_end=True)):
        prompts = [t for t in llama.texts if len(t.split()) > 1]
        wanted = [own for t, own in zip(llama.texts, texts, strict=True) if len(t.split()) > 1]
        want, _ = llama.model.log_likelihoods(prompts, wanted, intervention=edit)
        got, lengths = spread.log_likelihoods(prompts, wanted, intervention=edit)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        assert lengths[0] == [3, 1]
        torch.testing.assert_close(
            spread.next_token_logits(prompts, edit), llama.model.next_token_logits(prompts, edit), atol=1e-4, rtol=1e-4
        )  # fmt: skip


def test_editing_block_acts_on_the_spread_model(spread: Model, llama: Tiny) -> None:
    edit = llama.pair().edit("high")
    prompt = torch.tensor([llama.prompts[0]])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with llama.model.editing(edit):
        want = llama.model.hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    if spread.name != "disk":  # Hugging Face's own loop does more to its tensors than fake devices follow
        got = spread.generate([text(llama.prompts[0])], intervention=edit, max_new_tokens=6)[0].tokens
        n = len(got)
        assert list(got) == want[0, prompt.shape[1] :].tolist()[:n]
        return
    with spread.editing(edit):
        got = spread.hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert got.tolist() == want.tolist()
    assert (
        spread.hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).tolist() != want.tolist()
    )


def test_write_weights_and_replay(spread: Model, llama: Tiny) -> None:
    prompts = [list(p) for p in llama.prompts[:3]]
    answers = [[5, 6, 7], [8], [9, 10]]
    want = replay_answers(llama.model, prompts, answers, [(0, 1), (2, 5)])
    got = replay_answers(spread, prompts, answers, [(0, 1), (2, 5)])
    np.testing.assert_allclose(got.multiplier, want.multiplier, atol=1e-5)
    np.testing.assert_allclose(got.contribution, want.contribution, atol=1e-5)
    assert got.final_scale == pytest.approx(want.final_scale, rel=1e-5)
    assert got.examples.answer.tolist() == want.examples.answer.tolist()
    for layer in range(3):
        torch.testing.assert_close(written_rows(spread, layer).cpu(), written_rows(llama.model, layer))
    torch.testing.assert_close(unembedding_rows(spread).cpu(), unembedding_rows(llama.model))


def test_twins_share_what_is_fetched_and_act_on_their_own_modules(llama: Tiny, tmp_path: Path) -> None:
    model = dispatch_model(copy.deepcopy(llama.plain), DISK, offload_dir=tmp_path)
    twin = sharing_twin(model)
    down, other = model.model.layers[1].mlp.down_proj, twin.model.layers[1].mlp.down_proj
    assert other._hf_hook is not down._hf_hook
    assert other._hf_hook.weights_map is down._hf_hook.weights_map
    assert other._old_forward.__self__ is other and other.forward.args == (other,)
    assert "to" in vars(model) and "to" not in vars(twin)
    seen: list[int] = []
    twin.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    ids = torch.tensor([llama.prompts[0]])
    assert torch.equal(model(ids).logits, llama.plain(ids).logits) and not seen
    assert torch.equal(twin(ids).logits, llama.plain(ids).logits) and seen
    assert down.weight.device.type == "meta", "a fetched weight stayed"


def test_the_fast_product_is_kept_behind_the_hook_that_fetches(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPTI_LINEAR", "onednn")
    _kernels.linear_kernel.cache_clear() if hasattr(_kernels.linear_kernel, "cache_clear") else None
    twin = dispatch_model(copy.deepcopy(llama.plain), DISK, offload_dir=tmp_path)
    calls: list[int] = []
    real = _kernels._onednn_forward

    def counted(module: nn.Linear) -> Any:
        forward = real(module)
        return lambda x: (calls.append(1), forward(x))[1]

    monkeypatch.setattr(_kernels, "_onednn_forward", counted)
    assert _kernels.use_fast_linear(twin) == 3 * 7 + 1
    ids = torch.tensor([llama.prompts[0]])
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, llama.plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(calls) == 3 * 7 + 1


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_engines_on_an_offloaded_model(backend: str, llama: Tiny, tmp_path: Path) -> None:
    places = DISK
    if backend == "nnsight":
        hf = dispatch_model(copy.deepcopy(llama.plain), DISK, offload_dir=tmp_path)
        with pytest.raises(UnsupportedModelError, match="embedding"):
            Model(hf, tokenizer(), "disk", backend=backend)
        places = DISK | {"model.embed_tokens": "cpu"}
    hf = dispatch_model(copy.deepcopy(llama.plain), places, offload_dir=tmp_path)
    model = Model(hf, tokenizer(), "disk", backend=backend)
    edit = llama.pair().edit("high")
    want = llama.model.generate_sweep(llama.texts[:3], [None, edit], max_new_tokens=5)
    got = model.generate_sweep(llama.texts[:3], [None, edit], max_new_tokens=5)
    assert [[a.tokens for a in own] for own in got] == [[a.tokens for a in own] for own in want]
    if backend == "transformer_lens":
        ids = torch.tensor([llama.prompts[0]])
        with torch.no_grad():
            torch.testing.assert_close(model.bridge(ids), llama.plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_sft_is_refused_where_weights_are_fetched(llama: Tiny, tmp_path: Path) -> None:
    model = Model(dispatch_model(copy.deepcopy(llama.plain), DISK, offload_dir=tmp_path), tokenizer(), "disk")
    with pytest.raises(npti.UnsupportedMethodError, match="partly offloaded"):
        METHODS["sft"].check(model)


# ----------------------------------------------------------------------------------------------------------- load_model


@pytest.fixture(scope="module")
def checkpoint(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    llama.plain.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_load_with_a_device_map(checkpoint: Path, llama: Tiny, tmp_path: Path) -> None:
    want = [a.tokens for a in llama.model.generate(llama.texts, max_new_tokens=N_NEW)]
    for device_map in ("auto", {"": "cpu"}, "cpu", DISK):
        model = npti.load_model(checkpoint, device_map=device_map, offload_folder=tmp_path)
        assert [a.tokens for a in model.generate(llama.texts, max_new_tokens=N_NEW)] == want
        assert model.fingerprint == llama.model.fingerprint
        assert is_offloaded(model.hf_model) is (device_map == DISK)


def test_load_settings_that_exclude_each_other(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not both"):
        npti.load_model(checkpoint, device="cuda", device_map="auto")
    with pytest.raises(ValueError, match="unknown quantization '2bit'"):
        npti.load_model(checkpoint, quantization="2bit")
    for given in ({"device_map": "auto"}, {"quantization": "4bit"}, {"device": "cuda"}):
        with pytest.raises(ValueError, match=r"means nothing to a model on a server"):
            npti.load_model(checkpoint, "nnsight", remote=True, **given)
    with pytest.raises(ValueError, match=r"says nothing of (lm_head|model)"):
        npti.load_model(checkpoint, device_map={"model.embed_tokens": "cpu"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"npti-interp\[quantization\]"):
        npti.load_model(checkpoint, quantization="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="cannot be fetched"):
        npti.load_model(checkpoint, quantization="4bit", device_map=DISK)
    with pytest.raises(ValueError, match="dequantised when it is read"):
        npti.load_model("some.gguf", quantization="4bit")


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half(request: pytest.FixtureRequest, llama: Tiny) -> Model:
    return Model(copy.deepcopy(llama.plain).to(request.param), tokenizer(), str(request.param))


def test_half_precision_statistics_and_results(half: Model, llama: Tiny) -> None:
    assert compute_dtype(half.hf_model).itemsize == 2
    answers = half.generate(llama.texts, max_new_tokens=N_NEW)
    got, again = half.collect(llama.texts, max_new_tokens=N_NEW, n_blocks=3)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert (got.active_count.dtype, got.mean.dtype, got.m2.dtype, got.p95.dtype) == (
        np.int32, np.float64, np.float64, np.float32,
    )  # fmt: skip
    want, _ = llama.model.collect(llama.texts, answers, n_blocks=3)
    assert np.abs(got.probability - want.probability).mean() < 0.02  # the same up to the model's own rounding
    np.testing.assert_allclose(got.mean, want.mean, atol=0.1)
    read = half.read(llama.texts, answers, site="value")
    assert read.dtype == torch.float32
    assert half.next_token_logits(llama.texts).dtype == torch.float32
    sums, _ = half.log_likelihoods(llama.texts[:2], [["w5 w6"], ["w7"]])
    exact, _ = llama.model.log_likelihoods(llama.texts[:2], [["w5 w6"], ["w7"]])
    np.testing.assert_allclose(np.concatenate(sums), np.concatenate(exact), atol=0.2)
    edits = half.backend._edits([llama.pair().edit("high")])  # pyright: ignore
    assert {t.dtype for pair in edits.tables["value"].values() for t in pair} == {torch.float32}


def test_log_probabilities_in_half_precision_are_summed_in_float32(half: Model, llama: Tiny) -> None:
    prompt, rest = llama.prompts[2], [5, 6, 7, 8]
    ids = torch.tensor([[*prompt, *rest]])
    with torch.no_grad():
        logits = half.hf_model(ids).logits[0, len(prompt) - 1 : -1]
    exact = logits.double().log_softmax(-1).gather(1, torch.tensor(rest)[:, None]).sum()
    (got,), _ = half.log_likelihoods([text(prompt)], [[text(rest)]])
    # The cached pass rounds apart from the whole one; sums in half precision would be 0.06 apart in their last digit.
    assert got[0] == pytest.approx(float(exact), abs=0.15)
    assert got[0] != float(torch.tensor(got[0]).to(logits.dtype))


def test_a_penalty_in_half_precision_is_hugging_faces(half: Model, llama: Tiny) -> None:
    """Its logits processors work in float32: in half precision the division would round tokens together."""
    for penalty in (1.05, 1.3):
        got = half.generate(llama.texts, max_new_tokens=N_NEW, repetition_penalty=penalty, batch_size=1)
        for own, prompt in zip(got, llama.prompts, strict=True):
            ids = torch.tensor([prompt])
            whole = half.hf_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False, pad_token_id=PAD,
                repetition_penalty=penalty,
            )  # fmt: skip
            assert list(own.tokens) == whole[0, len(prompt) :].tolist()


def test_near_ties_survive_a_penalty() -> None:
    from npti_interp._programs import choose

    # 8 / 1.03 is below 7.78125, but the two are one bfloat16 number, and the first of equals would be taken.
    logits = torch.tensor([[8.0, 7.78125, 0.0]], dtype=torch.bfloat16)
    assert logits[0, 0] / 1.03 == logits[0, 1]
    assert choose(logits, {"temperature": 0, "repetition_penalty": 1.03, "top_p": 1.0}, [[0]], []) == [1]


def test_overflow_of_float16_has_a_name(llama: Tiny) -> None:
    plain = copy.deepcopy(llama.plain)
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight.mul_(3e4)
        plain.model.layers[1].mlp.gate_proj.weight.mul_(1e3)
    assert torch.isfinite(plain(torch.tensor([llama.prompts[0]])).logits).all()
    model = Model(plain.half(), tokenizer(), "overflows")
    for work in (
        lambda: model.generate(llama.texts[:1], max_new_tokens=3),
        lambda: model.collect(llama.texts[:1], max_new_tokens=3),
        lambda: model.collect(llama.texts[:1], ["w5 w6"]),
        lambda: model.read(llama.texts[:1], ["w5 w6"]),
        lambda: model.log_likelihoods(llama.texts[:1], [["w5 w6"]]),
        lambda: model.next_token_logits(llama.texts[:1]),
    ):
        with pytest.raises(NonFiniteActivationError, match=r"half precision|Half precision"):
            work()


# ------------------------------------------------------------------------------------------------------------ quantised


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantised(request: pytest.FixtureRequest, checkpoint: Path) -> Model:
    pytest.importorskip("bitsandbytes")
    return npti.load_model(checkpoint, quantization=request.param)


@quantising
def test_quantised_weights_are_near_the_plain_ones(quantised: Model, llama: Tiny) -> None:
    kind = quantised.fingerprint.quantisation
    assert quantised.dtype == f"torch.float32, {kind} weights"
    for layer in range(3):
        want, got = written_rows(llama.model, layer), written_rows(quantised, layer)
        assert got.shape == want.shape and got.dtype == torch.float32
        assert 0 < float((got - want).norm() / want.norm()) < (0.15 if kind == "4bit" else 0.02)
    torch.testing.assert_close(unembedding_rows(quantised), unembedding_rows(llama.model))  # not quantised


@quantising
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (40, 64), (64, 192)])
def test_multiplied_out_weights_are_the_nearest_levels(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """Each entry is the level nearest to it; in bitsandbytes' own words for (32, 48) on a CPU it is not."""
    import bitsandbytes as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    made: Any = (
        bnb.nn.Linear4bit(
            shape[1], shape[0], bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
        )
        if kind == "4bit"
        else bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    )
    with torch.no_grad():
        made.weight.data.copy_(weight)
    made = made.to("cpu")
    if kind == "4bit" and made.weight.quant_state is None:
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to(
            "cpu"
        )
    got = plain_weight(made).float()
    if kind == "8bit":
        step = weight.float().abs().amax(dim=1, keepdim=True) / 127
        # Half a step, and what float16, through which bitsandbytes goes, rounds off.
        assert ((got - weight.float()).abs() <= 0.5 * step + 2e-3 * weight.float().abs() + 1e-6).all()
        return
    code, scale = made.weight.quant_state.code, weight.float().flatten().split(64)
    want = torch.cat([b.abs().max() * code[(b[:, None] / b.abs().max() - code).abs().argmin(dim=1)] for b in scale])
    torch.testing.assert_close(got.flatten(), want.to(dtype).float(), atol=0, rtol=0.01)


@quantising
def test_a_quantised_model_is_the_plain_one_with_its_weights_rounded(quantised: Model, llama: Tiny) -> None:
    rounded = copy.deepcopy(llama.plain)
    for name, module in quantised.hf_model.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            with torch.no_grad():
                rounded.get_submodule(name).weight.copy_(plain_weight(module))
    same = Model(rounded, tokenizer(), "rounded")
    edits = everything(llama)
    want = same.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW)
    got = quantised.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW)
    assert [[a.tokens for a in own] for own in got] == [[a.tokens for a in own] for own in want]
    a, _ = quantised.collect(llama.texts, max_new_tokens=N_NEW, n_blocks=3)
    b, _ = same.collect(llama.texts, max_new_tokens=N_NEW, n_blocks=3)
    np.testing.assert_array_equal(a.active_count, b.active_count)
    np.testing.assert_allclose(
        np.concatenate(quantised.log_likelihoods(llama.texts[:2], [["w5 w6"], ["w7"]])[0]),
        np.concatenate(same.log_likelihoods(llama.texts[:2], [["w5 w6"], ["w7"]])[0]), atol=1e-4,
    )  # fmt: skip
    alone = [quantised.generate([t], max_new_tokens=N_NEW)[0].tokens for t in llama.texts]
    assert alone == [x.tokens for x in got[0]], "rows of a batch change each other"
    ids = torch.tensor([llama.prompts[2]])
    with torch.no_grad():
        torch.testing.assert_close(quantised.hf_model(ids).logits, rounded(ids).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(quantised.bridge(ids), rounded(ids).logits, atol=1e-4, rtol=1e-4)
    nnsight = Model(quantised.hf_model, tokenizer(), backend="nnsight")
    assert nnsight.fingerprint == quantised.fingerprint, "a pass changed what is stored"
    assert [x.tokens for x in nnsight.generate(llama.texts, max_new_tokens=5)] == [x.tokens[:5] for x in got[0]]


@quantising
def test_neurons_of_the_plain_model_are_refused_until_bound(quantised: Model, llama: Tiny, tmp_path: Path) -> None:
    assert quantised.fingerprint != llama.model.fingerprint
    assert quantised.fingerprint.weights.startswith(quantised.fingerprint.quantisation)
    high, _ = llama.model.collect(llama.texts[:3], max_new_tokens=N_NEW, n_blocks=2)
    low, _ = llama.model.collect(llama.texts[3:], max_new_tokens=N_NEW, n_blocks=2)
    neurons = npti.select_neurons(high, low, threshold=0.3)
    assert len(neurons)
    with pytest.raises(FingerprintMismatchError, match=r"(4bit|8bit).*bound_to"):
        quantised.generate(llama.texts, intervention=neurons.edit(1.4))
    bound = neurons.bound_to(quantised)
    bound.save(tmp_path / "n.safetensors")
    edit = npti.NeuronSet.load(tmp_path / "n.safetensors").edit(1.4)
    plain, edited = quantised.generate_sweep(llama.texts, [None, edit], max_new_tokens=N_NEW)
    assert [a.tokens for a in plain] != [a.tokens for a in edited]
    own, _ = quantised.collect(llama.texts, max_new_tokens=N_NEW)
    own.save(tmp_path / "s.safetensors")
    assert npti.ActivationStatistics.load(tmp_path / "s.safetensors").fingerprint == quantised.fingerprint
    with pytest.raises(FingerprintMismatchError):
        own.require_comparable(high)


@quantising
def test_a_quantised_model_of_ones_own_is_refused(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    own = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(UnsupportedModelError, match="rows of a batch change each other"):
        Model(own, tokenizer())
    # It is true: one row far out makes its columns the ones that are kept for the others as well.
    down = own.model.layers[0].mlp.down_proj
    x = torch.randn(4, down.in_features, generator=torch.Generator().manual_seed(0))
    far = x.clone()
    far[3] *= 100
    with torch.no_grad():
        assert (down(x)[0] - down(far)[0]).abs().max() > 1e-4
        assert multiply_out(own) == 21
        torch.testing.assert_close(down(x)[0], down(far)[0])
    Model(own, tokenizer())


@quantising
def test_a_quantised_checkpoint_and_what_else_is_refused(quantised: Model, llama: Tiny, tmp_path: Path) -> None:
    quantised.hf_model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    again = npti.load_model(tmp_path)
    assert again.fingerprint == quantised.fingerprint
    want = quantised.generate(llama.texts, max_new_tokens=N_NEW)
    assert [a.tokens for a in again.generate(llama.texts, max_new_tokens=N_NEW)] == [a.tokens for a in want]
    with pytest.raises(ValueError, match="quantised already"):
        npti.load_model(tmp_path, quantization="4bit")
    with pytest.raises(npti.UnsupportedMethodError, match=quantised.fingerprint.quantisation):
        METHODS["sft"].check(quantised)


@quantising
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_the_embedded_model_quantised(kind: str, smollm: Model) -> None:
    """Located, edited and judged end to end, at a small size."""
    model = npti.load_model("smollm2-135m", quantization=kind)
    bench = npti.PersonalityBench.embedded()
    found = npti.locate(model, bench, "Neuroticism", n_questions=8, max_new_tokens=6, threshold=0.3, progress=False)
    assert len(found.neurons)
    plain, edited = model.generate_sweep(["How are you?"], [None, found.neurons.edit(1.4)], max_new_tokens=8)
    assert plain[0].tokens != edited[0].tokens
    found.neurons.fingerprint.require_same(model.fingerprint, "neurons and model")  # pyright: ignore
    with pytest.raises(FingerprintMismatchError):
        smollm.generate(["How are you?"], intervention=found.neurons.edit(1.4))


def test_other_quantisations_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(checkpoint, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised by gptq"):
        npti.load_model(tmp_path / "gptq")
    plain: Any = hf_model("llama")
    plain.is_quantized, plain.quantization_method = True, "hqq"
    with pytest.raises(UnsupportedModelError, match="hqq"):
        Model(plain, tokenizer())


def test_execution_device_of_a_skeleton(llama: Tiny) -> None:
    with torch.device("meta"), nullcontext():
        from transformers import AutoModelForCausalLM

        skeleton = AutoModelForCausalLM.from_config(llama.plain.config)
    assert execution_device(skeleton).type == "meta"
    assert execution_device(nn.Identity()).type == "cpu"
