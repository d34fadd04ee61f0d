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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

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
_TILE, _TILE_ROWS, _AHEAD = 256, 32, 6
# log2 within an octave by a cubic whose slope is least, 10/7, at the octave's start: there the bins are widest.
_A, _B, _C = np.float32(6 / 35), np.float32(-3 / 5), np.float32(10 / 7)
_PER_OCTAVE = np.float32(1.002 * 0.7 / math.log((1 + ALPHA) / (1 - ALPHA)))
_PLACES = np.empty(32, np.uint8)
_PLACES[[(0x077CB531 << k & 0xFFFFFFFF) >> 27 for k in range(32)]] = np.arange(32)
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


def _fetching(_: Any, bins: Any, row: Any) -> Any:
    """Ask for a row of ``bins`` that is needed soon, without waiting: most of the time would go into waiting for it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        start = builder.mul(arguments[1], ir.Constant(arguments[1].type, BINS))
        for line in range(0, BINS, 64):
            place = builder.add(start, ir.Constant(start.type, line))
            address = builder.gep(builder.bitcast(array.data, byte), [place])
            builder.call(prefetch, [address, word(1), word(3), word(1)])  # to be written, to be kept, data
        return context.get_dummy_value()

    return types.void(bins, types.int64), code


_fetch: Any = intrinsic(_fetching)


@jit
def _start(upper: int, middle: int, lower: int, size: int) -> Any:
    """Where a window of ``size`` bins starts, for a percentile now at ``middle``, sure to lie in lower … upper."""
    spare = size - 1 - (upper - lower)
    return lower - spare * 3 // 5 if spare >= 0 else middle - size * 2 // 5


@jit
def _open(i: int, codes: Any, n: int, b8: Any, base: Any, width: Any, over: Any) -> None:
    """Turn a stream's list, copied to ``codes``, into a window; ``n`` values were seen, the non-positive ones included.

    The list has at most 240 entries, so that no counter overflows.
    """
    last = codes.shape[0] - 1
    rank = 0.05 * n
    noise = 3.0 * math.sqrt(rank)
    # How many are above the percentile, at least, about and at most.
    few, some, many = min(last, max(0, int(rank - noise))), int(rank), int(rank + noise)
    all_known = rank + noise <= last
    low, high = codes[0], codes[0]
    for code in codes:
        low, high = min(low, code), max(high, code)
    b8[i] = 0
    width[i], over[i] = BINS, 0
    span = high - low + 1
    counts = np.zeros(span, np.uint8)
    for code in codes:
        counts[code - low] += 1
    upper, middle, lower = low, low, low
    above, j = 0, span
    enough = many if all_known else few
    while above <= enough:
        j -= 1
        upper = low + j if above <= few else upper
        middle = low + j if above <= some else middle
        lower = low + j
        above += counts[j]
    # Where not all are known, the percentile may turn out as small as positive values get.
    start = (_start(upper, middle, lower, BINS) if all_known else upper + 60 - BINS) - low
    base[i] = start + low
    for j in range(max(0, start), min(span, start + BINS)):
        b8[i, j - start] = counts[j]
    for j in range(max(0, start + BINS), span):
        over[i] += counts[j]


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
def _tile_codes(bits: Any, rows: Any, start: int, stop: int, least: Any, codes: Any, matters: Any) -> None:
    """Bins of the values of neurons ``start … stop``, ``[row, neuron]``; of values that are not positive, anything.

    ``matters`` gets a bit a row for each neuron: whether the value is positive and its bin is at least ``least``.
    """
    matters[: stop - start] = 0
    for k in range(rows.shape[0]):
        own, c = bits[rows[k], start:stop], codes[k]
        for j in range(stop - start):  # no branch, and all in 32 bits: eight at a time and more
            b = own[j]
            s = np.float32(np.int32(b & np.int32(0x7FFFFF))) * _MANTISSA
            cubic = ((_A * s + _B) * s + _C) * s
            place = (np.float32(np.int32(np.int32(b >> np.int32(23)) - np.int32(127))) + cubic) * _PER_OCTAVE
            whole = np.int32(place)
            code = np.int32(whole - np.int32(place < np.float32(whole)))
            c[j] = code
            matters[j] |= np.uint32((b > np.int32(0)) & (code >= least[j])) << np.uint32(k)


@jit
def _lowest(bits: int) -> Any:
    """Number of the lowest bit that is set (a de Bruijn sequence: every five of its bits are different)."""
    own = np.uint32(bits & -np.int64(bits))
    return _PLACES[np.uint32(own * np.uint32(0x077CB531)) >> np.uint32(27)]


@jit
def _sketch_tile(
    bits: Any, rows: Any, start: int, stop: int, seen: int, codes: Any, least: Any, matters: Any,
    b8: Any, b16: Any, b32: Any, base: Any, width: Any, over: Any,
) -> None:  # fmt: skip
    """Take at most 32 rows of some neurons into their streams; ``seen`` values were taken in before."""
    one = np.uint32(1)
    for i in range(start, stop):
        least[i - start] = base[i] if width[i] != _LIST else -_LOST
    _tile_codes(bits, rows, start, stop, least, codes, matters)
    for i in range(start, stop):
        j = i - start
        if i + _AHEAD < stop:
            _fetch(b8, i + _AHEAD)
        left = matters[j]
        while left:
            size, first, above = np.int32(width[i]), np.int32(base[i]), 0
            if size > NARROW_BINS:  # one function for both kinds of counters would cost a seventh more time
                counters = b8[i]
                while left:
                    offset = np.uint32(codes[_lowest(left), j] - first)
                    if offset >= size:
                        above += 1
                    else:
                        count = counters[offset]
                        if count == 255:
                            break
                        counters[offset] = count + 1
                    left = np.uint32(left & (left - one))
                over[i] += above
            elif size == _LIST:
                held = over[i]
                while left and held < LISTED:
                    b16[i, held] = codes[_lowest(left), j]
                    held += 1
                    left = np.uint32(left & (left - one))
                over[i] = held
            else:
                large = b32[i]
                while left:
                    offset = np.uint32(codes[_lowest(left), j] - first)
                    if offset >= size:
                        above += 1
                    else:
                        large[offset] += 1
                    left = np.uint32(left & (left - one))
                over[i] += above
            if left:  # a full list or counter: the stream changes, and with it what matters
                k = _lowest(left)
                _note(i, codes[k, j], seen + k + 1, b8, b16, b32, base, width, over)
                left = np.uint32(left & (left - one))
                later = left
                while later:
                    if codes[_lowest(later), j] < base[i]:
                        left = np.uint32(left & ~(one << np.uint32(_lowest(later))))
                    later = np.uint32(later & (later - one))


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
def _tile_moments(
    values: Any, rows: Any, blocks: Any, counts: Any, mean: Any, m2: Any, seen: int, start: int, stop: int,
    total: Any, square: Any,
) -> bool:  # fmt: skip
    n, fresh = stop - start, rows.shape[0]
    total[:n] = 0
    for k in range(fresh):
        v, count = values[rows[k], start:stop], counts[blocks[k], start:stop]
        for i in range(n):
            total[i] += v[i]
            count[i] += v[i] > 0
    for i in range(n):
        total[i] /= fresh
    if not np.isfinite(total[:n]).all():
        return False
    square[:n] = 0
    for k in range(fresh):
        v = values[rows[k], start:stop]
        for i in range(n):
            d = v[i] - total[i]
            square[i] += d * d
    share = fresh / (seen + fresh)
    for i in range(n):
        step = total[i] - mean[start + i]
        m2[start + i] += square[i] + step * step * seen * share
        mean[start + i] += step * share
    return True


@jit
def _accumulate(
    values: Any, rows: Any, blocks: Any, counts: Any, mean: Any, m2: Any, seen: int,
    bins: Any, base: Any, width: Any, over: Any, first_stream: int,
) -> bool:  # fmt: skip
    n, fresh = values.shape[1], rows.shape[0]
    bits = values.view(np.int32)
    b8 = bins[first_stream : first_stream + n]  # sliced here, where it costs nothing
    b16, b32 = b8.view(np.int16), b8.view(np.uint32)
    base, width = base[first_stream : first_stream + n], width[first_stream : first_stream + n]
    over = over[first_stream : first_stream + n]
    total, square = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    codes, least = np.empty((_TILE_ROWS, _TILE), np.int32), np.empty(_TILE, np.int32)
    matters = np.empty(_TILE, np.uint32)
    for start in range(0, n, _TILE):  # few neurons at a time: values and counters stay in the processor's cache
        stop = min(start + _TILE, n)
        if not _tile_moments(values, rows, blocks, counts, mean, m2, seen, start, stop, total, square):
            return False
        for first in range(0, fresh, _TILE_ROWS):
            some = rows[first : first + _TILE_ROWS]
            _sketch_tile(
                bits, some, start, stop, seen + first, codes, least, matters, b8, b16, b32, base, width, over
            )  # fmt: skip
    return True


def accumulate(
    values: Floats, rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64], counts: npt.NDArray[np.int32],
    mean: npt.NDArray[np.float64], m2: npt.NDArray[np.float64], seen: int, sketch: QuantileSketch, start: int,
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
        sketch: its streams from ``start`` on are this layer's neurons.
        start: first of them.

    Returns:
        False if a value was NaN or infinite.
    """
    if len(rows) == 0:
        return True
    return _accumulate(
        values, rows, blocks, counts, mean, m2, seen, sketch.bins, sketch.base, sketch.width, sketch.over, start
    )


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
