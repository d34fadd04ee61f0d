"""Locating: answer search questions as one pole and as the other, and compare which neurons fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from tqdm.auto import tqdm

from npti_interp._files import read_json
from npti_interp.activations import DEFAULT_BLOCKS, ActivationStatistics
from npti_interp.bench import PersonalityBench, Question
from npti_interp.errors import RunFolderError
from npti_interp.experiments._lab import run_identity
from npti_interp.experiments._search_folder import (
    SearchFiles,
    collect_in,
    know_percentiles_in,
    neurons_file,
    remove_leftovers,
    stored_answers,
    stored_questions,
    wanted_neurons,
)
from npti_interp.experiments._search_plan import DEFAULT_CHUNK, SearchPlan, Shard, as_shard, question_blocks
from npti_interp.generation import Answer, Progress
from npti_interp.models import Model
from npti_interp.neurons import NeuronSet, beyond, select_neurons
from npti_interp.runs import RunFolder, verify_folder
from npti_interp.serving import Generator
from npti_interp.traits import POLES, Pole, Trait, as_trait

__all__ = [
    "THRESHOLDS",
    "LocateConfig",
    "Location",
    "LocationShard",
    "as_threshold",
    "choose_threshold",
    "collect_plan",
    "finish_location",
    "locate",
    "question_blocks",
    "read_run_config",
    "second_pass",
    "shown",
]

THRESHOLDS: tuple[float, ...] = (0.10, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03)
MIN_SHARE = 0.04
EXPERIMENT = "locate"
"""What a run folder of `locate` says it is."""


@dataclass(frozen=True)
class Location:
    """What `locate` found.

    Attributes:
        trait: the trait.
        questions: the search questions.
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        answers: the answers behind them, by pole; of a run folder they are read when they are asked for.
        neurons: the neurons chosen.
        folder: the run folder it lies in, if it lies in one.
    """

    trait: Trait
    questions: Sequence[Question]
    high: ActivationStatistics
    low: ActivationStatistics
    answers: Mapping[Pole, Sequence[Answer]]
    neurons: NeuronSet
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Location:
        """Read a finished run folder of `locate` or `merge_shards`; no model is needed.

        Raises:
            FileNotFoundError: no finished run there.
            RunFolderError: it holds something else, or a shard.
            ArtifactError: a file is missing, altered or damaged.
        """
        path = Path(folder)
        config = read_run_config(path)
        if config["settings"]["shard"]:
            raise RunFolderError(
                f"{path} holds shard {shown(config['settings']['shard'])}; neurons are chosen on all shards: merge them"
            )
        trait, recorded = as_trait(config["settings"]["trait"]), verify_folder(path)
        if neurons_file(trait) not in recorded:
            raise FileNotFoundError(
                f"{path} holds an unfinished run; the command that made it goes on from what is there"
            )
        high, low = (
            ActivationStatistics.load(path / (own.percentiles if own.percentiles in recorded else own.statistics))
            for own in (SearchFiles(trait, pole) for pole in POLES)
        )
        neurons = NeuronSet.load(path / neurons_file(trait))
        questions = stored_questions(path / SearchFiles(trait, Pole.HIGH).answers)
        return cls(trait, questions, high, low, _answers(path, trait), neurons, path)

    def select(self, rule: str = "npti", **settings: Any) -> NeuronSet:
        """Choose anew from the same statistics; see `select_neurons`."""
        return select_neurons(self.high, self.low, rule, **settings)

    def _repr_html_(self) -> str:
        return self.neurons._repr_html_() + self.high._repr_html_() + self.low._repr_html_()


@dataclass(frozen=True)
class LocationShard:
    """One shard of what `locate` does: counts and answers to add up with `merge_shards`. It has no neurons yet.

    Attributes:
        trait: the trait.
        shard: ``(k, n)``: part *k* of *n*, counted from 1.
        questions: this part's search questions.
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        answers: the answers behind them, by pole, read when they are asked for.
        folder: the run folder it lies in.
    """

    trait: Trait
    shard: Shard
    questions: Sequence[Question]
    high: ActivationStatistics
    low: ActivationStatistics
    answers: Mapping[Pole, Sequence[Answer]]
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> LocationShard:
        """Read a finished shard; no model is needed.

        Raises:
            FileNotFoundError: no finished shard there.
            RunFolderError: it holds something else, or a whole run.
            ArtifactError: a file is missing, altered or damaged.
        """
        path = Path(folder)
        settings = read_run_config(path)["settings"]
        if settings["shard"] is None:
            raise RunFolderError(f"{path} holds a whole run, not a shard: read it with Location.load")
        trait, recorded = as_trait(settings["trait"]), verify_folder(path)
        if any(SearchFiles(trait, pole).statistics not in recorded for pole in POLES):
            raise FileNotFoundError(
                f"{path} holds an unfinished run; the command that made it goes on from what is there"
            )
        high, low = (ActivationStatistics.load(path / SearchFiles(trait, pole).statistics) for pole in POLES)
        questions = stored_questions(path / SearchFiles(trait, Pole.HIGH).answers)
        return cls(trait, as_shard(settings["shard"]), questions, high, low, _answers(path, trait), path)

    def __repr__(self) -> str:
        return (
            f"LocationShard({self.trait}, {shown(self.shard)}: {len(self.questions):,} questions, "
            f"{self.high.total_tokens + self.low.total_tokens:,} tokens)"
        )

    def _repr_html_(self) -> str:
        what = f"Shard {shown(self.shard)} of {self.trait}: {len(self.questions):,} questions"
        return f"<p>{what}</p>" + self.high._repr_html_() + self.low._repr_html_()


def shown(shard: Sequence[int]) -> str:
    """A shard as people write it: ``k/n``."""
    return f"{shard[0]}/{shard[1]}"


def _answers(folder: Path, trait: Trait) -> dict[Pole, Sequence[Answer]]:
    return {pole: stored_answers(folder / SearchFiles(trait, pole).answers) for pole in POLES}


def read_run_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder of `locate`.

    Raises:
        FileNotFoundError: no run there.
        RunFolderError: another experiment's.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run; `npti locate TRAIT --run {folder}` makes one")
    config: Any = read_json(folder / "config.json")
    found = config.get("experiment") if isinstance(config, dict) else None
    if found != EXPERIMENT:
        raise RunFolderError(f"{folder} holds a run of {found or 'something else'}, not of locate")
    return config


def _require_generator_of(model: Model, generator: Generator | None) -> None:
    """Raise unless the generator, if there is one, answers with this model.

    Raises:
        TypeError: it is no generator.
        FingerprintMismatchError: it answers with another model.
    """
    given: Any = generator
    if given is None:
        return
    if not isinstance(given, Generator):
        raise TypeError(
            f"generator must have a fingerprint, generate() and identity(), as ServedGenerator and VLLMGenerator have; got "
            f"a {type(given).__name__}"
        )
    given.fingerprint.require_same(model.fingerprint, "the generator and the model")


def collect_plan(
    model: Model, plan: SearchPlan, pole: Pole, progress: bool | Progress
) -> tuple[ActivationStatistics, list[Answer]]:
    """One pole in memory, chunk by chunk: what `collect_in` does, without a folder."""
    collector, answers = plan.collector(model, pole), list[Answer]()
    for span in plan.spans:
        answers += plan.answer(model, pole, span, collector, progress)
    return collector.result(plan.metadata(model, pole, len(answers))), answers


def choose_threshold(high: ActivationStatistics, low: ActivationStatistics, *, min_share: float = MIN_SHARE) -> float:
    """The largest threshold of 0.10, 0.09 … 0.03 that gives each pole at least ``min_share`` of the FFN's neurons.

    The published 0.10 gives LLaMA-3-8B 4.3 % of its neurons a pole on average (METHOD.md section 6) but a small model
    far fewer. The rule looks at counts on search questions only, never at an outcome.

    Args:
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        min_share: share of all FFN neurons.

    Returns:
        the threshold; the smallest one if even that leaves too few.
    """
    high.require_comparable(low)
    delta = high.probability - low.probability
    for threshold in THRESHOLDS:
        if min(beyond(delta, threshold).mean(), beyond(-delta, threshold).mean()) >= min_share:
            return threshold
    return THRESHOLDS[-1]


@dataclass(frozen=True)
class LocateConfig:
    """Settings of a run folder of `locate`; the bytes of its files depend on nothing else but model and bench.

    Attributes:
        trait: the trait, by name.
        n_questions: search questions, over all shards.
        max_new_tokens: length of each answer.
        threshold: for |δ|, or ``"auto"``.
        repetition_penalty: of the decoding.
        n_blocks: question blocks.
        chunk: questions a chunk.
        batch_size: rows decoded at once; None leaves it to the model's memory.
        cache_bytes: that memory, where it decides.
        shard: ``(k, n)``, or None for all questions.
        generator: identity of what made the answers; None where the model did.
    """

    trait: str
    n_questions: int
    max_new_tokens: int
    threshold: float | str
    repetition_penalty: float
    n_blocks: int
    chunk: int
    batch_size: int | None
    cache_bytes: int | None
    shard: Shard | None
    generator: dict[str, Any] | None = None


def as_threshold(value: float | str) -> float | str:
    """A threshold for |δ|, checked.

    Raises:
        ValueError: outside (0, 1], and not ``"auto"``.
    """
    if value != "auto" and not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"threshold must lie in (0, 1] or be 'auto', got {value!r}")
    return value if isinstance(value, str) else float(value)


@overload
def locate(
    model: Model, bench: PersonalityBench, trait: Trait | str, *, n_questions: int | None = None,
    max_new_tokens: int = 100, threshold: float | str = 0.10, repetition_penalty: float = 1.0,
    n_blocks: int = DEFAULT_BLOCKS, batch_size: int | None = None, chunk: int = DEFAULT_CHUNK,
    run: str | Path | None = None, shard: None = None, progress: bool | Progress = True,
    generator: Generator | None = None,
) -> Location: ...  # fmt: skip
@overload
def locate(
    model: Model, bench: PersonalityBench, trait: Trait | str, *, n_questions: int | None = None,
    max_new_tokens: int = 100, threshold: float | str = 0.10, repetition_penalty: float = 1.0,
    n_blocks: int = DEFAULT_BLOCKS, batch_size: int | None = None, chunk: int = DEFAULT_CHUNK,
    run: str | Path | None = None, shard: str | Shard, progress: bool | Progress = True,
    generator: Generator | None = None,
) -> LocationShard: ...  # fmt: skip
def locate(
    model: Model,
    bench: PersonalityBench,
    trait: Trait | str,
    *,
    n_questions: int | None = None,
    max_new_tokens: int = 100,
    threshold: float | str = 0.10,
    repetition_penalty: float = 1.0,
    n_blocks: int = DEFAULT_BLOCKS,
    batch_size: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    run: str | Path | None = None,
    shard: str | Shard | None = None,
    progress: bool | Progress = True,
    generator: Generator | None = None,
) -> Location | LocationShard:
    """Find the neurons of a trait: METHOD.md section 1.

    With ``run`` everything goes into a run folder, chunk by chunk: what was stopped or killed goes on where it was when
    the same call is made again, to the same bytes, and memory does not grow with the number of questions. The numbers
    are those of the call without it.

    With ``shard`` as well, only that part of the questions is answered, by this process or on this machine. Blocks and
    personas are those of the whole list, so that `merge_shards` gives exactly what one run would have given.

    Args:
        model: from `load_model`.
        bench: gives personas and search questions.
        trait: the trait.
        n_questions: search questions, spread over facets and topics; all by default. Over all shards.
        max_new_tokens: length of each answer.
        threshold: for |δ|; ``"auto"`` is `choose_threshold`.
        repetition_penalty: of the decoding (the published search uses 1.1).
        n_blocks: question blocks for standard errors.
        batch_size: rows decoded at once; changes no result.
        chunk: questions that are done, and saved, together; a shard is a number of whole chunks.
        run: the run folder; made if it is not there.
        shard: ``"k/n"`` or ``(k, n)``: part *k* of *n*, counted from 1; needs ``run``.
        progress: show a bar, or advance the one given by one an answer.
        generator: makes the answers instead of ``model``, which then only replays them: a `ServedGenerator`, say. A run
            folder goes on only with the generator that it was begun with, and shards add up only if they had the same.

    Returns:
        statistics of both poles, the answers, and the neurons (which a shard has not).

    Raises:
        ValueError: unknown trait, threshold outside (0, 1], more questions than there are, fewer than blocks; a shard
            that is none, without a folder, or of fewer chunks than shards.
        RunFolderError: the folder belongs to other settings, or another process works in it.
        ArtifactError: a file of the folder is damaged.
        TypeError: something else than a generator as ``generator``.
        FingerprintMismatchError: the generator answers with another model.
        NonFiniteActivationError: NaN or infinity in a layer.
    """
    _require_generator_of(model, generator)
    wanted, limit = as_trait(trait), as_threshold(threshold)
    part = None if shard is None else as_shard(shard)
    if part is not None and run is None:
        raise ValueError("a shard goes into a run folder, from which it is merged: give run= as well")
    # Asked for by number even when all are wanted: that deals them out over facets and topics.
    wished = len(bench.questions(wanted, "search")) if n_questions is None else n_questions
    questions = bench.questions(wanted, "search", wished)
    if len(questions) < n_blocks:
        raise ValueError(
            f"{len(questions)} questions cannot fill {n_blocks} blocks; use more questions or fewer blocks"
        )
    plan = SearchPlan(
        bench, wanted, questions, chunk, n_blocks, max_new_tokens, repetition_penalty, batch_size, part, generator
    )
    if run is not None:
        config = LocateConfig(
            wanted.value, len(questions), max_new_tokens, limit, repetition_penalty, n_blocks, chunk, batch_size,
            model.cache_bytes if batch_size is None else None, part, None if generator is None else generator.identity(),
        )  # fmt: skip
        return _locate_in(Path(run), plan, config, model, progress)
    found = {pole: _collect_shown(model, plan, pole, progress) for pole in POLES}
    statistics = {pole: own for pole, (own, _) in found.items()}
    answers = {pole: own for pole, (_, own) in found.items()}
    chosen = _threshold(limit, statistics)
    high, low = (_known(plan, model, pole, statistics, answers[pole], chosen) for pole in POLES)
    return Location(wanted, questions, high, low, answers, select_neurons(high, low, threshold=chosen))


def _collect_shown(
    model: Model, plan: SearchPlan, pole: Pole, progress: bool | Progress
) -> tuple[ActivationStatistics, list[Answer]]:
    if not isinstance(progress, bool):
        return collect_plan(model, plan, pole, progress)
    with tqdm(total=len(plan.questions), desc="collect", delay=2, disable=not progress) as bar:
        return collect_plan(model, plan, pole, bar)


def _threshold(limit: float | str, statistics: Mapping[Pole, ActivationStatistics]) -> float:
    high, low = (statistics[pole] for pole in POLES)
    return choose_threshold(high, low) if isinstance(limit, str) else limit


def _known(
    plan: SearchPlan, model: Model, pole: Pole, statistics: Mapping[Pole, ActivationStatistics],
    answers: Sequence[str], threshold: float,
) -> ActivationStatistics:  # fmt: skip
    """One pole's statistics with a95 of its neurons, in memory: what `know_percentiles_in` does, without a folder."""
    own, where = statistics[pole], wanted_neurons(pole, statistics, threshold)
    if own.complete or not where.any():
        return own
    chosen, windows = own.percentile_windows(where)
    counts = (
        plan.count_windows(model, pole, span, answers[span.start : span.stop], windows, False) for span in plan.spans
    )
    fine = next(counts)
    for more in counts:
        fine = fine + more
    return own.with_percentiles(chosen, fine)


