r"""`LikelihoodJudge`: how much likelier an answer is in the mouth of one pole than of the other.

For an answer *a* of *T* tokens to question *q*, under persona descriptions *d* that never produced an answer:

    r(a) = mean_{d ∈ high} log p(a | d, q) / T − mean_{d ∈ low} log p(a | d, q) / T

by the *unedited* model. A logistic curve, fitted on persona-prompted answers of known pole to search questions, turns
*r* into P(high) and a rating 1 + 4 P(high). Its AUC on prompted answers that the fit has not seen goes with every
score: it says what the rating is worth on this model.

Fluency is the answer's negative log-likelihood per token under the unedited model and the neutral prompt, beside
distinct-2 and repetition, which a model in a loop cannot fool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize as _optimize
from scipy import special as _special
from scipy import stats as _stats

from npti_interp._files import from_fields, read_json
from npti_interp.bench import Persona, PersonalityBench, Question
from npti_interp.errors import ArtifactError
from npti_interp.evaluation._fluency import distinct_n, repetition
from npti_interp.evaluation._judge import require_sets
from npti_interp.generation import Progress
from npti_interp.models import Model
from npti_interp.prompts import persona_prompt
from npti_interp.traits import POLES, Pole, Trait, as_trait

__all__ = ["Calibration", "LikelihoodJudge", "area_under_curve"]

Floats = npt.NDArray[np.float64]
_RESAMPLES = 500


@dataclass(frozen=True)
class Calibration:
    """How a judge's raw score becomes a rating, and what it is worth.

    Attributes:
        slope: of the logistic curve.
        intercept: of the logistic curve.
        auc: area under the ROC curve on persona-prompted answers held out from the fit: 0.5 is chance, 1 perfect.
        n_fit: answers in the fit.
        n_held_out: answers behind the AUC.
        auc_low: lower end of the AUC's 95 % interval, by bootstrap over the held-out questions.
        auc_high: its upper end.
    """

    slope: float
    intercept: float
    auc: float
    n_fit: int
    n_held_out: int
    auc_low: float = math.nan
    auc_high: float = math.nan

    def __str__(self) -> str:
        backwards = "" if self.slope > 0 else "; it reads this trait BACKWARDS"
        return f"AUC {self.auc:.2f} [{self.auc_low:.2f}, {self.auc_high:.2f}] on {self.n_held_out} held-out answers{backwards}"

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read one that was written as JSON.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: not a calibration, or with numbers that none has.
        """
        made = from_fields(cls, read_json(path), str(path))
        shares = (made.auc, made.auc_low, made.auc_high)
        if not (math.isfinite(made.slope) and math.isfinite(made.intercept)) or any(s < 0 or s > 1 for s in shares):
            raise ArtifactError(f"{path}: {made} is no calibration")
        if min(made.n_fit, made.n_held_out) < 0:
            raise ArtifactError(f"{path}: a number of answers below 0")
        return made

    def rating(self, raw: npt.ArrayLike) -> Floats:
        """Ratings 1–5 of raw scores; NaN stays NaN."""
        return 1.0 + 4.0 * _special.expit(self.slope * np.asarray(raw, np.float64) + self.intercept)


