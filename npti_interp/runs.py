"""Run folders: what a long run has done is on disk at once, and a run that was stopped continues where it was.

A folder holds ``config.json``, the run's files, and ``manifest.json`` with the SHA-256 of each. A step is done when
its file is in the manifest; it is then loaded, not computed again. Every file is written to a temporary name and
renamed, so a killed run leaves whole files only, and continuing it gives the same bytes as never having stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pandas as pd

from npti_interp._files import (
    cannot_write,
    is_scratch,
    read_json,
    require_writable,
    sha256_of,
    write_atomic,
    write_json,
)
from npti_interp.errors import ArtifactError, RunFolderError

__all__ = [
    "RunFolder",
    "at_work_in",
    "read_config",
    "read_manifest",
    "read_table",
    "require_usable",
    "verify_folder",
    "write_table",
]

T = TypeVar("T")
_LOCK, _MANIFEST = ".lock", "manifest.json"


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as Parquet, whole or not at all."""
    write_atomic(path, lambda scratch: table.to_parquet(scratch, index=False))


def read_table(path: Path) -> pd.DataFrame:
    """Read a Parquet table.

    Raises:
        ArtifactError: not a whole Parquet file.
    """
    if not os.path.isfile(path):  # of a folder pandas would read whatever lies in it
        raise ArtifactError(f"{path} is not a whole Parquet file: there is no such file")
    try:
        return pd.read_parquet(path)
    except Exception as error:  # whatever a damaged file provokes in the parser
        raise ArtifactError(f"{path} is not a whole Parquet file: {error}") from error


def _manifest_digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, str]:
    """The checksums that a folder's manifest lists, by the files' names.

    Raises:
        FileNotFoundError: no manifest.
        ArtifactError: not a manifest, or one that was edited.
    """
    path = folder / _MANIFEST
    manifest: Any = read_json(path)
    files: Any = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ArtifactError(f"{path} is not a manifest")
    if manifest.get("sha256", digest := _manifest_digest(files)) != digest:  # early ones have none
        raise ArtifactError(
            f"{path} was altered: its content does not match the checksum stored with it; restore it, or delete the "
            "folder and run again"
        )
    return files


def read_config(folder: Path, *names: str) -> dict[str, Any]:
    """What a run folder's ``config.json`` holds.

    Args:
        folder: the run folder.
        names: entries that must be there; ``settings`` must be an object.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: it is not an object, or lacks one of them.
    """
    path = folder / "config.json"
    about: Any = read_json(path)
    if not isinstance(about, dict):
        raise ArtifactError(f"{path} holds no settings of a run")
    lacking = [name for name in names if name not in about]
    if lacking or not isinstance(about.get("settings", {}), dict):
        raise ArtifactError(f"{path} holds no settings of a run ({', '.join(lacking) or 'settings'} not as expected)")
    return about


def verify_folder(folder: Path, finished: str = "") -> dict[str, str]:
    """Compare every file of a run folder with its manifest.

    Args:
        folder: the run folder.
        finished: a file that a finished run has.

    Returns:
        the checksums by name.

    Raises:
        FileNotFoundError: no manifest, or ``finished`` is not in it.
        ArtifactError: the manifest was edited, or a file is missing or altered; the message names it.
    """
    files = read_manifest(folder)
    for name, digest in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{folder / 'manifest.json'} is not a manifest: {name!r} is no file of this folder")
        path = folder / name
        if not path.is_file():
            raise ArtifactError(
                f"{path} is in the manifest but missing; restore it, or delete the folder and run again"
            )
        if sha256_of(path) != digest:
            raise ArtifactError(
                f"{path} was altered since it was written; restore it, or delete the folder and run again"
            )
    if finished and finished not in files:
        raise FileNotFoundError(f"the run in {folder} is not finished: {finished} is not in its manifest; run it again")
    return files


