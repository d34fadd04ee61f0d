"""Replies on disk: one small JSON file a call, so that a call which was answered is never made again.

Files rather than a database: each is written whole by renaming, so that several processes (and a network file system)
need no lock, a killed one leaves nothing half done, a damaged file costs one call, and no index has to be held in
memory: 180,000 calls are 256 folders of about 700 files. An entry holds the call as well, for whoever wants to read
what was asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from npti_interp._files import from_fields, read_json, write_atomic
from npti_interp.chat._request import canonical
from npti_interp.errors import ArtifactError

__all__ = ["Call", "ReplyCache", "reply_folder"]

_VERSION = 1

ReplyT = TypeVar("ReplyT")


class Call(Protocol):
    """What is asked: a frozen dataclass that is valid JSON."""

    def key(self, answerer: Mapping[str, Any]) -> str:
        """SHA-256 of who is asked, and all that is."""
        ...


def reply_folder(cache: str | Path | None) -> Path | None:
    """The folder that ``cache`` means; ``"cache"`` is the user's cache folder.

    Raises:
        ValueError: it is there, and no folder.
    """
    folder = None if cache is None else Path(cache)
    if cache == "cache":
        from npti_interp.models._embedded import cache_folder

        folder = cache_folder() / "chat"
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"the cache {folder} is not a folder; give another place, or None to keep nothing")
    return folder


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in entry.items() if k != "sha256"}).encode()).hexdigest()


class ReplyCache(Generic[ReplyT]):
    """A folder of replies.

    Args:
        folder: made when the first reply is kept; None keeps nothing.
        kind: the replies' name in the files.
        reply: their dataclass, of plain values and tuples of them (`npti_interp._files.from_fields`).
    """

    def __init__(self, folder: Path | None, kind: str, reply: type[ReplyT]) -> None:
        self.folder, self._kind, self._reply = folder, kind, reply

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> ReplyT | None:
        """The reply to a call; None if it is not there, or its file is damaged (it is then asked for again)."""
        path = self._path(key)
        if path is None:
            return None
        try:
            entry: Any = read_json(path)
            whole = (entry["kind"], entry["version"], entry["key"]) == (self._kind, _VERSION, key)
            if not whole or entry["sha256"] != _digest(entry):
                return None
            raw = entry["reply"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:  # apart from the above: a reply's class that `from_fields` does not know is a mistake here, no damage
            return from_fields(self._reply, raw, str(path))
        except ArtifactError:
            return None

    def keep(self, key: str, call: Call, answerer: Mapping[str, Any], reply: ReplyT) -> None:
        """Write a reply.

        Raises:
            OSError: it cannot be written (a full disk, say).
        """
        path = self._path(key)
        if path is None:
            return
        asked: Any = call
        answered: Any = reply
        entry: dict[str, Any] = {
            "kind": self._kind, "version": _VERSION, "key": key, "call": {"answerer": dict(answerer), **asdict(asked)},
            "reply": asdict(answered),
        }  # fmt: skip
        entry["sha256"] = _digest(entry)
        write_atomic(path, lambda scratch: scratch.write_text(canonical(entry) + "\n", encoding="utf-8"))