def second_pass(
    run: RunFolder, plan: SearchPlan, spans: Sequence[range], model: Model, progress: bool | Progress
) -> SecondPass:
    """The second pass over the answers of some chunks in a run folder, with a bar of its own."""

    def count(pole: Pole, counted: Mapping[Pole, ActivationStatistics], threshold: float) -> ActivationStatistics:
        with tqdm(total=sum(map(len, spans)), desc=f"percentiles {pole}", disable=progress is not True) as bar:
            return know_percentiles_in(run, plan, spans, model, pole, counted, threshold, bar)

    return count


def _locate_in(
    folder: Path, plan: SearchPlan, config: LocateConfig, model: Model, progress: bool | Progress
) -> Location | LocationShard:
    trait, n = plan.trait, len(POLES) * len(plan.places)
    with (
        RunFolder(folder, run_identity(EXPERIMENT, config, model, plan.bench)) as run,
        tqdm(total=n, desc=f"locate {trait}", unit="answer", disable=progress is not True, smoothing=0.05) as bar,
    ):
        remove_leftovers(run)
        for pole in POLES:
            collect_in(run, plan, model, pole, bar if isinstance(progress, bool) else progress)
        if plan.shard is None:
            second = second_pass(run, plan, plan.spans, model, progress)
            return finish_location(run, trait, plan.questions, config.threshold, second)
        return LocationShard.load(folder)


