"""Adding up shards: run folders in which `locate` answered parts of one list of questions."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from npti_interp._files import read_json, sha256_of, write_json
from npti_interp.activations import ActivationStatistics
from npti_interp.bench import PersonalityBench
from npti_interp.errors import ArtifactError, RunFolderError
from npti_interp.experiments._locate import Location, finish_location, read_run_config, second_pass, shown
from npti_interp.experiments._search_folder import SearchFiles, StoredRows, join_tables, remove_leftovers
from npti_interp.experiments._search_plan import SearchPlan, Shard, chunk_spans
from npti_interp.models import Model
from npti_interp.models._fingerprint import ModelFingerprint
from npti_interp.runs import RunFolder, verify_folder
from npti_interp.traits import POLES, Pole, Trait, as_trait

__all__ = ["merge_shards"]

_MAY_DIFFER = ("device", "linear", "batch_size", "cache_bytes")
"""Of shards: what changes no result but through rounding."""

_SOURCES = "shards.json"


@dataclass(frozen=True)
class _Part:
    folder: Path
    shard: Shard
    config: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return self.config["settings"]

    @property
    def trait(self) -> Trait:
        return as_trait(self.settings["trait"])

    @property
    def spans(self) -> list[range]:
        return chunk_spans(self.settings["n_questions"], self.settings["chunk"], self.shard)

    def __str__(self) -> str:
        return f"{shown(self.shard)} ({self.folder})"


def merge_shards(
    folders: Iterable[str | Path],
    out: str | Path,
    *,
    partial: bool = False,
    model: Model | None = None,
    bench: PersonalityBench | None = None,
    progress: bool = True,
) -> Location:
    """Add up the shards of a `locate` run, and choose the neurons on the whole.

    Counts and tokens are, as integers, those of one run over all questions. Mean and variance are so to rounding, and a
    95th percentile that is known is the one run's; for a few neurons more it is not known (`ActivationStatistics.merge`).
    Answers come in the order of the questions. The order in which folders are given does not matter: the result has
    the same bytes.

    The folder looks like that of a run that was never cut, with ``shards.json`` beside: which shards, and the SHA-256 of
    their manifests.

    Args:
        folders: finished run folders of ``locate(…, run=…, shard=…)``.
        out: the run folder of the whole; one that was cut short is gone on with.
        partial: do with the shards there are. Which ones are missing is recorded in the config, the statistics and the
            neurons, and a run over all questions never goes on from such a folder.
        model: only where statistics were reduced on a server: the model, for the second pass over the answers.
        bench: with ``model``: the bench; by default the embedded one.
        progress: show a bar.

    Returns:
        what `locate` would have returned.

    Raises:
        ValueError: no folders; shards of different models, benches or settings, cut in different ways, given twice, or
            missing; a model is needed.
        FileNotFoundError: a folder holds no run, or one that is not finished.
        RunFolderError: a folder holds no shard; ``out`` holds something else, or another process works in it.
        ArtifactError: a file is missing, altered, or not what its folder says.
        FingerprintMismatchError: ``model`` is not the shards'.
    """
    parts = sorted((_part(Path(folder)) for folder in folders), key=lambda p: (p.shard, str(p.folder)))
    if not parts:
        raise ValueError("no shards were given; give the run folders of `npti locate … --shard K/N`")
    target = Path(out)
    if any(target.resolve() == p.folder.resolve() for p in parts):
        raise ValueError(f"{target} is one of the shards; choose another folder for the whole")
    _require_alike(parts)
    missing = _require_each_once(parts, partial)
    first = parts[0]
    with tqdm(total=len(parts) * (1 + len(POLES)), desc="merge", unit="shard", delay=2, disable=not progress) as bar:
        sources = {"of": first.shard[1], "missing": missing, "manifests": _verified(parts, bar)}
        model = _for_second_pass(parts, model)
        with RunFolder(target, _whole(parts, missing)) as run:
            _claim(run, sources)
            remove_leftovers(run)
            for pole in POLES:
                _merge_pole(run, parts, pole, missing, bar)

            def count(pole: Pole, counted: Mapping[Pole, ActivationStatistics], limit: float) -> ActivationStatistics:
                assert model is not None
                spans = [span for part in parts for span in part.spans]
                plan = _plan(first, bench or PersonalityBench.embedded())
                return second_pass(run, plan, spans, model, progress)(pole, counted, limit)

            return finish_location(run, first.trait, None, first.settings["threshold"], count)


def _part(folder: Path) -> _Part:
    config = read_run_config(folder)
    shard = config["settings"]["shard"]
    if shard is None:
        raise RunFolderError(f"{folder} holds a whole run, not a shard: there is nothing to add to it")
    return _Part(folder, (int(shard[0]), int(shard[1])), config)


def _settings(part: _Part) -> dict[str, Any]:
    """All that decides a shard's numbers, one level deep."""
    flat: dict[str, Any] = {}
    for key, value in part.config.items():
        if key == "settings":
            flat |= {k: v for k, v in value.items() if k != "shard"}
        elif key == "fingerprint":
            flat["model"] = str(ModelFingerprint.from_json(value))
            flat |= {f"model's {k}": v for k, v in vars(ModelFingerprint.from_json(value)).items()}
        else:
            flat[key] = value
    return flat


