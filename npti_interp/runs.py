"""Run folders: what a long run has done is on disk at once, and a run that was stopped continues where it was.

A folder holds ``config.json``, the run's files, and ``manifest.json`` with the SHA-256 of each. A step is done when
its file is in the manifest; it is then loaded, not computed again. Every file is written to a temporary name and
renamed, so a killed run leaves whole files only, and continuing it gives the same bytes as never having stopped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pandas as pd

from npti_interp._files import read_json, sha256_of, write_atomic, write_json
from npti_interp.errors import ArtifactError, RunFolderError

__all__ = ["RunFolder", "read_table", "verify_folder", "write_table"]

T = TypeVar("T")
_SCRATCH = re.compile(r"\.[\w.\-]+-[a-z0-9_]{8}\.[a-z]+")  # the temporary names of `write_atomic`


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as Parquet, whole or not at all."""
    write_atomic(path, lambda scratch: table.to_parquet(scratch, index=False))


def read_table(path: Path) -> pd.DataFrame:
    """Read a Parquet table.

    Raises:
        ArtifactError: not a whole Parquet file.
    """
    import pyarrow as pa

    try:
        return pd.read_parquet(path)
    except (pa.ArrowInvalid, pa.ArrowIOError, ValueError) as error:
        raise ArtifactError(f"{path} is not a whole Parquet file: {error}") from error


def verify_folder(folder: Path) -> dict[str, str]:
    """Compare every file of a run folder with its manifest.

    Returns:
        the checksums by name.

    Raises:
        ArtifactError: no manifest, or a file is missing or altered; the message names it.
    """
    manifest: Any = read_json(folder / "manifest.json")
    files: Any = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise ArtifactError(f"{folder / 'manifest.json'} is not a manifest")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(
                f"{path} is in the manifest but missing; restore it, or delete the folder and run again"
            )
        if sha256_of(path) != digest:
            raise ArtifactError(
                f"{path} was altered since it was written; restore it, or delete the folder and run again"
            )
    return files


def _flat(config: Any) -> dict[str, Any]:
    """One level of nesting opened, so that a difference is named by its own key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _flush(path: Path) -> None:
    """Wait until a file's content and name are on the disk, so that a machine that dies keeps them, too."""
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            # Some file systems cannot do this for folders; the content is what the manifest's checksum is about.
            with contextlib.nullcontext() if target is path else contextlib.suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


class RunFolder:
    """One run's folder, locked while in use. A context manager.

    Args:
        path: the folder; made if it is not there.
        config: the run's settings; a folder made with other settings is refused.

    Raises:
        RunFolderError: other settings, or another process is at work in it.
        ArtifactError: a file listed in the manifest is missing or altered.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._config = json.loads(json.dumps(dict(config)))
        self._files: dict[str, str] = {}
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._check_config()
            self._sweep()
            if (self.path / "manifest.json").is_file():
                self._files = verify_folder(self.path)
            if not self.done("config.json"):
                self.record("config.json")
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _acquire(self) -> None:
        import fcntl

        self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunFolderError(
                    f"{self.path} lies on a file system that gives no locks ({error.strerror}), so nothing could keep two "
                    "processes apart; choose a folder on another one (a local disk, say)"
                ) from error
            raise RunFolderError(
                f"another process is at work in {self.path}; wait for it, or choose another folder"
            ) from error

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # closing gives the lock back, also when the process is killed
            self._lock = None

    def _check_config(self) -> None:
        file = self.path / "config.json"
        if not file.is_file():
            if any(p.name != ".lock" and not _SCRATCH.fullmatch(p.name) for p in self.path.iterdir()):
                raise RunFolderError(f"{self.path} holds other files and no config.json; choose an empty or new folder")
            write_json(file, self._config)
            return
        there, now = _flat(read_json(file)), _flat(self._config)
        if names := sorted(k for k in {*there, *now} if there.get(k) != now.get(k)):
            shown = "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in names[:4])
            raise RunFolderError(
                f"{self.path} was made with other settings ({shown}); choose another folder, or delete this one"
            )

    def _sweep(self) -> None:
        """Remove what a killed run left half-written; the lock says that nobody is writing it."""
        for folder in (self.path, *(p for p in self.path.iterdir() if p.is_dir())):
            for left in folder.iterdir():
                if left.is_file() and _SCRATCH.fullmatch(left.name):
                    left.unlink()

    def done(self, name: str) -> bool:
        """Whether ``name`` is finished."""
        return name in self._files

    @property
    def recorded(self) -> tuple[str, ...]:
        """The finished files, in order."""
        return tuple(sorted(self._files))

    def record(self, *names: str) -> None:
        """Take finished files into the manifest."""
        self.replace((), *names)

    def replace(self, old: Sequence[str], *names: str) -> None:
        """Take finished files into the manifest in the place of others, which are removed.

        The manifest changes from the old to the new at one stroke, after the new ones are safely on the disk and
        before the old ones go; a kill in between leaves at most files that no manifest names (`remove_unrecorded`).
        """
        files = {name: digest for name, digest in self._files.items() if name not in old}
        for name in names:
            _flush(self.path / name)
            files[name] = sha256_of(self.path / name)
        manifest = self.path / "manifest.json"
        write_json(manifest, {"files": dict(sorted(files.items()))})
        self._files = files
        if old:
            _flush(manifest)
        for name in old:
            (self.path / name).unlink(missing_ok=True)

    def remove_unrecorded(self, *patterns: str) -> None:
        """Remove files of the run that are not in its manifest: a killed process left them.

        Args:
            patterns: as for `Path.glob`; only what the run itself writes may match.
        """
        for pattern in patterns:
            for path in self.path.glob(pattern):
                if not self.done(path.relative_to(self.path).as_posix()):
                    path.unlink()

    def step(
        self, name: str, compute: Callable[[], T], save: Callable[[Path, T], None], load: Callable[[Path], T]
    ) -> T:
        """The content of file ``name``: loaded if it is there, else computed, written and recorded.

        What is returned is always read back from the file, so that a run which continues and one which never
        stopped go on with the very same numbers.
        """
        if not self.done(name):
            save(self.path / name, compute())
            self.record(name)
        return load(self.path / name)

    def table(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """`step` for a Parquet table."""
        return self.step(name, compute, write_table, read_table)
