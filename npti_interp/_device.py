r"""The reduction of `npti_interp._sketch` on the device that holds the values, in plain PyTorch.

What a step's layers give is kept until a group of layers (a *part*) is complete and then reduced in one go, some sixty
operations on ``[token, stream]`` whatever the number of layers; nothing is copied to the host and nothing waits for it.

State is `QuantileSketch`'s own, byte for byte (with counts and moments the 295 bytes a neuron of the host), so that what
`Part.download` brings back needs no conversion. Lists and counters are entries of 16, 8 or 32 bits of the same 60 words a
stream, and taking a value into any of them is one addition to one word: a list's next entry is 0 before, and a counter
that begins at bit ``o`` of a word counts by ``1 << o``. One ``scatter_add_`` does them all, in any order, and exactly as
long as no entry overflows.

*That none does* is known on the host without asking the device: after a check every list and every one-byte counter has
room for so many tokens, at least 64, and no stream gets more than one entry a token. When these are used up another
check opens the windows of lists that are nearly full and narrows windows whose counters nearly are (by the rules of
`npti_interp._sketch`, a little earlier than there: at 57 to 120 entries and at 192 to 255 counts). Only a check waits for
the device: twice, and a few times more if it finds something to do; once in 64 to 255 tokens of a part. Among the first
4,096 tokens it is 32 instead of 64, so that lists grow longer: a list that fills later is one of a neuron that fires too
seldom for its percentile to be above 0.

Moments are kept as pairs of float32, whose second member holds what the first could not: some devices have no float64.
A value that is NaN or infinite makes its stream's mean so for good, which is what a check looks at.

It is exercised on CPU tensors, where it agrees with `npti_interp._sketch`. It has not been timed on a GPU: the sixty
operations each read and write what they work on, so that memory traffic, some 300 bytes a value, is what it should cost
there. `npti_interp._device_triton` does all sixty in one kernel that reads each value twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from npti_interp import _sketch
from npti_interp._sketch import BINS, LISTED, NARROW_BINS, QuantileSketch
from npti_interp.errors import NonFiniteActivationError

__all__ = ["ROOM", "DeviceReducer", "Part", "not_finite"]

ROOM, FIRST_ROOM, FIRST = 64, 32, 4096
"""Tokens that every list and counter has room for after a check, later and among the first ``FIRST`` tokens."""
STREAMS = 1 << 17
"""Streams of a part, unless one layer has more: the more, the fewer operations and the larger their operands."""

_A, _B, _C, _PER_OCTAVE, _MANTISSA = map(
    float, (_sketch._A, _sketch._B, _sketch._C, _sketch._PER_OCTAVE, _sketch._MANTISSA)
)
_WORDS = BINS // 4
_SORTED = 1 << 14  # streams whose lists are sorted at once


def not_finite(layer: int) -> NonFiniteActivationError:
    """The error of a layer's values being NaN or infinite."""
    return NonFiniteActivationError(
        f"layer {layer}: NaN or infinite neuron values (first of their kind; earlier layers were finite). "
        "Half precision overflowing, damaged weights, or an edit with too large a γ do this"
    )


def grid_codes(values: Float[Tensor, "token stream"]) -> Int[Tensor, "token stream"]:
    """Bin of each positive value, to the bit what `npti_interp._sketch.grid_codes` says; anything for the others."""
    bits = values.view(torch.int32)
    s = (bits & 0x7FFFFF).float().mul_(_MANTISSA)
    cubic = (s * _A).add_(_B).mul_(s).add_(_C).mul_(s)
    octave = (bits >> 23).sub_(127)
    return cubic.add_(octave).mul_(_PER_OCTAVE).floor_().to(torch.int32)


def _add(high: Tensor, low: Tensor, x: Tensor) -> None:
    """``high + low += x`` with the rounding error of the sum kept in ``low`` (Knuth's two-sum)."""
    total = high + x
    part = total - high
    low += (high - (total - part)).add_(x - part)
    high.copy_(total)


