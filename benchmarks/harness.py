"""What all benchmarks share: interleaved timing, peak memory, and a report in Markdown and JSON.

A benchmark is a module with ``run(setting) -> Section``. What is compared runs in one process, one after the other,
over and over (so that a slow minute of the machine hits all ways alike); times are medians with their spread, and
what is printed first are ratios.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

import npti_interp as npti
from npti_interp._files import library_versions
from npti_interp.backends._kernels import linear_kernel

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Of one run of the benchmarks.

    Attributes:
        model: name for `npti.load_model`, or ``"llama-3-8b"``: random weights of that shape.
        device: where it runs.
        dtype: of its weights.
        repeats: times that each way is measured, after one that is not.
        quick: small sizes, to see that everything runs; the numbers mean little.
    """

    model: str = "smollm2-135m"
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 3
    quick: bool = False

    @property
    def few(self) -> int:
        """Repeats of what takes minutes each time."""
        return max(1, self.repeats - 1)

    def sized(self, full: T, quick: T) -> T:
        """A size, or sizes, that depend on `quick`."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated measurements.

    Attributes:
        seconds: one a repeat, in order.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest minus smallest, relative to the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def ratio(self, base: Timing) -> tuple[float, float, float]:
        """``base / self``, median of the repeats' own ratios, with the smallest and the largest: above 1 is faster."""
        each = [b / a for a, b in zip(self.seconds, base.seconds, strict=True)]
        return statistics.median(each), min(each), max(each)


@dataclass
class Section:
    """What one benchmark found.

    Attributes:
        title: headline.
        columns: of the table.
        rows: of the table, values as they are (formatted only in Markdown).
        notes: sentences below it.
        targets: what was aimed at: name, value, bound, and whether it was reached.
        data: everything that was measured.
    """

    title: str
    columns: list[str] = field(default_factory=list[str])
    rows: list[list[Any]] = field(default_factory=list[list[Any]])
    notes: list[str] = field(default_factory=list[str])
    targets: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    data: dict[str, Any] = field(default_factory=dict[str, Any])

    def target(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Hold a number against what was aimed at."""
        reached = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        self.targets.append(
            {"name": name, "value": value, "at_least": at_least, "at_most": at_most, "reached": reached}
        )

    def markdown(self) -> str:
        """For people."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [f"| {' | '.join(self.columns)} |", "|" + " --- |" * len(self.columns)]
            lines += [f"| {' | '.join(_shown(v) for v in row)} |" for row in self.rows]
            lines.append("")
        for note in self.notes:
            lines += [note, ""]
        for t in self.targets:
            bound = f"at least {t['at_least']:g}" if t["at_least"] is not None else f"at most {t['at_most']:g}"
            lines.append(
                f"- {t['name']}: {t['value']:.3g}, target {bound}: {'reached' if t['reached'] else '**missed**'}"
            )
        return "\n".join(lines).rstrip() + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes, on the device as well."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def measure(ways: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True) -> dict[str, Timing]:
    """Time several ways of doing one thing, interleaved; every other round goes backwards."""
    if warm_up:
        for work in ways.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(repeats):
        for name in list(ways)[:: -1 if k % 2 else 1]:
            seconds[name].append(clock(ways[name]))
    return {name: Timing(own) for name, own in seconds.items()}


def timed_peak(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and `peak_memory`, of one and the same run."""
    seconds: list[float] = []

    def watched() -> object:
        start = time.perf_counter()
        kept = work()
        synchronize()
        seconds.append(time.perf_counter() - start)
        return kept

    peak = peak_memory(watched)
    return seconds[0], peak


def peak_memory(work: Callable[[], object]) -> int:
    """Most bytes beyond what was there before that ``work`` holds at once: on a GPU exactly, on a CPU sampled each ms."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    release_heap()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = work()
        peak = max(peak, process.memory_info().rss)
        del kept
    finally:
        done.set()
        watcher.join()
    return peak - before


def release_heap() -> None:
    """Give freed memory back to the system, so that it is not taken for free the next time."""
    import ctypes

    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power of its size with which a cost grows, fitted by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def load(setting: Setting) -> npti.Model:
    """The model that a setting names."""
    dtype = getattr(torch, setting.dtype)
    if setting.model != "llama-3-8b":
        return npti.load_model(setting.model, dtype=dtype, device=setting.device)
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500_000.0, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokenizer = npti.load_model("smollm2-135m").tokenizer  # random weights speak no language; any ids will do
    torch.manual_seed(0)
    with torch.device(setting.device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return npti.Model(made, tokenizer, "llama-3-8b, random weights")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "float32_products": linear_kernel(),
        "python": platform.python_version(),
        "versions": library_versions(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command-line form of `Setting`."""
    default = Setting()
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--dtype", default=default.dtype)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")


def report(setting: Setting, sections: Mapping[str, Section]) -> tuple[str, dict[str, Any]]:
    """The whole as Markdown and as JSON."""
    about = machine()
    device = about["gpu"] or f"{about['cpu']}, {about['cores']} cores"
    head = (
        f"# Benchmarks\n\n{setting.model} in {setting.dtype} on {device}; {about['threads']} threads, float32 products by "
        f"{about['float32_products']}. Each number is the median of {setting.repeats} interleaved repeats in one process, "
        "where its section says nothing else.\n"
    )
    text = "\n".join([head, *(section.markdown() for section in sections.values())])
    return text, {
        "setting": asdict(setting), "machine": about, "sections": {name: asdict(own) for name, own in sections.items()},
    }  # fmt: skip