SecondPass = Callable[[Pole, Mapping[Pole, ActivationStatistics], float], ActivationStatistics]
"""Makes a95 of one pole's neurons beyond a threshold known, where statistics were reduced on a server."""


def finish_location(
    run: RunFolder, trait: Trait, questions: Sequence[Question] | None, limit: float | str, second_pass: SecondPass
) -> Location:
    """Choose the neurons in a run folder that holds both poles' statistics and answers.

    Args:
        run: the folder.
        trait: the trait.
        questions: the questions; None reads them from the folder when they are asked for.
        limit: threshold for |δ|, or ``"auto"``.
        second_pass: called for each pole whose percentiles are not known.
    """
    folder = run.path
    counted = {pole: ActivationStatistics.load(folder / SearchFiles(trait, pole).statistics) for pole in POLES}
    chosen = _threshold(limit, counted)
    high, low = (own if own.complete else second_pass(pole, counted, chosen) for pole, own in counted.items())
    neurons = run.step(
        neurons_file(trait),
        lambda: select_neurons(high, low, threshold=chosen),
        lambda path, found: found.save(path),
        NeuronSet.load,
    )
    asked = stored_questions(folder / SearchFiles(trait, Pole.HIGH).answers) if questions is None else questions
    return Location(trait, asked, high, low, _answers(folder, trait), neurons, folder)
