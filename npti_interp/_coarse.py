"""A quantile sketch in two passes, for values that never come here.

A server sends back, for every neuron, counts of its positive values in 18 coarse bins (runs of 36 bins of the grid of
`npti_interp._sketch`, from 2e-4 to 70). They add up exactly over jobs, and tell in which coarse bins the order statistics
behind a percentile lie. A second pass over the same answers counts, for chosen neurons only, the grid's bins inside
those. What comes out is then what one pass over the values would have given, to the same 1 %. Neurons that were not
chosen, and percentiles outside the coarse bins, are NaN: never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from npti_interp._files import require_array
from npti_interp._programs import COARSE_BINS, COARSE_START, FINE_BINS
from npti_interp._sketch import representatives
from npti_interp.errors import ArtifactError

__all__ = ["CoarseSketch"]

_ZERO, _UNKNOWN = -32_768, 32_767


class CoarseSketch:
    """Coarse counts of several streams, and fine counts of some of them.

    Attributes:
        coarse: ``int32 [stream, 18]`` (int64 after a merge), positive values in each coarse bin; the first takes what is smaller, the last
            what is larger.
        chosen: ``int64 [chosen]``, streams with fine counts, ascending.
        starts: ``int32 [chosen, 2]``, first grid bins of their two windows.
        fine: ``int32 [chosen, 2, 36]``, counts inside them.
        q: the quantile that the windows were laid for (NaN before the second pass).
    """

    def __init__(
        self,
        coarse: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        chosen: npt.NDArray[np.int64] | None = None,
        starts: npt.NDArray[np.int32] | None = None,
        fine: npt.NDArray[np.int32] | None = None,
        q: float = float("nan"),
    ) -> None:
        self.coarse = coarse
        self.chosen = np.zeros(0, np.int64) if chosen is None else chosen
        self.starts = np.zeros((0, 2), np.int32) if starts is None else starts
        self.fine = np.zeros((0, 2, FINE_BINS), np.int32) if fine is None else fine
        self.q = q

    complete = False
    """Whether every stream's percentile is known without a second pass."""

    @classmethod
    def empty(cls, n_streams: int) -> Self:
        """Nothing seen yet."""
        return cls(np.zeros((n_streams, COARSE_BINS), np.int32))

    def copy(self) -> Self:
        """An independent copy."""
        return type(self)(self.coarse.copy(), self.chosen.copy(), self.starts.copy(), self.fine.copy(), self.q)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What a file holds."""
        return {
            "coarse": self.coarse, "coarse_chosen": self.chosen, "coarse_starts": self.starts, "coarse_fine": self.fine,
            "coarse_q": np.array([self.q]),
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Inverse of `tensors`.

        Raises:
            ArtifactError: arrays that are no sketch.
        """
        coarse = require_array(tensors, "coarse", (None, COARSE_BINS), np.int32, np.int64).copy()
        chosen = require_array(tensors, "coarse_chosen", (None,), np.int64).copy()
        starts = require_array(tensors, "coarse_starts", (len(chosen), 2), np.int32).copy()
        fine = require_array(tensors, "coarse_fine", (len(chosen), 2, FINE_BINS), np.int32).copy()
        q = float(require_array(tensors, "coarse_q", (1,), np.float64)[0])
        windows = COARSE_START * FINE_BINS, (COARSE_START + COARSE_BINS - 1) * FINE_BINS
        sound = (
            (coarse >= 0).all()
            and (fine >= 0).all()
            and ((chosen >= 0) & (chosen < len(coarse))).all()
            and (np.diff(chosen) > 0).all()
            and ((starts >= windows[0]) & (starts <= windows[1]) & (starts % FINE_BINS == 0)).all()
            and (np.isnan(q) or 0 < q < 1)
        )
        if not sound:
            raise ArtifactError("a coarse sketch's counts or windows lie outside what one can hold")
        return cls(coarse, chosen, starts, fine, q)

    def merge(self, other: Self, n: int) -> Self:
        """Both sketches' values together; fine counts are dropped, as the percentile may have moved."""
        return type(self)(self.coarse.astype(np.int64) + other.coarse)

    @staticmethod
    def _ranks(q: float, n: int) -> tuple[int, int, float]:
        """From above: ranks of the two order statistics, and the upper one's weight."""
        place = q * (n - 1)
        low = int(np.floor(place))
        high = min(low + 1, n - 1)
        return n - 1 - low, n - 1 - high, place - low

    def windows(self, streams: npt.NDArray[np.int64], q: float, n: int) -> npt.NDArray[np.int32]:
        """First grid bins ``int32 [stream, 2]`` of the coarse bins in which the two order statistics lie."""
        above = self.coarse[streams][:, ::-1].cumsum(axis=1)
        low, high, _ = self._ranks(q, n)
        steps = np.stack([(above <= rank).sum(axis=1) for rank in (low, high)], axis=1)
        bins = COARSE_BINS - 1 - np.minimum(steps, COARSE_BINS - 1)
        return ((bins + COARSE_START) * FINE_BINS).astype(np.int32)

    def with_fine(self, chosen: npt.NDArray[np.int64], fine: npt.NDArray[np.int32], q: float, n: int) -> Self:
        """The same with the second pass's counts.

        Raises:
            ValueError: they do not add up to the coarse counts: they are of other answers.
        """
        starts = self.windows(chosen, q, n)
        bins = starts // FINE_BINS - COARSE_START
        off, of = 0, 0
        for window in range(2):
            own = self.coarse[chosen, bins[:, window]]
            inner = (bins[:, window] > 0) & (bins[:, window] < COARSE_BINS - 1)
            off += int(np.abs(fine[:, window].sum(axis=1) - own)[inner].sum())
            of += int(own[inner].sum())
        # On the whole, as half precision moves single values over a bin's edge from one pass to another.
        if off > max(10, 0.1 * of):
            raise ValueError("the second pass counted other values than the first: were the answers the same?")
        return type(self)(self.coarse, chosen, starts, fine, q)

    def quantile(self, q: float, n: int, positive: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """See `npti_interp._sketch.QuantileSketch.quantile`; NaN where a second pass has not been made for ``q``."""
        lower, upper, weight = self._ranks(q, n)
        out = np.where(positive <= upper, 0.0, np.nan)  # both order statistics are not positive
        if len(self.chosen) and q == self.q:
            codes = np.stack([self._codes(rank, window, positive) for window, rank in enumerate((lower, upper))])
            values = np.where(codes == _ZERO, 0.0, representatives(np.where(np.abs(codes) > 10_000, 0, codes)))
            values = np.where(codes == _UNKNOWN, np.nan, values)
            out[self.chosen] = values[0] + weight * (values[1] - values[0])
        return out

    def _codes(self, rank: int, window: int, positive: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Grid bin of the value that ``rank`` others of its stream are above, for the chosen streams."""
        bins = self.starts[:, window] // FINE_BINS - COARSE_START
        over = np.array([self.coarse[s, b + 1 :].sum() for s, b in zip(self.chosen, bins, strict=True)], np.int64)
        fine = self.fine[:, window]
        # The last coarse bin holds what lies above its fine ones, too.
        last = bins == COARSE_BINS - 1
        over = over + np.where(last, self.coarse[self.chosen, COARSE_BINS - 1] - fine.sum(axis=1), 0)
        steps = (over[:, None] + fine[:, ::-1].cumsum(axis=1) <= rank).sum(axis=1)
        code = self.starts[:, window] + FINE_BINS - 1 - steps
        known = (steps < FINE_BINS) & (over <= rank)
        return np.where(positive[self.chosen] <= rank, _ZERO, np.where(known, code, _UNKNOWN))
