"""What tests of faults share: children that are killed, small disks, readings of hooks.

A child is a fork, so that it has the parent's models at once; it is killed by a real SIGKILL that it sends itself at its
n-th file operation, as Python's audit events count them: opening for writing, making, renaming and removing.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.chmod", "os.rmdir", "tempfile.mkstemp"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _changes_files(event: str, given: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, mode, flags = given
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & _WRITES)
        return writes and folder in str(path)
    return event in _CHANGES and folder in str(given[0])


def in_child(job: Callable[[], object], folder: Path, die_at: int | None = None) -> int | None:
    """Run ``job`` in a forked child that kills itself right before its file operation ``die_at`` under ``folder``.

    Args:
        job: what is run; it must not raise.
        folder: file operations elsewhere are not counted.
        die_at: counted from 1; None kills never.

    Returns:
        how many file operations there were, None if the child was killed.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(receive)
            count, main = 0, os.getpid()

            def watch(event: str, given: tuple[Any, ...]) -> None:
                nonlocal count
                if os.getpid() == main and _changes_files(event, given, str(folder)):
                    count += 1
                    if count == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            job()
            os.write(send, str(count).encode())
            code = 0
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(code)  # without the parent's exit handlers, buffers and threads
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child ended with {status}"
    return int(said) if status == 0 else None


def killed_anywhere(
    job: Callable[[Path], object],
    folder: Path,
    contents: Callable[[Path], Any],
    *,
    seed: int,
    lives: int,
    times: int = 1,
) -> None:
    """Kill ``job`` at random file operations until it has died ``lives`` times, then let it end: same contents.

    Args:
        job: works in the folder it is given, and can be called again.
        folder: place for the runs.
        contents: what must be the same in the end.
        seed: of the kill points.
        lives: kills of one run, each at a point drawn anew of those that are left.
        times: runs.
    """
    whole = folder / "whole"
    n = in_child(lambda: job(whole), whole)
    assert n is not None and n > lives
    expected, rng = contents(whole), random.Random(seed)
    for attempt in range(times):
        own = folder / f"killed-{attempt}"
        for _ in range(lives):
            # The first kill anywhere in a whole run; a later one may come after its end.
            if in_child(lambda own=own: job(own), own, rng.randint(1, n)) is not None:
                break
        job(own)
        assert contents(own) == expected
        assert not [p for p in own.rglob(".*") if p.name != ".lock"], "a killed run's temporary files are still there"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own of ``size``; skips where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """``folder`` made read-only, for root as well; skips where that may not be done."""
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,bind,ro", str(folder))
        yield folder
    finally:
        _unmount(folder)


def _mount(*arguments: str) -> None:
    made = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")


def _unmount(folder: Path) -> None:
    # Lazily: a memory map that is still held must not fail the test.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def hooks_on(model: nn.Module) -> list[str]:
    """Every hook on a model's modules, by kind and module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        f"{kind} of {name or 'the model'}" for name, m in model.named_modules() for kind in kinds if getattr(m, kind)
    ]


def twin_of(model: Any) -> nn.Module:
    """The engine's own twin of the user's model."""
    backend = model.backend
    return backend.nnsight_model._module if backend.name == "nnsight" else backend._model
