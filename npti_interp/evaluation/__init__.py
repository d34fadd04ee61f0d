"""Judging answers: ratings, fluency, intervals."""

from npti_interp.evaluation._fluency import distinct_n, repetition
from npti_interp.evaluation._likelihood import Calibration, LikelihoodJudge, area_under_curve
from npti_interp.evaluation._scores import Interval, bootstrap_mean, pair_scores

__all__ = [
    "Calibration",
    "Interval",
    "LikelihoodJudge",
    "area_under_curve",
    "bootstrap_mean",
    "distinct_n",
    "pair_scores",
    "repetition",
]
