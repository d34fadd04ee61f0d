"""Laws that hold for any input: merging, sketches, edits, selection, run folders and corrections for many tests."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npti_interp._coarse import CoarseSketch
from npti_interp._programs import COARSE_BINS, COARSE_START, FINE_BINS, Edits
from npti_interp._sketch import QuantileSketch, grid_codes
from npti_interp.activations import ActivationCollector, ActivationStatistics
from npti_interp.evaluation import bootstrap_mean
from npti_interp.evaluation._statistics import benjamini_hochberg, holm
from npti_interp.experiments._locate import THRESHOLDS, choose_threshold
from npti_interp.interventions import CONFLICTS, LayerEdit, NeuronEdit, ResidualSteering, compose, edit_plan, stack
from npti_interp.models import ModelFingerprint
from npti_interp.neurons import estimate_delta, select_lape, select_neurons
from npti_interp.runs import RunFolder
from npti_interp.traits import Pole, Trait

LAYERS, NEURONS, BLOCKS = 2, 5, 3
MADE = ModelFingerprint("Made", LAYERS, NEURONS, 4, 9, "silu", "w", "t", "")
SEEDS = st.integers(0, 2**32 - 1)

# -- statistics ------------------------------------------------------------------------------------------------------


def values_of(seed: int, n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Heavy-tailed values ``[token, layer, neuron]`` of unlike scales, and a block for each token."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 3, (1, LAYERS, NEURONS)))
    values = rng.standard_t(3, (n, LAYERS, NEURONS)) * scale + rng.normal(0, 1, (1, LAYERS, NEURONS)) * scale
    values[:, 0, 0] = -1.0  # one that never fires
    return values.astype(np.float32), rng.integers(0, BLOCKS, n)


def collected(values: Any, blocks: Any) -> ActivationStatistics:
    if len(values) == 0:
        shape = LAYERS, NEURONS
        return ActivationStatistics(
            np.zeros((BLOCKS, *shape), np.int32), np.zeros(BLOCKS, np.int64), np.zeros(shape), np.zeros(shape),
            QuantileSketch.empty(LAYERS * NEURONS), MADE,
        )  # fmt: skip
    collector = ActivationCollector(MADE, BLOCKS)
    collector.begin(blocks)
    for layer in range(LAYERS):
        collector.add(layer, torch.from_numpy(values[:, layer].copy()), np.arange(len(values)), blocks)
    return collector.result()


def merged(parts: Sequence[ActivationStatistics], rng: np.random.Generator) -> ActivationStatistics:
    """All parts, in a random order and with random brackets."""
    left = [parts[k] for k in rng.permutation(len(parts))]
    while len(left) > 1:
        k = int(rng.integers(len(left) - 1))
        left[k : k + 2] = [left[k].merge(left[k + 1])]
    return left[0]


@settings(max_examples=60)
@given(SEEDS, st.lists(st.sampled_from([0, 1, 2, 3, 40, 119, 120, 121, 400, 3000]), min_size=2, max_size=5))
def test_statistics_merge_to_the_whole_in_any_order_and_brackets(seed: int, sizes: list[int]) -> None:
    assume(sum(sizes) > 0)
    rng = np.random.default_rng(seed)
    values, blocks = values_of(seed, sum(sizes))
    edges = np.cumsum([0, *sizes])
    parts = [collected(values[a:b], blocks[a:b]) for a, b in itertools.pairwise(edges)]
    whole = collected(values, blocks)
    for own in (merged(parts, rng), merged(parts, rng)):
        assert own.active_count.dtype == whole.active_count.dtype
        assert (own.active_count == whole.active_count).all() and (own.n_tokens == whole.n_tokens).all()
        scale = np.abs(values).max(axis=0) + 1e-30
        np.testing.assert_allclose(own.mean / scale, values.astype(np.float64).mean(axis=0) / scale, atol=2e-6)
        np.testing.assert_allclose(own.variance / scale**2, values.astype(np.float64).var(axis=0) / scale**2, atol=2e-6)
        exact = np.quantile(np.maximum(values.astype(np.float64), 0), 0.95, axis=0)
        known = np.isfinite(own.p95)
        assert known.mean() > 0.5 or sum(sizes) > 500
        np.testing.assert_allclose(own.p95[known], exact[known], rtol=0.0101, atol=1e-30)
        assert (own.p95[exact == 0] == 0).all(), "a percentile that is not positive is 0, and known"


@given(st.lists(st.integers(1, 2**33), min_size=2, max_size=4), SEEDS)
def test_counts_grow_out_of_32_bits_and_lose_nothing(tokens: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = LAYERS, NEURONS

    def part(n: int) -> ActivationStatistics:
        count = rng.integers(0, n + 1, (BLOCKS, *shape))
        narrow = count.astype(np.int32) if count.max() <= 2**31 - 1 else count
        empty = CoarseSketch.empty(LAYERS * NEURONS)
        return ActivationStatistics(
            narrow, np.full(BLOCKS, n), rng.normal(size=shape), np.ones(shape), empty, MADE
        )  # fmt: skip

    parts = [part(n) for n in tokens]
    exact = sum(p.active_count.astype(object) for p in parts)
    for own in (merged(parts, rng), merged(parts, rng)):
        assert (own.active_count.astype(object) == exact).all() and own.total_tokens == BLOCKS * sum(tokens)
        assert own.active_count.dtype == (np.int32 if exact.max() <= 2**31 - 1 else np.int64)


# -- the coarse sketch -----------------------------------------------------------------------------------------------


def coarse_of(values: Any) -> CoarseSketch:
    """What a server counts, by hand: ``values [token, stream]``."""
    counts = np.zeros((values.shape[1], COARSE_BINS), np.int32)
    for k in range(values.shape[1]):
        own = values[values[:, k] > 0, k]
        bins = np.clip(grid_codes(own) // FINE_BINS - COARSE_START, 0, COARSE_BINS - 1)
        counts[k] = np.bincount(bins, minlength=COARSE_BINS)
    return CoarseSketch(counts)


def fine_of(values: Any, starts: Any) -> Any:
    counts = np.zeros((values.shape[1], 2, FINE_BINS), np.int32)
    for k in range(values.shape[1]):
        codes = grid_codes(values[values[:, k] > 0, k])
        for window in range(2):
            inside = codes - starts[k, window]
            counts[k, window] = np.bincount(inside[(inside >= 0) & (inside < FINE_BINS)], minlength=FINE_BINS)
    return counts


@settings(max_examples=60)
@given(SEEDS, st.lists(st.integers(1, 300), min_size=1, max_size=4), st.floats(-6, 6))
def test_a_coarse_sketch_is_right_or_silent_whole_or_merged(seed: int, sizes: list[int], size: float) -> None:
    rng = np.random.default_rng(seed)
    n, streams = sum(sizes), 6
    scale = np.exp(rng.normal(size, 2, streams))
    values = (rng.standard_t(3, (n, streams)) * scale).astype(np.float32)
    edges = np.cumsum([0, *sizes])
    parts = [coarse_of(values[a:b]) for a, b in itertools.pairwise(edges)]
    order = rng.permutation(len(parts))
    sketch = functools.reduce(lambda a, b: a.merge(b, n), [parts[k] for k in order])
    assert (sketch.coarse == coarse_of(values).coarse).all()
    positive = (values > 0).sum(axis=0)
    chosen = np.arange(streams)
    filled = sketch.with_fine(chosen, fine_of(values, sketch.windows(chosen, 0.95, n)), 0.95, n)
    found = filled.quantile(0.95, n, positive)
    exact = np.quantile(np.maximum(values.astype(np.float64), 0), 0.95, axis=0)
    known = np.isfinite(found)
    np.testing.assert_allclose(found[known], exact[known], rtol=0.0101, atol=1e-30)
    assert known[(exact > 3e-4) & (exact < 60)].all(), "inside the coarse bins nothing is lost"
    median = np.median(np.maximum(values.astype(np.float64), 0), axis=0)
    assert np.isnan(filled.quantile(0.5, n, positive)[median > 0]).all(), "another quantile was not asked for"
    assert not len(filled.merge(filled, 2 * n).chosen), "a merge drops fine counts, as the percentile may have moved"


# -- edits -----------------------------------------------------------------------------------------------------------

CELL = st.tuples(
    st.integers(0, LAYERS - 1), st.integers(0, NEURONS - 1), st.one_of(st.none(), st.floats(-4, 4, width=32))
)
CELLS = st.lists(CELL, max_size=8, unique_by=lambda c: c[:2])


def edit_of(cells: Sequence[tuple[int, int, float | None]], **more: Any) -> NeuronEdit:
    """None clamps, a number is added."""
    return NeuronEdit(
        layer=np.array([c[0] for c in cells], np.int64),
        neuron=np.array([c[1] for c in cells], np.int64),
        amount=np.array([c[2] or 0.0 for c in cells], np.float64),
        clamp=np.array([c[2] is None for c in cells], bool),
        **more,
    )


def by_hand(cells: Sequence[tuple[int, int, float | None]], values: Any) -> Any:
    out = values.astype(np.float32).copy()
    for layer, neuron, amount in cells:
        if amount is None:
            out[layer, neuron] = min(np.float32(0), out[layer, neuron])
        else:
            out[layer, neuron] += np.float32(amount)
    return out


def applied(edit: Any, values: Any) -> Any:
    out = torch.from_numpy(values.astype(np.float32).copy())
    for layer, own in edit.layer_edits(LAYERS, NEURONS).items():
        out[layer] = torch.minimum(out[layer], own.bound) + own.add
    return out.numpy()


def random_values(seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 3, (LAYERS, NEURONS)).astype(np.float32)


@given(st.lists(CELLS, min_size=1, max_size=5), SEEDS)
def test_a_sequence_is_its_functions_one_after_the_other(sets: list[Any], seed: int) -> None:
    values = random_values(seed)
    expected = functools.reduce(lambda v, cells: by_hand(cells, v), sets, values)
    edits = [edit_of(cells) for cells in sets]
    for whole in (stack(edits), compose(edits, "sequence")):
        np.testing.assert_allclose(applied(whole, values), expected, atol=1e-4)
    halves = stack([stack(edits[: len(edits) // 2]), *edits[len(edits) // 2 :]]) if len(edits) > 1 else stack(edits)
    np.testing.assert_allclose(applied(halves, values), expected, atol=1e-4)


BOUNDS = st.lists(st.tuples(st.one_of(st.just(math.inf), st.floats(-3, 3)), st.floats(-3, 3)), min_size=4, max_size=4)


@given(BOUNDS, BOUNDS, BOUNDS, SEEDS)
def test_then_is_associative_and_does_one_after_the_other(a: Any, b: Any, c: Any, seed: int) -> None:
    first, second, third = (
        LayerEdit(torch.tensor([x for x, _ in e]).double(), torch.tensor([x for _, x in e]).double()) for e in (a, b, c)
    )
    v = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, 4))

    def do(edit: LayerEdit, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(x, edit.bound) + edit.add

    torch.testing.assert_close(do(first.then(second), v), do(second, do(first, v)), atol=1e-9, rtol=0)
    left, right = first.then(second).then(third), first.then(second.then(third))
    torch.testing.assert_close(left.bound, right.bound, atol=1e-9, rtol=0)
    torch.testing.assert_close(left.add, right.add, atol=1e-9, rtol=0)


@given(st.lists(CELLS, min_size=2, max_size=5), SEEDS, st.sampled_from(CONFLICTS))
def test_composition_neuron_by_neuron(sets: list[Any], seed: int, rule: str) -> None:
    values = random_values(seed)
    expected = functools.reduce(lambda v, cells: by_hand(cells, v), sets, values)
    if rule != "sequence":
        for layer in range(LAYERS):
            for neuron in range(NEURONS):
                own = [c[2] for cells in sets for c in cells if c[:2] == (layer, neuron)]
                amounts, clamped = [x for x in own if x], None in own
                v = values[layer, neuron]
                if amounts and clamped and rule == "drop":
                    expected[layer, neuron] = v
                elif amounts:
                    expected[layer, neuron] = v + sum(sorted(amounts))
                else:
                    expected[layer, neuron] = min(v, 0) if clamped else v
    whole = compose([edit_of(cells) for cells in sets], rule)
    np.testing.assert_allclose(applied(whole, values), expected, atol=1e-4)
    if rule != "sequence":
        order = np.random.default_rng(seed).permutation(len(sets))
        other = compose([edit_of(sets[k]) for k in order], rule)
        assert isinstance(whole, NeuronEdit) and isinstance(other, NeuronEdit)
        for name in ("layer", "neuron", "amount", "clamp"):
            assert (getattr(whole, name) == getattr(other, name)).all(), "to the last bit, whatever the order"


@given(CELLS, SEEDS)
def test_dense_is_the_layers_edits(cells: Any, seed: int) -> None:
    amount, clamp = (t.numpy() for t in edit_of(cells, fingerprint=MADE).dense())
    values = random_values(seed)
    assert (np.where(clamp, np.minimum(values, 0), values) + amount == applied(edit_of(cells), values)).all()
    assert clamp.sum() == sum(c[2] is None for c in cells)


@settings(max_examples=40)
@given(st.lists(st.one_of(st.none(), CELLS), min_size=1, max_size=5), SEEDS)
def test_a_plan_gives_each_row_its_own_edit(sets: list[Any], seed: int) -> None:
    sites = tiny("llama").model.sites
    rng = np.random.default_rng(seed)

    def intervention(cells: Any, k: int) -> Any:
        if cells is None:
            return None
        vector = {int(rng.integers(sites.n_layers)): torch.from_numpy(rng.normal(size=sites.d_model)).float()}
        return stack([edit_of(cells), ResidualSteering(vector)]) if k % 2 else edit_of(cells)

    edits = [intervention(cells, k) for k, cells in enumerate(sets)]
    which = torch.from_numpy(rng.integers(0, len(edits), 7))
    together = Edits(edit_plan(edits, sites))
    for site, width in (("value", sites.d_mlp), ("residual", sites.d_model)):
        for layer in range(sites.n_layers):
            values = torch.from_numpy(rng.normal(0, 2, (7, 1, width))).float()
            start = torch.zeros(7, dtype=torch.long)
            mine = (
                together.change(site, layer, values, which, [1] * 7, start)
                if layer in together.tables[site]
                else values
            )
            for row in range(7):
                alone = Edits(edit_plan([edits[int(which[row])]], sites))
                own, zero = values[row : row + 1], torch.zeros(1, dtype=torch.long)
                if layer in alone.tables[site]:
                    own = alone.change(site, layer, own, zero, [1], zero)
                assert torch.equal(mine[row : row + 1], own)


# -- selection -------------------------------------------------------------------------------------------------------


def counted(counts: Any, tokens: Any, pole: str | None = None) -> ActivationStatistics:
    """Statistics of given counts ``[block, layer, neuron]`` out of ``tokens [block]``."""
    counts = np.asarray(counts)
    _, layers, neurons = counts.shape
    own = ModelFingerprint("Made", layers, neurons, 4, 9, "silu", "w", "t", "")
    sketch = QuantileSketch.empty(layers * neurons)
    return ActivationStatistics(
        counts.astype(np.int32), np.asarray(tokens, np.int64), np.zeros((layers, neurons)), np.ones((layers, neurons)),
        sketch, own, {"pole": pole} if pole else {},
    )  # fmt: skip


@st.composite
def pairs(draw: st.DrawFn, tokens: int = 10) -> tuple[ActivationStatistics, ActivationStatistics]:
    """Both poles over few tokens, so that ties and exact thresholds are common."""
    rng = np.random.default_rng(draw(SEEDS))
    n = [rng.integers(1, tokens + 1, 4) if draw(st.booleans()) else np.full(4, 5) for _ in range(2)]
    shape = 3, 12
    return tuple(counted(rng.integers(0, own[:, None, None] + 1, (4, *shape)), own) for own in n)  # pyright: ignore


def exact_delta(high: ActivationStatistics, low: ActivationStatistics) -> Any:
    def share(own: ActivationStatistics, at: tuple[int, int]) -> Fraction:
        return Fraction(int(own.active_count[:, at[0], at[1]].sum()), own.total_tokens)

    return {at: share(high, at) - share(low, at) for at in np.ndindex(high.shape)}


@settings(max_examples=100)
@given(pairs(), st.sampled_from([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4]))
def test_the_threshold_is_exact_at_ties(pair: Any, threshold: float) -> None:
    found, delta = select_neurons(*pair, threshold=threshold), exact_delta(*pair)
    bar = Fraction(str(threshold))
    assert found.keys("high") == {at for at, d in delta.items() if d > bar}
    assert found.keys("low") == {at for at, d in delta.items() if d < -bar}
    own = np.abs(found.delta)
    assert (own[:-1] >= own[1:]).all(), "strongest first"


def test_eight_of_ten_and_seven_of_ten_are_a_tenth_apart() -> None:
    high, low = counted([[[4, 4]], [[4, 5]]], [5, 5]), counted([[[3, 3]], [[4, 4]]], [5, 5])
    assert select_neurons(high, low, threshold=0.1).keys() == {(0, 1)}


@settings(max_examples=80)
@given(pairs(), st.sampled_from(["npti", "top_k", "random_matched"]), st.integers(1, 9), st.booleans())
def test_swapped_poles_mirror_the_choice(pair: Any, rule: str, k: int, floor: bool) -> None:
    more: dict[str, Any] = {"k": k} if rule == "top_k" else {"threshold": 0.2, "floor": k if floor else None}
    ahead, back = select_neurons(*pair, rule, **more), select_neurons(*pair[::-1], rule, **more)
    if rule != "random_matched":
        assert ahead.keys("high") == back.keys("low") and ahead.keys("low") == back.keys("high")
        mine = dict(zip(zip(ahead.layer, ahead.neuron, strict=True), ahead.delta, strict=True))
        assert all(mine[at] == -d for at, d in zip(zip(back.layer, back.neuron, strict=True), back.delta, strict=True))
    assert not ahead.keys("high") & ahead.keys("low")
    assert len(ahead) == len(ahead.pole("high")) + len(ahead.pole("low"))
    one, two = estimate_delta(*pair), estimate_delta(*pair[::-1])
    assert (one.delta == -two.delta).all()
    np.testing.assert_allclose(one.se, two.se, atol=1e-15)
    np.testing.assert_allclose(one.q, two.q, rtol=1e-6, atol=1e-12)


@settings(max_examples=60)
@given(pairs(), st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(1, 40))
def test_a_higher_threshold_takes_no_more_and_a_floor_no_fewer(pair: Any, a: float, b: float, floor: int) -> None:
    wide, narrow = select_neurons(*pair, threshold=min(a, b)), select_neurons(*pair, threshold=max(a, b))
    assert narrow.keys("high") <= wide.keys("high") and narrow.keys("low") <= wide.keys("low")
    floored, delta = select_neurons(*pair, threshold=max(a, b), floor=floor), exact_delta(*pair)
    for pole in Pole:
        there = sum(d * pole.sign > 0 for d in delta.values())
        assert narrow.keys(pole) <= floored.keys(pole)
        assert len(floored.pole(pole)) == max(len(narrow.pole(pole)), min(floor, there))
        left = [abs(d) for at, d in delta.items() if d * pole.sign > 0 and at not in floored.keys(pole)]
        if left and len(floored.pole(pole)):
            assert float(max(left)) <= np.abs(floored.pole(pole).delta).min() + 1e-15, "the largest are taken"


@settings(max_examples=60)
@given(pairs(), SEEDS)
def test_random_neurons_match_layers_and_poles_and_avoid_the_originals(pair: Any, seed: int) -> None:
    found = select_neurons(*pair, threshold=0.25)
    control = found.random_matched(seed)
    assert (control.layer == found.layer).all() and (control.delta == found.delta).all()
    for pole in Pole:
        assert (control.pole(pole).per_layer(3) == found.pole(pole).per_layer(3)).all()
    for layer in range(3):
        own, other = ({n for at, n in zip(s.layer, s.neuron, strict=True) if at == layer} for s in (found, control))
        assert len(own) == len(other)
        assert not own & other or len(own) > 6, "they meet only where a layer has no others"
    assert control.digest == found.random_matched(seed).digest


@settings(max_examples=60)
@given(pairs())
def test_standard_errors_are_the_slow_jackknife(pair: Any) -> None:
    high, low = pair
    found = estimate_delta(high, low).se
    for layer, neuron in [(0, 0), (1, 5), (2, 11)]:
        without: list[float] = []
        for b in range(4):
            kept = [k for k in range(4) if k != b]
            shares = [s.active_count[kept, layer, neuron].sum() / s.n_tokens[kept].sum() for s in pair]
            without.append(float(shares[0] - shares[1]))
        mean = sum(without) / 4
        assert found[layer, neuron] == pytest.approx(
            math.sqrt(3 / 4 * sum((x - mean) ** 2 for x in without)), abs=1e-12
        )


@settings(max_examples=40)
@given(pairs(), SEEDS)
def test_a_permutation_of_the_neurons_permutes_the_choice(pair: Any, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(12)
    turned = [counted(s.active_count[:, :, order], s.n_tokens) for s in pair]
    found, other = select_neurons(*pair, threshold=0.2), select_neurons(*turned, threshold=0.2)
    assert {(layer, int(order[n])) for layer, n in zip(other.layer, other.neuron, strict=True)} == found.keys()
    assert vars(found.stability) == pytest.approx(vars(other.stability), nan_ok=True)


@settings(max_examples=40)
@given(pairs(40), st.floats(0.001, 0.5))
def test_the_chosen_threshold_is_the_largest_that_leaves_enough(pair: Any, share: float) -> None:
    found, delta = choose_threshold(*pair, min_share=share), list(exact_delta(*pair).values())

    def enough(threshold: float) -> bool:
        bar = Fraction(str(threshold))
        return min(sum(d > bar for d in delta), sum(d < -bar for d in delta)) >= share * len(delta)

    assert found == next((t for t in THRESHOLDS if enough(t)), THRESHOLDS[-1])
    assert found == choose_threshold(*pair[::-1], min_share=share)


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 3), st.floats(0.02, 0.9))
def test_lape_takes_specific_neurons_and_no_order_matters(seed: int, n_traits: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.full(4, 50)
    given_ = {
        (trait, pole): counted(rng.integers(0, 51, (4, 3, 12)), tokens, pole.value)
        for trait in list(Trait)[:n_traits] for pole in Pole
    }  # fmt: skip
    found = select_lape(given_, percentile=0.6, share=share)
    every: set[tuple[int, int]] = set()
    for trait, own in found.items():
        assert not own.keys("high") & own.keys("low")
        every |= own.keys()
        bar = own.rule["bar"]
        for pole in Pole:
            for at in own.keys(pole):
                assert given_[trait, pole].probability[at] > bar
                assert given_[trait, Pole.LOW if pole is Pole.HIGH else Pole.HIGH].probability[at] <= bar
    assert len(every) <= round(share * 36)
    again = select_lape(dict(reversed(given_.items())), percentile=0.6, share=share)
    assert {t: s.keys() for t, s in again.items()} == {t: s.keys() for t, s in found.items()}


# -- run folders -----------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 9), max_size=5))
def test_a_run_that_stops_anywhere_ends_as_one_that_does_not(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], stops: list[int]
) -> None:
    def work(folder: Path, left: int, made: list[str]) -> list[float]:
        numbers: list[float] = []
        with RunFolder(folder, {"steps": steps}) as run:
            for k, value in enumerate(steps):

                def compute(k: int = k, value: int = value) -> pd.DataFrame:
                    if len(made) >= left:
                        raise StopError
                    made.append(f"{k}")
                    # From the numbers so far, so that a step read back another way would show.
                    return pd.DataFrame({"x": [value / 3 + sum(numbers)]})

                numbers.append(float(run.table(f"part/{k}.parquet", compute)["x"][0]))
        return numbers

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    home = tmp_path_factory.mktemp("runs")
    whole = work(home / "a", 10**9, [])
    made: list[str] = []
    for stop in stops:
        try:
            work(home / "b", len(made) + stop, made)
        except StopError:
            continue
    assert work(home / "b", 10**9, made) == whole
    assert made == sorted(set(made), key=int), "no step is done twice"
    assert content(home / "a") == content(home / "b")


# -- corrections and bootstrap ---------------------------------------------------------------------------------------

P = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(P)
def test_holm_and_benjamini_hochberg_by_hand(p: list[float]) -> None:
    m, order = len(p), np.argsort(p, kind="stable")
    by_holm, by_bh = np.zeros(m), np.zeros(m)
    most = 0.0
    for place, k in enumerate(order):
        most = max(most, min(1.0, (m - place) * p[k]))
        by_holm[k] = most
    least = 1.0
    for place in range(m - 1, -1, -1):
        least = min(least, m / (place + 1) * p[order[place]])
        by_bh[order[place]] = least
    np.testing.assert_allclose(holm(p), by_holm, rtol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(p), by_bh, rtol=1e-12)


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
@given(p=P, seed=SEEDS)
def test_corrections_do_not_depend_on_the_order(adjust: Callable[..., Any], p: list[float], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(p))
    np.testing.assert_allclose(adjust(np.array(p)[order]), adjust(p)[order], rtol=1e-12)
    assert (adjust(p) >= np.array(p) * (1 - 1e-12)).all() and (adjust(p) <= 1).all()


@settings(max_examples=40)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.floats(-50, 50), st.floats(0.1, 10))
def test_a_bootstrap_moves_and_stretches_with_its_values(values: list[float], shift: float, scale: float) -> None:
    base, other = (bootstrap_mean(v, n_resamples=200) for v in (values, [shift + scale * x for x in values]))
    for name in ("mean", "low", "high"):
        assert getattr(other, name) == pytest.approx(shift + scale * getattr(base, name), abs=1e-6)
    assert min(values) - 1e-9 <= base.low <= base.mean + 1e-9 and base.mean - 1e-9 <= base.high <= max(values) + 1e-9
    missing = bootstrap_mean([*values, math.nan], n_resamples=200)
    assert (missing.mean, missing.low, missing.high) == (base.mean, base.low, base.high)
