"""Locating in a run folder: after each chunk of questions its answers and the statistics so far are on disk.

While a pole is at work the folder holds one file of statistics, over all chunks so far, and one table of answers a
chunk. After a chunk the new statistics are written beside the old ones, the manifest passes from the one to the other,
and the old ones go; a process killed in between leaves files that the manifest does not name, which the next one
removes. A collector that goes on from the file holds the very numbers of one that never stopped. At a pole's end the
tables become one, with a row group a chunk, and what is left is what a run of one chunk would have left.

Memory does not grow with the number of questions, but for the list of questions itself.
"""

from __future__ import annotations

import bisect
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from npti_interp._files import read_tensors, write_atomic, write_tensors
from npti_interp.activations import ActivationCollector, ActivationStatistics
from npti_interp.bench import Question
from npti_interp.errors import ArtifactError
from npti_interp.experiments._lab import Condition, answer_rows
from npti_interp.experiments._search_plan import SearchPlan
from npti_interp.generation import Answer, Progress
from npti_interp.models import Model
from npti_interp.neurons import beyond
from npti_interp.prompts import eliciting_personas
from npti_interp.runs import RunFolder
from npti_interp.traits import POLES, Pole, Trait

__all__ = [
    "SearchFiles",
    "StoredRows",
    "collect_in",
    "join_tables",
    "know_percentiles_in",
    "neurons_file",
    "remove_leftovers",
    "stored_answers",
    "stored_questions",
    "wanted_neurons",
]

T = TypeVar("T")

_TEXTS = ("trait", "condition", "pole", "question_id", "facet", "topic", "split", "question", "answer")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        ("tokens", pa.list_(pa.int64())),
        ("finished", pa.bool_()),
        *((name, pa.string()) for name in ("model", "fingerprint", "dtype", "backend", "bench")),
        ("max_new_tokens", pa.int64()),
        *((name, pa.float64()) for name in ("temperature", "repetition_penalty", "gamma", "threshold")),
        *((name, pa.int64()) for name in ("random_seed", "n_raised", "n_clamped")),
        ("persona", pa.string()),
        *((name, pa.int64()) for name in ("place", "block")),
        *((name, pa.string()) for name in ("item", "key")),
        ("suspect", pa.bool_()),
    ]
)
"""Said, not inferred: a chunk in which no question has a topic must fit to one in which all have."""

_KIND, _VERSION = "WindowCounts", 1


@dataclass(frozen=True)
class SearchFiles:
    """Names of one pole's files in a run folder; those of a finished run are as in a folder of `reproduce`."""

    trait: Trait
    pole: Pole

    @property
    def statistics(self) -> str:
        """Statistics over all questions."""
        return f"statistics/{self.trait}-{self.pole}.safetensors"

    @property
    def percentiles(self) -> str:
        """The same after the second pass, where they were reduced on a server."""
        return f"statistics/{self.trait}-{self.pole}-percentiles.safetensors"

    @property
    def answers(self) -> str:
        """All answers."""
        return f"answers/search-{self.trait}-{self.pole}.parquet"

    def so_far(self, chunks: int) -> str:
        """Statistics over the first ``chunks`` chunks."""
        return f"statistics/{self.trait}-{self.pole}-after-{chunks:06d}.safetensors"

    def windows_so_far(self, chunks: int) -> str:
        """Counts of the second pass over the first ``chunks`` chunks."""
        return f"statistics/{self.trait}-{self.pole}-windows-after-{chunks:06d}.safetensors"

    def part(self, chunk: int) -> str:
        """One chunk's answers."""
        return f"answers/search-{self.trait}-{self.pole}-part-{chunk:06d}.parquet"


def neurons_file(trait: Trait) -> str:
    """Name of the neurons' file."""
    return f"neurons/{trait}.safetensors"


def remove_leftovers(run: RunFolder) -> None:
    """Remove what a killed process left beside what is recorded."""
    run.remove_unrecorded("statistics/*-after-*.safetensors", "answers/search-*-part-*.parquet")


