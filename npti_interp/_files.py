"""Files written whole or not at all: safetensors with JSON metadata, JSON, Parquet."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from npti_interp.errors import ArtifactError

__all__ = [
    "cannot_write",
    "from_fields",
    "is_scratch",
    "library_versions",
    "parse_json",
    "read_json",
    "read_tensors",
    "require_array",
    "require_writable",
    "sha256_of",
    "write_atomic",
    "write_json",
    "write_tensors",
]

_HEADER = "npti_interp"
_MOST_NESTED = 100
"""Levels of JSON that are read: far more than any file has, far fewer than Python's own recursion takes."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

T = TypeVar("T")


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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} occurs twice in one object")
    return made


def _nested_within(value: Any, most: int) -> bool:
    level: list[Any] = [value]
    for _ in range(most + 1):
        inner = (own.values() if isinstance(own, dict) else own for own in level if isinstance(own, dict | list))
        level = [x for own in inner for x in own if isinstance(x, dict | list)]
        if not level:
            return True
    return False


def parse_json(text: str) -> Any:
    """A JSON text from outside.

    Refused, beside what is not JSON: a name twice in one object (Python would drop the first without a word), nesting
    that later work could not follow, numbers of thousands of digits, and halves of surrogate pairs (they cannot be
    written, hashed or printed).

    Raises:
        ValueError: it is not such a text (`json.JSONDecodeError` where it is no JSON).
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > _MOST_NESTED and not _nested_within(value, _MOST_NESTED):
        raise ValueError(f"nested more than {_MOST_NESTED} levels deep")
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair in a text") from None
    return value


def read_json(path: Path) -> Any:
    """Read JSON, as strictly as `parse_json`.

    Raises:
        FileNotFoundError: no such file (a folder is none, nor is a pipe or a device).
        ArtifactError: not JSON.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error


_SCALARS: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": (int, float), "bool": bool, "None": type(None)
}  # fmt: skip


_TUPLE = re.compile(r"tuple\[(\w+), \.\.\.\]")


def _fits(value: Any, kind: str) -> bool:
    """Whether a value from JSON is of a kind, as an annotation names it; a tuple is a list in JSON."""
    if (inner := _TUPLE.fullmatch(kind)) is not None:
        return isinstance(value, list) and all(_fits(v, inner[1]) for v in cast(list[Any], value))
    return isinstance(value, _SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))


def from_fields(cls: type[T], raw: Any, where: str) -> T:
    """A dataclass of plain values (text, numbers, truth values, None) or tuples of one kind of them, from JSON.

    Every field's type is checked.

    Args:
        cls: the dataclass.
        raw: what the JSON holds.
        where: what to call it in messages.

    Raises:
        ArtifactError: not an object, a field that is missing, unknown or of another type, or values that the dataclass
            itself refuses.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cast(Any, cls))}
    if not isinstance(raw, dict):
        raise ArtifactError(f"{where}: expected an object with {', '.join(known)}, got a {type(raw).__name__}")
    lacking = [n for n, f in known.items() if n not in raw and f.default is MISSING and f.default_factory is MISSING]
    unknown = sorted(raw.keys() - known.keys())
    if lacking or unknown:
        raise ArtifactError(
            f"{where}: {', '.join([*(f'{n} is missing' for n in lacking), *(f'{n[:80]} is unknown' for n in unknown)])}"
        )
    values: dict[str, Any] = {}
    for name, value in raw.items():
        kinds = str(known[name].type).split(" | ")
        if not any(_fits(value, kind) for kind in kinds):
            raise ArtifactError(f"{where}: {name} must be {known[name].type}, got {str(value)[:80]!r}")
        try:
            if isinstance(value, list):
                values[name] = tuple(map(float, value)) if "tuple[float, ...]" in kinds else tuple(value)
            else:
                values[name] = float(value) if kinds == ["float"] else value
        except OverflowError:
            raise ArtifactError(f"{where}: {name} is too large") from None
    try:
        return cls(**values)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error


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
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            raw: dict[str, str] = file.metadata() or {}
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header: Any = parse_json(raw.get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file (truncated or altered?): {error}") from error
    found = header.get("kind") if isinstance(header, dict) else None
    if found != kind:
        raise ArtifactError(f"{path} holds {found or 'something this toolkit did not write'}, not {kind}")
    stored, metadata = header.get("version"), header.get("metadata")
    if type(stored) is not int or stored > format_version:
        raise ArtifactError(
            f"{path} is {kind} format {stored}; this version of npti_interp reads up to {format_version}: upgrade it"
        )
    if header.pop("sha256", None) != _content_digest(arrays, header) or not isinstance(metadata, dict):
        raise ArtifactError(f"{path} was altered: its content does not match the checksum stored with it")
    return arrays, metadata


def require_array(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int | None, ...], *dtypes: npt.DTypeLike
) -> npt.NDArray[Any]:
    """One array of a file, with the type and shape that its readers count on.

    A checksum shows damage, not intent: a file made by hand can have any arrays under a checksum that fits.

    Args:
        arrays: what `read_tensors` gave.
        name: which.
        shape: its lengths; None fits any.
        dtypes: the types it may have.

    Raises:
        ArtifactError: it is missing, or has another type or shape.
    """
    array = arrays.get(name)
    if array is None:
        raise ArtifactError(f"the array {name!r} is missing")
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.dtype not in [np.dtype(d) for d in dtypes]:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(np.dtype(d)) for d in dtypes)
        raise ArtifactError(
            f"the array {name!r} is {array.dtype} {list(array.shape)[:8]} where {kinds} [{wanted}] is expected"
        )
    return array


def _content_digest(arrays: Mapping[str, npt.NDArray[Any]], header: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name}{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
