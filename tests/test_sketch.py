"""The quantile sketch: within 1 % or NaN, for any distribution, number of values, order, and way of splitting."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npti_interp import _sketch
from npti_interp._sketch import ALPHA, BYTES_PER_STREAM, QuantileSketch, grid_codes, grid_edges

Floats = npt.NDArray[np.floating]


class Streams:
    """Streams of values fed to a sketch, with the counts that belong to them."""

    def __init__(self, values: Floats, chunk: int = 64) -> None:
        values = np.ascontiguousarray(values, np.float32)
        self.n, streams = values.shape
        self.sketch = QuantileSketch.empty(streams)
        counts, mean, m2 = np.zeros((1, streams), np.int32), np.zeros(streams), np.zeros(streams)
        for start in range(0, self.n, chunk):
            part = np.ascontiguousarray(values[start : start + chunk])
            rows = np.arange(len(part))
            assert _sketch.accumulate(
                part, rows, np.zeros(len(part), np.int64), counts, mean, m2, start, self.sketch, 0
            )
        self.positive = counts[0].astype(np.int64)

    def merge(self, other: Streams) -> Streams:
        merged = object.__new__(Streams)
        merged.n, merged.positive = self.n + other.n, self.positive + other.positive
        merged.sketch = self.sketch.merge(other.sketch, merged.n)
        return merged

    def p95(self) -> Floats:
        return self.sketch.quantile(0.95, self.n, self.positive)


def exact(values: Floats) -> Floats:
    """The 95th percentile of ``max(0, value)`` of each stream."""
    return np.quantile(np.maximum(np.asarray(values, np.float32), 0).astype(np.float64), 0.95, axis=0)


def check(found: Floats, wanted: Floats, lost: float) -> None:
    """Every answer within 1 %, zero where the truth is; at most a share ``lost`` of NaN."""
    known = ~np.isnan(found)
    assert (~known).mean() <= lost, f"{(~known).mean():.2%} lost"
    error = np.abs(found - wanted)[known]
    # The bins are 0.2 % narrower than they may be; float32 arithmetic in the grid takes far less than that.
    assert (error <= ALPHA * wanted[known]).all(), f"off by {np.max(error / np.maximum(wanted[known], 1e-300)):.2%}"


def silu(z: Floats) -> Floats:
    return z / (1 + np.exp(-z))


Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]
DISTRIBUTIONS: dict[str, Draw] = {
    "silu": lambda r, s: silu(r.normal(0, 1, s)),
    "silu, mostly negative": lambda r, s: silu(r.normal(-1, 1, s)),
    "silu, sparse": lambda r, s: silu(r.normal(-3, 2, s)),
    "silu, tiny": lambda r, s: 1e-6 * silu(r.normal(0, 1, s)),
    "silu, huge": lambda r, s: 1e6 * silu(r.normal(0, 1, s)),
    "silu, in bursts": lambda r, s: silu(r.normal(-1, 1, s) + np.repeat(r.normal(0, 1, (-(-s[0] // 40), s[1])), 40, 0)[: s[0]]),
    "lognormal": lambda r, s: r.lognormal(0, 2, s),
    "lognormal, tiny": lambda r, s: r.lognormal(-14, 2, s),
    "lognormal, huge": lambda r, s: r.lognormal(14, 2, s),
    "lognormal, narrow": lambda r, s: r.lognormal(0, 0.05, s),
    "gamma, wide": lambda r, s: r.gamma(0.3, 1, s),
    "gamma, narrow": lambda r, s: r.gamma(5, 1, s),
    "always on": lambda r, s: r.normal(5, 0.1, s),
    "uniform": lambda r, s: r.uniform(0, 1, s),
    "half Cauchy": lambda r, s: np.maximum(r.standard_cauchy(s), 0),
    "two values": lambda r, s: np.where(r.uniform(size=s) < 0.1, 2.0, 1.0),
    "two values, the percentile is the lower": lambda r, s: np.where(r.uniform(size=s) < 0.03, 2.0, 1.0),
    "rare and a thousand times larger": lambda r, s: r.lognormal(0, 0.5, s) * np.where(r.uniform(size=s) < 0.01, 1e3, 1.0),
    "constant": lambda r, s: np.full(s, 0.37),
    "negative": lambda r, s: -np.abs(r.normal(0, 1, s)),
    "zero": lambda r, s: np.zeros(s),
}  # fmt: skip
SIZES = (1, 2, 20, 60, 61, 99, 130, 250, 400, 1000, 2400, 7000, 30_000, 300_000)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_within_one_percent(name: str) -> None:
    rng = np.random.default_rng(1)
    for n in SIZES:
        values = DISTRIBUTIONS[name](rng, (n, max(3, min(300, 200_000 // n)))).astype(np.float32)
        streams = Streams(values)
        check(streams.p95(), exact(values), lost=0.01)
        if name in ("negative", "zero"):
            assert (streams.p95() == 0).all()
        else:
            assert (streams.p95() > 0).any() or n < 20


def test_stages_are_all_reached() -> None:
    """So that the test above cannot pass by keeping lists."""
    rng = np.random.default_rng(0)
    widths = {n: set(Streams(DISTRIBUTIONS["silu"](rng, (n, 20))).sketch.width.tolist()) for n in (100, 2000, 300_000)}
    assert widths == {100: {0}, 2000: {240}, 300_000: {60}}


def test_at_the_edge_of_five_percent() -> None:
    """Neurons active on about 5 % of tokens: the percentile hangs between zero and the smallest values there are."""
    rng = np.random.default_rng(2)
    for n in (60, 100, 300, 1000, 2400, 6000, 30_000):
        share = rng.uniform(0.045, 0.055, max(20, 600_000 // n))
        values = silu(np.abs(rng.normal(0, 1, (n, len(share))))) * np.where(
            rng.uniform(size=(n, len(share))) < share, 1, -1
        )
        check(Streams(values).p95(), exact(values), lost=0.04)


@pytest.mark.parametrize("order", ["ascending", "descending", "outliers first", "outliers last", "two regimes"])
def test_order_gives_nan_at_worst(order: str) -> None:
    """No order of the values may give a wrong answer; a hopeless one may give none."""
    rng = np.random.default_rng(3)
    for n, sigma in itertools.product((100, 400, 3000, 20_000), (0.2, 1.0, 3.0)):
        values = rng.lognormal(0, sigma, (n, 20)) * np.where(rng.uniform(size=(n, 20)) < 0.6, 1, -1)
        if order != "two regimes":
            values = np.sort(values, axis=0)
        if order == "descending":
            values = values[::-1]
        elif order.startswith("outliers"):
            parts = [rng.permutation(values[: -n // 50]), values[-n // 50 :]]
            values = np.concatenate(parts if order.endswith("last") else parts[::-1])
        elif order == "two regimes":
            values[n // 3 :] *= 30
        check(Streams(values).p95(), exact(values), lost=1.0)
        if n <= 100:
            assert not np.isnan(Streams(values).p95()).any(), "small numbers are kept one by one"


def test_chunks_do_not_matter() -> None:
    values = DISTRIBUTIONS["lognormal"](np.random.default_rng(4), (3000, 40))
    whole = Streams(values, 3000)
    for chunk in (1, 7, 64):
        other = Streams(values, chunk)
        for name in ("bins", "base", "width", "over"):
            assert np.array_equal(getattr(whole.sketch, name), getattr(other.sketch, name))


def test_percentile_lies_between_order_statistics() -> None:
    """As numpy's, by linear interpolation; a non-positive neighbour enters as 0."""
    values = np.full((100, 2), -1.0)
    values[:5, 0] = 8.0  # the 95th percentile lies 0.05 of the way from the sixth largest to the fifth
    values[:6, 1] = 8.0
    assert Streams(values).p95() == pytest.approx([0.05 * 8, 8], rel=0.01)
    assert exact(values) == pytest.approx([0.05 * 8, 8])
    for n in range(1, 130):
        ladder = 1.5 ** -np.arange(n)[:, None]
        assert Streams(ladder).p95() == pytest.approx(exact(ladder), rel=0.01), n