# -- tables ----------------------------------------------------------------------------------------------------------


class StoredRows(Sequence[T]):
    """Rows of a Parquet table as objects, read when they are asked for: one row group is in memory at a time.

    Args:
        path: the table.
        columns: the columns that are read.
        make: makes the object of a row.

    Raises:
        ArtifactError: not a whole Parquet file.
    """

    def __init__(self, path: Path, columns: Sequence[str], make: Callable[[Mapping[str, Any]], T]) -> None:
        self._path, self._columns, self._make = path, list(columns), make
        try:
            about: Any = pq.read_metadata(path)
        except (pa.ArrowInvalid, pa.ArrowIOError) as error:
            raise ArtifactError(f"{path} is not a whole Parquet file: {error}") from error
        sizes = [int(about.row_group(k).num_rows) for k in range(about.num_row_groups)]
        self._stops = list(itertools.accumulate(sizes))
        self._group, self._rows = -1, list[T]()

    def _load(self, group: int) -> list[T]:
        if group != self._group:
            with pq.ParquetFile(self._path) as file:
                rows: list[dict[str, Any]] = file.read_row_group(group, columns=self._columns).to_pylist()
            self._group, self._rows = group, [self._make(row) for row in rows]
        return self._rows

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = bisect.bisect_right(self._stops, at)
        return self._load(group)[at - (self._stops[group - 1] if group else 0)]

    def __iter__(self) -> Iterator[T]:
        for group in range(len(self._stops)):
            yield from self._load(group)

    def __repr__(self) -> str:
        return f"StoredRows({len(self):,} in {self._path})"


def stored_answers(path: Path) -> StoredRows[Answer]:
    """The answers of a table."""
    return StoredRows(
        path,
        ("answer", "tokens", "finished"),
        lambda row: Answer(row["answer"], row["tokens"], finished=row["finished"]),
    )


def stored_questions(path: Path) -> StoredRows[Question]:
    """The questions of a table of answers."""

    def make(row: Mapping[str, Any]) -> Question:
        named = {"id": "question_id", "text": "question"}
        fields = ("id", "trait", "facet", "item", "key", "topic", "split", "text", "suspect")
        return Question(**{name: row[named.get(name, name)] for name in fields})

    columns = ("question_id", "trait", "facet", "item", "key", "topic", "split", "question", "suspect")
    return StoredRows(path, columns, make)


def _write_part(path: Path, rows: pd.DataFrame) -> None:
    table = pa.Table.from_pandas(rows, schema=_SCHEMA, preserve_index=False).replace_schema_metadata(None)
    write_atomic(path, lambda scratch: pq.write_table(table, scratch, row_group_size=max(1, len(rows))))


def join_tables(path: Path, parts: Iterable[Path]) -> None:
    """Write tables one after the other into one, row group by row group; only one is in memory at a time."""

    def write(scratch: Path) -> None:
        with pq.ParquetWriter(scratch, _SCHEMA) as writer:
            for part in parts:
                with pq.ParquetFile(part) as file:
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group)
                        writer.write_table(table, row_group_size=max(1, len(table)))

    write_atomic(path, write)


# -- work ------------------------------------------------------------------------------------------------------------


def _rows(model: Model, plan: SearchPlan, pole: Pole, span: range, answers: Sequence[Answer]) -> pd.DataFrame:
    own = plan.questions[span.start : span.stop]
    facts = {
        "persona": [p.id for p in eliciting_personas(plan.bench, plan.trait, pole, len(span), span.start)],
        "place": list(span),
        "block": plan.blocks(span),
        "item": [q.item for q in own],
        "key": [q.key for q in own],
        "suspect": [q.suspect for q in own],
    }
    condition = Condition("persona", pole, facts=facts)
    return answer_rows(model, plan.bench, plan.trait, own, answers, condition, plan.decoding)


