"""Statistics over generated tokens: the right tokens, the right values, exact counts; merged, saved, bound to the model."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, N_NEW, Recorder, Reference, Tiny, changed, decode, hf_model, text, tiny, tokenizer

from npti_interp import activations
from npti_interp._sketch import BYTES_PER_STREAM, QuantileSketch
from npti_interp.activations import ActivationCollector, ActivationStatistics, collect_activations
from npti_interp.bench import PersonalityBench
from npti_interp.errors import ArtifactError, FingerprintMismatchError, NonFiniteActivationError
from npti_interp.generation import Answer, Decoding, Row
from npti_interp.models import Model, ModelFingerprint

PRINT = ModelFingerprint("Nothing", 1, 2, 4, 5, "silu", "w", "t", "")


def agrees(stats: ActivationStatistics, rows: list[Reference], blocks: list[int], n_layers: int = 3) -> None:
    """The statistics are those of the reference's values: counts but for values within 1e-5 of zero."""
    wanted = [0] * stats.n_blocks
    for row, block in zip(rows, blocks, strict=True):
        wanted[block] += len(row.values[0])
    assert stats.n_tokens.tolist() == wanted
    assert stats.active_count.dtype.kind == "i"
    for layer in range(n_layers):
        own = [
            torch.cat(
                [r.values[layer] for r, at in zip(rows, blocks, strict=True) if at == b]
                or [torch.empty(0, stats.shape[1])]
            )
            for b in range(stats.n_blocks)
        ]
        for block, values in enumerate(own):
            off = np.abs(stats.active_count[block, layer] - (values > 0).sum(0).numpy())
            assert (off <= (values.abs() < 1e-5).sum(0).numpy()).all()
        values = torch.cat(own).double().numpy()
        assert np.abs(stats.mean[layer] - values.mean(0)).max() < 1e-4
        assert np.allclose(stats.variance[layer], values.var(0), rtol=1e-3, atol=1e-5)
        exact = np.quantile(np.maximum(values, 0), 0.95, axis=0)
        assert (np.abs(stats.p95[layer] - exact) <= 0.01 * exact + 1e-5).all()
        assert (exact > 0).any()


# ------------------------------------------------------------------------------------------ values of every architecture


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_statistics_are_the_references(kind: str) -> None:
    x = tiny(kind)
    assert sum(r.n_fed for r in x.expected) not in (0, len(x.prompts) * (N_NEW - 1)), "some rows end early"
    stats, answers = x.model.collect(x.texts, max_new_tokens=N_NEW, n_blocks=4)
    assert [list(a.tokens) for a in answers] == [r.tokens for r in x.expected]
    assert stats.n_tokens.tolist() == [sum(r.n_fed for r in x.expected[b::4]) for b in range(4)], (
        "never the prompt, padding, or anything after a row's end"
    )
    agrees(stats, x.expected, [k % 4 for k in range(6)])
    assert stats.total_tokens == sum(r.n_fed for r in x.expected)
    assert np.allclose(stats.probability, stats.active_count.sum(0) / stats.total_tokens)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_replay_equals_decoding(kind: str) -> None:
    x = tiny(kind)
    n = len(x.prompts)
    rows = [Row(p, 0, block) for block, p in enumerate(x.prompts)]
    replayed = Recorder(x.model.fingerprint, n)
    x.model.backend.replay(rows, [r.tokens[:-1] for r in x.expected], [None], replayed)
    for batch_size in (1, 3, 8):
        decoded = Recorder(x.model.fingerprint, n)
        x.model.backend.generate(rows, [None], Decoding(N_NEW), collector=decoded, max_rows=batch_size)
        for block, row in enumerate(x.expected):
            for layer in range(3):
                mine, again, wanted = decoded.of(block)[layer], replayed.of(block)[layer], row.values[layer]
                assert mine.shape == again.shape == (row.n_fed, x.d_mlp)
                assert torch.allclose(mine, wanted, rtol=0, atol=1e-4)
                assert torch.allclose(again, wanted, rtol=0, atol=1e-4)
                assert ((mine > 0) != (again > 0)).sum() <= (wanted.abs() < 1e-5).sum()
        one, two = decoded.result(), replayed.result()
        assert one.n_tokens.tolist() == two.n_tokens.tolist() == [r.n_fed for r in x.expected]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_replay_of_answers_and_of_plain_text(kind: str) -> None:
    x = tiny(kind)
    answers = x.model.generate(x.texts, max_new_tokens=N_NEW)
    agrees(collect_activations(x.model, x.texts, answers, n_blocks=4), x.expected, [k % 4 for k in range(6)])
    # Of a plain string every token counts, the last one included.
    words = [(9, 10), (11,), (12, 13, 14, 15, 16, 17, 18, 19, 20), (5,), (21, 22, 23), (30, 31)]
    rows = []
    for prompt, given in zip(x.prompts, words, strict=True):
        with changed(x.plain, None, 0) as values:
            x.plain(torch.tensor([[*prompt, *given]]))
        rows.append(Reference(prompt, [*given], [v[len(prompt) :] for v in values]))
    stats = collect_activations(x.model, x.texts, [text(w) for w in words], blocks=[0, 1, 1, 0, 2, 2], n_blocks=3)
    assert stats.n_tokens.tolist() == [3, 10, 5]
    agrees(stats, rows, [0, 1, 1, 0, 2, 2])
    assert stats.metadata["decoding"] == "replay"