def _start(upper: Tensor, middle: Tensor, lower: Tensor, size: int) -> Tensor:
    """`npti_interp._sketch._start` of many streams."""
    spare = lower - upper + (size - 1)
    low = lower - torch.div(spare * 3, 5, rounding_mode="floor")
    return torch.where(spare >= 0, low, middle - size * 2 // 5)


class Part:
    """Counts, moments and sketches of some consecutive layers, on one device.

    Args:
        layers: which.
        n_neurons: of each layer.
        n_blocks: blocks counted apart.
        device: where the values are.
        fused: `npti_interp._device_triton.reduce`, which does in one kernel what otherwise is done here.
    """

    def __init__(
        self,
        layers: range,
        n_neurons: int,
        n_blocks: int,
        device: torch.device,
        fused: Callable[..., None] | None = None,
    ) -> None:
        n = len(layers) * n_neurons
        self._fused = fused
        self.layers, self.n_neurons, self.device = layers, n_neurons, device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.counts = zeros(n_blocks, n, dtype=torch.int32)
        self.mean, self.mean_rest, self.m2, self.m2_rest = zeros(4, n, dtype=torch.float32)
        self.words = zeros(n, _WORDS, dtype=torch.int32)
        self.base = zeros(n, dtype=torch.int16)
        self.width = zeros(n, dtype=torch.uint8)
        self.over = zeros(n, dtype=torch.int32)
        self.seen = np.zeros(len(layers), np.int64)
        self._room = np.full(len(layers), LISTED)
        self._lists = np.ones(len(layers), bool)

    def take(self, first: int, values: Float[Tensor, "token stream"], blocks: Int[Tensor, " token"]) -> None:
        """Take in the values of some layers that have seen equally many tokens.

        Args:
            first: the first of these layers.
            values: of any floating type, one layer's neurons after the other's.
            blocks: each token's block.
        """
        at = first - self.layers.start
        own = slice(at, at + values.shape[1] // self.n_neurons)
        start = 0
        while start < len(values):
            wanted = self._wanted_room(at)
            piece = values[start : start + wanted]
            if self._room[own].min() < len(piece):
                self._make_room(own)
            self._reduce(own, piece, blocks[start : start + wanted])
            self._room[own] -= len(piece)
            self.seen[own] += len(piece)
            start += wanted

    def _wanted_room(self, layer: int) -> int:
        return FIRST_ROOM if self.seen[layer] < FIRST else ROOM

    def _streams(self, layers: slice) -> slice:
        return slice(layers.start * self.n_neurons, layers.stop * self.n_neurons)

    def _reduce(self, layers: slice, values: Tensor, blocks: Tensor) -> None:
        """Count, moments and sketch of no more tokens than there is room for. Nothing here may wait for the device."""
        own, n, seen = self._streams(layers), len(values), int(self.seen[layers.start])
        if self._fused is not None:
            self._fused(self, own, seen, values, blocks)
            return
        values = values.float()
        positive = values > 0
        self.counts[:, own].index_add_(0, blocks, positive.to(torch.int32))

        variance, mean = torch.var_mean(values, dim=0, correction=0)
        share = n / (seen + n)
        step = mean.sub_(self.mean[own]).sub_(self.mean_rest[own])
        _add(self.m2[own], self.m2_rest[own], variance.mul_(n).addcmul_(step, step, value=seen * share))
        _add(self.mean[own], self.mean_rest[own], step.mul_(share))

        code = grid_codes(values)
        base, width, over = self.base[own], self.width[own], self.over[own]
        place = code - base
        size = width.to(torch.int32)
        entry_bits = 5 - 2 * (width > NARROW_BINS).to(torch.int32)  # as a power of two
        unit: Tensor | None = None
        if self._lists[layers].any():
            listed = width == 0
            size = size.masked_fill(listed, LISTED)
            entry_bits = entry_bits.masked_fill_(listed, 4)
            place = torch.where(listed, positive.cumsum(0, dtype=torch.int32).add_(over - 1), place)
            unit = torch.where(listed, code.bitwise_and_(0xFFFF), 1)
        over += (positive & (place >= width)).sum(0, dtype=torch.int32)  # above the window, or in the list
        inside = (positive & (place >= 0)).logical_and_(place < size)
        bit = place.mul_(inside).bitwise_left_shift_(entry_bits)
        amount = inside.to(torch.int32) if unit is None else unit.mul_(inside)
        amount.bitwise_left_shift_(bit & 31)
        start = torch.arange(own.start * _WORDS, own.stop * _WORDS, _WORDS, device=self.device)
        word = bit.bitwise_right_shift_(5) + start
        self.words.view(-1).scatter_add_(0, word.view(-1), amount.view(-1))

    # -- checks --------------------------------------------------------------------------------------------------

    def _make_room(self, layers: slice) -> None:
        """Open full lists and narrow full windows, so that all have room again.

        Raises:
            NonFiniteActivationError: a value was NaN or infinite.
        """
        own, n = self._streams(layers), int(self.seen[layers.start])
        room = self._rooms(own)
        full = (room < self._wanted_room(layers.start)).nonzero().flatten() + own.start
        for index in full.split(_SORTED):
            is_list = self.width[index] == 0
            self._open(index[is_list], n)
            self._narrow(index[~is_list], n)
        if len(full):
            room = self._rooms(own)
        by_layer = [
            room.view(-1, self.n_neurons).amin(1),
            (self.width[own] == 0).view(-1, self.n_neurons).any(1).to(torch.int32),
            torch.isfinite(self.mean[own]).view(-1, self.n_neurons).all(1).to(torch.int32),
        ]
        least, lists, finite = torch.stack(by_layer).cpu().numpy()
        self._require_finite(finite, layers.start)
        self._room[layers], self._lists[layers] = least, lists.astype(bool)

    def _rooms(self, own: slice) -> Int[Tensor, " stream"]:
        """For how many tokens each stream has room."""
        width = self.width[own]
        most = self.words[own].view(torch.uint8).amax(1).to(torch.int32)
        room = torch.where(width == 0, LISTED - self.over[own], 255 - most)
        return room.masked_fill(
            (width > 0) & (width <= NARROW_BINS), 1 << 30
        )  # four-byte counters hold all tokens there may be

    def _open(self, index: Int[Tensor, " stream"], n: int) -> None:
        """Turn some streams' lists into windows: `npti_interp._sketch._open`."""
        if len(index) == 0:
            return
        length = self.over[index][:, None]
        codes = self.words[index].view(torch.int16).to(torch.int32)
        codes = codes.masked_fill(torch.arange(LISTED, device=self.device) >= length, 1 << 20).sort(1).values
        rank = 0.05 * n
        noise = 3.0 * math.sqrt(rank)

        def largest(k: int) -> Tensor:
            return codes.gather(1, (length - 1 - k).clamp_(min=0).long())[:, 0]

        upper = largest(max(0, int(rank - noise)))
        base = _start(upper, largest(int(rank)), largest(int(rank + noise)), BINS)
        base = torch.where(length[:, 0] - 1 < rank + noise, upper + (60 - BINS), base)
        place = codes - base[:, None]
        taken = codes < 1 << 20
        inside = (place >= 0) & (place < BINS)  # what pads the lists lies far above
        bit = (place * inside) << 3
        words = torch.zeros_like(self.words[index])
        words.scatter_add_(1, (bit >> 5).long(), inside.to(torch.int32) << (bit & 31))
        self.words[index] = words
        self.over[index] = ((place >= BINS) & taken).sum(1, dtype=torch.int32)
        self.base[index] = base.to(torch.int16)
        self.width[index] = BINS

    def _narrow(self, index: Int[Tensor, " stream"], n: int) -> None:
        """Give some streams four-byte counters round their percentile: `npti_interp._sketch._store`."""
        if len(index) == 0:
            return
        counts = self.words[index].view(torch.uint8).to(torch.int32)
        over = self.over[index][:, None]
        above = torch.cat(
            [counts.flip(1).cumsum(1, dtype=torch.int32).flip(1) + over, over], dim=1
        )  # at bin j or higher
        rank = 0.05 * n
        noise = 3.0 * math.sqrt(rank)
        upper, middle, lower = (
            ((above[:, :BINS] > x).sum(1, dtype=torch.int32) - 1).clamp_(min=0)
            for x in (rank - noise, rank, rank + noise)
        )
        start = _start(upper, middle, lower, NARROW_BINS).clamp_(0, BINS - NARROW_BINS)[:, None].long()
        self.words[index] = counts.gather(1, start + torch.arange(NARROW_BINS, device=self.device))
        self.over[index] = above.gather(1, start + NARROW_BINS)[:, 0]
        self.base[index] += start[:, 0].to(torch.int16)
        self.width[index] = NARROW_BINS

    def _require_finite(self, finite: npt.NDArray[Any], first: int = 0) -> None:
        if not finite.all():
            raise not_finite(self.layers.start + first + int(np.argmin(finite)))

    def check(self) -> None:
        """Wait for the device, and look whether all values were finite.

        Raises:
            NonFiniteActivationError: one was not; names the first layer of this part with one.
        """
        self._require_finite(torch.isfinite(self.mean).view(-1, self.n_neurons).all(1).cpu().numpy())

    def download(
        self, counts: npt.NDArray[np.int32], mean: npt.NDArray[np.float64], m2: npt.NDArray[np.float64],
        sketch: QuantileSketch,
    ) -> None:  # fmt: skip
        """Put the state into a collector's arrays: ``[layer, block, neuron]``, twice ``[layer, neuron]``, and a sketch."""
        first, last = self.layers.start, self.layers.stop
        shape = len(self.layers), self.n_neurons
        counts[first:last] = self.counts.cpu().numpy().reshape(-1, *shape).transpose(1, 0, 2)
        for target, high, low in ((mean, self.mean, self.mean_rest), (m2, self.m2, self.m2_rest)):
            target[first:last] = (high.cpu().double() + low.cpu().double()).numpy().reshape(shape)
        own = slice(first * self.n_neurons, last * self.n_neurons)
        sketch.bins[own] = self.words.cpu().numpy().view(np.uint8)
        sketch.base[own], sketch.width[own], sketch.over[own] = (
            t.cpu().numpy() for t in (self.base, self.width, self.over)
        )

    def upload(
        self, counts: npt.NDArray[np.int32], mean: npt.NDArray[np.float64], m2: npt.NDArray[np.float64],
        sketch: QuantileSketch, seen: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Go on from a collector's arrays, as `download` leaves them, and the tokens that each layer has seen."""
        first, last = self.layers.start, self.layers.stop

        def there(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        self.counts.copy_(there(counts[first:last].transpose(1, 0, 2).reshape(counts.shape[1], -1)))
        for source, high, low in ((mean, self.mean, self.mean_rest), (m2, self.m2, self.m2_rest)):
            value = source[first:last].reshape(-1)
            rounded = value.astype(np.float32)
            high.copy_(there(rounded))
            low.copy_(there((value - rounded).astype(np.float32)))
        own = slice(first * self.n_neurons, last * self.n_neurons)
        self.words.copy_(there(np.ascontiguousarray(sketch.bins[own]).view(np.int32)))
        for name in ("base", "width", "over"):
            getattr(self, name).copy_(there(getattr(sketch, name)[own]))
        self.seen[:] = seen[first:last]
        self._room[:] = 0  # unknown: the next values are preceded by a check
        self._lists[:] = (sketch.width[own] == 0).reshape(len(self.layers), -1).any(axis=1)


class DeviceReducer:
    """Collects what a step's layers give, and reduces it a part at a time.

    The tensors given to `add` are kept, not copied, until their part is complete or the step ends; nothing may change
    them in place before.

    Args:
        n_layers: of the model.
        n_neurons: of each layer.
        n_blocks: blocks counted apart.
        fused: see `Part`.
        begin: called with every new part, before anything is counted in it.
    """

    def __init__(
        self, n_layers: int, n_neurons: int, n_blocks: int, fused: Callable[..., None] | None = None,
        begin: Callable[[Part], None] | None = None,
    ) -> None:  # fmt: skip
        self._shape, self._begin, self._fused = (n_layers, n_neurons, n_blocks), begin, fused
        self._parts: dict[int, Part] = {}  # by layer
        self._waiting: dict[int, tuple[Tensor, int]] = {}  # by layer, with the tensor's version
        self._rows = self._blocks = np.zeros(0, np.int64)
        self._placed: dict[torch.device, tuple[Tensor | None, Tensor]] = {}

    def __contains__(self, layer: int) -> bool:
        """Whether a layer is reduced here."""
        return layer in self._parts or layer in self._waiting

    def __bool__(self) -> bool:
        return bool(self._parts or self._waiting)

    def forget(self) -> None:
        """Drop all parts, of which the state has been taken (`Part.download`)."""
        assert not self._waiting
        self._parts = {}

    @property
    def parts(self) -> list[Part]:
        """In the order of their layers."""
        return [part for layer, part in sorted(self._parts.items()) if part.layers.start == layer]

    def add(
        self, layer: int, values: Float[Tensor, "row d_mlp"], rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]
    ) -> None:
        """Take in one layer's values, now or when others have come; arguments as for `ActivationCollector.add`.

        Raises:
            NonFiniteActivationError: NaN or infinity among the values of this step or an earlier one.
        """
        if len(rows) == 0:
            return
        same = np.array_equal(rows, self._rows) and np.array_equal(blocks, self._blocks)
        if layer in self._waiting or not same:
            self.flush()
        if not same:
            self._rows, self._blocks, self._placed = rows.copy(), blocks.copy(), {}
        values = values.detach()
        # Changes of a tensor made in inference mode are not counted.
        self._waiting[layer] = (values.clone(), -1) if values.is_inference() else (values, values._version)
        part = self._parts.get(layer)
        if part is not None:
            if all(k in self._waiting for k in part.layers):
                self._flush(list(part.layers))
        elif len(self._waiting) * self._shape[1] >= STREAMS or layer == self._shape[0] - 1:
            self.flush()

    def flush(self) -> None:
        """Reduce what is waiting: the step is over.

        Raises:
            NonFiniteActivationError: NaN or infinity among the values of this step or an earlier one.
        """
        self._flush(sorted(self._waiting))

    def _flush(self, layers: list[int]) -> None:
        for run in self._runs(layers):
            self._reduce(run)

    def _runs(self, layers: list[int]) -> list[range]:
        """Consecutive layers of one part, or of none as yet and on one device, that have seen equally many tokens."""
        runs: list[list[int]] = []
        for layer in layers:
            last = runs[-1][-1] if runs else None
            if last is None or last + 1 != layer or self._kind(last) != self._kind(layer):
                runs.append([layer])
            else:
                runs[-1].append(layer)
        return [range(run[0], run[-1] + 1) for run in runs]

    def _kind(self, layer: int) -> tuple[Any, ...]:
        part = self._parts.get(layer)
        if part is None:
            return None, self._waiting[layer][0].device
        return part.layers, int(part.seen[layer - part.layers.start])

    def _reduce(self, run: range) -> None:
        own: list[Tensor] = []
        for layer in run:
            values, version = self._waiting.pop(layer)
            if version >= 0 and values._version != version:
                raise RuntimeError(
                    f"layer {layer}: its neuron values were changed in place after they were handed over and before they "
                    "were counted; set NPTI_REDUCE=host to have them copied to the host at once"
                )
            own.append(values)
        part = self._parts.get(run.start)
        if part is None:
            part = Part(run, *self._shape[1:], own[0].device, self._fused)
            if self._begin is not None:
                self._begin(part)
            self._parts |= dict.fromkeys(run, part)
        rows, blocks = self._places(part.device, len(own[0]))
        values = torch.cat([v.to(part.device) for v in own], dim=1)  # [row, stream], still of the model's type
        if rows is not None:
            values = values.index_select(0, rows)
        seen = part.seen[[layer - part.layers.start for layer in run]]
        assert (seen == seen[0]).all()
        try:
            part.take(run.start, values, blocks)
        except NonFiniteActivationError:
            for earlier in self.parts:  # of which no check has come round yet
                earlier.check()
            raise

    def _places(self, device: torch.device, n_rows: int) -> tuple[Tensor | None, Tensor]:
        """The step's rows (None for all of them) and blocks, where the values are."""
        if device not in self._placed:
            everything = np.array_equal(self._rows, np.arange(n_rows))
            rows = None if everything else torch.tensor(self._rows, device=device)
            self._placed[device] = rows, torch.tensor(self._blocks, device=device)
        return self._placed[device]

    def check(self) -> None:
        """Wait for the devices, and look whether all values were finite.

        Raises:
            NonFiniteActivationError: one was not; names the first layer with one.
        """
        self.flush()
        for part in self.parts:
            part.check()
