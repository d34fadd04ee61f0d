"""What every experiment stands on: model, questions, a calibrated judge and neurons, and the two steps of a test.

An experiment is a list of `Condition`s. `Session.test` answers questions under each of them (one prompt pass for all),
judges the answers, and leaves two tables in the run folder: answers and scores, a row a question × condition. Tables
of results, figures and words are then made from those files alone, without a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from npti_interp._files import library_versions
from npti_interp.activations import ActivationStatistics
from npti_interp.backends import linear_kernel
from npti_interp.bench import PersonalityBench, Question
from npti_interp.errors import ArtifactError, FingerprintMismatchError, NptiError
from npti_interp.evaluation import Calibration, Judge, LikelihoodJudge, bootstrap_mean
from npti_interp.evaluation._statistics import interval_columns
from npti_interp.figures import save_figure
from npti_interp.generation import Answer, Decoding
from npti_interp.interventions import Intervention
from npti_interp.models import Model, Prompt, load_model
from npti_interp.neurons import NeuronSet
from npti_interp.runs import RunFolder, read_config, read_table, verify_folder
from npti_interp.traits import TRAITS, Pole, Trait, as_pole, as_trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Condition",
    "ExperimentConfig",
    "ExperimentResult",
    "Lab",
    "Session",
    "answer_conditions",
    "interval_columns",
    "judge_conditions",
    "run_identity",
    "summarise",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Condition:
    """One way of answering the questions.

    Attributes:
        name: its name in tables.
        pole: the pole that is induced; None if none is.
        interventions: what is changed inside the model; question *i* gets the one at place *i* modulo their number
            (several draws of a random control, say).
        prompts: own prompts, one a question, instead of the question's text (a persona prompt, say).
        model: the model that answers, where it is another than the lab's (with a trained adapter, say).
        facts: further columns of the tables: one value, or a list with one a question.
    """

    name: str
    pole: Pole | None = None
    interventions: Sequence[Intervention | None] = (None,)
    prompts: Sequence[Prompt] | None = None
    model: Model | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Meter:
    """Passes work on to a bar in that bar's units."""

    def __init__(self, bar: tqdm[Any], weight: float) -> None:
        self._bar, self._weight = bar, weight

    def update(self, n: float = 1) -> None:
        """``n`` more units are done."""
        self._bar.update(min(n * self._weight, max(0.0, self._bar.total - self._bar.n)))  # float sums may overshoot


# What a row costs, in tokens of a plain forward pass: decoding is about 1.7 times as dear as scoring.
def decoding_cost(tokens: int) -> float:
    """Cost of decoding one answer."""
    return 1.7 * tokens + 60


def scoring_cost(answers: int, tokens: int, personas_per_pole: int) -> float:
    """Cost of judging ``answers`` answers to one question."""
    return (1 + 2 * personas_per_pole) * (answers * tokens + 90)


def answer_conditions(
    model: Model,
    bench: PersonalityBench,
    trait: Trait,
    questions: Sequence[Question],
    conditions: Sequence[Condition],
    decoding: Decoding,
    *,
    batch_size: int,
    progress: Any = False,
) -> pd.DataFrame:
    """Answer every question under every condition.

    Returns:
        one row a condition × question, conditions outermost, with every setting that produced it.

    Raises:
        ValueError: no conditions, or one whose prompts or facts do not fit the questions.
    """
    n = len(questions)
    if not conditions:
        raise ValueError("no conditions were given")
    for condition in conditions:
        if not condition.interventions:
            raise ValueError(f"condition {condition.name!r} has no intervention; use (None,) for the unedited model")
        if condition.prompts is not None and len(condition.prompts) != n:
            raise ValueError(f"condition {condition.name!r}: {len(condition.prompts)} prompts for {n} questions")
    answerers = {id(own): own for own in (c.model or model for c in conditions)}
    tables: dict[int, pd.DataFrame] = {}
    for which, answerer in answerers.items():
        places = [j for j, c in enumerate(conditions) if id(c.model or model) == which]
        made = _answers(
            answerer, questions, [conditions[j] for j in places], decoding, batch_size=batch_size, progress=progress
        )
        for k, j in enumerate(places):
            own = made[k * n : (k + 1) * n]
            tables[j] = answer_rows(model, bench, trait, questions, own, conditions[j], decoding)
    return pd.concat([tables[j] for j in range(len(conditions))], ignore_index=True)