def test_replay_in_many_chunks(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = llama.model.generate(llama.texts, max_new_tokens=N_NEW)
    monkeypatch.setattr("npti_interp.generation._PREFILL_TOKENS", 20)
    agrees(collect_activations(llama.model, llama.texts, answers), llama.expected, list(range(6)))


def test_edited_values_are_the_ones_counted(llama: Tiny) -> None:
    pair = llama.pair(seed=5)
    edit = pair.edit("low")
    wanted = [decode(llama.plain, p, N_NEW, pair.function("low"), llama.stop) for p in llama.prompts]
    stats, answers = llama.model.collect(llama.texts, intervention=edit, max_new_tokens=N_NEW)
    agrees(stats, wanted, list(range(6)))
    again, given = llama.model.collect(llama.texts, answers, intervention=edit)
    assert given == answers
    agrees(again, wanted, list(range(6)))
    with pytest.raises(ValueError, match="replay"):
        llama.model.collect(llama.texts, answers, intervention=pair.edit("low", drop=0.1))
    longer = [p for p in llama.prompts if len(p) > 1]
    early, texts = pair.edit("low", edit_prompt_end=True), [text(p) for p in longer]
    wanted = [decode(llama.plain, p, N_NEW, pair.function("low"), llama.stop, start=len(p) - 1) for p in longer]
    answers = llama.model.generate(texts, intervention=early, max_new_tokens=N_NEW)
    agrees(llama.model.collect(texts, answers, intervention=early)[0], wanted, list(range(len(longer))))


def test_fault_04_one_token_prompts_are_not_counted(llama: Tiny) -> None:
    """The published code counted prompts that were no longer than the batch."""
    prompts = [text((w,)) for w in range(5, 29)]
    stats, answers = llama.model.collect(prompts, max_new_tokens=3)
    assert stats.total_tokens == sum(len(a.tokens) - 1 for a in answers)
    agrees(stats, [decode(llama.plain, (w,), 3, stop=llama.stop) for w in range(5, 29)], [k % 8 for k in range(24)])


def test_fault_06_p95_is_neither_capped_nor_infinite() -> None:
    """The published code binned values up to 3.0: a95 was at most 2.99, and −inf where the bin was that of non-positives."""
    plain = hf_model("llama")
    with torch.no_grad():
        plain.model.layers[1].mlp.gate_proj.weight *= 4
        plain.model.layers[2].mlp.gate_proj.weight[7] = 0.0  # σ(0) = 0: never active
    model = Model(copy.deepcopy(plain), tokenizer())
    prompts = [(w, w + 3) for w in range(5, 35)]
    stats, _ = model.collect([text(p) for p in prompts], max_new_tokens=N_NEW)
    rows = [decode(plain, p, N_NEW) for p in prompts]
    agrees(stats, rows, [k % 8 for k in range(30)])
    assert stats.p95[1].max() > 10
    assert (stats.p95[1] > 3).mean() > 0.3
    assert np.isfinite(stats.p95).all()
    assert stats.p95[2, 7] == 0.0
    assert (stats.p95 >= 0).all()


def test_fault_07_counts_go_past_two_to_the_24th() -> None:
    """The published code counted in float32, which stops at 2²⁴."""
    collector = ActivationCollector(PRINT, 2)
    n, times = 1 << 16, 257
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    values = torch.stack([torch.linspace(0.001, 2.0, n), torch.linspace(-1, 1, n)], dim=1)[shuffled]
    rows, blocks = np.arange(n), np.zeros(n, np.int64)
    blocks[-1] = 1
    for _ in range(times):
        collector.begin(blocks)
        collector.add(0, values, rows, blocks)
    stats = collector.result()
    assert stats.total_tokens == n * times > 2**24
    assert stats.active_count[:, 0, 0].tolist() == [(n - 1) * times, times]
    assert stats.active_count[0, 0, 0] % 2 == 1, "odd, so no float32 could hold it"
    assert stats.active_count[:, 0, 1].sum() == n // 2 * times
    assert stats.p95[0, 0] == pytest.approx(0.001 + 0.95 * 1.999, rel=0.01)
    assert stats.mean[0] == pytest.approx([1.0005, 0.0], abs=1e-4)
    assert stats.variance[0] == pytest.approx([1.999**2 / 12, 1 / 3], rel=1e-3)

    whole = stats
    for _ in range(8):
        whole = whole.merge(whole)
    assert whole.total_tokens == n * times * 256 > 2**32
    assert whole.active_count[:, 0, 0].tolist() == [(n - 1) * times * 256, times * 256]
    assert whole.active_count.dtype.kind == "i"
    assert whole.n_tokens.dtype == np.int64
    assert whole.p95[0, 0] == pytest.approx(0.001 + 0.95 * 1.999, rel=0.01)
    one = dataclasses.replace(PRINT)
    extra = ActivationStatistics(
        np.ones((2, 1, 2), np.int64), np.array([1, 1]), np.zeros((1, 2)), np.zeros((1, 2)), QuantileSketch.empty(2), one
    )
    assert (whole.merge(extra).active_count - whole.active_count == 1).all()

    collector._tokens[0] = 2**31 - 10
    with pytest.raises(OverflowError, match="shards"):
        collector.begin(blocks)


def test_counts_past_32_bits_are_saved(tmp_path: Path) -> None:
    large = ActivationStatistics(
        np.full((2, 1, 2), 2**40 + 1), np.array([2**41, 2**41]), np.zeros((1, 2)), np.zeros((1, 2)),
        QuantileSketch.empty(2), PRINT,
    )  # fmt: skip
    large.save(tmp_path / "large.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "large.safetensors")
    assert loaded.active_count.tolist() == large.active_count.tolist()
    assert np.isnan(loaded.p95).all(), "a sketch that holds nothing says so"


# ------------------------------------------------------------------------------------------------------- the collector


def test_collector_takes_only_the_rows_named() -> None:
    rng = np.random.default_rng(0)
    print_ = dataclasses.replace(PRINT, n_layers=2, d_mlp=5)
    collector = ActivationCollector(print_, 3)
    kept: list[list[Any]] = [[], []]
    where: list[int] = []
    for _ in range(40):
        values = torch.tensor(rng.normal(size=(2, 7, 5)), dtype=torch.float32)
        rows = np.flatnonzero(rng.random(7) < 0.5)
        blocks = rng.integers(0, 3, len(rows))
        poison = np.setdiff1d(np.arange(7), rows)
        values[:, poison] = math.nan  # what is not counted must not even be looked at
        collector.begin(blocks)
        where += blocks.tolist()
        for layer in range(2):
            collector.add(layer, values[layer], rows, blocks)
            kept[layer].append(values[layer, rows].double().numpy())
    stats = collector.result({"trait": "Neuroticism"})
    assert stats.n_tokens.tolist() == np.bincount(where).tolist()
    for layer in range(2):
        values = np.concatenate(kept[layer])
        for block in range(3):
            own = values[np.array(where) == block]
            assert stats.active_count[block, layer].tolist() == (own > 0).sum(0).tolist()
        assert np.allclose(stats.mean[layer], values.mean(0), atol=1e-6)
        assert np.allclose(stats.variance[layer], values.var(0), rtol=1e-5)
        assert np.allclose(stats.p95[layer], np.quantile(np.maximum(values, 0), 0.95, axis=0), rtol=0.01)
    counts, tokens = stats.blocks([0, 2])
    assert tokens == where.count(0) + where.count(2)
    assert np.array_equal(counts, stats.active_count[0] + stats.active_count[2])
    assert stats.metadata == {"site": activations.SITE, "trait": "Neuroticism"}
    frozen = stats.active_count.copy()
    collector.begin(np.array([0]))
    collector.add(0, torch.ones(1, 5), np.array([0]), np.array([0]))
    assert np.array_equal(stats.active_count, frozen), "a result does not change when more is collected"


def test_zero_is_not_active() -> None:
    collector = ActivationCollector(PRINT, 2)
    values = torch.tensor([[0.0, -0.0], [1e-30, -1e-30]])
    collector.begin(np.zeros(2, np.int64))
    collector.add(0, values, np.arange(2), np.zeros(2, np.int64))
    assert collector.result().active_count[0, 0].tolist() == [1, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_collector_refuses_what_is_not_finite(value: float) -> None:
    collector = ActivationCollector(PRINT, 2)
    values = torch.zeros(4, 2)
    values[2, 1] = value
    collector.begin(np.zeros(4, np.int64))
    with pytest.raises(NonFiniteActivationError, match="^layer 0: "):
        collector.add(0, values, np.arange(4), np.zeros(4, np.int64))


def test_half_precision_values() -> None:
    collector = ActivationCollector(PRINT, 2)
    values = torch.randn(50, 2).to(torch.bfloat16)
    collector.begin(np.zeros(50, np.int64))
    collector.add(0, values, np.arange(50), np.zeros(50, np.int64))
    assert np.allclose(collector.result().mean[0], values.double().numpy().mean(0), atol=1e-6)


def test_bfloat16_model(llama: Tiny) -> None:
    half = Model(copy.deepcopy(llama.plain).to(torch.bfloat16), tokenizer())
    edit = llama.pair(seed=5).edit("high")
    rows = [Row(p, 0, block) for block, p in enumerate(llama.prompts)]
    fed = [r.tokens[:-1] for r in llama.expected]
    recorders = [Recorder(llama.model.fingerprint, len(rows)) for _ in range(2)]
    for model, recorder in zip((llama.model, half), recorders, strict=True):
        model.backend.replay(rows, fed, [edit], recorder)
    for block in range(len(rows)):
        for full, short in zip(*(r.of(block) for r in recorders), strict=True):
            assert torch.allclose(full, short, rtol=0.05, atol=0.3)
    stats, answers = half.collect(llama.texts, intervention=edit, max_new_tokens=4)
    assert stats.total_tokens == sum(len(a.tokens) - 1 for a in answers)
    assert stats.mean.dtype == np.float64


def test_moments_of_large_offsets_and_scales() -> None:
    """Mean 1,000 and deviation 1: naive sums of squares would lose the variance."""
    rng = np.random.default_rng(0)
    collector = ActivationCollector(PRINT, 2)
    values = np.stack([rng.normal(1000, 1, 5000), rng.normal(0, 1e-6, 5000)], axis=1).astype(np.float32)
    for part in np.split(values, 50):
        collector.begin(np.zeros(100, np.int64))
        collector.add(0, torch.from_numpy(part), np.arange(100), np.zeros(100, np.int64))
    stats = collector.result()
    assert np.allclose(stats.variance[0], values.astype(np.float64).var(0), rtol=1e-3)


def test_bytes_per_neuron_are_what_the_docstring_says() -> None:
    big = dataclasses.replace(PRINT, n_layers=3, d_mlp=100)
    collector = ActivationCollector(big)
    collector.begin(np.zeros(1, np.int64))
    collector.add(0, torch.zeros(1, 100), np.zeros(1, np.int64), np.zeros(1, np.int64))
    sketch = collector._sketch
    arrays = [collector._counts, collector._mean, collector._m2, sketch.bins, sketch.base, sketch.width, sketch.over]
    per_neuron = sum(a.nbytes for a in arrays) / 300
    assert per_neuron <= 302
    said = re.search(
        r"Memory is (\d+) bytes a neuron .*: (\d+) for the counts, (\d+) for\s+the moments, (\d+) for the sketch",
        activations.__doc__ or "",
        re.DOTALL,
    )
    assert said is not None
    total, counts, moments, of_sketch = map(int, said.groups())
    assert total == per_neuron == counts + moments + of_sketch
    assert of_sketch == BYTES_PER_STREAM
    # Nothing else in the collector grows with the neurons, before or after it has worked.
    collector.begin(np.zeros(400, np.int64))
    for layer in range(3):
        collector.add(layer, torch.randn(400, 100), np.arange(400), np.zeros(400, np.int64))
    held = [v for v in vars(collector).values() if isinstance(v, np.ndarray)]
    held += [v for v in vars(collector._sketch).values() if isinstance(v, np.ndarray)]
    assert sum(a.nbytes for a in held if a.size >= 300) / 300 == per_neuron


def test_collector_and_collect_refuse_what_makes_no_sense(llama: Tiny) -> None:
    with pytest.raises(ValueError, match="at least 2 question blocks"):
        ActivationCollector(PRINT, 1)
    with pytest.raises(ValueError, match="nothing to count"):
        ActivationCollector(PRINT, 2).result()
    with pytest.raises(ValueError, match="raise max_new_tokens above 1"):
        collect_activations(llama.model, llama.texts, max_new_tokens=1)
    with pytest.raises(ValueError, match="6 prompts but 2 blocks"):
        collect_activations(llama.model, llama.texts, blocks=[0, 1])
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=r"blocks must lie in 0 … 7"):
            collect_activations(llama.model, llama.texts, blocks=[0, 0, 0, 0, 0, wrong])
    with pytest.raises(ValueError, match="6 prompts but 1 answers"):
        collect_activations(llama.model, llama.texts, ["w5"])
    with pytest.raises(ValueError, match="no prompts"):
        collect_activations(llama.model, [])
    with pytest.raises(ValueError, match="nothing to count"):
        collect_activations(llama.model, llama.texts, [Answer("", (5,))] * 6)


# ---------------------------------------------------------------------------------------------- merging, saving, binding


@pytest.fixture(scope="module")
def halves(llama: Tiny) -> tuple[ActivationStatistics, ActivationStatistics, ActivationStatistics]:
    whole = collect_activations(
        llama.model, llama.texts, max_new_tokens=N_NEW, metadata={"trait": "Openness", "part": 0}
    )
    parts = [
        collect_activations(
            llama.model, llama.texts[part], max_new_tokens=N_NEW, blocks=list(range(6))[part],
            metadata={"trait": "Openness", "part": k},
        )
        for k, part in enumerate((slice(0, 2), slice(2, 6)))
    ]  # fmt: skip
    return whole, *parts


def test_merged_halves_are_the_whole(halves: tuple[ActivationStatistics, ...]) -> None:
    whole, first, second = halves
    for merged in (first.merge(second), second.merge(first)):
        assert np.array_equal(merged.active_count, whole.active_count)
        assert np.array_equal(merged.n_tokens, whole.n_tokens)
        assert np.allclose(merged.mean, whole.mean, atol=1e-5)
        assert np.allclose(merged.m2, whole.m2, rtol=1e-4, atol=1e-5)
        assert np.allclose(merged.p95, whole.p95, rtol=1e-4, atol=1e-6)
        assert merged.fingerprint == whole.fingerprint
        assert merged.metadata["trait"] == "Openness"
        assert "part" not in merged.metadata, "only what both have in common"
    before = first.active_count.copy(), first.p95.copy()
    first.merge(second)
    assert np.array_equal(first.active_count, before[0])
    assert np.array_equal(first.p95, before[1])


def test_fault_11_statistics_of_different_models_do_not_mix(
    halves: tuple[ActivationStatistics, ...], llama: Tiny
) -> None:
    other = collect_activations(Model(hf_model("llama", seed=3), tokenizer()), ["w5 w6"], max_new_tokens=4)
    with pytest.raises(FingerprintMismatchError, match=r"different models \(weights"):
        halves[0].merge(other)
    with pytest.raises(FingerprintMismatchError, match="different models"):
        halves[0].require_comparable(other)
    fewer = collect_activations(llama.model, llama.texts, max_new_tokens=4, n_blocks=2)
    with pytest.raises(ValueError, match="number of blocks: 8 and 2"):
        halves[0].merge(fewer)
    moved = copy.copy(halves[0])
    moved.metadata = {**moved.metadata, "site": "elsewhere"}
    with pytest.raises(ValueError, match="site"):
        halves[0].merge(moved)


def test_saved_and_loaded(halves: tuple[ActivationStatistics, ...], tmp_path: Path) -> None:
    whole = halves[0]
    path = tmp_path / "folder" / "high.safetensors"
    whole.save(path)
    loaded = ActivationStatistics.load(path)
    for name in ("active_count", "n_tokens", "mean", "m2", "p95", "probability", "variance"):
        mine, theirs = getattr(whole, name), getattr(loaded, name)
        assert np.array_equal(mine, theirs), name
        assert mine.dtype == theirs.dtype, name
    assert loaded.fingerprint == whole.fingerprint
    for key, value in whole.metadata.items():
        assert loaded.metadata[key] == value
    assert loaded.metadata["site"] == "ffn_activation"
    assert set(loaded.metadata["versions"]) >= {"torch", "transformers", "numpy"}
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes(), "equal content, equal bytes"
    assert np.array_equal(loaded.merge(halves[1]).p95, whole.merge(halves[1]).p95), (
        "a loaded sketch can still be merged"
    )
    assert [p.name for p in path.parent.iterdir()] == ["high.safetensors"]


def test_saved_arrays_are_named_as_designed(halves: tuple[ActivationStatistics, ...], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    halves[0].save(tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    assert arrays["active_count"].shape == (8, 3, 48)
    assert np.issubdtype(arrays["active_count"].dtype, np.integer)
    assert {k: arrays[k].shape for k in ("n_tokens", "mean", "m2", "p95")} == {
        "n_tokens": (8,), "mean": (3, 48), "m2": (3, 48), "p95": (3, 48)
    }  # fmt: skip


def test_damaged_statistics_raise(halves: tuple[ActivationStatistics, ...], tmp_path: Path) -> None:
    from npti_interp._files import read_tensors, write_tensors

    path = tmp_path / "a.safetensors"
    halves[0].save(path)
    arrays, metadata = read_tensors(path, "ActivationStatistics", 1)
    without = {k: v for k, v in arrays.items() if k != "sketch_bins"}
    write_tensors(path, "ActivationStatistics", 1, without, metadata)
    with pytest.raises(ArtifactError, match="sketch_bins"):
        ActivationStatistics.load(path)
    write_tensors(path, "ActivationStatistics", 1, arrays, {**metadata, "fingerprint": "{}"})
    with pytest.raises(ArtifactError, match="fingerprint"):
        ActivationStatistics.load(path)
    write_tensors(path, "ActivationStatistics", 1, arrays | {"mean": arrays["mean"][:2]}, metadata)
    with pytest.raises(ArtifactError, match=r"'mean' is float64 \[2, 48\]"):
        ActivationStatistics.load(path)
    write_tensors(path, "NeuronSet", 1, arrays, metadata)
    with pytest.raises(ArtifactError, match="NeuronSet, not ActivationStatistics"):
        ActivationStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        ActivationStatistics.load(tmp_path / "none.safetensors")


def test_shown_in_a_notebook(halves: tuple[ActivationStatistics, ...]) -> None:
    assert f"{halves[0].total_tokens:,} tokens" in repr(halves[0])
    assert "Openness" in halves[0]._repr_html_()
    assert halves[0].fingerprint.digest in halves[0]._repr_html_()


# ------------------------------------------------------------------------------------------------ the embedded model


def test_p95_of_the_embedded_model(smollm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 short questions, 40 tokens each: every neuron's p95 against the exact one; practically none is lost."""
    bench = PersonalityBench.embedded()
    questions = sorted((q.text for q in bench.questions(None, "test")), key=len)[:24]
    n_layers, d_mlp = smollm.sites.n_layers, smollm.sites.d_mlp
    whole = np.zeros((n_layers, 24 * 39, d_mlp), np.float32)
    at = np.zeros(n_layers, int)
    original = ActivationCollector.add

    def spy(self: ActivationCollector, layer: int, values: torch.Tensor, rows: Any, blocks: Any) -> None:
        whole[layer, at[layer] : at[layer] + len(rows)] = values.numpy()[rows]
        at[layer] += len(rows)
        original(self, layer, values, rows, blocks)

    monkeypatch.setattr(ActivationCollector, "add", spy)
    stats, answers = smollm.collect(questions, max_new_tokens=40)
    assert stats.total_tokens == sum(len(a.tokens) - 1 for a in answers) == at[0] == at[-1]
    n = stats.total_tokens
    assert n > 700
    lost = np.isnan(stats.p95).mean()
    assert lost < 0.005, f"{lost:.2%} of the neurons have no p95"
    for layer in range(n_layers):
        values = whole[layer, :n].T.copy()
        assert np.array_equal(stats.active_count[:, layer].sum(0), (values > 0).sum(1))
        exact = np.quantile(np.maximum(values, 0, out=values), 0.95, axis=1)
        known = ~np.isnan(stats.p95[layer])
        assert (np.abs(stats.p95[layer] - exact)[known] <= 0.01 * exact[known]).all()
        assert 0.3 < (exact > 0).mean() <= 1
    # The values are σ(ĥW1): one answer again, by hand, with nothing but the plain model.
    k = min(range(24), key=lambda k: len(answers[k].tokens))
    prompt = smollm.encode(questions[k])
    with changed(smollm.hf_model, None, 0) as values:
        smollm.hf_model(torch.tensor([[*prompt, *answers[k].tokens[:-1]]]))
    monkeypatch.undo()
    alone = smollm.collect(questions[k : k + 1], [answers[k]])[0]
    assert alone.total_tokens == len(answers[k].tokens) - 1
    for layer in range(n_layers):
        mine = values[layer][len(prompt) :]
        off = np.abs(alone.active_count[0, layer] - (mine > 0).sum(0).numpy())
        assert (off <= (mine.abs() < 1e-5).sum(0).numpy()).all()
        assert np.abs(alone.mean[layer] - mine.mean(0).numpy()).max() < 1e-4


def test_embedded_model_decodes_as_hugging_face(smollm: Model) -> None:
    questions = ["What is your favourite season?", "You missed the last bus home on a rainy evening. What now?"]
    answers = smollm.generate(questions, max_new_tokens=10)
    for question, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([smollm.encode(question)])
        whole = smollm.hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert list(answer.tokens) == whole[0, ids.shape[1] :].tolist()
        assert smollm.encode(question) == tuple(
            smollm.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