def _lock(folder: Path) -> int:
    """Lock a folder; closing the descriptor gives the lock back, also when the process is killed.

    Raises:
        RunFolderError: another process holds it, or the file system knows no locks.
        OSError: the folder cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise cannot_write(folder, OSError(error.errno, error.strerror)) or error from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RunFolderError(
            f"another process is at work in {folder}; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        os.close(handle)
        raise RunFolderError(
            f"{folder} cannot be locked ({error.strerror}): its file system knows no locks; choose a folder on another one"
        ) from error
    return handle


@contextlib.contextmanager
def at_work_in(folder: str | Path) -> Generator[Path]:
    """Inside the block no other process that asks may write into ``folder``, which is made if it is not there.

    Raises:
        RunFolderError: another process is at work in it.
        OSError: it cannot be written.
    """
    path = Path(folder)
    handle = _lock(path)
    try:
        yield path
    finally:
        os.close(handle)


def require_usable(folder: str | Path) -> None:
    """Raise unless files can be written in ``folder`` and no process is at work there; leaves nothing behind.

    For the begin of long work: before a model is loaded and minutes are spent. The folder need not be there yet.

    Raises:
        RunFolderError: another process is at work in it.
        OSError: it cannot be made, is a file, is read-only, or the disk is full.
    """
    path = Path(folder)
    require_writable(path)
    if (path / _LOCK).is_file():
        os.close(_lock(path))


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
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._config = json.loads(json.dumps(dict(config)))
        self._files: dict[str, str] = {}
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self._lock = _lock(self.path)
        try:
            self._check_config()
            self._sweep()
            if (self.path / _MANIFEST).is_file():
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

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_config(self) -> None:
        file = self.path / "config.json"
        if not file.is_file():
            if any(p.name != _LOCK and not is_scratch(p.name) for p in self.path.iterdir()):
                raise RunFolderError(f"{self.path} holds other files and no config.json; choose an empty or new folder")
            write_json(file, self._config)
            return
        there, now = _flat(read_config(self.path)), _flat(self._config)
        if names := sorted(k for k in {*there, *now} if there.get(k) != now.get(k)):
            shown = "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in names[:4])
            raise RunFolderError(
                f"{self.path} was made with other settings ({shown}); choose another folder, or delete this one"
            )

    def _sweep(self) -> None:
        """Remove what a killed run left half-written; the lock says that nobody is writing it."""
        for place, folders, files in os.walk(self.path):
            # A run inside the run (an experiment's) has a lock of its own, and may be at work.
            folders[:] = [own for own in folders if not (Path(place) / own / _LOCK).exists()]
            for name in filter(is_scratch, files):
                (Path(place) / name).unlink()

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
        self._write_manifest(files)
        if old:
            _flush(self.path / _MANIFEST)
        for name in old:
            (self.path / name).unlink(missing_ok=True)

    def release(self, names: Iterable[str]) -> None:
        """Take files out of the manifest, and leave them on the disk: they are about to be written anew.

        A kill between writing and recording would otherwise leave a file that the manifest calls altered.
        """
        gone = {name for name in names if self.done(name)}
        if gone:
            self._write_manifest({name: digest for name, digest in self._files.items() if name not in gone})

    def _write_manifest(self, files: Mapping[str, str]) -> None:
        ordered = dict(sorted(files.items()))
        write_json(self.path / _MANIFEST, {"files": ordered, "sha256": _manifest_digest(ordered)})
        self._files = ordered

    def remove_unrecorded(self, *patterns: str) -> None:
        """Remove files of the run that are not in its manifest: a killed process left them.

        Args:
            patterns: as for `Path.glob`; only what the run itself writes may match.
        """
        for pattern in patterns:
            for path in self.path.glob(pattern):
                if not self.done(path.relative_to(self.path).as_posix()):
                    path.unlink()

    def names(self, *starts: str) -> list[str]:
        """Finished files whose path begins with one of ``starts``."""
        return [name for name in self._files if name.startswith(starts)]

    def texts(self, texts: Mapping[str, str]) -> None:
        """Write texts, by name, and take them into the manifest; those of before are replaced."""
        for name, text in texts.items():
            data = text.encode()
            if self._files.get(name) == hashlib.sha256(data).hexdigest():
                continue  # it is there, and the same
            self.release([name])
            write_atomic(self.path / name, lambda scratch, data=data: scratch.write_bytes(data))
            self.record(name)

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        """Draw into the folder ``figures`` and take what was drawn into the manifest; those of before are replaced.

        Args:
            draw: draws into the folder it is given, and says which files it wrote.
        """
        self.release(self.names("figures/"))
        self.record(*(str(path.relative_to(self.path)) for path in draw(self.path / "figures")))

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
