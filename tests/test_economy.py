"""What saves work must change nothing: shared beginnings of prompts, and going on with less memory."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, SPECIAL, VOCAB, Recorder, Tiny, tiny
from hypothesis import given
from hypothesis import strategies as st

from npti_interp import generation
from npti_interp.generation import Decoding, Row, in_halves, is_out_of_memory

# -- shared beginnings ------------------------------------------------------------------------------------------------


def saved(prompts: list[tuple[int, ...]], n: int) -> int:
    """Tokens that are saved if those prompts share a pass that have their first ``n`` tokens in common."""
    groups: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        if len(prompt) > n:
            groups[prompt[:n]] = groups.get(prompt[:n], 0) + 1
    return sum(n * (members - 1) for members in groups.values())


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=9).map(tuple), max_size=9, unique=True), st.integers(1, 3)
)
def test_prompts_are_divided_about_as_well_as_at_any_one_length(prompts: list[tuple[int, ...]], least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_LEAST_SHARED", least)
        lengths = generation._shared_lengths(sorted(prompts))
    groups: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        n = lengths.get(prompt, 0)
        assert n == 0 or least <= n < len(prompt)
        if n:
            groups[prompt[:n]] = groups.get(prompt[:n], 0) + 1
    assert all(n > 1 for n in groups.values()), "a beginning is shared by nobody"
    made = sum(len(own) * (n - 1) for own, n in groups.items())
    assert made >= 0.9 * max(saved(prompts, n) for n in range(least, 10))


def test_many_prompts_are_divided_at_once() -> None:
    """No recursion, and nothing quadratic."""
    rng = np.random.default_rng(0)
    head = tuple(range(20))
    prompts = sorted({(*head, *[k % 80] * 30, *rng.integers(0, 9, 12).tolist()) for k in range(40_000)})
    lengths = generation._shared_lengths(prompts)
    assert len({p[: lengths[p]] for p in prompts}) == 80
    assert set(lengths.values()) == {50}


def families(seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of three beginnings of different lengths, of one that others begin with, and of none; all lengths differ."""
    rng = np.random.default_rng(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(len(SPECIAL), VOCAB - 1, n))

    beginnings = [some(9), some(14), some(11)]
    own = [(*beginnings[k % 3], *some(1 + k)) for k in range(9)]
    return [*own, beginnings[0], (*beginnings[0], *some(3)), some(1), some(17)]


