r"""A quantile sketch of many streams at once: exact lists that turn into windows on one fixed logarithmic grid.

Positive values fall into bins whose edges grow by at most ``(1+α)/(1−α)``, α = 0.01, so naming a bin gives its values
to 1 % at any scale (DDSketch, Masson et al. 2019, arXiv 1908.10693). Of that endless grid each stream keeps 240 bytes,
as one high percentile (the 95th) is all that is asked:

*list*: the bins of its first 120 positive values, one by one. Nothing is lost, however small they are.

*window*: 240 one-byte counters, a range of 1 : 116, laid round the percentile as those 120 values and the number of
tokens place it. What lies above the window is counted in one number; what lies below is not needed.

*narrow window*: once a counter would pass 255, 60 four-byte counters round the percentile of that moment.

A window never moves and never widens, so every value in or above it has been counted from the first token on. Hence an
answer is right whatever the order of the values, and where the percentile has left the window it is NaN, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numba
import numpy as np
import numpy.typing as npt

from npti_interp._files import require_array
from npti_interp.errors import ArtifactError

__all__ = ["ALPHA", "BYTES_PER_STREAM", "QuantileSketch", "accumulate", "grid_codes", "grid_edges", "representatives"]

ALPHA = 0.01
LISTED = 120
BINS = 240
NARROW_BINS = 60
BYTES_PER_STREAM = BINS + 2 + 1 + 4
"""Counters (or list), window position, window width, values above the window (or in the list)."""

_LIST = 0  # a width of no window
_LOST = 32_000  # a window position above every value
_ZERO, _UNKNOWN = -32_768, 32_767
_TILE, _TILE_ROWS = 128, 32
# log2 within an octave by a cubic whose slope is least, 10/7, at the octave's start: there the bins are widest.
_A, _B, _C = np.float32(6 / 35), np.float32(-3 / 5), np.float32(10 / 7)
_PER_OCTAVE = np.float32(1.002 * 0.7 / math.log((1 + ALPHA) / (1 - ALPHA)))
_MANTISSA = np.float32(2.0**-23)

Floats = npt.NDArray[np.float32]
jit: Any = numba.njit(cache=True, nogil=True)
# Summing in any order is harmless here (the sums are exact to 1e-7) and lets the loops use vector registers.
jit_sums: Any = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})


def grid_codes(values: Floats) -> npt.NDArray[np.int32]:
    """Bin of each positive value (what the kernel's `_tile_codes` does, to the bit)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    s = (bits & 0x7FFFFF).astype(np.float32) * _MANTISSA
    cubic = ((_A * s + _B) * s + _C) * s
    return np.floor((((bits >> 23) - 127).astype(np.float32) + cubic) * _PER_OCTAVE).astype(np.int32)


def grid_edges(codes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Lower edge of each bin; the upper edge is that of the next."""
    position = np.asarray(codes, np.float64) / float(_PER_OCTAVE)
    octave = np.floor(position)
    target = position - octave
    s = target.copy()
    for _ in range(8):  # Newton on the monotone cubic
        s -= (((6 / 35 * s - 0.6) * s + 10 / 7) * s - target) / ((18 / 35 * s - 1.2) * s + 10 / 7)
    return np.exp2(octave) * (1.0 + s)


def representatives(codes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The value that stands for each bin."""
    low, high = grid_edges(codes), grid_edges(np.asarray(codes) + 1)
    return 2.0 * low * high / (low + high)  # equal relative error at both edges


@jit
def _start(upper: int, middle: int, lower: int, size: int) -> Any:
    """Where a window of ``size`` bins starts, for a percentile now at ``middle``, sure to lie in lower … upper."""
    spare = size - 1 - (upper - lower)
    return lower - spare * 3 // 5 if spare >= 0 else middle - size * 2 // 5


@jit
def _place(codes: Any, n: int) -> Any:
    """Where the first window starts, from the sorted bins of all positive values among ``n``."""
    last = codes.shape[0] - 1
    rank = 0.05 * n
    noise = 3.0 * math.sqrt(rank)
    upper = codes[last - min(last, max(0, int(rank - noise)))]
    if rank + noise > last:  # the percentile may turn out as small as positive values get
        return upper + 60 - BINS
    return _start(upper, codes[last - int(rank)], codes[last - int(rank + noise)], BINS)


@jit
def _sorted(codes: Any) -> Any:
    """By counting, as a list's bins seldom span more than a few hundred: several times faster than `np.sort`."""
    low, high = codes[0], codes[0]
    for code in codes:
        low, high = min(low, code), max(high, code)
    if high - low >= 2048:
        return np.sort(codes)
    counts = np.zeros(high - low + 1, np.uint8)
    for code in codes:
        counts[code - low] += 1
    ordered, k = np.empty_like(codes), 0
    for j in range(counts.shape[0]):
        for _ in range(counts[j]):
            ordered[k] = low + j
            k += 1
    return ordered


@jit
def _open(i: int, codes: Any, n: int, b8: Any, base: Any, width: Any, over: Any) -> None:
    """Turn a stream's list into a window; its values are at most 240 in number, so that no counter overflows."""
    codes = _sorted(codes)
    b8[i] = 0
    base[i], width[i], over[i] = _place(codes, n), BINS, 0
    for code in codes:
        offset = code - base[i]
        if offset >= BINS:
            over[i] += 1
        elif offset >= 0:
            b8[i, offset] += 1


@jit
def _store(i: int, counts: Any, low: int, n: int, b8: Any, b32: Any, base: Any, width: Any, over: Any) -> None:
    """Give a stream the window ``counts`` from grid position ``low`` on, narrowed where one byte is too little."""
    size = counts.shape[0]
    b8[i] = 0
    if size > NARROW_BINS and counts.max() <= 255:
        base[i], width[i] = low, size
        for j in range(size):
            b8[i, j] = counts[j]
        return
    above, rank = np.int64(over[i]), 0.05 * n
    noise = 3.0 * math.sqrt(rank)
    upper, middle, lower = 0, 0, 0
    for j in range(size - 1, -1, -1):
        above += counts[j]
        upper = max(upper, j if above > rank - noise else 0)
        middle = max(middle, j if above > rank else 0)
        lower = max(lower, j if above > rank + noise else 0)
    start = min(max(_start(upper, middle, lower, NARROW_BINS), 0), max(size - NARROW_BINS, 0))
    stop = min(start + NARROW_BINS, size)
    base[i], width[i] = low + start, stop - start
    for j in range(start, stop):
        b32[i, j - start] = min(counts[j], 4_294_967_295)
    above = np.int64(over[i])
    for j in range(stop, size):
        above += counts[j]
    over[i] = min(above, 2_147_483_647)


@jit
def _note(i: int, code: int, n: int, b8: Any, b16: Any, b32: Any, base: Any, width: Any, over: Any) -> None:
    """Take one positive value, the ``n``-th of its stream or thereabouts, into a stream."""
    if width[i] == _LIST:
        if over[i] < LISTED:
            b16[i, over[i]] = code
            over[i] += 1
            return
        _open(i, b16[i].copy(), n, b8, base, width, over)
    offset = code - base[i]
    if offset < 0:
        return
    if offset >= width[i]:
        over[i] += 1
        return
    if width[i] > NARROW_BINS:
        if b8[i, offset] < 255:
            b8[i, offset] += 1
            return
        counts = b8[i, : width[i]].astype(np.int64)
        counts[offset] += 1
        _store(i, counts, base[i], n, b8, b32, base, width, over)
        return
    b32[i, offset] += 1


@jit
def _tile_codes(bits: Any, rows: Any, start: int, stop: int, codes: Any) -> None:
    """Bins of the values of neurons ``start … stop``, ``[row, neuron]``; `_ZERO` where a value is not positive."""
    for k in range(rows.shape[0]):
        own, c = bits[rows[k], start:stop], codes[k]
        for j in range(stop - start):  # no branch, and all in 32 bits: eight at a time and more
            b = own[j]
            s = np.float32(np.int32(b & np.int32(0x7FFFFF))) * _MANTISSA
            cubic = ((_A * s + _B) * s + _C) * s
            place = (np.float32(np.int32(np.int32(b >> np.int32(23)) - np.int32(127))) + cubic) * _PER_OCTAVE
            whole = np.int32(place)
            code = np.int32(whole - np.int32(place < np.float32(whole)))
            c[j] = code if b > np.int32(0) else np.int32(_ZERO)


@jit
def _sketch_rows(
    bits: Any, rows: Any, seen: int, b8: Any, b16: Any, b32: Any, base: Any, width: Any, over: Any
) -> None:
    n, fresh = bits.shape[1], rows.shape[0]
    codes = np.empty((_TILE_ROWS, _TILE), np.int32)
    own = np.empty(_TILE_ROWS, np.int32)
    for start in range(0, n, _TILE):  # few neurons at a time: their counters stay in the processor's cache
        stop = min(start + _TILE, n)
        for first in range(0, fresh, _TILE_ROWS):
            m = min(_TILE_ROWS, fresh - first)
            _tile_codes(bits, rows[first : first + m], start, stop, codes)
            for i in range(start, stop):
                j, size = i - start, np.int32(width[i])
                # Which values matter is as good as random: they are picked out without a branch.
                least = np.int32(base[i] if size != _LIST else _ZERO + 1)
                taken = 0
                for k in range(m):
                    code = codes[k, j]
                    own[taken] = code
                    taken += code >= least
                done, above = 0, 0
                if size > NARROW_BINS:
                    counters = b8[i]
                    while done < taken:
                        offset = np.uint32(own[done] - least)
                        if offset >= size:
                            above += 1
                        else:
                            count = counters[offset]
                            if count == 255:
                                break
                            counters[offset] = count + 1
                        done += 1
                    over[i] += above
                elif size == _LIST:
                    done = max(0, min(taken, LISTED - over[i]))
                    for k in range(done):
                        b16[i, over[i] + k] = own[k]
                    over[i] += done
                else:
                    large = b32[i]
                    for done in range(taken):
                        offset = np.uint32(own[done] - least)
                        if offset >= size:
                            above += 1
                        else:
                            large[offset] += 1
                    done = taken
                    over[i] += above
                if done < taken:  # a full list or counter: from here on one by one
                    k = -1
                    for _ in range(done + 1):
                        k += 1
                        while codes[k, j] < least:
                            k += 1
                    for row in range(k, m):
                        if codes[row, j] >= least:
                            _note(i, codes[row, j], seen + first + row + 1, b8, b16, b32, base, width, over)


@jit
def _counts(i: int, b8: Any, b32: Any, width: Any) -> Any:
    counts = np.zeros(width[i], np.int64)
    for j in range(width[i]):
        counts[j] = b8[i, j] if width[i] > NARROW_BINS else b32[i, j]
    return counts


@jit
def _merge(
    n: int, b8: Any, b16: Any, b32: Any, base: Any, width: Any, over: Any,
    c8: Any, c16: Any, c32: Any, base2: Any, width2: Any, over2: Any,
) -> None:  # fmt: skip
    """Take the second sketch's streams into the first's; ``n`` values each, together."""
    for i in range(base.shape[0]):
        if width2[i] == _LIST:
            if width[i] == _LIST and over[i] + over2[i] > LISTED:
                _open(i, np.concatenate((b16[i, : over[i]], c16[i, : over2[i]])), n, b8, base, width, over)
            else:
                for k in range(over2[i]):
                    _note(i, c16[i, k], n, b8, b16, b32, base, width, over)
            continue
        if width[i] == _LIST:
            codes = b16[i, : over[i]].copy()
            b8[i] = c8[i]
            base[i], width[i], over[i] = base2[i], width2[i], over2[i]
            for code in codes:
                _note(i, code, n, b8, b16, b32, base, width, over)
            continue
        low = max(np.int64(base[i]), np.int64(base2[i]))
        high = low + BINS  # one that has nothing above its window sets no limit
        if over[i] > 0:
            high = min(high, np.int64(base[i]) + width[i])
        if over2[i] > 0:
            high = min(high, np.int64(base2[i]) + width2[i])
        if high <= low:  # the windows have nothing in common
            b8[i] = 0
            base[i], width[i], over[i] = _LOST, NARROW_BINS, 0
            continue
        total = np.zeros(high - low, np.int64)
        above = np.int64(over[i]) + over2[i]
        for own, start in ((_counts(i, b8, b32, width), base[i]), (_counts(i, c8, c32, width2), base2[i])):
            for j in range(own.shape[0]):
                offset = start + j - low
                if offset >= total.shape[0]:
                    above += own[j]
                elif offset >= 0:
                    total[offset] += own[j]
        over[i] = min(above, 2_147_483_647)
        _store(i, total, low, n, b8, b32, base, width, over)


@jit
def _descending(
    rank: int, positive: Any, b8: Any, b16: Any, b32: Any, base: Any, width: Any, over: Any, out: Any
) -> None:
    """Bin of the value that ``rank`` others of its stream are above."""
    for i in range(base.shape[0]):
        if positive[i] <= rank:
            out[i] = _ZERO
        elif width[i] == _LIST:
            out[i] = np.sort(b16[i, : over[i]])[over[i] - 1 - rank] if over[i] > rank else _UNKNOWN
        else:
            out[i] = _UNKNOWN
            above = np.int64(over[i])
            if above > rank:
                continue
            for j in range(width[i] - 1, -1, -1):
                above += b8[i, j] if width[i] > NARROW_BINS else b32[i, j]
                if above > rank:
                    out[i] = base[i] + j
                    break


@jit_sums
def _moments(values: Any, rows: Any, blocks: Any, counts: Any, mean: Any, m2: Any, seen: int) -> bool:
    n, fresh = values.shape[1], rows.shape[0]
    total = np.zeros(n, np.float32)
    for k in range(fresh):
        v = values[rows[k]]
        count = counts[blocks[k]]
        for i in range(n):
            total[i] += v[i]
            count[i] += v[i] > 0
    for i in range(n):
        total[i] /= fresh
    if not np.isfinite(total).all():
        return False
    square = np.zeros(n, np.float32)
    for k in range(fresh):
        v = values[rows[k]]
        for i in range(n):
            d = v[i] - total[i]
            square[i] += d * d
    share = fresh / (seen + fresh)
    for i in range(n):
        step = total[i] - mean[i]
        m2[i] += square[i] + step * step * seen * share
        mean[i] += step * share
    return True


def accumulate(
    values: Floats, rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64], counts: npt.NDArray[np.int32],
    mean: npt.NDArray[np.float64], m2: npt.NDArray[np.float64], seen: int, sketch: QuantileSketch, start: int, stop: int,
) -> bool:  # fmt: skip
    """Take one layer's values into its counts, moments and sketch, in place.

    Args:
        values: ``[row, neuron]``, contiguous.
        rows: which rows hold a token to count.
        blocks: block of each of those rows.
        counts: ``[block, neuron]``, values above 0.
        mean: ``[neuron]``.
        m2: ``[neuron]``, summed squared deviations from the mean.
        seen: tokens taken in before.
        sketch: its streams ``start … stop`` are this layer's neurons.
        start: first of them.
        stop: one past the last.

    Returns:
        False if a value was NaN or infinite.
    """
    if len(rows) == 0:
        return True
    if not _moments(values, rows, blocks, counts, mean, m2, seen):
        return False
    _sketch_rows(values.view(np.int32), rows, seen, *sketch.arrays(start, stop))
    return True


# Bins of the smallest and the largest positive value: what lists and windows can hold.
_FIRST, _LAST = (int(c) for c in grid_codes(np.array([2.0**-149, np.finfo(np.float32).max], np.float32)))


class QuantileSketch:
    """Sketches of several streams of equal length.

    Attributes:
        bins: ``uint8 [stream, 240]``: the list (two bytes an entry) or the counters (one or four bytes each).
        base: ``int16 [stream]``, grid position of the first counter.
        width: ``uint8 [stream]``, number of counters: 0 for a list; up to 60 have four bytes, more have one.
        over: ``int32 [stream]``, entries of the list, or values above the window.
    """

    complete = True
    """Whether every stream's percentile is known without a second pass."""

    def __init__(
        self,
        bins: npt.NDArray[np.uint8],
        base: npt.NDArray[np.int16],
        width: npt.NDArray[np.uint8],
        over: npt.NDArray[np.int32],
    ) -> None:
        self.bins, self.base, self.width, self.over = bins, base, width, over

    @classmethod
    def empty(cls, n_streams: int) -> Self:
        """Nothing seen yet."""
        return cls(
            np.zeros((n_streams, BINS), np.uint8),
            np.zeros(n_streams, np.int16),
            np.zeros(n_streams, np.uint8),
            np.zeros(n_streams, np.int32),
        )

    def arrays(self, start: int = 0, stop: int | None = None) -> tuple[npt.NDArray[Any], ...]:
        """What the kernels work on, for some of the streams: the bytes as uint8, int16 and uint32, then the rest."""
        part = slice(start, stop)
        bins = self.bins[part]
        return bins, bins.view(np.int16), bins.view(np.uint32), self.base[part], self.width[part], self.over[part]

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What a file holds."""
        return {f"sketch_{name}": getattr(self, name) for name in ("bins", "base", "width", "over")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Inverse of `tensors`.

        Raises:
            ArtifactError: arrays that are no sketch. The kernels check no bounds, so nothing else may reach them.
        """
        bins = require_array(tensors, "sketch_bins", (None, BINS), np.uint8).copy()
        base = require_array(tensors, "sketch_base", (len(bins),), np.int16).copy()
        width = require_array(tensors, "sketch_width", (len(bins),), np.uint8).copy()
        over = require_array(tensors, "sketch_over", (len(bins),), np.int32).copy()
        lists = width == _LIST
        codes = bins[lists].view(np.int16)
        held = codes[np.arange(LISTED) < over[lists, None]]
        start, lost = base[~lists], base[~lists] == _LOST
        sound = (
            (width <= BINS).all()
            and (over >= 0).all()
            and (over[lists] <= LISTED).all()
            and ((held >= _FIRST) & (held <= _LAST)).all()
            and (lost | ((start >= _FIRST - BINS) & (start <= _LAST))).all()
        )
        if not sound:
            raise ArtifactError("a sketch's lists or windows lie outside what a sketch can hold")
        return cls(bins, base, width, over)

    def copy(self) -> Self:
        """An independent copy."""
        return type(self)(self.bins.copy(), self.base.copy(), self.width.copy(), self.over.copy())

    def emptied(self) -> Self:
        """The same windows with nothing counted in them: what several parts of one stream can all begin with."""
        own = self.empty(len(self.base))
        own.base, own.width = self.base.copy(), self.width.copy()
        return own

    def quantile(self, q: float, n: int, positive: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Quantile ``q`` of every stream, by linear interpolation between order statistics.

        An order statistic that is not positive enters as 0, as its value is not kept: what comes out is the quantile of
        ``max(0, value)``.

        Args:
            q: in (0, 1); windows are laid round the 95th percentile, so others may come out as NaN.
            n: values seen by each stream, the non-positive ones included.
            positive: how many of them were above 0.

        Returns:
            ``float64 [stream]``: within 1 % where the quantile is positive, 0 where it is not, NaN where it lies
            outside the window (and for ``n`` = 0).
        """
        if n == 0:
            return np.full(len(self.base), np.nan)
        rank = (n - 1) * q
        low, part = math.floor(rank), rank - math.floor(rank)
        first = self._descending(n - 1 - low, positive)
        if part == 0.0 or low + 1 >= n:
            return first
        return (1 - part) * first + part * self._descending(n - 2 - low, positive)

    def _descending(self, rank: int, positive: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        codes = np.zeros(len(self.base), np.int32)
        _descending(rank, np.asarray(positive, np.int64), *self.arrays(), codes)
        known = np.abs(codes) <= _LOST
        place = np.where(known, codes, 0)
        low = int(place.min(initial=0))
        value = representatives(np.arange(low, int(place.max(initial=0)) + 1))[
            place - low
        ]  # far fewer bins than streams
        return np.where(known, value, np.where(codes == _ZERO, 0.0, np.nan))

    def merge(self, other: QuantileSketch, n: int) -> Self:
        """The sketch of both streams' values together.

        Values are counted in the bins of one fixed grid, so counts add up exactly: inside the merged window, and above
        it, they are what one sketch of all the values would hold there. A percentile that lies in it is therefore found
        in the very bin that it has without splitting, and comes out as the same number. What splitting costs is the
        window: the merged one is what the two have in common, so a percentile falls outside it, and is NaN, more often
        the more parts there are and the more they differ. Parts that begin with the same windows (`emptied`) have them
        in common.

        Args:
            other: of as many streams.
            n: values seen by each stream, in both sketches together; windows are laid by it.
        """
        merged = self.copy()
        _merge(n, *merged.arrays(), *other.arrays())
        return merged
