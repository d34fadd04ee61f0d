"""Vectors added to the stream, to heads, to products and to the prompt's front: held against hooks written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    PAD,
    TEMPLATE,
    Tiny,
    changed,
    down_of,
    heads_of,
    hf_model,
    layers_of,
    text,
    tiny,
    tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import npti_interp as npti
from npti_interp.backends import RemoteSettings
from npti_interp.backends._ndif import Estimate
from npti_interp.errors import FingerprintMismatchError, NonFiniteActivationError
from npti_interp.generation import Answer, Decoding
from npti_interp.interventions import (
    FrontSteering,
    HeadShift,
    Intervention,
    ProductShift,
    ResidualSteering,
    edit_plan,
    stack,
)
from npti_interp.models import Model

NEW = 7
FRONT = 3

# -- the reference: the plain model, one row, no cache, no padding -----------------------------------------------------


@contextmanager
def added(
    model: Any, vectors: Mapping[str, Mapping[int, Tensor]], start: int
) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Add vectors at the places ``start …`` of one row, at the front from place 0; yields what each site then holds."""
    seen: dict[str, dict[int, Tensor]] = {"heads": {}, "product": {}, "residual": {}, "before": {}}
    handles = []

    def note(site: str, layer: int, values: Tensor) -> Tensor:
        vector = vectors.get(site, {}).get(layer)
        if vector is not None:
            values = values.clone()
            if site == "before":
                for place in range(min(len(vector), values.shape[1])):
                    values[0, place] += vector[place]
            else:
                for place in range(start, values.shape[1]):
                    values[0, place] += vector.flatten()
        seen[site][layer] = values[0].detach()
        return values

    def of_input(site: str, layer: int) -> Callable[..., Any]:
        return lambda _m, given: (note(site, layer, given[0]), *given[1:])

    def of_output(layer: int) -> Callable[..., Any]:
        def hook(_m: Any, _given: Any, out: Any) -> Any:
            return (
                (note("residual", layer, out[0]), *out[1:]) if isinstance(out, tuple) else note("residual", layer, out)
            )

        return hook

    for layer, block in enumerate(layers_of(model)):
        handles.append(block.register_forward_pre_hook(of_input("before", layer)))
        handles.append(heads_of(block).register_forward_pre_hook(of_input("heads", layer)))
        handles.append(down_of(block).register_forward_pre_hook(of_input("product", layer)))
        handles.append(block.register_forward_hook(of_output(layer)))
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