def area_under_curve(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Probability that a random positive scores above a random negative (ties count half); NaN if one is empty."""
    a, b = (np.asarray(v, np.float64) for v in (positive, negative))
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if not len(a) or not len(b):
        return math.nan
    return float(_stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))


def _fit_logistic(high: Floats, low: Floats) -> tuple[float, float]:
    """Slope and intercept by maximum likelihood with a weak Gaussian prior on the standardised slope."""
    x = np.concatenate([high, low])
    y = np.concatenate([np.ones(len(high)), np.zeros(len(low))])
    centre, scale = float(x.mean()), float(x.std()) or 1.0
    z = (x - centre) / scale

    def loss(w: Floats) -> float:
        logit = w[0] * z + w[1]
        return float(np.sum(np.logaddexp(0, logit) - y * logit) + 0.5 * w[0] ** 2 / 25.0)

    found = _optimize.minimize(loss, np.zeros(2), method="BFGS").x
    return float(found[0] / scale), float(found[1] - found[0] * centre / scale)


def _reason(answer: str, lost: bool) -> str | None:
    if not lost:
        return None
    return "likelihood is not finite" if answer.strip() else "empty answer"


class LikelihoodJudge:
    """Judges answers by the unedited model's own likelihoods.

    Args:
        model: the model that judges; best the one that was edited, without its edit.
        bench: gives the judge personas.
        personas_per_pole: descriptions that judge one answer; they rotate over the facets from question to question,
            so that all of them take part.

    Raises:
        ValueError: fewer judge personas than asked for.
    """

    name = "likelihood"

    def __init__(self, model: Model, bench: PersonalityBench, *, personas_per_pole: int = 2) -> None:
        if personas_per_pole < 1:
            raise ValueError(f"personas_per_pole must be at least 1, got {personas_per_pole}")
        self._model, self._bench = model, bench
        self.personas_per_pole = personas_per_pole
        self._calibrations: dict[Trait, Calibration] = {}

    def _panel(self, trait: Trait, index: int) -> dict[Pole, list[Persona]]:
        panel: dict[Pole, list[Persona]] = {}
        for pole in POLES:
            own = self._bench.personas(trait, pole, "judge")
            if len(own) < self.personas_per_pole:
                raise ValueError(
                    f"{trait}, {pole}: {self.personas_per_pole} judge personas asked for, the bench has {len(own)}"
                )
            step = max(1, len(own) // self.personas_per_pole)
            panel[pole] = [own[(index + j * step) % len(own)] for j in range(self.personas_per_pole)]
        return panel

    def raw_scores(
        self,
        questions: Sequence[Question],
        answers: Sequence[Sequence[str]],
        trait: Trait | str,
        *,
        progress: bool | Progress = False,
    ) -> tuple[Floats, Floats]:
        """Uncalibrated scores of several answers to each question.

        Args:
            questions: the questions.
            answers: for each question, any number of answers (the same number for all).
            trait: the trait to judge.
            progress: show a bar, or advance the one given by one a prompt.

        Returns:
            *r* and the negative log-likelihood per token under the neutral prompt, each ``[question, answer]``; NaN
            where an answer is empty.

        Raises:
            ValueError: the model is edited (see `Model.editing`): judges rate with the plain one.
        """
        self._model.require_unedited("a judge")
        wanted = as_trait(trait)
        prompts: list[Any] = []
        repeated: list[Sequence[str]] = []
        for index, (question, own) in enumerate(zip(questions, answers, strict=True)):
            panel = self._panel(wanted, index)
            prompts.append(question.text)
            prompts += [persona_prompt(p, question) for pole in POLES for p in panel[pole]]
            repeated += [own] * (1 + 2 * self.personas_per_pole)
        sums, lengths = self._model.log_likelihoods(prompts, repeated, progress=progress)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.array(sums) / np.array(lengths, dtype=np.float64)
        each = each.reshape(len(questions), 1 + 2 * self.personas_per_pole, -1)
        raw = each[:, 1 : 1 + self.personas_per_pole].mean(axis=1) - each[:, 1 + self.personas_per_pole :].mean(axis=1)
        return raw, -each[:, 0]

    def calibrate(
        self,
        trait: Trait | str,
        questions: Sequence[Question],
        high_answers: Sequence[str],
        low_answers: Sequence[str],
        *,
        progress: bool | Progress = False,
    ) -> Calibration:
        """Fit the rating curve on persona-prompted answers of known pole.

        Half of the questions fit the curve, the others give the AUC of the ratings; both halves hold every facet.

        Args:
            trait: the trait.
            questions: search questions, at least 8.
            high_answers: answers prompted with high-pole personas (not the judge's).
            low_answers: answers prompted with low-pole personas.
            progress: as for `raw_scores`.

        Returns:
            the calibration, which `score` uses from now on.

        Raises:
            ValueError: too few questions or scorable answers, or unequal numbers.
        """
        wanted = as_trait(trait)
        if len(questions) < 8:
            raise ValueError(f"calibration needs at least 8 questions, got {len(questions)}")
        pairs = list(zip(high_answers, low_answers, strict=True))
        raw, _ = self.raw_scores(questions, pairs, wanted, progress=progress)
        fits = np.array([(i + i // 6) % 2 == 0 for i in range(len(questions))])
        scorable = np.isfinite(raw).all(axis=1)
        fit, held = raw[fits & scorable], raw[~fits & scorable]
        if len(fit) < 2 or len(held) < 2:
            raise ValueError(f"{int(scorable.sum())} of {len(questions)} questions have two scorable answers: too few")
        slope, intercept = _fit_logistic(fit[:, 0], fit[:, 1])
        held = slope * held
        rng = np.random.default_rng(0)
        again = [area_under_curve(*held[rng.integers(0, len(held), len(held))].T) for _ in range(_RESAMPLES)]
        low, high = np.quantile(again, [0.025, 0.975])
        found = Calibration(
            slope, intercept, area_under_curve(held[:, 0], held[:, 1]), 2 * len(fit), 2 * len(held), float(low),
            float(high),
        )  # fmt: skip
        self._calibrations[wanted] = found
        return found

    def calibration(self, trait: Trait | str) -> Calibration:
        """The calibration of ``trait``; makes its own persona-prompted answers if `calibrate` has not been called."""
        wanted = as_trait(trait)
        if wanted not in self._calibrations:
            from npti_interp.prompts import persona_prompts

            questions = self._bench.questions(wanted, "search", min(24, len(self._bench.questions(wanted, "search"))))
            made = {
                pole: self._model.generate(persona_prompts(self._bench, wanted, pole, questions), max_new_tokens=48)
                for pole in POLES
            }
            self.calibrate(wanted, questions, made[Pole.HIGH], made[Pole.LOW])
        return self._calibrations[wanted]

    def use_calibration(self, trait: Trait | str, calibration: Calibration) -> None:
        """Use a calibration made earlier (a resumed run)."""
        self._calibrations[as_trait(trait)] = calibration

    def score(
        self,
        questions: Sequence[Question],
        answers: Sequence[str],
        trait: Trait | str,
        *,
        progress: bool | Progress = False,
    ) -> pd.DataFrame:
        """Judge one answer a question.

        Args:
            questions: the questions.
            answers: their answers.
            trait: the trait to judge.
            progress: as for `raw_scores`.

        Returns:
            one row an answer: ``question_id``, ``raw``, ``rating`` (1–5), ``auc`` of the judge, ``nll`` (nats a
            token), ``distinct_2``, ``repetition_4``, ``unscored`` (the reason, or None). Empty answers are unscored:
            their numbers are NaN.

        Raises:
            ValueError: unequal numbers of questions and answers, or none.
        """
        return self.score_many(questions, [answers], trait, progress=progress)[0]

    def score_many(
        self,
        questions: Sequence[Question],
        conditions: Sequence[Sequence[str]],
        trait: Trait | str,
        *,
        progress: bool | Progress = False,
    ) -> list[pd.DataFrame]:
        """`score` for several sets of answers to the same questions, each prompt being passed once for all."""
        require_sets(questions, conditions)
        calibration = self.calibration(trait)
        raw, nll = self.raw_scores(questions, list(zip(*conditions, strict=True)), trait, progress=progress)
        frames: list[pd.DataFrame] = []
        for c, answers in enumerate(conditions):
            lost = ~np.isfinite(raw[:, c])
            frames.append(
                pd.DataFrame(
                    {
                        "question_id": [q.id for q in questions],
                        "raw": raw[:, c],
                        "rating": calibration.rating(raw[:, c]),
                        "auc": calibration.auc,
                        "nll": nll[:, c],
                        "distinct_2": [distinct_n(a) for a in answers],
                        "repetition_4": [repetition(a) for a in answers],
                        "unscored": [_reason(a, x) for a, x in zip(answers, lost, strict=True)],
                    }
                )
            )
        return frames
