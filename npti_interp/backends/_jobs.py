"""Finished jobs on disk: what a server has computed once is never asked for again.

A job is named by the SHA-256 of everything that goes out with it, so a run that was cut off sends only what is missing.
Results are safetensors with JSON, written whole or not at all; nothing is pickled. The id of a job that is under way is
kept beside them, so that a run which comes back takes it up again.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npti_interp._files import read_json, read_tensors, write_json, write_tensors
from npti_interp.errors import ArtifactError

__all__ = ["JobStore", "task_digest"]

_KIND, _VERSION = "Job", 1
_JOB_ID = re.compile(r"[\w.:\-]{1,200}", re.ASCII)


def task_digest(*parts: Any) -> str:
    """SHA-256 over nested plain data with tensors in it."""
    sha = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous()
            sha.update(f"T{array.dtype}{tuple(array.shape)}".encode())
            sha.update(array.view(torch.uint8).numpy().tobytes() if array.numel() else b"")
        elif isinstance(value, dict):
            sha.update(b"{")
            for key in sorted(value, key=repr):
                take(key)
                take(value[key])
            sha.update(b"}")
        elif isinstance(value, list | tuple):
            sha.update(b"[")
            for item in value:
                take(item)
            sha.update(b"]")
        elif isinstance(value, np.generic):
            take(value.item())
        elif isinstance(value, str | int | float | bool | None):
            sha.update(json.dumps(value).encode() + b";")
        else:
            take({k: v for k, v in sorted(value.to_dict().items()) if not k.startswith("_") and "version" not in k})

    take(list(parts))
    return sha.hexdigest()


def _flatten(value: Any, at: str, tensors: dict[str, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().numpy()
        return {"$tensor": name}
    if isinstance(value, dict):
        return {"$dict": [[key, _flatten(own, f"{at}.{key}", tensors)] for key, own in value.items()]}
    if isinstance(value, list | tuple):
        if any(isinstance(own, torch.Tensor | dict | list | tuple) for own in value):
            return {"$list": [_flatten(own, at, tensors) for own in value]}
        return {"$plain": list(value)}
    return {"$plain": value}


def _restore(value: Any, tensors: dict[str, Any]) -> Any:
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return torch.from_numpy(np.array(tensors[content]))
    if kind == "$dict":
        return {key: _restore(own, tensors) for key, own in content}
    if kind == "$list":
        return [_restore(own, tensors) for own in content]
    if kind != "$plain":
        raise ValueError(f"unknown kind of value {kind[:40]!r}")
    return content


class JobStore:
    """A folder of finished jobs.

    Args:
        folder: made when the first job is kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, digest: str) -> dict[str, Any] | None:
        """The result of a job; None if it is not there.

        Raises:
            ArtifactError: its file is damaged.
        """
        if self.folder is None or not (path := self.folder / f"{digest}.safetensors").is_file():
            return None
        try:
            tensors, metadata = read_tensors(path, _KIND, _VERSION)
            result = _restore(metadata["result"], tensors)
            if not isinstance(result, dict):
                raise ValueError(f"its result is a {type(result).__name__}")
            return result
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{path} is not a whole job: {error}; delete it, and it is asked for again") from error

    def keep(self, digest: str, result: dict[str, Any]) -> None:
        """Write a result."""
        if self.folder is None:
            return
        tensors: dict[str, Any] = {}
        layout = _flatten(result, "", tensors)
        write_tensors(self.folder / f"{digest}.safetensors", _KIND, _VERSION, tensors, {"result": layout})
        (self.folder / f"{digest}.json").unlink(missing_ok=True)

    def note(self, digest: str, job_id: str) -> None:
        """Remember that a job is under way."""
        if self.folder is not None:
            write_json(self.folder / f"{digest}.json", {"job_id": job_id})

    def under_way(self, digest: str) -> str | None:
        """The id of a job that was sent and not seen to end."""
        path = self.folder / f"{digest}.json" if self.folder is not None else None
        if path is None or not path.is_file():
            return None
        try:
            job_id: Any = read_json(path)["job_id"]
            if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):  # it goes into an address
                raise ArtifactError(f"{path} holds no job's id")
            return job_id
        except (ArtifactError, KeyError, TypeError):  # only a hint: without it the job is sent again
            path.unlink(missing_ok=True)
            return None

    def forget(self, digest: str) -> None:
        """The job is under way no more."""
        if self.folder is not None:
            (self.folder / f"{digest}.json").unlink(missing_ok=True)