def _require_alike(parts: Sequence[_Part]) -> None:
    """Raise unless the shards are parts of one run.

    Raises:
        ValueError: they differ in a setting that matters, or were cut differently; names two folders.
    """
    first, here = parts[0], _settings(parts[0])
    for part in parts[1:]:
        there = _settings(part)
        names = sorted(k for k in {*here, *there} if here.get(k) != there.get(k) and k not in _MAY_DIFFER)
        if names:
            shown_names = "; ".join(f"{k}: {here.get(k)!r} and {there.get(k)!r}" for k in names[:4])
            raise ValueError(
                f"{first.folder} and {part.folder} are not shards of one run: they differ in {shown_names}"
            )
        if part.shard[1] != first.shard[1]:
            raise ValueError(
                f"shards overlap: {first} and {part} are of lists cut in {first.shard[1]} and in {part.shard[1]} parts"
            )
    for name in _MAY_DIFFER:
        found = _values(parts, name)
        if len(found) > 1:
            warnings.warn(
                f"the shards differ in {name} ({', '.join(map(repr, found))}): the sum equals one run's to rounding only",
                stacklevel=3,
            )


def _values(parts: Sequence[_Part], name: str) -> list[Any]:
    """The different values that the shards have of a setting."""
    found: list[Any] = []
    for part in parts:
        value = _settings(part).get(name)
        if value not in found:
            found.append(value)
    return found


def _require_each_once(parts: Sequence[_Part], partial: bool) -> list[str]:
    """The shards that are missing.

    Raises:
        ValueError: one is there twice; some are missing, and the sum shall not be partial.
    """
    n = parts[0].shard[1]
    for one, other in itertools.pairwise(parts):
        if one.shard == other.shard:
            raise ValueError(f"shard {shown(one.shard)} was given twice: {one.folder} and {other.folder}")
    there = {part.shard[0] for part in parts}
    missing = [f"{k}/{n}" for k in range(1, n + 1) if k not in there]
    if missing and not partial:
        raise ValueError(
            f"{len(missing)} of {n} shards are missing: {_listed(missing)}; run them, or do without them with partial "
            "(on the command line --partial)"
        )
    return missing


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _verified(parts: Sequence[_Part], bar: tqdm[Any]) -> dict[str, str]:
    """The SHA-256 of the shards' manifests, after every file has been compared with them.

    Raises:
        FileNotFoundError: a shard is not finished.
        ArtifactError: a file is missing or altered, or a table has other rows than its shard.
    """
    found: dict[str, str] = {}
    for part in parts:
        recorded: Mapping[str, str] = {}
        if (part.folder / "manifest.json").is_file():
            recorded = verify_folder(part.folder)
        for pole in POLES:
            files = SearchFiles(part.trait, pole)
            if files.statistics not in recorded or files.answers not in recorded:
                raise FileNotFoundError(
                    f"shard {part} is not finished: the command that made it goes on from what is there"
                )
            places = StoredRows(part.folder / files.answers, ["place"], lambda row: int(row["place"]))
            spans = part.spans
            if list(places) != list(range(spans[0].start, spans[-1].stop)):
                raise ArtifactError(f"{part.folder / files.answers} does not hold the questions of shard {part}")
        found[shown(part.shard)] = sha256_of(part.folder / "manifest.json")
        bar.update()
    return found


