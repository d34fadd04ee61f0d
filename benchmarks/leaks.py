"""What a process holds on to, counted between rounds of work, and whether it grows: the detector behind the soak.

`census` counts, after collecting garbage and giving freed memory back to the system. `watch` runs rounds and counts
after each. `verdict` says what leaked. Growth of a count means: in the last third of the rounds it was never as low as
it ever was at most in the first third; so one thing that is left behind once is found, and a thread that ends a little
late is not. Memory is judged by its Theil–Sen slope over time, whose interval has to lie below a bound.
"""

from __future__ import annotations

import gc
import hashlib
import json
import linecache
import locale
import logging
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import psutil
import torch
import tqdm
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

from benchmarks.harness import release_heap

MIB = 2**20
_ENVIRONMENT = frozenset(os.environ)
_SETTLING = "(garbage collected after the round)"
CONFIDENCE = 0.95
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_NEVER = ("hooks on the models", "half-written files")
"""Counts that must be zero after every round, the first ones included."""
_UNITS = {"tensor_bytes": "bytes of tensors", "objects": "objects in the garbage collector"}
_SLACK = {"objects": 2000, "lines_cached": 8}
"""Growth of a count that means nothing: caches of the interpreter and of libraries that fill up and stay bounded."""


@dataclass
class Census:
    """What the process holds.

    Attributes:
        memory: MiB that nobody can take from it: anonymous and shared pages, swapped or not (elsewhere than on Linux
            the resident set).
        resident: MiB of the resident set. Weights are mapped from their file, and the system drops such pages as it
            likes: for the record, not for the verdict.
        counts: what must not grow, by name.
        names: what stands behind a count, for whoever has to find it.
        settings: global state that nobody may change.
        types: objects in the garbage collector, by type; the commonest ones.
    """

    memory: float
    resident: float
    counts: dict[str, int]
    names: dict[str, list[str]]
    settings: dict[str, str]
    types: dict[str, int]


@dataclass
class Round:
    """One round.

    Attributes:
        number: from 0.
        hours: since the start, when it was counted.
        seconds: that its work took.
        memory: see `Census`.
        resident: see `Census`.
        counts: see `Census`.
        names: see `Census`.
        settings: see `Census`.
        types: see `Census`.
        answers: digest of what each step returned.
        steps: MiB by which `Census.memory` changed in each step, and when the garbage was collected at the end.
        failures: steps that went wrong, with the reason.
    """

    number: int
    hours: float
    seconds: float
    memory: float
    resident: float
    counts: dict[str, int]
    names: dict[str, list[str]]
    settings: dict[str, str]
    types: dict[str, int]
    answers: dict[str, str]
    steps: dict[str, float]
    failures: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Limits:
    """What is still flat.

    Attributes:
        mib_per_hour: bound of the memory's slope.
        mib_in_all: growth over the whole run that is never called a leak: the noise of an allocator. In a run of *h*
            hours after warm-up the bound is the larger of ``mib_per_hour`` and ``mib_in_all / h``.
        jump_mib: most that memory may rise for good from one round to the next.
        fewest: rounds after warm-up without which nothing can be said.
    """

    mib_per_hour: float = 12.0
    mib_in_all: float = 16.0
    jump_mib: float = 32.0
    fewest: int = 6

    def bound(self, hours: float) -> float:
        """MiB an hour that the memory's slope has to stay below in a run of so many hours."""
        return max(self.mib_per_hour, self.mib_in_all / hours) if hours > 0 else float("inf")


@dataclass(frozen=True)
class Verdict:
    """What a soak found.

    Attributes:
        findings: one sentence each; none if nothing leaked.
        rounds: rounds after warm-up.
        hours: from the first of them to the last.
        slope: of the memory, MiB an hour (Theil–Sen).
        slope_low: lower end of its interval at `CONFIDENCE`.
        slope_high: upper end.
        bound: that the upper end is held against.
        intercept: MiB at the start, on that line.
        jump: MiB of the largest lasting rise.
    """

    findings: list[str]
    rounds: int
    hours: float
    slope: float
    slope_low: float
    slope_high: float
    bound: float
    intercept: float
    jump: float


def held_memory() -> tuple[float, float]:
    """MiB that the process holds, and MiB resident; see `Census`."""
    resident = psutil.Process().memory_info().rss / MIB
    status = Path("/proc/self/status")
    if not status.is_file():
        return resident, resident
    found = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.endswith("kB")}
    return sum(int(found.get(name, 0)) for name in ("RssAnon", "RssShmem", "VmSwap")) / 1024, resident


def settle() -> None:
    """Collect garbage (twice: finalizers make some) and give freed memory back."""
    gc.collect()
    gc.collect()
    release_heap()


