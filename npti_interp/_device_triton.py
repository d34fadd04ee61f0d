# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUnknownVariableType=false, reportIndexIssue=false
r"""`npti_interp._device.Part`'s reduction of a few tokens as one Triton kernel: each value is read twice, nothing else is.

A program takes in a block of streams, row after row. Streams do not meet, so nothing contends; additions to counters are
atomic all the same, so that no assumption is made on which thread sees what when. Must give what the operations of
`Part._reduce` give, which is tested in Triton's interpreter. It has not run on a GPU: hence it is used on request only
(``NPTI_REDUCE=triton``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npti_interp import _sketch

if TYPE_CHECKING:
    from npti_interp._device import Part

__all__ = ["reduce"]

BLOCK = 256
_GRID = {
    "A": float(_sketch._A), "B": float(_sketch._B), "C": float(_sketch._C),
    "PER_OCTAVE": float(_sketch._PER_OCTAVE), "MANTISSA": float(_sketch._MANTISSA),
    "LISTED": _sketch.LISTED, "NARROW": _sketch.NARROW_BINS, "WORDS": _sketch.BINS // 4,
}  # fmt: skip


@triton.jit
def _add(high_at, low_at, x, mask):
    """`npti_interp._device._add`."""
    high = tl.load(high_at, mask=mask, other=0.0)
    low = tl.load(low_at, mask=mask, other=0.0)
    total = high + x
    part = total - high
    tl.store(low_at, low + ((high - (total - part)) + (x - part)), mask=mask)
    tl.store(high_at, total, mask=mask)


@triton.jit
def _kernel(
    values, blocks, counts, mean, mean_rest, m2, m2_rest, words, base, width, over,
    n_rows, n_streams, row_stride, count_stride, share, seen_share,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, PER_OCTAVE: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    LISTED: tl.constexpr, NARROW: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    stream = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = stream < n_streams
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(n_rows):
        total += tl.load(values + row * row_stride + stream, mask=here, other=0.0).to(tl.float32)
    middle = total / n_rows

    start = tl.load(base + stream, mask=here, other=0).to(tl.int32)
    bins = tl.load(width + stream, mask=here, other=0).to(tl.int32)
    before = tl.load(over + stream, mask=here, other=0)
    listed = bins == 0
    size = tl.where(listed, LISTED, bins)
    entry_bits = tl.where(listed, 4, tl.where(bins > NARROW, 3, 5))
    square = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    for row in range(n_rows):
        v = tl.load(values + row * row_stride + stream, mask=here, other=0.0).to(tl.float32)
        off = v - middle
        square += off * off
        positive = here & (v > 0)
        block = tl.load(blocks + row)
        tl.atomic_add(counts + block * count_stride + stream, 1, mask=positive, sem="relaxed")
        bits = v.to(tl.int32, bitcast=True)
        s = (bits & 0x7FFFFF).to(tl.float32) * MANTISSA
        cubic = ((s * A + B) * s + C) * s
        code = tl.floor((((bits >> 23) - 127).to(tl.float32) + cubic) * PER_OCTAVE).to(tl.int32)
        place = tl.where(listed, before + above, code - start)
        above += (positive & (place >= bins)).to(tl.int32)
        inside = positive & (place >= 0) & (place < size)
        bit = tl.where(inside, place, 0) << entry_bits
        unit = tl.where(listed, code & 0xFFFF, 1)
        tl.atomic_add(words + stream * WORDS + (bit >> 5), unit << (bit & 31), mask=inside, sem="relaxed")
    tl.store(over + stream, before + above, mask=here)

    step = (middle - tl.load(mean + stream, mask=here, other=0.0)) - tl.load(mean_rest + stream, mask=here, other=0.0)
    _add(m2 + stream, m2_rest + stream, square + step * step * seen_share, here)
    _add(mean + stream, mean_rest + stream, step * share, here)


def reduce(part: Part, own: slice, seen: int, values: Tensor, blocks: Tensor) -> None:
    """Take at most as many tokens as there is room for into a part's streams.

    Args:
        part: changed in place.
        own: its streams that these values are of.
        seen: tokens that these streams have taken in before.
        values: ``[token, stream]``, of any floating type.
        blocks: each token's block.
    """
    n_rows, n_streams = values.shape
    values = values.contiguous()
    share = n_rows / (seen + n_rows)
    state: list[Any] = [part.counts[:, own], part.mean[own], part.mean_rest[own], part.m2[own], part.m2_rest[own]]
    state += [part.words[own], part.base[own], part.width[own], part.over[own]]
    with torch.cuda.device_of(values):  # of several, the one that holds the values; elsewhere this does nothing
        _kernel[(triton.cdiv(n_streams, BLOCK),)](
            values, blocks, *state, n_rows, n_streams, values.stride(0), part.counts.stride(0), share, seen * share,
            **_GRID, BLOCK=BLOCK, enable_fp_fusion=False,  # fused, products round otherwise and bins shift at their edges
        )  # fmt: skip