def test_nothing_seen_is_nan() -> None:
    sketch = QuantileSketch.empty(3)
    assert np.isnan(sketch.quantile(0.95, 0, np.zeros(3, np.int64))).all()
    assert np.isnan(sketch.quantile(0.95, 10, np.full(3, 5))).all(), "counts without values"


# -------------------------------------------------------------------------------------------------------------- grid


@given(st.lists(st.floats(2.0**-126, 2.0**120, width=32), min_size=1, max_size=50))
def test_grid(values: list[float]) -> None:
    array = np.array(values, np.float32)
    codes = grid_codes(array)
    low, high = grid_edges(codes), grid_edges(codes + 1)
    assert (high / low <= (1 + ALPHA) / (1 - ALPHA)).all()
    assert (low * (1 - 1e-4) <= array).all()
    assert (array <= high * (1 + 1e-4)).all()
    order = np.argsort(array)
    assert (np.diff(codes[order]) >= 0).all()
    kernel = Streams(array[:, None] * np.ones((1, 1), np.float32)).sketch
    assert (np.abs(kernel.bins.view(np.int16)[0, : len(array)] - codes) <= 1).all(), "the kernel's twin"


def test_grid_tells_values_apart_two_percent_each() -> None:
    assert len(np.unique(grid_codes(np.geomspace(1, 1024, 100_000).astype(np.float32)))) == pytest.approx(
        np.log(1024) / np.log((1 + ALPHA) / (1 - ALPHA)), rel=0.15
    )


