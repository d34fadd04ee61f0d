"""Files written whole or not at all: safetensors with JSON metadata, JSON, Parquet."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_interp.errors import ArtifactError

__all__ = [
    "library_versions",
    "read_json",
    "read_tensors",
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


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name beside ``path``, then rename: a reader sees all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        write(scratch)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


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