def _open_files() -> list[str]:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return [file.path for file in psutil.Process().open_files()]
    found: list[str] = []
    for entry in list(folder.iterdir()):
        try:
            found.append(os.readlink(entry))
        except OSError:  # the one that listed the folder
            continue
    return sorted(found)


def _mapped_files() -> list[str]:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = [line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6]
    return [path for path in paths if path.startswith("/")]


def _hooks_of(module: nn.Module) -> int:
    return sum(len(getattr(module, table, None) or ()) for table in _HOOK_TABLES)


def hooks_on(models: Iterable[nn.Module]) -> list[str]:
    """Names of the modules that have hooks, with how many."""
    return [
        f"{type(model).__name__}.{name}: {count}"
        for model in models
        for name, module in model.named_modules()
        if (count := _hooks_of(module))
    ]


def settings_now() -> dict[str, str]:
    """Global state that work has no business changing, in words."""
    own = nn.modules.module
    root = logging.getLogger()
    return {
        "torch.get_default_dtype()": str(torch.get_default_dtype()),
        "torch.is_grad_enabled()": str(torch.is_grad_enabled()),
        "torch.get_num_threads()": str(torch.get_num_threads()),
        "global module hooks": str(
            [len(getattr(own, name)) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")]
        ),
        "nn.Module.__call__": repr(nn.Module.__call__),
        "torch.Tensor.__setattr__": repr(torch.Tensor.__setattr__),
        "attributes of object": hashlib.sha256(" ".join(sorted(dir(object))).encode()).hexdigest()[:16],
        "sys.gettrace(), getprofile()": f"{sys.gettrace()}, {sys.getprofile()}",
        "sys.excepthook": repr(sys.excepthook),
        "sys.path": repr(sys.path),
        "SIGINT's handler": repr(signal.getsignal(signal.SIGINT)),
        "warnings.filters": str(len(warnings.filters)),
        "logging": repr((root.level, [type(h).__name__ for h in root.handlers])),
        "level of transformers' logger": str(logging.getLogger("transformers").level),
        "np.geterr()": str(np.geterr()),
        "matplotlib.rcParams": hashlib.sha256(
            repr(sorted(mpl.rcParams.items(), key=lambda i: i[0])).encode()
        ).hexdigest()[:16],
        "environment variables": f"new {sorted({*os.environ} - _ENVIRONMENT)}, gone {sorted(_ENVIRONMENT - {*os.environ})}",
        "current folder": os.getcwd(),
        "locale": str(locale.getlocale()),
    }


def census(models: Sequence[nn.Module] = (), folder: Path | None = None) -> Census:
    """Count what the process holds.

    Args:
        models: on which there must be no hook at all.
        folder: where work puts its files; nothing half written may lie there. Temporary files are looked for in
            `tempfile.gettempdir`, which should be the run's own.
    """
    settle()
    memory, resident = held_memory()
    kinds, special = Counter[type](), list[Any]()
    wanted: dict[type, bool] = {}
    for thing in gc.get_objects():
        kind = type(thing)  # never isinstance: lazy proxies answer that by importing something
        kinds[kind] += 1
        if kind not in wanted:
            wanted[kind] = issubclass(kind, torch.Tensor | nn.Module | Figure)
        if wanted[kind]:
            special.append(thing)
    thing = None
    tensors = hooks = modules = figures = 0
    storages: dict[int, int] = {}
    shapes: Counter[str] = Counter()
    for thing in special:
        kind = type(thing)
        if issubclass(kind, torch.Tensor):
            tensors += 1
            shapes[f"{kind.__name__}{list(thing.shape)}"] += 1
            if thing.device.type != "meta" and thing.layout is torch.strided:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif issubclass(kind, nn.Module):
            modules += 1
            hooks += _hooks_of(thing) if "_forward_hooks" in getattr(thing, "__dict__", ()) else 0
        else:
            figures += 1
    thing = None
    special.clear()
    types = Counter({f"{kind.__module__}.{kind.__qualname__}": n for kind, n in kinds.most_common(80)})
    objects = kinds.total()
    kinds.clear()
    pyplot = sys.modules.get("matplotlib.pyplot")
    process = psutil.Process()
    files, mapped, children = _open_files(), _mapped_files(), process.children(recursive=True)
    threads = threading.enumerate()
    left = sorted(p.name for p in Path(tempfile.gettempdir()).iterdir())
    scratch = [] if folder is None else [str(p) for p in folder.rglob(".*") if p.is_file() and p.name != ".lock"]
    hooked = hooks_on(models)
    counts = {
        "hooks": hooks,
        "hooks on the models": len(hooked),
        "tensors": tensors,
        "tensor_bytes": sum(storages.values()),
        "modules": modules,
        "threads": len(threads),
        "system threads": process.num_threads(),
        "open files": len(files),
        "mapped files": len(mapped),
        "child processes": len(children),
        "figures": figures,
        "pyplot figures": 0 if pyplot is None else len(pyplot.get_fignums()),
        "progress bars": len(getattr(tqdm.tqdm, "_instances", ())),
        "temporary files": len(left),
        "half-written files": len(scratch),
        "lines_cached": len(linecache.cache),
        "imported modules": len(sys.modules),
        "objects": objects,
    }
    names = {
        "hooks on the models": hooked[:10],
        "tensors": [f"{n} × {shape}" for shape, n in sorted(shapes.items(), key=lambda i: (-i[1], i[0]))[:40]],
        "threads": sorted(t.name for t in threads),
        "open files": files,
        "mapped files": sorted(f"{n} × {path}" for path, n in Counter(mapped).items()),
        "child processes": [f"{c.pid} {c.name()}" for c in children],
        "temporary files": left[:20],
        "half-written files": scratch[:20],
    }
    return Census(memory, resident, counts, names, settings_now(), dict(types))


def digest(value: Any) -> str:
    """SHA-256 of what a step returned; arrays and tensors by their bytes, so that equal means equal to the last bit."""

    def plain(thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            thing = thing.detach().contiguous().view(torch.uint8).numpy() if thing.ndim else thing.item()
        if isinstance(thing, np.ndarray):
            about = f"{thing.dtype.str}{thing.shape}"
            return about + hashlib.sha256(np.ascontiguousarray(thing).tobytes()).hexdigest()
        if isinstance(thing, np.generic):
            return repr(thing.item())
        if isinstance(thing, Mapping):
            return {str(k): plain(v) for k, v in thing.items()}
        if isinstance(thing, list | tuple):
            return [plain(v) for v in thing]
        if thing is None or isinstance(thing, str | int | float | bool):
            return repr(thing)
        raise TypeError(f"a step returned {type(thing).__name__}, which has no digest")

    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


Step = Callable[[], Any]


def watch(
    steps: Mapping[str, Step],
    go_on: Callable[[int, float], bool],
    *,
    models: Callable[[], Sequence[nn.Module]] = tuple,
    folder: Path | None = None,
    warm_up: int = 0,
    every: Mapping[str, int] | None = None,
    after: Callable[[list[Round]], object] = len,
) -> list[Round]:
    """Run rounds of ``steps`` and count after each.

    What is kept of a round is small, and equal parts of two rounds are one: the record shall not be the leak.

    Args:
        steps: by name; what one returns must be the same in every round. One that raises is a failure of its round.
        go_on: called with the number of rounds done and the hours since the start, before each round.
        models: as for `census`.
        folder: as for `census`.
        warm_up: as for `verdict`: the names of this round are kept, to compare with the last one's.
        every: steps that run in every n-th round only, from the first one on.
        after: called with all rounds after each.

    Returns:
        the rounds.
    """
    rounds: list[Round] = []
    began = time.perf_counter()
    while go_on(len(rounds), (time.perf_counter() - began) / 3600):
        start = time.perf_counter()
        answers: dict[str, str] = {}
        grown: dict[str, float] = {}
        failures: list[str] = []
        settle()
        before = held_memory()[0]
        for name, step in steps.items():
            if len(rounds) % (every or {}).get(name, 1):
                continue
            try:
                answers[name] = digest(step())
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                del error
            release_heap()  # collecting all garbage as well would take longer than most steps
            now = held_memory()[0]
            grown[name], before = now - before, now
        seconds = time.perf_counter() - start
        found = census(models(), folder)
        grown[_SETTLING] = found.memory - before
        hours = (time.perf_counter() - began) / 3600
        rounds.append(
            Round(len(rounds), hours, seconds, **vars(found), answers=answers, steps=grown, failures=failures)
        )
        _share(rounds, warm_up)
        after(rounds)
    return rounds


def _share(rounds: Sequence[Round], keep: int) -> None:
    """Forget what `verdict` does not need of the round before the last, and keep equal parts once."""
    if len(rounds) < 2:
        return
    earlier, last = rounds[-2:]
    if earlier.number != keep:
        earlier.names = {name: own for name, own in earlier.names.items() if name in _NEVER and own}
        earlier.types = {}
    if last.settings == earlier.settings:
        last.settings = earlier.settings
    first = rounds[0].answers
    last.answers = {name: first[name] if own == first.get(name) else own for name, own in last.answers.items()}


def _more(before: Sequence[str], after: Sequence[str]) -> str:
    new = list((Counter(after) - Counter(before)).elements())
    return f" (new: {', '.join(new[:5])})" if new else ""


def _growth(rounds: Sequence[Round], name: str) -> str | None:
    """A sentence if a count has grown."""
    series = [r.counts[name] for r in rounds]
    third = max(2, len(series) // 3)
    first, last = max(series[:third]), min(series[-third:])
    if last <= first + _SLACK.get(name, 0):
        return None
    start = rounds[0]
    what = _UNITS.get(name, name.replace("_", " "))
    behind = _more(start.names.get(name, []), rounds[-1].names.get(name, [])) if start.names else ""
    if name == "objects" and start.types:
        more = {k: n - start.types.get(k, 0) for k, n in rounds[-1].types.items() if k in start.types}
        top = sorted(more.items(), key=lambda i: -i[1])[:5]
        behind = f" (most: {', '.join(f'{n:+,} {k}' for k, n in top if n > 0)})"
    return f"{what} grew from {first:,} to {last:,} over {len(series)} rounds{behind}"


def verdict(rounds: Sequence[Round], warm_up: int, limits: Limits | None = None) -> Verdict:
    """What leaked.

    Args:
        rounds: all of them.
        warm_up: the first ones, in which libraries are imported, kernels compiled and pools filled; only their answers
            count.
        limits: what is still flat.
    """
    limits = limits or Limits()
    own = rounds[warm_up:]
    if len(own) < limits.fewest:
        raise ValueError(
            f"{len(own)} rounds after {warm_up} of warm-up are too few to tell a leak from noise; at least "
            f"{limits.fewest} are needed: soak longer"
        )
    findings = [f"round {r.number} failed in {failure}" for r in rounds for failure in r.failures]
    for name in rounds[0].answers:
        other = [r.number for r in rounds if r.answers.get(name, rounds[0].answers[name]) != rounds[0].answers[name]]
        if other:
            findings.append(f"what {name} returned in round {other[0]} is not what it returned in round 0")
    for name, at_first in own[0].settings.items():
        changed = next((r for r in own if r.settings[name] != at_first), None)
        if changed is not None:
            findings.append(
                f"{name} was {_short(at_first)} and is {_short(changed.settings[name])} since round {changed.number}"
            )
    for name in _NEVER:
        at = next((r for r in rounds if r.counts[name]), None)
        if at is not None:
            findings.append(
                f"{name}: {at.counts[name]} after round {at.number} ({', '.join(at.names.get(name, [])[:3])})"
            )
    findings += [s for name in own[0].counts if name not in _NEVER and (s := _growth(own, name))]

    hours = np.array([r.hours for r in own])
    memory = np.array([r.memory for r in own])
    span = float(hours[-1] - hours[0])
    slope, intercept, low, high = map(float, stats.theilslopes(memory, hours, CONFIDENCE))
    bound = limits.bound(span)
    shown = f"{slope:+.1f} MiB an hour ({CONFIDENCE:.0%} interval {low:+.1f} to {high:+.1f}; bound {bound:.1f})"
    if high > bound:
        why = "memory grew" if low > 0 else "memory was not shown to be flat (soak longer)"
        findings.append(f"{why}: {shown}{_where(own)}")
    at, jump = _largest_jump(memory)
    if jump > limits.jump_mib:
        findings.append(
            f"memory rose by {jump:.0f} MiB at round {own[at].number} and stayed there (bound {limits.jump_mib:g} MiB)"
        )
    return Verdict(findings, len(own), span, slope, low, high, bound, intercept, jump)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}…"


def _largest_jump(memory: Any) -> tuple[int, float]:
    """The place before which and from which on the medians of five values (or what there is) differ most, upwards."""
    rises = [
        (float(np.median(memory[k : k + 5]) - np.median(memory[max(0, k - 5) : k])), k)
        for k in range(2, len(memory) - 1)
    ]
    rise, at = max(rises, default=(0.0, 0))
    return at, max(0.0, rise)


def _where(rounds: Sequence[Round]) -> str:
    """In which steps memory stayed: the sum of each one's changes."""
    total = {name: sum(r.steps.get(name, 0.0) for r in rounds[1:]) for name in rounds[0].steps}
    top = sorted(((mib, name) for name, mib in total.items() if mib > 0.5), reverse=True)[:3]
    return f"; by step: {', '.join(f'{name} {mib:+.1f} MiB' for mib, name in top)}" if top else ""


def step_table(rounds: Sequence[Round]) -> list[tuple[str, float, float]]:
    """For each step: its name, MiB that stayed in all, and the median of a round."""
    return [
        (name, sum(own), statistics.median(own))
        for name in (rounds[0].steps if rounds else ())
        for own in ([r.steps[name] for r in rounds if name in r.steps],)
        if own
    ]


def as_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The rounds as plain data."""
    return [asdict(r) for r in rounds]
