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
from typing import Any

from npti_interp._files import from_fields, read_json, write_atomic
from npti_interp.chat._request import Form, Reply, canonical

__all__ = ["ReplyCache"]

_KIND, _VERSION = "ChatReply", 1


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in entry.items() if k != "sha256"}).encode()).hexdigest()


class ReplyCache:
    """A folder of replies.

    Args:
        folder: made when the first reply is kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """The reply to a call; None if it is not there, or its file is damaged (it is then asked for again)."""
        path = self._path(key)
        if path is None:
            return None
        try:
            entry: Any = read_json(path)
            whole = (entry["kind"], entry["version"], entry["key"]) == (_KIND, _VERSION, key)
            return (
                from_fields(Reply, entry["reply"], str(path)) if whole and entry["sha256"] == _digest(entry) else None
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: str, form: Form, answerer: Mapping[str, Any], reply: Reply) -> None:
        """Write a reply.

        Raises:
            OSError: it cannot be written (a full disk, say).
        """
        path = self._path(key)
        if path is None:
            return
        call = {"answerer": dict(answerer), **asdict(form)}
        entry: dict[str, Any] = {
            "kind": _KIND, "version": _VERSION, "key": key, "call": call, "reply": asdict(reply)
        }  # fmt: skip
        entry["sha256"] = _digest(entry)
        write_atomic(path, lambda scratch: scratch.write_text(canonical(entry) + "\n", encoding="utf-8"))
