"""Files written whole or not at all: safetensors with JSON metadata, JSON, Parquet."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_interp.errors import ArtifactError

__all__ = [
    "cannot_write",
    "is_scratch",
    "library_versions",
    "read_json",
    "read_tensors",
    "require_writable",
    "sha256_of",
    "write_atomic",
    "write_json",
    "write_tensors",
]

_HEADER = "npti_interp"


def library_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found: dict[str, str] = {}
    for name in ("npti-interp", "torch", "transformers", "transformer-lens", "nnsight", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


_SCRATCH = re.compile(r"\..*\.part-[a-z0-9_]{8}(\.[^.]*)?", re.DOTALL)
_LONGEST_NAME = 255
_WHAT_TO_DO = {
    errno.ENOSPC: "free some space and run it again; nothing half-written was left under that name",
    errno.EDQUOT: "your quota is used up: free some space and run it again",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.ENOTDIR: "a part of that path is a file, where a folder is needed; choose another place",
    errno.EEXIST: "a part of that path is a file, where a folder is needed; choose another place",
    errno.EISDIR: "there is a folder of that name; choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file system takes no file of this size; choose another place",
    errno.EIO: "the disk reports a fault; choose another place",
    errno.ELOOP: "a link there leads back to itself; choose another place",
}
_ERRNO = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust word what the operating system said


def is_scratch(name: str) -> bool:
    """Whether a file's name is one that `write_atomic` gives while it writes."""
    return _SCRATCH.fullmatch(name) is not None


def cannot_write(path: Path, error: Exception) -> OSError | None:
    """An error that names the file and says what to do, for what a library raised while writing it.

    Args:
        path: the file or folder that was to be written.
        error: what was raised.

    Returns:
        an `OSError` of the same number; None where the operating system did not refuse to write.
    """
    if isinstance(error, OSError):
        number = error.errno
        if error.filename is not None:
            named = Path(os.fsdecode(error.filename))
            if not (named == path or named.parent == path.parent or named in path.parents):
                return None  # about another file: one that was to be copied, say
    else:
        # safetensors has an error of its own, which is no OSError.
        found = _ERRNO.search(str(error))
        number = int(found[1]) if found else None
    if number not in _WHAT_TO_DO:
        return None
    return OSError(number, f"cannot write {path}: {os.strerror(number)}; {_WHAT_TO_DO[number]}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name beside ``path``, then rename: a reader sees all of the file or none.

    Raises:
        OSError: it cannot be written (a full disk, say); the message names ``path``. What was there before still is.
    """
    try:
        _write_atomic(path, write)
    except Exception as error:
        if (told := cannot_write(path, error)) is None:
            raise
        raise told from error


def _write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    stem, room = path.stem, _LONGEST_NAME - len(os.fsencode(f"..part-12345678{path.suffix}"))
    if len(os.fsencode(stem)) > room:  # the final name fits, this longer one would not
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
    handle, name = tempfile.mkstemp(prefix=f".{stem}.part-", suffix=path.suffix, dir=path.parent)
    scratch = Path(name)
    try:
        os.close(handle)
        write(scratch)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Raise unless files can be written in ``folder``, which need not be there yet; leaves nothing behind.

    For the begin of long work: before a model is loaded and minutes are spent.

    Raises:
        OSError: it cannot be made, is a file, is read-only, or the disk is full; the message names it.
    """
    there, missing = folder.absolute(), list[str]()
    try:
        while True:
            try:
                os.stat(there)
                break
            except FileNotFoundError:
                missing.append(there.name)
                there = there.parent
        longest = os.pathconf(there, "PC_NAME_MAX")
        if any(len(os.fsencode(name)) > longest for name in missing):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=there, buffering=0) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        told = cannot_write(folder, OSError(error.errno, error.strerror))  # not named after the probe
        raise error if told is None else told from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, sorted and indented."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error


def write_tensors(
    path: Path, kind: str, format_version: int, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]
) -> None:
    """Write arrays as safetensors, with their checksum, kind and version in the metadata."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    header: dict[str, Any] = json.loads(
        json.dumps({"kind": kind, "version": format_version, "metadata": dict(metadata)})
    )
    header["sha256"] = _content_digest(arrays, header)
    # One entry only: safetensors writes several in random order, and equal content shall give equal bytes.
    one = {_HEADER: json.dumps(header, sort_keys=True)}
    write_atomic(path, lambda scratch: save_file(arrays, scratch, metadata=one))


def read_tensors(
    path: str | Path, kind: str, format_version: int
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write_tensors` wrote; nothing in the file is ever executed.

    Returns:
        arrays by name, and the metadata.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: not safetensors, truncated, altered, of another kind, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            raw: dict[str, str] = file.metadata() or {}
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header: Any = json.loads(raw.get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file (truncated or altered?): {error}") from error
    found = header.get("kind") if isinstance(header, dict) else None
    if found != kind:
        raise ArtifactError(f"{path} holds {found or 'something this toolkit did not write'}, not {kind}")
    stored, metadata = header.get("version"), header.get("metadata")
    if not isinstance(stored, int) or stored > format_version:
        raise ArtifactError(
            f"{path} is {kind} format {stored}; this version of npti_interp reads up to {format_version}: upgrade it"
        )
    if header.pop("sha256", None) != _content_digest(arrays, header) or not isinstance(metadata, dict):
        raise ArtifactError(f"{path} was altered: its content does not match the checksum stored with it")
    return arrays, metadata


def _content_digest(arrays: Mapping[str, npt.NDArray[Any]], header: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name}{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