# ------------------------------------------------------------------------------------------------------------ memory


def test_bytes_per_stream() -> None:
    rng = np.random.default_rng(0)
    for n in (10, 1000, 100_000):
        sketch = Streams(DISTRIBUTIONS["silu"](rng, (n, 8))).sketch
        assert sum(a.nbytes for a in vars(sketch).values()) == 8 * BYTES_PER_STREAM
    assert BYTES_PER_STREAM <= 302 - 48, "8 blocks of counts and the moments take 48"


def test_no_large_temporaries() -> None:
    """458,752 neurons (Llama-3-8B) are 108 MiB of sketches; asking for p95 must not take a multiple of that."""
    import tracemalloc

    sketch = QuantileSketch.empty(50_000)
    other = sketch.copy()
    sketch.quantile(0.95, 10, np.zeros(50_000, np.int64))
    sketch.merge(other, 10)
    tracemalloc.start()
    sketch.quantile(0.95, 10, np.zeros(50_000, np.int64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    held = sketch.merge(other, 10)
    merging = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held.base) == 50_000
    assert peak < 50_000 * BYTES_PER_STREAM / 2
    assert merging < 50_000 * BYTES_PER_STREAM * 1.5


# ----------------------------------------------------------------------------------------------------------- merging


def draw(seed: int, n: int, streams: int = 6) -> Floats:
    """Streams of different kinds side by side, the same kind at every size."""
    rng = np.random.default_rng(seed)
    kinds = ["silu", "silu, mostly negative", "lognormal", "gamma, narrow", "two values", "constant"]
    return np.concatenate([DISTRIBUTIONS[k](rng, (n, streams // 6)) for k in kinds], axis=1).astype(np.float32)


SPLITS = st.lists(st.integers(1, 700), min_size=2, max_size=6)


@given(seed=st.integers(0, 10**6), sizes=SPLITS)
def test_merged_parts_are_the_whole(seed: int, sizes: list[int]) -> None:
    values = draw(seed, sum(sizes))
    parts = [Streams(p) for p in np.split(values, np.cumsum(sizes)[:-1])]
    whole = exact(values)
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        assert merged.n == sum(sizes)
        check(merged.p95(), whole, lost=1.0)
        assert np.isnan(merged.p95()).sum() <= 1
    pairs = [parts[k].merge(parts[k + 1]) if k + 1 < len(parts) else parts[k] for k in range(0, len(parts), 2)]
    tree = pairs[0]
    for pair in pairs[1:]:
        tree = tree.merge(pair)
    check(tree.p95(), whole, lost=1 / 6)


@given(seed=st.integers(0, 10**6), sizes=st.tuples(st.integers(1, 90_000), st.integers(1, 90_000)))
@settings(max_examples=25)
def test_merging_large_parts(seed: int, sizes: tuple[int, int]) -> None:
    values = draw(seed, sum(sizes))
    first, second = Streams(values[: sizes[0]]), Streams(values[sizes[0] :])
    one, two = first.merge(second).p95(), second.merge(first).p95()
    check(one, exact(values), lost=1 / 6)
    check(two, exact(values), lost=1 / 6)
    both = ~np.isnan(one) & ~np.isnan(two)
    assert np.allclose(one[both], two[both], rtol=0.021)


@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=4),
    scales=st.lists(st.floats(1e-4, 1e4), min_size=4, max_size=4),
)
def test_merging_unlike_parts_never_guesses(seed: int, sizes: list[int], scales: list[float]) -> None:
    rng = np.random.default_rng(seed)
    parts = [scale * draw(int(rng.integers(10**6)), n) for n, scale in zip(sizes, scales, strict=False)]
    merged = Streams(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Streams(part))
    check(merged.p95(), exact(np.concatenate(parts)), lost=1.0)


def test_values_that_one_part_did_not_count_are_not_guessed() -> None:
    """The one's window lies so high that it has dropped the very values that are the percentile of both."""
    rng = np.random.default_rng(5)
    high = rng.permutation(np.repeat([1000.0, 1.0], [30, 140]))[:, None]
    low = rng.permutation(np.concatenate([rng.uniform(0.01, 0.4, 2565), rng.uniform(0.5, 0.99, 285)]))[:, None]
    one, two = Streams(high), Streams(low)
    assert one.sketch.width[0] == two.sketch.width[0] == 240
    assert grid_edges(one.sketch.base)[0] > 1.0
    assert exact(np.concatenate([high, low])) == pytest.approx(1.0)
    for merged in (one.merge(two), two.merge(one)):
        assert np.isnan(merged.p95()).all()
    # And the other way round: what lies above the lower window has no place in the higher one.
    top = Streams(rng.permutation(np.repeat([1.0, 3000.0], [980, 20]))[:, None])
    many = Streams(rng.uniform(2000, 4000, (100, 1)))
    wide = np.concatenate([np.repeat([1.0, 3000.0], [980, 20])[:, None], np.full((100, 1), 3000.0)])
    check(top.merge(many).p95(), exact(wide), lost=1.0)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 500), more=st.integers(1, 3000))
def test_feeding_goes_on_after_a_merge(seed: int, n: int, more: int) -> None:
    values = draw(seed, 2 * n + more)
    merged = Streams(values[:n]).merge(Streams(values[n : 2 * n]))
    streams = values.shape[1]
    counts, mean, m2 = np.zeros((1, streams), np.int32), np.zeros(streams), np.zeros(streams)
    rest = np.ascontiguousarray(values[2 * n :])
    _sketch.accumulate(rest, np.arange(more), np.zeros(more, np.int64), counts, mean, m2, 2 * n, merged.sketch, 0)
    merged.n, merged.positive = 2 * n + more, merged.positive + counts[0]
    check(merged.p95(), exact(values), lost=1.0)
    assert np.isnan(merged.p95()).sum() <= 1


@given(
    values=st.lists(st.floats(-100, 2.0**115, width=32, allow_subnormal=False), min_size=1, max_size=400),
    cut=st.integers(0, 400),
)
@settings(max_examples=150)
def test_any_values_at_all(values: list[float], cut: int) -> None:
    array = np.array(values, np.float32)[:, None]
    whole = exact(array)
    check(Streams(array).p95(), whole, lost=1.0)
    if 0 < cut < len(array):
        check(Streams(array[:cut]).merge(Streams(array[cut:])).p95(), whole, lost=1.0)
    if (array > 0).sum() <= 120:
        assert not np.isnan(Streams(array).p95()).any()


def test_merge_changes_neither_part() -> None:
    for n in (50, 1500, 70_000):
        first, second = Streams(draw(1, n)), Streams(draw(2, n))
        before = [np.copy(a) for s in (first, second) for a in vars(s.sketch).values()]
        first.merge(second)
        after = [a for s in (first, second) for a in vars(s.sketch).values()]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_copy_is_independent() -> None:
    first = Streams(draw(1, 500))
    twin = first.sketch.copy()
    twin.bins[:] = 7
    twin.over[:] = 3
    assert not (first.sketch.bins == 7).all()
    assert np.allclose(first.p95(), Streams(draw(1, 500)).p95())