@contextlib.contextmanager
def passed(engine: Any) -> Iterator[list[int]]:
    """Tokens of each forward pass, padding included."""
    sizes: list[int] = []
    real = engine._forward

    def spy(ids: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(ids.numel())
        return real(ids, *rest, **more)

    engine._forward = spy
    try:
        yield sizes
    finally:
        del engine._forward


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_shared_beginnings_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and values are those of each prompt by itself, and fewer tokens are passed."""
    x = tiny(kind)
    engine: Any = x.model.backend
    pair = x.pair(seed=1)
    edits = [None, pair.edit("high"), replace(pair.edit("low"), edit_prompt_end=True)]
    prompts = [p for p in families() if len(p) > 1]
    rows = [Row(p, k % 3, k % 4, key=k) for k, p in enumerate(prompts)]
    alone, together = Recorder(x.model.fingerprint, 4), Recorder(x.model.fingerprint, 4)
    decoding = Decoding(6)
    wanted = [engine.generate([row], edits, decoding, collector=alone)[0] for row in rows]
    with passed(engine) as sizes:
        assert engine.generate(rows, edits, decoding, collector=together) == wanted
    monkeypatch.setattr(generation, "_LEAST_SHARED", 10**6)
    with passed(engine) as plain:
        assert engine.generate(rows, edits, decoding) == wanted
    assert sum(sizes) < sum(plain)
    monkeypatch.undo()
    assert engine.generate(rows, edits, decoding, max_rows=2) == wanted
    for block, layer in itertools.product(range(4), range(3)):
        a, b = alone.of(block)[layer], together.of(block)[layer]
        assert a.shape == b.shape
        assert torch.allclose(a.sort(dim=0).values, b.sort(dim=0).values, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
def test_likelihoods_with_shared_beginnings(kind: str) -> None:
    x = tiny(kind)
    engine: Any = x.model.backend
    prompts = [list(p) for p in families(1) if len(p) > 1]
    texts = [[[5, 6, 7][: k % 4], [8, 9]] for k in range(len(prompts))]
    for edit in (None, x.pair().edit("high"), replace(x.pair().edit("low"), edit_prompt_end=True)):
        together = engine.log_likelihoods(prompts, texts, edit)
        for prompt, own, got in zip(prompts, texts, together, strict=True):
            assert got == pytest.approx(engine.log_likelihoods([prompt], [own], edit)[0], abs=2e-4)


def test_little_room_for_beginnings(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used longest ago are forgotten and passed anew."""
    engine: Any = llama.model.backend
    rows = [Row(p, key=k) for k, p in enumerate(families())]
    wanted = engine.generate(rows, [None], Decoding(4))
    held: list[int] = []
    real = generation._Shared.make_room

    def spy(self: Any, own: Any) -> None:
        real(self, own)
        held.append(len(self.kept))

    monkeypatch.setattr(generation._Shared, "make_room", spy)
    monkeypatch.setattr(generation, "_SHARED_BYTES", 1)
    assert engine.generate(rows, [None], Decoding(4), max_rows=1) == wanted
    assert max(held) <= 1
    monkeypatch.setattr(generation, "_SHARED_BYTES", 2**28)
    assert engine.generate(rows, [None], Decoding(4), max_rows=1) == wanted
    assert max(held) > 1


# -- memory -----------------------------------------------------------------------------------------------------------


class Scarce:
    """Lets passes of more than ``most`` rows fail in a layer drawn at random, and others now and then."""

    def __init__(self, engine: Any, most: int, seed: int, share: float = 0.0, cpu: bool = False) -> None:
        self.engine, self.most, self.share, self.cpu = engine, most, share, cpu
        self.rng = np.random.default_rng(seed)
        self.failures = 0
        self.due = -1

    def __enter__(self) -> Scarce:
        self.handles = [
            module.register_forward_pre_hook(self._hook(layer))
            for layer, module in enumerate(self.engine._modules["product"])
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            if layer == 0:  # a new pass: does it fail, and where?
                fails = len(inputs[0]) > self.most or (len(inputs[0]) > 1 and self.rng.random() < self.share)
                self.due = int(self.rng.integers(3)) if fails else -1
            if layer == self.due:
                self.failures += 1
                if self.cpu:
                    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        return hook


def every_kind(x: Tiny) -> tuple[list[Any], list[Row]]:
    """Rows under edits of all kinds: plain, from the prompt's end on, with a random mask, at the prompt's front."""
    pair = x.pair(seed=3)
    edits: list[Any] = [
        None, pair.edit("high"), replace(pair.edit("high"), edit_prompt_end=True),
        replace(pair.edit("low"), drop=0.4, seed=1),
    ]  # fmt: skip
    prompts = [p for p in [*x.prompts, *families()] if len(p) > 1]
    return edits, [Row(p, k % 4, k % 3 - 1 if k % 5 else 2, key=k) for k, p in enumerate(prompts)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.2}],
    ids=["greedy", "drawn", "penalty"],
)
@pytest.mark.parametrize(("most", "share"), [(3, 0.0), (1, 0.0), (4, 0.2), (100, 0.25)])
def test_decoding_goes_on_with_less_memory(
    llama: Tiny, settings: dict[str, Any], most: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, and the same values once each, wherever memory runs out."""
    monkeypatch.setattr(generation, "_release_memory", lambda: None)  # collecting garbage is what would take time here
    engine: Any = llama.model.backend
    edits, rows = every_kind(llama)
    decoding = Decoding(9, **settings)
    calm, scarce = Recorder(llama.model.fingerprint, 3), Recorder(llama.model.fingerprint, 3)
    wanted = engine.generate(rows, edits, decoding, collector=calm)
    for seed in range(3):
        scarce = Recorder(llama.model.fingerprint, 3)
        with Scarce(engine, most, seed, share) as memory, pytest.warns(UserWarning, match="out of memory with"):
            assert engine.generate(rows, edits, decoding, collector=scarce) == wanted
        assert memory.failures
        a, b = calm.result(), scarce.result()
        assert (a.n_tokens == b.n_tokens).all()
        for block, layer in itertools.product(range(3), range(3)):
            x, y = calm.of(block)[layer], scarce.of(block)[layer]
            assert x.shape == y.shape
            assert torch.allclose(x.sort(dim=0).values, y.sort(dim=0).values, atol=1e-4)
    assert engine.generate(rows, edits, decoding) == wanted


def test_memory_runs_out_while_the_next_token_is_drawn(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is repeated, but nothing of it is counted twice."""
    engine: Any = llama.model.backend
    edits, rows = every_kind(llama)
    calm, scarce = Recorder(llama.model.fingerprint, 3), Recorder(llama.model.fingerprint, 3)
    wanted = engine.generate(rows, edits, Decoding(9), collector=calm)
    real, calls = generation.choose, itertools.count()

    def fails(*args: Any) -> Any:
        if next(calls) in (0, 3, 7):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(generation, "choose", fails)
    with pytest.warns(UserWarning, match="out of memory"):
        assert engine.generate(rows, edits, Decoding(9), collector=scarce) == wanted
    assert (calm.result().active_count.sum(axis=0) == scarce.result().active_count.sum(axis=0)).mean() > 0.999
    assert (calm.result().n_tokens == scarce.result().n_tokens).all()


def test_no_room_for_a_smaller_buffer(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are then moved together in the buffers that there are."""
    engine: Any = llama.model.backend
    edits, rows = every_kind(llama)
    wanted = engine.generate(rows, edits, Decoding(9))
    real, failed = torch.Tensor.index_select, []

    def fails(self: Any, dim: int, index: Any) -> Any:
        if self.ndim == 4 and len(index) < len(self):
            failed.append(len(index))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", fails)
    with Scarce(engine, 3, 0), pytest.warns(UserWarning, match="out of memory"):
        assert engine.generate(rows, edits, Decoding(9)) == wanted
    assert failed


def test_replay_and_likelihoods_go_on_with_less_memory(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_release_memory", lambda: None)
    engine: Any = llama.model.backend
    edits, rows = every_kind(llama)
    rows = [replace(row, intervention=row.intervention % 3) for row in rows]
    answers = [[5 + k % 7] * (k % 6) for k in range(len(rows))]
    calm, scarce = Recorder(llama.model.fingerprint, 3), Recorder(llama.model.fingerprint, 3)
    engine.replay(rows, answers, edits[:3], calm)
    with Scarce(engine, 2, 0, 0.2, cpu=True) as memory, pytest.warns(UserWarning, match="out of memory"):
        engine.replay(rows, answers, edits[:3], scarce)
    assert memory.failures
    assert (calm.result().n_tokens == scarce.result().n_tokens).all()
    for block, layer in itertools.product(range(3), range(3)):
        a, b = calm.of(block)[layer], scarce.of(block)[layer]
        assert torch.allclose(a.sort(dim=0).values, b.sort(dim=0).values, atol=1e-5)

    whole = engine.read(rows, [a or [5] for a in answers], edits[:3], site="residual", at="answer")
    with Scarce(engine, 2, 1), pytest.warns(UserWarning, match="out of memory"):
        parts = engine.read(rows, [a or [5] for a in answers], edits[:3], site="residual", at="answer")
    assert torch.allclose(whole, parts, atol=1e-4)

    prompts, texts = [list(row.prompt) for row in rows], [[a, [7, 8]] for a in answers]
    wanted = engine.log_likelihoods(prompts, texts, edits[1])
    with Scarce(engine, 3, 2), pytest.warns(UserWarning, match="out of memory"):
        got = engine.log_likelihoods(prompts, texts, edits[1])
    assert np.allclose(np.array(got), np.array(wanted), atol=2e-4)


def test_where_not_even_one_row_fits_it_says_so(llama: Tiny) -> None:
    engine: Any = llama.model.backend
    rows = [Row(p, 0, 0, key=k) for k, p in enumerate(llama.prompts)]
    collector = Recorder(llama.model.fingerprint, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Scarce(engine, 0, 0):
            with pytest.raises(MemoryError, match="not even one row fits"):
                engine.generate(rows, [None], Decoding(3))
            with pytest.raises(MemoryError, match="not even one row fits"):
                engine.replay(rows, [[5, 6]] * len(rows), [None], collector)
            with pytest.raises(MemoryError, match="not even one row fits"):
                engine.log_likelihoods(llama.prompts, [[[5]]] * len(llama.prompts))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine._model.modules())
    assert engine.generate(rows, [None], Decoding(3)) == [r.tokens[:3] for r in llama.expected]


def test_a_collector_without_memory_ends_the_call(llama: Tiny) -> None:
    """Half an update cannot be repeated: no numbers are better than wrong ones."""

    class Full(Recorder):
        def add(self, layer: int, values: Any, rows: Any, blocks: Any) -> None:
            if layer == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().add(layer, values, rows, blocks)

    engine: Any = llama.model.backend
    with pytest.raises(MemoryError, match="no memory was left to count"):
        engine.generate([Row((5, 6, 7), 0, 0)], [None], Decoding(3), collector=Full(llama.model.fingerprint, 2))


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("whatever"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(MemoryError("out of memory")), "it was raised here: nothing is left to try"
    done: list[list[int]] = []

    def work(chunk: list[int]) -> None:
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("no")
        done.append(chunk)

    with pytest.warns(UserWarning, match="going on with"):
        in_halves([1, 2, 3, 4, 5], work)
    assert done == [[1, 2], [3], [4, 5]]
    with pytest.raises(RuntimeError, match="another"):
        in_halves([1, 2], lambda _: (_ for _ in ()).throw(RuntimeError("another")))