class Way:
    """An intervention of the toolkit, and what it means by hand."""

    def __init__(
        self, made: Intervention | None, vectors: Mapping[str, Mapping[int, Tensor]] | None = None, change: Any = None,
        early: bool = False,
    ) -> None:  # fmt: skip
        self.made, self.vectors, self.change, self.early = made, vectors or {}, change, early

    @contextmanager
    def on(self, model: Any, n_prompt: int) -> Iterator[tuple[dict[str, dict[int, Tensor]], list[Tensor]]]:
        start = n_prompt - self.early
        with changed(model, self.change, start) as values, added(model, self.vectors, start) as seen:
            yield seen, values

    def logits(self, model: Any, prompt: Sequence[int], answer: Sequence[int] = ()) -> Tensor:
        with self.on(model, len(prompt)):
            return model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]

    def decode(
        self, model: Any, prompt: Sequence[int], stop: Sequence[int], n_new: int = NEW
    ) -> tuple[list[int], float]:
        """The answer, and the least distance between the first and the second choice of its tokens."""
        out, gap = [], math.inf
        while True:
            best = self.logits(model, prompt, out)[-1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            out.append(int(best.indices[0]))
            if len(out) == n_new or out[-1] in stop:
                return out, gap


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ways(x: Tiny) -> dict[str, Way]:
    """One intervention of each kind, some at once, and some from the prompt's end on."""
    c, d_mlp = x.plain.config, x.d_mlp
    d = c.hidden_size
    n_heads = c.num_attention_heads
    d_head = getattr(c, "head_dim", None) or d // n_heads
    front = {0: drawn(1, FRONT, d, scale=2.0), 2: drawn(2, FRONT - 1, d, scale=2.0)}
    heads = {0: drawn(3, n_heads, d_head, scale=2.0), 1: drawn(4, n_heads, d_head, scale=2.0)}
    heads[1][2] = 0
    product = {1: drawn(5, d_mlp, scale=2.0), 2: drawn(6, d_mlp, scale=2.0)}
    stream = {0: drawn(7, d, scale=2.0)}

    def times(factor: float, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {layer: factor * vector for layer, vector in vectors.items()}

    pair = x.pair(seed=5)
    parts = [
        FrontSteering(front, 1.5), HeadShift(heads, -0.5), ProductShift(product, 0.25), ResidualSteering(stream, 0.25),
        pair.edit("high", gamma=0.2), FrontSteering({0: front[2]}), HeadShift({0: heads[1]}, 0.25),
    ]  # fmt: skip
    everything = {
        "before": {**times(1.5, front), 0: 1.5 * front[0] + torch.cat([front[2], torch.zeros(1, d)])},
        "heads": {**times(-0.5, heads), 0: -0.5 * heads[0] + 0.25 * heads[1]},
        "product": times(0.25, product),
        "residual": times(0.25, stream),
    }
    change = pair.function("high", 0.2)
    return {
        "none": Way(None),
        "front": Way(FrontSteering(front, 1.5), {"before": times(1.5, front)}),
        "another front": Way(FrontSteering({0: front[0]}, -4.0), {"before": {0: -4.0 * front[0]}}),
        "heads": Way(HeadShift(heads, 1.5), {"heads": times(1.5, heads)}),
        "heads early": Way(HeadShift(heads, 1.5, edit_prompt_end=True), {"heads": times(1.5, heads)}, early=True),
        "product": Way(ProductShift(product, 2.0), {"product": times(2.0, product)}),
        "product early": Way(
            ProductShift(product, -2.5, edit_prompt_end=True), {"product": times(-2.5, product)}, early=True
        ),
        "stack": Way(stack(parts), everything, change),
        "stack early": Way(
            stack([*parts[:-1], replace(parts[-1], edit_prompt_end=True)]),  # pyright: ignore
            everything, change, early=True,
        ),
    }  # fmt: skip


def long_prompts(x: Tiny) -> list[tuple[int, ...]]:
    """Longer than the front."""
    return [p for p in x.prompts if len(p) > FRONT][:3]


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    return [list(a.tokens) for a in answers]


def nnsight(x: Tiny, **remote: Any) -> Model:
    settings = RemoteSettings(here=True, repo="some/model", show=False, **remote) if remote else None
    return Model(x.model.hf_model, x.model.tokenizer, "second", backend="nnsight", remote=settings)


def known(x: Tiny, cache: dict[str, dict[str, list[tuple[list[int], float]]]] = {}) -> dict[str, Any]:  # noqa: B006
    """The reference's answers to `long_prompts`, by way."""
    if x.kind not in cache:
        cache[x.kind] = {
            name: [way.decode(x.plain, p, x.stop) for p in long_prompts(x)] for name, way in ways(x).items()
        }
    return cache[x.kind]


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_are_those_of_hooks_written_by_hand(kind: str) -> None:
    x = tiny(kind)
    texts, every = [text(p) for p in long_prompts(x)], ways(x)
    wanted = {name: [tokens for tokens, _ in rows] for name, rows in known(x).items()}
    assert min(gap for rows in known(x).values() for _, gap in rows) > 1e-4, "a near tie would make this a lottery"
    for name in every:
        assert name == "none" or wanted[name] != wanted["none"], f"{name} changes nothing"
    for name in ("heads", "product"):
        assert [t[0] for t in wanted[name]] == [t[0] for t in wanted["none"]], "the prompt pass is not edited"
    conditions = [way.made for way in every.values()]
    for batch_size in (64, 4):  # prompts of several lengths, left-padded together; rows of several interventions
        swept = x.model.generate_sweep(texts, conditions, max_new_tokens=NEW, batch_size=batch_size)
        for name, answers in zip(every, swept, strict=True):
            assert tokens_of(answers) == wanted[name], (name, batch_size)
    for name, way in every.items():
        single = x.model.generate(texts[:1], intervention=way.made, max_new_tokens=NEW, batch_size=1)
        assert tokens_of(single) == wanted[name][:1], name
    theirs = nnsight(x).generate_sweep(texts, conditions, max_new_tokens=NEW, batch_size=11)
    for name, answers in zip(every, theirs, strict=True):
        assert tokens_of(answers) == wanted[name], ("nnsight", name)


def padded_on_the_left(
    model: Any, prompts: Sequence[Sequence[int]], n_new: int, stop: Sequence[int]
) -> list[list[int]]:
    """What ``model.generate`` itself makes of a padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": list(stop), "pad_token_id": PAD}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=n_new, **settings)[:, width:].tolist()
    ends = [next((k + 1 for k, token in enumerate(row) if token in stop), n_new) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_plain_model_is_edited_alike_and_restored_to_the_last_bit(kind: str) -> None:
    x = tiny(kind)
    model, every = Model(copy.deepcopy(x.plain), tokenizer()), ways(x)
    prompts = long_prompts(x)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        before = model.hf_model(ids).logits
    for name in ("front", "heads", "product", "stack"):
        way: Any = every[name].made
        wanted = [tokens for tokens, _ in known(x)[name]]
        with way.on(model) as inside:
            assert padded_on_the_left(inside.hf_model, prompts, NEW, x.stop) == wanted, name
            assert tokens_of(inside.generate([text(p) for p in prompts], max_new_tokens=NEW)) == wanted, name
        with pytest.raises(ZeroDivisionError), way.on(model):
            raise ZeroDivisionError
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())
        with torch.no_grad():
            assert torch.equal(model.hf_model(ids).logits, before)
    with model.editing(every["front"].made), model.editing(every["heads"].made):  # type: ignore[arg-type]
        both = [
            Way(None, {**every["front"].vectors, **every["heads"].vectors}).decode(x.plain, p, x.stop)[0]
            for p in prompts
        ]
        assert padded_on_the_left(model.hf_model, prompts, NEW, x.stop) == both
    with pytest.raises(ValueError, match=r"Model\.generate"), model.editing(every["heads early"].made):  # type: ignore[arg-type]
        raise AssertionError("not reached")


def test_front_steering_on_the_plain_model_needs_to_know_where_rows_begin(llama: Tiny) -> None:
    model = Model(copy.deepcopy(llama.plain), tokenizer())
    front, ids = FrontSteering({0: drawn(0, 4, 32)}), torch.tensor([[7, 8, 9], [7, 8, 9]])
    with front.on(model):
        for wrong, words in (
            ({"input_ids": ids}, "3 tokens is shorter than the 4 positions"),
            (
                {"input_ids": ids[:, [0, 1, 2, 2, 2]], "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])},
                "3 tokens",
            ),
            ({"input_ids": ids, "attention_mask": torch.zeros(2, 1, 3, 3)}, "does not say where each row begins"),
        ):
            with pytest.raises(ValueError, match=words), torch.no_grad():
                model.hf_model(**wrong, past_key_values=DynamicCache())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())


def test_a_prompt_is_passed_once_for_every_front(llama: Tiny) -> None:
    model = Model(copy.deepcopy(llama.plain), tokenizer())
    every = ways(llama)
    twin: Any = model.backend
    passed: list[int] = []
    hooks: list[int] = []

    def before(module: Any, _args: Any, given: Any) -> None:
        prompt = given["input_ids"].shape[1] > 1
        passed.append(int(given["attention_mask"].sum()) if prompt else 0)
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()) - 1)

    handle = twin._model.register_forward_pre_hook(before, with_kwargs=True)
    prompts = long_prompts(llama)
    total = sum(map(len, prompts))

    def run(names: Sequence[str], **settings: Any) -> tuple[int, set[int]]:
        passed.clear()
        hooks.clear()
        model.generate_sweep([text(p) for p in prompts], [every[n].made for n in names], max_new_tokens=3, **settings)
        return sum(passed), set(hooks)

    assert run(["none", "none"]) == (total, {0}), "no hook where nothing is edited"
    assert run(["none", "heads", "product"]) == (total, {0, 4}), "two layers each, and none in the prompt pass"
    assert run(["front"]) == (total, {2, 0}), "in the prompt pass alone"
    for batch_size in (64, 2):
        again = ["none", "front", "heads", "front", "product", "another front"]
        assert run(again, batch_size=batch_size)[0] == 3 * total
    handle.remove()


@pytest.mark.parametrize(("kind", "road"), [("llama", "trusted"), ("gpt_neox", "sandboxed")])
def test_over_the_remote_road(kind: str, road: str, tmp_path: Any) -> None:
    x = tiny(kind)
    far = nnsight(x, jobs=tmp_path, rows_per_job=2, trusted=road == "trusted")
    every, texts = ways(x), [text(p) for p in long_prompts(x)]
    names = ["stack", "stack early", "none", "front"]
    if road == "sandboxed":
        with pytest.raises(ValueError, match="cannot edit the prompt's front"):
            far.generate(texts, intervention=every["front"].made, max_new_tokens=NEW)
        names = ["heads", "heads early", "none", "product"]
    swept = far.generate_sweep(texts, [every[n].made for n in names], max_new_tokens=NEW)
    for name, answers in zip(names, swept, strict=True):
        assert tokens_of(answers) == [tokens for tokens, _ in known(x)[name]], name
    edit, answers = every[names[1]].made, swept[1]
    counts = [m.collect(texts, intervention=edit, max_new_tokens=NEW)[0].active_count for m in (x.model, far)]
    assert (counts[0] == counts[1]).all()
    for site, at in (("heads", "answer"), ("product", "answer_end"), ("value", "prompt_end")):
        own = None if at == "prompt_end" else answers
        here, there = (m.read(texts, own, site=site, at=at, intervention=edit) for m in (x.model, far))
        assert torch.allclose(here, there, atol=1e-4)
    more = [["w7 w8", "w9"]] * len(texts)
    here, there = (torch.tensor(m.log_likelihoods(texts, more, intervention=edit)[0]) for m in (x.model, far))
    assert torch.allclose(here, there, atol=1e-4)
    assert torch.allclose(x.model.next_token_logits(texts, edit), far.next_token_logits(texts, edit), atol=1e-4)
    here, there = (m.read_positions(["w5 w6", "w7"], pad="w9") for m in (x.model, far))
    assert torch.allclose(here, there, atol=1e-4)


def test_the_estimate_counts_vectors(llama: Tiny, tmp_path: Any) -> None:
    far: Any = nnsight(llama, jobs=tmp_path)
    plan = edit_plan([HeadShift({1: drawn(0, 4, 8)}), FrontSteering({0: drawn(0, 2, 32)})], llama.model.sites)
    task = {"prompts": [[5, 6]], "answers": [[7]], "plan": plan, "want": "read", "site": "product", "at": "answer"}
    assert far.backend._estimate("replay", [task]) == Estimate(1, 8 * 3 + 4 * (32 + 64), 4 * 3 * 48)


# -- replay, likelihoods, reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_reading_and_likelihoods_under_each_intervention(kind: str) -> None:
    x = tiny(kind)
    prompts, other = long_prompts(x), nnsight(x)
    texts = [text(p) for p in prompts]
    answers = ["w9 w33 w41 w20", "w60", "w12 w13"]
    tokens = [x.model.encode_answer(a) for a in answers]
    for name in ("none", "front", "heads early", "product", "stack"):
        way = ways(x)[name]
        wanted: dict[tuple[str, str], list[Tensor]] = {}
        scores, first = [], []
        for prompt, answer in zip(prompts, tokens, strict=True):
            with way.on(x.plain, len(prompt)) as (seen, values):
                logp = x.plain(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[len(prompt) - 1 + k, t]) for k, t in enumerate(answer)))
            sites = {s: torch.stack([seen[s][layer] for layer in range(3)]) for s in ("heads", "product", "residual")}
            for site, held in {**sites, "value": torch.stack(values)}.items():
                wanted.setdefault((site, "answer"), []).append(held[:, len(prompt) :].mean(dim=1))
                wanted.setdefault((site, "answer_end"), []).append(held[:, -1])
                wanted.setdefault((site, "prompt_end"), []).append(held[:, len(prompt) - 1])
            first.append(way.logits(x.plain, prompt)[-1])
        for (site, at), rows in wanted.items():
            given = None if at == "prompt_end" else answers
            read = x.model.read(texts, given, site=site, at=at, intervention=way.made)  # type: ignore[arg-type]
            assert read.dtype == torch.float32
            assert read.shape == (3, 3, len(rows[0][0]))
            assert torch.allclose(read, torch.stack(rows), atol=2e-4), (name, site, at)
            if name == "stack":
                theirs = other.read(texts, given, site=site, at=at, intervention=way.made)  # type: ignore[arg-type]
                assert torch.allclose(theirs, read, atol=2e-4), ("nnsight", site, at)
        for model in (x.model, other) if name in ("heads early", "stack") else (x.model,):
            logits = model.next_token_logits(texts, way.made)
            assert torch.allclose(logits, torch.stack(first), atol=1e-3), name
            sums, counts = model.log_likelihoods(texts, [[a, "", a] for a in answers], intervention=way.made)
            assert counts == [[len(t), 0, len(t)] for t in tokens]
            assert [s[:2] for s in sums] == [[pytest.approx(s, abs=1e-3), 0.0] for s in scores], name
            assert [s[2] for s in sums] == [pytest.approx(s[0], abs=1e-6) for s in sums]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statistics_are_those_of_the_edited_values(kind: str) -> None:
    x = tiny(kind)
    texts, every = [text(p) for p in long_prompts(x)], ways(x)
    for name in ("front", "stack early"):
        decoded, answers = x.model.collect(texts, intervention=every[name].made, max_new_tokens=NEW, n_blocks=3)
        replayed, _ = x.model.collect(texts, answers, intervention=every[name].made, n_blocks=3)
        expected = []
        for prompt, answer in zip(long_prompts(x), answers, strict=True):
            with every[name].on(x.plain, len(prompt)) as (_, values):
                x.plain(torch.tensor([[*prompt, *answer.tokens[:-1]]]), use_cache=False)
            expected.append(torch.stack([(v[len(prompt) :] > 0).sum(dim=0) for v in values]))
        for stats in (decoded, replayed):
            assert torch.equal(torch.from_numpy(stats.active_count.astype("int64")), torch.stack(expected))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_positions_are_hugging_faces_hidden_states(kind: str) -> None:
    x = tiny(kind)
    read = x.model.read_positions(["w5 w6 w7 w8", (9, 10)], pad="w11")
    assert read.shape == (2, 4, 3, 32)
    plain = copy.deepcopy(x.plain)  # the library leaves hooks of its own on a model that was asked for hidden states
    with torch.no_grad():
        states = plain(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 11]]), output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.allclose(read[:, :, layer], states[layer], atol=1e-5)
    assert torch.allclose(nnsight(x).read_positions(["w5 w6 w7 w8", (9, 10)], pad=11), read, atol=1e-4)


def test_a_contrast_pair_gives_front_steering(llama: Tiny) -> None:
    """ActAdd by hand: adding the difference at the front turns one text's stream there into the other's."""
    a, b = llama.model.read_positions(["w5 w6 w7", "w8"], pad="w9")
    front = FrontSteering({0: a[:, 0] - b[:, 0]})
    moved = llama.model.read(["w8 w9 w9"], at="prompt_end", intervention=front)
    assert torch.allclose(moved, llama.model.read(["w5 w6 w7"], at="prompt_end"), atol=1e-4)


def test_a_chat_template_is_not_applied_to_positions() -> None:
    model = Model(hf_model("llama"), tokenizer(TEMPLATE))
    assert model.read_positions(["w5 w6"], pad=0).shape == (1, 2, 3, 32)
    assert len(model.encode("w5 w6")) == 5


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_prompt_shorter_than_the_front_is_refused_before_any_work(llama: Tiny) -> None:
    front = FrontSteering({1: drawn(0, 5, 32)})
    texts = [text(llama.prompts[2]), "w5 w6 w7 w8"]
    calls: list[Any] = []
    engine: Any = llama.model.backend
    handle = engine._model.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        for use in (
            lambda m, i: m.generate(texts, intervention=i),
            lambda m, i: m.generate_sweep(texts, [None, i]),
            lambda m, i: m.collect(texts, intervention=i),
            lambda m, i: m.collect(texts, ["w5", "w6"], intervention=i),
            lambda m, i: m.log_likelihoods(texts, [["w5"]] * 2, intervention=i),
            lambda m, i: m.next_token_logits(texts, i),
            lambda m, i: m.read(texts, at="prompt_end", intervention=i),
        ):
            for model in (llama.model, nnsight(llama)):
                with pytest.raises(ValueError, match="4 tokens is shorter than the 5 positions"):
                    use(model, front)
        early = ResidualSteering({0: drawn(1, 32)}, edit_prompt_end=True)
        with pytest.raises(ValueError, match="one token more"):
            llama.model.generate(["w5 w6 w7 w8 w9"], intervention=stack([front, early]))
    finally:
        handle.remove()
    assert not calls
    assert llama.model.generate(["w5 w6 w7 w8 w9"], intervention=front, max_new_tokens=2)
    assert llama.model.generate(["w5 w6 w7 w8 w9 w10"], intervention=stack([front, early]), max_new_tokens=2)


def test_vectors_that_do_not_fit() -> None:
    x = tiny("qwen3")
    d_head = x.plain.config.head_dim
    assert (x.model.sites.n_heads, x.model.sites.d_head) == (4, d_head)
    assert 4 * d_head != x.model.sites.d_model
    for wrong in (
        HeadShift({0: drawn(0, 4, d_head + 1)}), HeadShift({0: drawn(0, 2, d_head)}), HeadShift({3: drawn(0, 4, d_head)}),
        ProductShift({0: drawn(0, 47)}), ProductShift({-1: drawn(0, 48)}), FrontSteering({0: drawn(0, 2, 31)}),
        FrontSteering({3: drawn(0, 2, 32)}), ResidualSteering({0: drawn(0, 31)}),
    ):  # fmt: skip
        for use in (
            lambda i: x.model.generate(x.texts, intervention=i),
            lambda i: x.model.editing(i).__enter__(),
            lambda i: x.model.read(x.texts, at="prompt_end", intervention=stack([i, i])),
        ):
            with pytest.raises(ValueError, match="does not fit a model of 3 layers"):
                use(wrong)
    for kind, shape in (
        (HeadShift, (4, 8)),
        (ProductShift, (48,)),
        (FrontSteering, (2, 32)),
        (ResidualSteering, (32,)),
    ):
        for bad in (drawn(0, *shape, 2), drawn(0, *shape) * math.nan, torch.zeros(0)):
            with pytest.raises(ValueError, match="layer 1: expected finite vectors"):
                kind({1: bad})
        with pytest.raises(ValueError, match="no vectors"):
            kind({})
        with pytest.raises(ValueError, match="coefficient must be finite"):
            kind({1: drawn(0, *shape)}, math.inf)
        huge = kind({1: drawn(0, *shape)}, 1e39)
        assert not huge.edit_prompt_end
        with pytest.raises(ValueError, match="beyond float32"):
            tiny("llama").model.generate(["w5 w6 w7"], intervention=huge)
        foreign = kind({1: drawn(0, *shape)}, fingerprint=x.model.fingerprint)
        for use in (
            lambda i: tiny("llama").model.generate(["w5 w6 w7"], intervention=i),
            lambda i: tiny("llama").model.log_likelihoods(["w5 w6"], [["w7"]], intervention=i),
            lambda i: tiny("llama").model.next_token_logits(["w5 w6"], i),
            lambda i: tiny("llama").model.read(["w5 w6"], at="prompt_end", intervention=i),
        ):
            with pytest.raises(FingerprintMismatchError, match="different models"):
                use(foreign)


def test_readings_that_make_no_sense(llama: Tiny) -> None:
    model = llama.model
    for words, settings in (
        ("unknown site 'stream'", {"site": "stream"}),
        ("unknown site 'before'", {"site": "before"}),
        ("unknown place 'start'", {"at": "start"}),
        ("at='answer' needs answers", {}),
        ("at='prompt_end' takes no answers", {"at": "prompt_end", "answers": ["w5"]}),
        ("1 prompts but 2 answers", {"answers": ["w5", "w6"]}),
        ("empty answers", {"answers": [""]}),
        ("empty answers", {"answers": [""], "at": "answer_end"}),
        ("random mask", {"answers": ["w5"], "intervention": llama.pair().edit("high", drop=0.1)}),
    ):
        with pytest.raises(ValueError, match=words):
            model.read(["w5 w6"], **settings)  # type: ignore[arg-type]
    for words, texts, pad in (
        ("list of strings", "w5", " "), ("at least one", [], " "), ("text 1 has no tokens", ["w5", ""], "w6"),
        ("pad must be one token, but 'w5 w6' is 2", ["w5"], "w5 w6"), ("but '' is 0", ["w5"], ""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model.read_positions(texts, pad=pad)
    with pytest.raises(ValueError, match="random mask"):
        model.log_likelihoods(["w5 w6"], [["w7"]], intervention=llama.pair().edit("high", drop=0.1))


def test_a_reading_that_is_not_finite_names_the_layer() -> None:
    plain = hf_model("llama")
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight[3, 4] = math.nan
    model = Model(plain, tokenizer())
    with pytest.raises(NonFiniteActivationError, match="^layer 1: "):
        model.read(["w5 w6"], ["w7"])
    # Before layer 2 it shows, but the weights that it comes from are named.
    with pytest.raises(NonFiniteActivationError, match=r"^layer 1: .* in the weights model\.layers\.1\.mlp\.down_proj"):
        model.read_positions(["w5 w6"], pad=0)


def test_a_judge_refuses_an_edited_model(smollm: Model) -> None:
    bench = npti.PersonalityBench.embedded()
    judge = npti.LikelihoodJudge(smollm, bench, personas_per_pole=1)
    steering = ResidualSteering({1: drawn(0, 576)})
    with steering.on(smollm), pytest.raises(ValueError, match="a judge needs the unedited model"):
        judge.raw_scores(bench.questions("N", "search", 1), [["I worry."]], "N")


# -- arithmetic --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.floats(-2, 2)), min_size=1, max_size=5))
def test_stacked_fronts_add_up_whatever_their_lengths(parts: list[tuple[int, int, float]]) -> None:
    sites = tiny("llama").model.sites
    made = [FrontSteering({layer: drawn(k, n, 32)}, c) for k, (layer, n, c) in enumerate(parts)]
    whole = stack(made).front_additions(sites)
    assert set(whole) == {layer for layer, _, _ in parts}
    for layer, vectors in whole.items():
        wanted = torch.zeros(max(n for at, n, _ in parts if at == layer), 32)
        for k, (at, n, c) in enumerate(parts):
            if at == layer:
                wanted[:n] += c * drawn(k, n, 32)
        assert torch.allclose(vectors, wanted, atol=1e-5)


def test_a_front_that_is_nearly_as_long_as_another_prompt_reaches_only_its_own_rows(llama: Tiny) -> None:
    """Rows of one pass with fronts of different lengths, one of which would not fit the other's prompt."""
    long, short = llama.prompts[5], llama.prompts[3]
    fronts = [FrontSteering({0: drawn(1, len(long), 32)}), FrontSteering({0: drawn(2, 1, 32)})]
    pairs = [(0, 0), (1, 1)]
    answers = llama.model.generate_pairs([text(long), text(short)], fronts, pairs, decoding=Decoding(NEW))
    wanted = [
        Way(None, {"before": {0: drawn(k + 1, n, 32)}}).decode(llama.plain, p, llama.stop)[0]
        for k, (p, n) in enumerate(((long, len(long)), (short, 1)))
    ]
    assert tokens_of(answers) == wanted