def _statistics(part: _Part, pole: Pole) -> ActivationStatistics:
    return ActivationStatistics.load(part.folder / SearchFiles(part.trait, pole).statistics)


def _for_second_pass(parts: Sequence[_Part], model: Model | None) -> Model | None:
    """The model, if the percentiles take one.

    Raises:
        ValueError: they do, and none was given.
        FingerprintMismatchError: it is another.
    """
    # A sketch that has seen no token is of neither kind: the first shard that has seen some tells.
    complete = next((own.complete for own in (_statistics(p, Pole.HIGH) for p in parts) if own.total_tokens), True)
    if complete:
        return None
    if model is None:
        raise ValueError(
            "these shards were reduced on a server, where percentiles take a second pass over the answers of the chosen "
            "neurons: give the model with model= (on the command line --model, --backend and --remote)"
        )
    ModelFingerprint.from_json(parts[0].config["fingerprint"]).require_same(
        model.fingerprint, "the shards and the model"
    )
    return model


def _plan(part: _Part, bench: PersonalityBench) -> SearchPlan:
    """The whole list of questions.

    Raises:
        ValueError: of another bench.
    """
    if bench.digest != part.config["bench"]:
        raise ValueError(
            f"the shards were made with another bench than {bench.name!r}; give the one they were made with"
        )
    s = part.settings
    return SearchPlan(
        bench, part.trait, bench.questions(part.trait, "search", s["n_questions"]), s["chunk"], s["n_blocks"],
        s["max_new_tokens"], s["repetition_penalty"], s["batch_size"],
    )  # fmt: skip


def _whole(parts: Sequence[_Part], missing: Sequence[str]) -> dict[str, Any]:
    """The config of the whole: a run's that was never cut, with every value where the shards differ."""
    first = parts[0]
    settings = {**first.settings, "shard": None}
    config: dict[str, Any] = {**first.config, "settings": settings}
    for name in _MAY_DIFFER:
        if len(found := _values(parts, name)) > 1:
            (settings if name in settings else config)[name] = found
    if missing:
        config["missing_shards"] = list(missing)
    return config


def _claim(run: RunFolder, sources: Mapping[str, Any]) -> None:
    """Write down what is merged here.

    Raises:
        RunFolderError: the folder holds a run that was never cut, or other shards' sum.
    """
    path = run.path / _SOURCES
    if not run.done(_SOURCES):
        if set(run.recorded) - {"config.json"}:
            raise RunFolderError(f"{run.path} holds a run that was not merged from shards; choose another folder")
        write_json(path, sources)
        run.record(_SOURCES)
    elif read_json(path) != sources:
        raise RunFolderError(f"{run.path} was merged from other shards; choose another folder, or delete this one")


def _merge_pole(run: RunFolder, parts: Sequence[_Part], pole: Pole, missing: Sequence[str], bar: tqdm[Any]) -> None:
    files = SearchFiles(parts[0].trait, pole)
    if not (run.done(files.statistics) and run.done(files.answers)):
        whole = _statistics(parts[0], pole)
        for part in parts[1:]:
            whole = whole.merge(_statistics(part, pole))
            bar.update()
        whole.metadata.pop("shard", None)
        if missing:
            whole.metadata["missing_shards"] = list(missing)
        if whole.total_tokens == 0:
            raise ValueError("no generated token was fed back in any shard, so there is nothing to count")
        whole.save(run.path / files.statistics)
        join_tables(run.path / files.answers, (part.folder / files.answers for part in parts))
        run.replace((), files.statistics, files.answers)
        bar.update()
    else:
        bar.update(len(parts))
