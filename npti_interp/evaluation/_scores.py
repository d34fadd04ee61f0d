"""From ratings of single answers to scores of conditions, with intervals over questions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "bootstrap_mean", "pair_scores"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over questions.

    Attributes:
        mean: the mean.
        low: lower end of the 95 % interval.
        high: upper end.
        variance: sample variance over questions (what the published tables print beside the mean).
        n: questions that entered.
        unscored: questions left out because they have no score.
    """

    mean: float
    low: float
    high: float
    variance: float
    n: int
    unscored: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def apart_from(self, other: Interval) -> bool:
        """Whether the two intervals do not overlap."""
        return self.low > other.high or self.high < other.low


def bootstrap_mean(
    values: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean with a percentile bootstrap interval.

    Args:
        values: one number a question; NaN is unscored, left out and counted.
        n_resamples: resamples of the questions.
        seed: of the resampling.
        confidence: of the interval.
    """
    array = np.asarray(values, dtype=np.float64)
    scored = array[np.isfinite(array)]
    lost = len(array) - len(scored)
    if len(scored) == 0:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0, lost)
    if len(scored) == 1:
        return Interval(float(scored[0]), math.nan, math.nan, math.nan, 1, lost)
    rng = np.random.default_rng(seed)
    means = scored[rng.integers(0, len(scored), (n_resamples, len(scored)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(scored.mean()), float(low), float(high), float(scored.var(ddof=1)), len(scored), lost)


def pair_scores(high: npt.ArrayLike, low: npt.ArrayLike) -> Floats:
    """Score of a pole pair out of 10, question by question: ``s(high answer) + (6 − s(low answer))``.

    The published code has no aggregation at all; this form, from 2 to 10, is inferred from the tables (METHOD.md
    section 3).

    Args:
        high: ratings 1–5 of the answers under the high pole.
        low: ratings 1–5 of the answers under the low pole, the same questions.

    Raises:
        ValueError: unequal lengths, or a rating outside 1 … 5.
    """
    a, b = np.asarray(high, np.float64), np.asarray(low, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} high ratings but {b.shape} low ones")
    for ratings in (a, b):
        known = ratings[np.isfinite(ratings)]
        if known.size and (known.min() < 1 or known.max() > 5):
            raise ValueError(f"ratings must lie in 1 … 5, got {known.min():g} … {known.max():g}")
    return a + (6.0 - b)