def _answers(
    model: Model, questions: Sequence[Question], conditions: Sequence[Condition], decoding: Decoding, *,
    batch_size: int, progress: Any,
) -> list[Answer]:  # fmt: skip
    """One model's answers, conditions outermost; each prompt is passed once for all of them."""
    prompts: list[Prompt] = [q.text for q in questions]
    interventions, pairs = list[Intervention | None](), list[tuple[int, int]]()
    for condition in conditions:
        start = 0
        if condition.prompts is not None:
            start = len(prompts)
            prompts += condition.prompts
        place, own = len(interventions), condition.interventions
        interventions += own
        pairs += [(start + k, place + k % len(own)) for k in range(len(questions))]
    return model.generate_pairs(
        prompts, interventions, pairs, decoding=decoding, batch_size=batch_size, progress=progress
    )


def answer_rows(
    model: Model, bench: PersonalityBench, trait: Trait, questions: Sequence[Question], answers: Sequence[Answer],
    condition: Condition, decoding: Decoding,
) -> pd.DataFrame:  # fmt: skip
    """The rows of one condition in a table of answers."""
    facts = {**dict.fromkeys(_FACTS), **condition.facts}
    for name, value in facts.items():
        if isinstance(value, list) and len(value) != len(questions):
            raise ValueError(
                f"condition {condition.name!r}: {len(value)} values of {name} for {len(questions)} questions"
            )
    return pd.DataFrame(
        {
            "trait": trait.value,
            "condition": condition.name,
            "pole": condition.pole.value if condition.pole else None,
            "question_id": [q.id for q in questions],
            "facet": [q.facet for q in questions],
            "topic": [q.topic for q in questions],
            "split": [q.split for q in questions],
            "question": [q.text for q in questions],
            "answer": [str(a) for a in answers],
            "tokens": [list(a.tokens) for a in answers],
            "finished": [a.finished for a in answers],
            "model": model.name,
            "fingerprint": model.fingerprint.digest,
            "dtype": model.dtype,
            "backend": model.backend.name,
            "bench": bench.digest,
            "max_new_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "repetition_penalty": decoding.repetition_penalty,
            **facts,
        }
    )


_FACTS = ("gamma", "threshold", "random_seed", "n_raised", "n_clamped", "persona")
"""Columns that every table of answers has, so that tables of different experiments go together."""


def judge_conditions(
    judge: Judge,
    questions: Sequence[Question],
    answers: pd.DataFrame,
    judged: Sequence[Trait],
    *,
    facts: Sequence[str] = ("gamma",),
    progress: Any = False,
) -> pd.DataFrame:
    """Judge what `answer_conditions` made.

    Args:
        judge: the judge.
        questions: the questions, in the order of the table.
        answers: the table of answers.
        judged: traits to judge the answers on.
        facts: columns of the answers to carry over.
        progress: as for `LikelihoodJudge.raw_scores`.

    Returns:
        one row a judged trait × condition × question.
    """
    n = len(questions)
    groups = [answers.iloc[start : start + n] for start in range(0, len(answers), n)]
    keys = ["trait", "condition", "pole", *facts]
    parts: list[pd.DataFrame] = []
    for trait in judged:
        scored = judge.score_many(questions, [g["answer"].tolist() for g in groups], trait, progress=progress)
        parts += [
            pd.concat([g[keys].reset_index(drop=True), s], axis=1).assign(judged=trait.value, judge=judge.name)
            for g, s in zip(groups, scored, strict=True)
        ]
    return pd.concat(parts, ignore_index=True)


