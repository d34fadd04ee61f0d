"""Damage: bytes, JSON and arrays changed at random, files that are none, and a bound on what reading one may take.

Everything is drawn from a `numpy` generator, so that one number reproduces an example.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 60.0
"""Most that one read may take: a hundred times what any takes, so that a busy machine does not matter."""
BYTES = 1 << 31
"""Most address space that one read may add: little beside the terabytes that a header can claim."""


class HangError(BaseException):
    """A read took longer than `SECONDS`. Not an Exception, so that no reader can catch it."""


@contextmanager
def bounded(seconds: float = SECONDS, extra: int = BYTES) -> Iterator[None]:
    """Raise in the block when it takes too long (HangError) or asks for too much memory (MemoryError)."""

    def stop(_signal: int, _frame: Any) -> None:
        raise HangError(f"more than {seconds:g} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)  # for libraries that no signal gets out of
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


# -- files that are none ---------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a pipe": lambda path: os.mkfifo(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
}
"""Things at a path that are no file."""

CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(4096),
    "noise": np.random.default_rng(0).bytes(4096),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte-order mark": b"\xef\xbb\xbf" + b'{"a": 1}',
    "nested deeply": b"[" * 200_000 + b"]" * 200_000,
    "nested within Python's limit": b'{"a":' * 400 + b"1" + b"}" * 400,
    "a million digits": b"1" * 1_000_000,
    "a million digits inside": b'{"a": ' + b"7" * 1_000_000 + b"}",
    "half of a surrogate pair": b'{"a": "\\ud800"}',
    "a name twice": b'{"files": {}, "files": {}}',
    "no numbers": b'{"a": NaN, "b": -Infinity, "c": 1e999999}',
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "a text": b'"text"',
    "true": b"true",
    "YAML": b"!!python/object/apply:os.system ['true']\n",
    "a NumPy header of objects": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "safetensors of a terabyte": (len(b := b'{"a":{"dtype":"F64","shape":[137438953472],"data_offsets":[0,1099511627776]}}'
                                      ).to_bytes(8, "little") + b),
    "safetensors with a long header": (1 << 62).to_bytes(8, "little") + b"{}",
    "Parquet's ends": b"PAR1" + (1 << 30).to_bytes(4, "little") + b"PAR1",
    "GGUF of many": b"GGUF" + (3).to_bytes(4, "little") + (1 << 62).to_bytes(8, "little") * 2,
    "GGUF of one": b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    + (1 << 60).to_bytes(8, "little"),
}  # fmt: skip
"""Content that no reader takes for its own (one that does is given it under a name, see `Target.takes`)."""


def bomb(mark: Path) -> bytes:
    """A pickle that makes the file ``mark`` when it is loaded."""
    return pickle.dumps(Bomb(mark))


# -- bytes -----------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, taken out, put in or repeated; or the end cut off."""
    out = bytearray(data)
    left = int(rng.integers(1, 4))
    while left > 0 or out == data:  # a byte may have been given the value it had
        left -= 1
        at = int(rng.integers(0, len(out) + 1))
        kind = rng.integers(0, 6)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            del out[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3 and at < len(out):
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 4 and at < len(out):
            out[at] = int(rng.choice([0, 0x7F, 0x80, 0xFF]))
        else:
            out[at:at] = out[at : at + int(rng.integers(1, 65))]
    return bytes(out)


# -- JSON ------------------------------------------------------------------------------------------------------------


def odd_value(rng: np.random.Generator) -> Any:
    """A JSON value that is seldom the one expected."""
    values: list[Any] = [
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
        float("inf"), "", " ", "x", "\x00", "a\nb", "../../x", "/etc/passwd", "{{ 7 * 7 }}", "é" * 40, "x" * 5000, [],
        [[]], {}, {"a": {}}, [1, "a", None], {"": 0}, [[[[[[[]]]]]]], {"__class__": "os.system"}, ["a"] * 300,
    ]  # fmt: skip
    return values[int(rng.integers(len(values)))]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _places(own, (*at, key))
    elif isinstance(value, list):
        for k, own in enumerate(value):
            yield from _places(own, (*at, k))


def changed(value: Any, rng: np.random.Generator) -> Any:
    """A copy of a JSON value with one to three places changed: replaced, removed, renamed, doubled, wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(value))
        place = places[int(rng.integers(len(places)))]
        if not place:
            if rng.random() < 0.1:
                return odd_value(rng)
            continue
        home = value
        for step in place[:-1]:
            home = home[step]
        last = place[-1]
        kind = int(rng.integers(0, 6))
        if kind == 0:
            del home[last]
        elif kind == 1 and isinstance(home, dict):
            home[str(last) + "x"] = home.pop(last)
        elif kind == 2 and isinstance(home, list):
            home.insert(last, home[last])
        elif kind == 3:
            home[last] = [home[last]]
        elif kind == 4 and isinstance(home, dict):
            home[f"new {rng.integers(9)}"] = odd_value(rng)
        else:
            home[last] = odd_value(rng)
    return value


# -- arrays ----------------------------------------------------------------------------------------------------------

_DTYPES = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64, np.bool_)


def changed_arrays(arrays: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Arrays with one or two of them changed: values, type, shape, name, or gone."""
    out = {name: array.copy() for name, array in arrays.items()}
    for _ in range(int(rng.integers(1, 3))):
        if not out:
            break
        name = str(rng.choice(sorted(out)))
        array, kind = out[name], int(rng.integers(0, 8))
        if kind == 0:
            del out[name]
        elif kind == 1:
            with np.errstate(all="ignore"):
                out[name] = array.astype(_DTYPES[int(rng.integers(len(_DTYPES)))])
        elif kind == 2:
            out[name] = array[:-1] if array.ndim and len(array) else np.zeros(3, array.dtype)
        elif kind == 3:
            out[name] = array.reshape(-1) if rng.random() < 0.5 else array[None]
        elif kind == 4:
            out[name] = np.zeros((0, *array.shape[1:]), array.dtype)
        elif array.size:
            flat = array.reshape(-1)
            at = rng.integers(0, flat.size, int(rng.integers(1, 4)))
            raw = np.frombuffer(rng.bytes(flat.itemsize * len(at)), flat.dtype)
            odd = [np.nan, np.inf, -np.inf, -1.0, 1e300] if flat.dtype.kind == "f" else None
            flat[at] = raw if odd is None else rng.choice(odd, len(at))
    return out


# -- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        name: what is read.
        path: the file that is damaged, which exists and is whole.
        read: reads it. Whatever it returns has been checked to be usable.
        errors: what it may raise, by its docstring.
        rewrites: further ways of damaging the file, beside bytes: each writes it anew.
        takes: names in `CONTENTS` that are valid for it.
    """

    name: str
    path: Path
    read: Callable[[], object]
    errors: tuple[type[Exception], ...]
    rewrites: tuple[Callable[[np.random.Generator], None], ...] = ()
    takes: tuple[str, ...] = ()

    def tried(self) -> str:
        """``"read"``, or the name of the documented error; anything else is raised."""
        with bounded():
            try:
                self.read()
            except self.errors as error:
                if not str(error).strip():
                    raise AssertionError("an error without a word") from error
                return type(error).__name__
        return "read"
