"""The build's folder: a run folder whose tables are written in shards, and can be taken back.

Each stage is a folder of Parquet files ``TRAIT-NUMBER.parquet`` that pandas reads as one table. A shard is whole or not
there, and counts only once the manifest has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npti_interp._files import write_atomic
from npti_interp.errors import ArtifactError
from npti_interp.runs import RunFolder
from npti_interp.traits import Trait

__all__ = ["BENCH", "BuildFolder", "Row", "read_rows", "shard_name"]

Row = dict[str, Any]

BENCH = "bench"
"""The folder of the finished set."""

_CELL = {"trait": "text", "facet": "text", "item_id": "text", "item": "text", "key": "text", "topic": "text",
         "split": "text"}  # fmt: skip
_ANSWER = {"attempt": "small", "structured": "flag", "failure": "text", "kind": "text"}
_PERSONA = {"id": "text", "trait": "text", "pole": "text", "facet": "text", "second": "text", "circumstance": "text"}
_DROPPED = {"dropped": "text", "detail": "text"}

COLUMNS: dict[str, Mapping[str, str]] = {
    "1_personas": {**_PERSONA, "text": "text", **_ANSWER},
    "2_questions": {"id": "text", "cell": "text", **_CELL, "question": "text", **_ANSWER},
    "3_refined": {"id": "text", "cell": "text", **_CELL, "written": "text", "question": "text", **_ANSWER},
    "4_personas": {**_PERSONA, "text": "text", **_DROPPED},
    "4_filtered": {"id": "text", **_CELL, "question": "text", **_DROPPED},
    "5_splits": {"id": "text", **_CELL, "question": "text", "used": "flag", "unused": "text"},
}
"""Of each stage. ``failure`` and ``kind`` say why a call has no answer, ``dropped`` and ``detail`` why a filter took a
row out, ``unused`` why a good question is in neither split."""


def shard_name(stage: str, trait: Trait, number: int) -> str:
    """Path of a shard in the folder."""
    return f"{stage}/{trait.value.lower()}-{number:05d}.parquet"


def _schema(stage: str) -> Any:
    import pyarrow as pa

    kinds: dict[str, Any] = {"text": pa.string(), "small": pa.int16(), "flag": pa.bool_()}
    return pa.schema([(name, kinds[kind]) for name, kind in COLUMNS[stage].items()])


def read_rows(path: Path) -> list[Row]:
    """The rows of one shard.

    Raises:
        ArtifactError: not a whole Parquet file.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ArtifactError(f"{path} is not a whole Parquet file: there is no such file")
    try:
        rows: list[Row] = pq.ParquetFile(path).read().to_pylist()
    except Exception as error:  # whatever a damaged file provokes in the parser
        raise ArtifactError(f"{path} is not a whole Parquet file: {error}") from error
    return rows


class BuildFolder(RunFolder):
    """A `RunFolder` of shards."""

    def write(self, stage: str, trait: Trait, number: int, rows: Sequence[Row]) -> None:
        """Write one shard and take it into the manifest."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = shard_name(stage, trait, number)
        table = pa.Table.from_pylist(list(rows), schema=_schema(stage))
        write_atomic(self.path / name, lambda scratch: pq.write_table(table, scratch, compression="zstd"))
        self.record(name)

    def read(self, stage: str, trait: Trait, number: int) -> list[Row]:
        """The rows of a finished shard."""
        return read_rows(self.path / shard_name(stage, trait, number))

    def shards(self, stage: str, trait: Trait) -> list[int]:
        """Numbers of the finished shards of a trait."""
        start = f"{stage}/{trait.value.lower()}-"
        return sorted(int(name[len(start) :].split(".")[0]) for name in self._files if name.startswith(start))

    def rows(self, stage: str, trait: Trait) -> Iterator[Row]:
        """All rows of a trait, one shard in memory at a time."""
        for number in self.shards(stage, trait):
            yield from self.read(stage, trait, number)

    def forget(self, names: Iterable[str]) -> None:
        """Take files out of the manifest, and then off the disk: they are not done."""
        gone = [name for name in dict.fromkeys(names) if name in self._files]
        if not gone:
            return
        self.release(gone)
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