def collect_in(run: RunFolder, plan: SearchPlan, model: Model, pole: Pole, progress: Progress) -> None:
    """Answer the plan's questions as one pole and count, going on from what the folder holds.

    Raises:
        ValueError: no token was counted in all the questions.
        NonFiniteActivationError: NaN or infinity in a layer.
    """
    files, spans = SearchFiles(plan.trait, pole), plan.spans
    if run.done(files.statistics) and run.done(files.answers):
        progress.update(len(plan.places))
        return
    done = next((k for k in range(len(spans), 0, -1) if run.done(files.so_far(k))), 0)
    if not done:
        collector = plan.collector(model, pole)
    else:
        collector = ActivationCollector.resume(ActivationStatistics.load(run.path / files.so_far(done)))
        progress.update(spans[done - 1].stop - spans[0].start)
    for k in range(done, len(spans)):
        made = plan.answer(model, pole, spans[k], collector, progress)
        _write_part(run.path / files.part(k), _rows(model, plan, pole, spans[k], made))
        metadata = plan.metadata(model, pole, spans[k].stop - spans[0].start)
        collector.so_far(metadata).save(run.path / files.so_far(k + 1))
        run.replace([files.so_far(k)] if k else [], files.part(k), files.so_far(k + 1))
    if plan.shard is None:
        collector.result()  # raises where nothing was counted; other shards may have counted something
    last, parts = files.so_far(len(spans)), [files.part(k) for k in range(len(spans))]
    write_atomic(run.path / files.statistics, lambda scratch: shutil.copyfile(run.path / last, scratch))
    join_tables(run.path / files.answers, (run.path / part for part in parts))
    run.replace([last, *parts], files.statistics, files.answers)


def wanted_neurons(
    pole: Pole, statistics: Mapping[Pole, ActivationStatistics], threshold: float
) -> npt.NDArray[np.bool_]:
    """The neurons of one pole beyond ``threshold``, ``bool [layer, neuron]``: those whose a95 will be asked for."""
    high, low = (statistics[p].probability for p in POLES)
    return beyond(pole.sign * (high - low), threshold)


def know_percentiles_in(
    run: RunFolder, plan: SearchPlan, spans: Sequence[range], model: Model, pole: Pole,
    statistics: Mapping[Pole, ActivationStatistics], threshold: float, progress: Progress,
) -> ActivationStatistics:  # fmt: skip
    """One pole's statistics with a95 of every neuron beyond ``threshold``: the second pass, chunk by chunk.

    Args:
        run: the folder, which holds both poles' answers.
        plan: the questions.
        spans: the chunks whose answers those are, in order.
        model: as it was in the first pass.
        pole: the pole.
        statistics: both poles'.
        threshold: for |δ|.
        progress: advanced by one an answer.
    """
    files, own = SearchFiles(plan.trait, pole), statistics[pole]
    where = wanted_neurons(pole, statistics, threshold)
    if not run.done(files.percentiles):
        known, old = own, list[str]()
        if where.any():
            chosen, windows = own.percentile_windows(where)
            done = next((k for k in range(len(spans), 0, -1) if run.done(files.windows_so_far(k))), 0)
            fine = np.zeros(0, np.int32)
            if done:
                fine = read_tensors(run.path / files.windows_so_far(done), _KIND, _VERSION)[0]["fine"]
            answers = stored_answers(run.path / files.answers)
            at = sum(map(len, spans[:done]))
            progress.update(at)
            for k in range(done, len(spans)):
                given = answers[at : at + len(spans[k])]
                at += len(spans[k])
                more = plan.count_windows(model, pole, spans[k], given, windows, progress)
                fine = fine + more if k else more
                about = {"trait": plan.trait.value, "pole": pole.value, "chunks": k + 1}
                write_tensors(run.path / files.windows_so_far(k + 1), _KIND, _VERSION, {"fine": fine}, about)
                run.replace([files.windows_so_far(k)] if k else [], files.windows_so_far(k + 1))
            known, old = own.with_percentiles(chosen, fine), [files.windows_so_far(len(spans))]
        known.save(run.path / files.percentiles)
        run.replace(old, files.percentiles)
    return ActivationStatistics.load(run.path / files.percentiles)