def summarise(scores: pd.DataFrame, by: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Mean rating and fluency of each group of answers, with 95 % intervals over questions.

    Args:
        scores: from `judge_conditions`.
        by: columns that make a group; a missing value is a group of its own.
        seed: of the bootstrap.

    Returns:
        ``by``, then ``rating``, ``nll`` and ``repetition`` with ``_low`` and ``_high``, ``distinct_2``, ``n`` and
        ``unscored``.
    """
    rows: list[dict[str, Any]] = []
    for key, part in scores.groupby(list(by), sort=False, dropna=False):
        named = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rating = bootstrap_mean(part["rating"], seed=seed)
        rows.append(
            {
                **named,
                **interval_columns("rating", rating),
                **interval_columns("nll", bootstrap_mean(part["nll"], seed=seed)),
                **interval_columns("repetition", bootstrap_mean(part["repetition_4"], seed=seed)),
                "distinct_2": part["distinct_2"].mean(),
                "n": rating.n,
                "unscored": rating.unscored,
            }
        )
    return pd.DataFrame(rows)


def finished_run(folder: Path, experiment: str, what_to_do: str) -> dict[str, Any]:
    """The config of a finished run, all of whose files are as they were written.

    Raises:
        FileNotFoundError: no finished run there.
        ArtifactError: a file is damaged, or the run is another experiment's.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished run; {what_to_do}")
    about = read_config(folder)
    found = about.get("experiment")
    if found != experiment:
        raise ArtifactError(
            f"{folder} holds {f'a run of {found}' if found else 'no run of an experiment'}, not of {experiment}"
        )
    read_config(folder, "settings")
    if not (folder / "summary.md").is_file():
        raise FileNotFoundError(f"{folder} holds no finished run; {what_to_do}")
    verify_folder(folder, finished="summary.md")
    return about


def run_identity(experiment: str, config: Any, model: Model, bench: PersonalityBench, **more: Any) -> dict[str, Any]:
    """What a run folder's files depend on: a folder made with another identity is refused."""
    return {
        "experiment": experiment,
        "settings": asdict(config),
        "bench": bench.digest,
        "fingerprint": model.fingerprint.to_json(),
        "dtype": model.dtype,
        "device": model.device,
        "backend": model.backend.name,
        "place": getattr(model.backend, "place", None),
        "linear": linear_kernel(),
        "versions": library_versions(),
        **more,
    }


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings that every experiment has; each adds its own.

    Attributes:
        traits: the traits, by name.
        n_questions: test questions a trait.
        max_new_tokens: length of their answers.
        gamma: strength γ of the edits.
        batch_size: rows decoded at once; changes no result.
        seed: of random neurons and of resampling.
    """

    traits: tuple[str, ...] = tuple(t.value for t in TRAITS)
    n_questions: int = 24
    max_new_tokens: int = 28
    gamma: float = 1.4
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "traits", tuple(as_trait(t).value for t in self.traits))
        if not self.traits or len(set(self.traits)) != len(self.traits):
            raise ValueError(f"traits must be at least one, and differ; got {self.traits}")
        if self.n_questions < 2 or self.max_new_tokens < 2 or self.batch_size < 1:
            raise ValueError(
                f"n_questions and max_new_tokens must be at least 2 and batch_size at least 1, got {self.n_questions}, "
                f"{self.max_new_tokens} and {self.batch_size}"
            )
        if not np.isfinite(self.gamma):
            raise ValueError(f"gamma must be finite, got {self.gamma}")

    @property
    def trait_list(self) -> list[Trait]:
        """The traits."""
        return [as_trait(t) for t in self.traits]

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict` through JSON."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: _as_tuple(v) for k, v in settings.items() if k in names})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


class Lab:
    """A model, a bench, a judge and neurons.

    Args:
        model: from `load_model`.
        bench: gives questions and personas.
        neurons: a `NeuronSet` of each trait, from anywhere.
        judge: by default a `LikelihoodJudge`, which calibrates itself when a trait is first judged.
        run: folder of a finished `reproduce` run, for experiments that need the statistics behind the neurons.

    Raises:
        FingerprintMismatchError: neurons of another model.
        ArtifactError: neurons of another trait.
    """

    def __init__(
        self,
        model: Model,
        bench: PersonalityBench,
        neurons: Mapping[Trait | str, NeuronSet] | Mapping[Trait, NeuronSet],
        *,
        judge: LikelihoodJudge | None = None,
        run: Path | None = None,
    ) -> None:
        self.model, self.bench, self.run = model, bench, run
        self.neurons: dict[Trait, NeuronSet] = {as_trait(t): n for t, n in neurons.items()}
        for trait, own in self.neurons.items():
            if own.fingerprint is not None:
                own.fingerprint.require_same(model.fingerprint, f"the neurons of {trait} and the model")
            if (found := own.metadata.get("trait", trait.value)) != trait.value:
                raise ArtifactError(f"the neurons given as those of {trait} are neurons of {found}")
        self.judge = judge or LikelihoodJudge(model, bench)

    @classmethod
    def from_run(cls, run: str | Path, *, model: Model | None = None, bench: PersonalityBench | None = None) -> Lab:
        """The model, neurons and calibrations of a finished `reproduce` run.

        Args:
            run: its folder.
            model: the model, if it is loaded already.
            bench: by default the embedded one.

        Raises:
            FileNotFoundError: no finished run there.
            ArtifactError: a file of it is damaged.
            FingerprintMismatchError: the run was made with another model.
        """
        folder = Path(run)
        about = finished_run(folder, "reproduce", f"`npti reproduce --out {folder}` makes or continues one")
        read_config(folder, "bench")
        settings = about["settings"]
        if missing := [k for k in ("model", "traits", "personas_per_pole") if k not in settings]:
            raise ArtifactError(f"{folder / 'config.json'} lacks the settings {', '.join(missing)}")
        bench = bench or PersonalityBench.embedded()
        if bench.digest != about["bench"]:
            raise ValueError(f"{folder} was made with another bench than {bench.name!r}; give the one it was made with")
        model = model or load_model(settings["model"])
        neurons = {as_trait(t): NeuronSet.load(folder / f"neurons/{t}.safetensors") for t in settings["traits"]}
        judge = LikelihoodJudge(model, bench, personas_per_pole=settings["personas_per_pole"])
        for trait in neurons:
            judge.use_calibration(trait, Calibration.load(folder / f"scores/calibration-{trait}.json"))
        return cls(model, bench, neurons, judge=judge, run=folder)

    @property
    def traits(self) -> list[Trait]:
        """The traits that there are neurons for."""
        return list(self.neurons)

    def of(self, trait: Trait | str) -> NeuronSet:
        """The neurons of a trait.

        Raises:
            ValueError: there are none.
        """
        wanted = as_trait(trait)
        if wanted not in self.neurons:
            raise ValueError(f"no neurons of {wanted} here, only of {', '.join(self.neurons)}; locate them first")
        return self.neurons[wanted]

    def _in_run(self, name: str) -> Path:
        if self.run is None:
            raise ValueError(
                "this needs the statistics behind the neurons: make the lab with Lab.from_run(folder of a finished run)"
            )
        return self.run / name

    def statistics(self, trait: Trait | str, pole: Pole | str) -> ActivationStatistics:
        """The statistics that the run chose the neurons from.

        Raises:
            ValueError: the lab was not made from a run.
            ArtifactError: the file is damaged, or holds another trait's or pole's.
            FingerprintMismatchError: it is of another model.
        """
        stem = f"statistics/{as_trait(trait)}-{as_pole(pole)}"
        # Of a run on a server: the ones whose percentiles are known.
        known = self._in_run(f"{stem}-percentiles.safetensors")
        path = known if known.is_file() else self._in_run(f"{stem}.safetensors")
        found = ActivationStatistics.load(path)
        found.fingerprint.require_same(self.model.fingerprint, f"{path} and the model")
        _require_own(path, trait, pole, found.metadata.get("trait"), found.metadata.get("pole"))
        return found

    def search_answers(self, trait: Trait | str, pole: Pole | str) -> pd.DataFrame:
        """The persona-prompted answers that the run located the neurons on.

        Raises:
            ValueError: the lab was not made from a run.
            ArtifactError: the file is damaged, or holds another trait's or pole's.
            FingerprintMismatchError: they are another model's answers.
        """
        path = self._in_run(f"answers/search-{as_trait(trait)}-{as_pole(pole)}.parquet")
        found = read_table(path)
        for name, pole_name, fingerprint in {*zip(found["trait"], found["pole"], found["fingerprint"], strict=True)}:
            _require_own(path, trait, pole, name, pole_name)
            if fingerprint != self.model.fingerprint.digest:
                raise FingerprintMismatchError(
                    f"{path} holds answers of the model {fingerprint}, not of {self.model.fingerprint.digest}"
                )
        return found

    @contextlib.contextmanager
    def session(
        self,
        experiment: str,
        config: ExperimentConfig,
        folder: str | Path | None,
        *,
        progress: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> Generator[Session]:
        """Open an experiment's run folder, or continue it.

        Args:
            experiment: its name.
            config: its settings.
            folder: its folder; by default one of its name in the lab's run folder.
            progress: show a bar.
            more: what else the run's identity holds.

        Raises:
            ValueError: no folder was given and the lab was not made from a run; no neurons of a trait.
            RunFolderError: the folder belongs to other settings, or another process works in it.
        """
        if folder is None:
            if self.run is None:
                raise ValueError("say which folder the experiment goes to: this lab was not made from a run")
            folder = self.run / experiment
        for trait in config.trait_list:
            self.of(trait)
            self.bench.questions(trait, "test", config.n_questions)  # too many: raises before any work
        identity = run_identity(
            experiment, config, self.model, self.bench,
            neurons={t.value: self.of(t).digest for t in config.trait_list},
            judge={"name": self.judge.name, "personas_per_pole": self.judge.personas_per_pole},
            **dict(more or {}),
        )  # fmt: skip
        with (
            RunFolder(folder, identity) as run,
            tqdm(disable=not progress, desc=experiment, unit="tok", unit_scale=True, smoothing=0.05) as bar,
        ):
            bar.total = 0
            yield Session(self, config, run, bar)


def _require_own(path: Path, trait: Trait | str, pole: Pole | str, *found: str | None) -> None:
    """Raise if a file says that it is of another trait or pole than its name.

    Raises:
        ArtifactError: it does.
    """
    wanted = as_trait(trait).value, as_pole(pole).value
    if any(own is not None and own != name for own, name in zip(found, wanted, strict=True)):
        raise ArtifactError(f"{path} is of {found[0]}, {found[1]} pole, not of {wanted[0]}, {wanted[1]} pole")


@dataclass
class Session:
    """An experiment at work in its run folder."""

    lab: Lab
    config: ExperimentConfig
    run: RunFolder
    bar: tqdm[Any]

    def _cost(self, n_questions: int, n_conditions: int, n_judged: int) -> tuple[float, float]:
        tokens = self.config.max_new_tokens
        judge = scoring_cost(n_conditions, tokens, self.lab.judge.personas_per_pole)
        return n_questions * n_conditions * decoding_cost(tokens), n_questions * n_judged * judge

    def plan(self, tests: Iterable[tuple[int, int, int]]) -> None:
        """Tell the bar what is coming: ``(questions, conditions, judged traits)`` of each `test`."""
        self.bar.total += sum(sum(self._cost(*test)) for test in tests)
        self.bar.refresh()

    def test(
        self,
        stem: str,
        trait: Trait,
        questions: Sequence[Question],
        conditions: Sequence[Condition] | Callable[[], Sequence[Condition]],
        *,
        judged: Sequence[Trait] | None = None,
        decoding: Decoding | None = None,
        facts: Sequence[str] = ("gamma",),
    ) -> pd.DataFrame:
        """Answer and judge: two steps, each done once and then read from its file.

        Args:
            stem: names the files ``answers/STEM.parquet`` and ``scores/STEM.parquet``.
            trait: the trait that is induced.
            questions: the questions.
            conditions: the conditions, or a function that makes them (called only if they are not answered yet).
            judged: traits to judge on; by default ``trait`` alone.
            decoding: by default greedy, of the config's length.
            facts: columns of the answers to carry into the scores.

        Returns:
            the scores: see `judge_conditions`.
        """
        answers, scores = f"answers/{stem}.parquet", f"scores/{stem}.parquet"
        on = [trait] if judged is None else list(judged)
        chosen = decoding or Decoding(self.config.max_new_tokens)
        answered, rated = self.run.done(answers), self.run.done(scores)

        def make() -> pd.DataFrame:
            own = list(conditions() if callable(conditions) else conditions)
            self.bar.set_postfix_str(f"{stem}: answering")
            cost, _ = self._cost(len(questions), len(own), 0)
            return answer_conditions(
                self.lab.model, self.lab.bench, trait, questions, own, chosen,
                batch_size=self.config.batch_size, progress=Meter(self.bar, cost / (len(own) * len(questions))),
            )  # fmt: skip

        made = self.run.table(answers, make)
        decoding_part, scoring_part = self._cost(len(questions), len(made) // len(questions), len(on))

        def rate() -> pd.DataFrame:
            self.bar.set_postfix_str(f"{stem}: judging")
            prompts = len(questions) * len(on) * (1 + 2 * self.lab.judge.personas_per_pole)
            meter = Meter(self.bar, scoring_part / max(1, prompts))
            return judge_conditions(self.lab.judge, questions, made, on, facts=facts, progress=meter)

        table = self.run.table(scores, rate)
        self.bar.update(answered * decoding_part + rated * scoring_part)  # what was there already
        return table

    def questions(self, trait: Trait, n: int | None = None) -> list[Question]:
        """Test questions of a trait, as many as the config says, spread over facets and topics."""
        return list(self.lab.bench.questions(trait, "test", n or self.config.n_questions))

    def finish(self, result: ExperimentResult) -> None:
        """Write the result's tables, words and figures, and take them into the manifest."""
        self.bar.set_postfix_str("tables and figures")
        self.bar.update(max(0.0, self.bar.total - self.bar.n))
        texts = {f"{name}.csv": t.to_csv(index=False, lineterminator="\n") for name, t in result.tables.items()}
        texts["summary.md"] = result.summary()
        self.run.texts(texts)
        self.run.figures(result.save_figures)


@dataclass(frozen=True)
class ExperimentResult(ABC):
    """What an experiment found; made from its folder's tables, without a model.

    Attributes:
        folder: its run folder.
        config: its settings.
        tables: the tidy tables by name.
    """

    folder: Path
    config: Any
    tables: dict[str, pd.DataFrame]

    name: ClassVar[str]
    config_type: ClassVar[type[ExperimentConfig]]

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path, config: Any) -> Self:
        """Make the tables from the folder's answers and scores."""

    @abstractmethod
    def summary(self) -> str:
        """What came out, in words (Markdown)."""

    @abstractmethod
    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """Figures by name, each with the data that was plotted."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a finished run of the experiment.

        Raises:
            FileNotFoundError: no finished run there.
            ArtifactError: a file is damaged, or the folder is another experiment's.
        """
        path = Path(folder)
        about = finished_run(path, cls.name, f"run the experiment {cls.name} with this folder")
        try:
            return cls.from_folder(path, cls.config_type.from_settings(about["settings"]))
        except NptiError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            # Its files are those of its manifest, but not what such a run writes.
            raise ArtifactError(f"{path} does not hold what a run of {cls.name} writes: {error!r}") from error

    def save_figures(self, folder: str | Path) -> list[Path]:
        """Draw every figure into ``folder`` as PDF, PNG, CSV and JSON.

        Returns:
            the files written.
        """
        about = read_config(self.folder, "fingerprint")
        settings = {
            "experiment": self.name, "settings": asdict(self.config), "fingerprint": about["fingerprint"],
            "seed": self.config.seed,
        }  # fmt: skip
        written: list[Path] = []
        for stem, (figure, data) in self.figures().items():
            written += save_figure(figure, Path(folder) / stem, data, settings)
        return written

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{name}</h4>{table.round(3).to_html(index=False)}" for name, table in self.tables.items())
