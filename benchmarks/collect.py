"""Collecting neuron statistics while decoding, against the published algorithm: time added, memory, and a95's error.

What is compared with is the published collection written afresh (METHOD.md sections 1 and 4): for each layer and step a
float32 histogram a neuron of 302 bins, 0.01 wide up to 3.0 and one each below and above, by `torch.bucketize` and
`scatter_add_`, and counts of values above 0. Both run in one process on the same decoding loop and the same values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import npti_interp as npti
from benchmarks import harness
from npti_interp.activations import ActivationCollector, ActivationStatistics
from npti_interp.generation import Decoding, Row
from npti_interp.models import ModelFingerprint

PUBLISHED, OURS = "published histogram", "this toolkit"
WIDTHS = (1536, 14_336)
"""Neurons a layer of the embedded model and of Llama-3-8B."""


class Published:
    """The published collection, with a collector's methods.

    Args:
        fingerprint: the model's.
    """

    def __init__(self, fingerprint: ModelFingerprint) -> None:
        self._shape = fingerprint.n_layers, fingerprint.d_mlp
        self._edges = torch.arange(301) * 0.01
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens = 0

    def begin(self, blocks: npt.NDArray[np.int64]) -> None:
        """A pass over so many tokens; it knows no blocks."""
        self.tokens += len(blocks)

    def add(self, layer: int, values: Tensor, rows: npt.NDArray[np.int64], _: npt.NDArray[np.int64]) -> None:
        """Take in one layer's values."""
        if layer not in self._layers:
            self._edges = self._edges.to(values.device)
            d = values.shape[1]
            self._layers[layer] = torch.zeros(d, 302, device=values.device), torch.zeros(d, device=values.device)
        histogram, active = self._layers[layer]
        if len(rows) < len(values):
            values = values[torch.from_numpy(rows).to(values.device)]
        own = values.float()
        active += (own > 0).sum(dim=0)
        bins = torch.bucketize(own.T.contiguous(), self._edges)
        histogram.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float32))

    def check(self) -> None:
        """It looks at nothing."""

    def p95(self) -> npt.NDArray[np.float64]:
        """``[layer, neuron]``: the lower edge of the percentile's bin, −∞ where that is the one below all edges."""
        lower = np.concatenate([[-np.inf], self._edges.cpu().numpy()])
        out = np.full(self._shape, np.nan)
        for layer, (histogram, _) in self._layers.items():
            reached = histogram.cumsum(dim=1) >= 0.95 * self.tokens
            out[layer] = lower[reached.to(torch.int8).argmax(dim=1).cpu().numpy()]
        return out


class Timed:
    """Hands everything to another collector, and adds up the time that takes.

    Args:
        of: the other; None takes nothing.
    """

    def __init__(self, of: Any) -> None:
        self._of, self.seconds = of, 0.0

    def begin(self, *args: Any) -> None:
        """See `ActivationCollector`."""
        self._timed("begin", args)

    def add(self, *args: Any) -> None:
        """See `ActivationCollector`."""
        self._timed("add", args)

    def check(self) -> None:
        """See `ActivationCollector`."""
        self._timed("check", ())

    def _timed(self, name: str, args: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        getattr(self._of, name)(*args)
        self.seconds += time.perf_counter() - start


class Kept:
    """Keeps all values, on the host.

    Args:
        n_layers: of the model.
    """

    def __init__(self, n_layers: int) -> None:
        self.layers: list[list[Tensor]] = [[] for _ in range(n_layers)]
        self.places: list[tuple[Any, Any]] = []

    def begin(self, _: npt.NDArray[np.int64]) -> None:
        """See `ActivationCollector`."""

    def add(self, layer: int, values: Tensor, rows: Any, blocks: Any) -> None:
        """See `ActivationCollector`."""
        self.layers[layer].append(values[torch.from_numpy(rows).to(values.device)].cpu().clone())
        if layer == 0:
            self.places.append((np.arange(len(rows)), blocks))

    def check(self) -> None:
        """See `ActivationCollector`."""

    def feed(self, collector: Any, device: str = "cpu") -> Any:
        """Give another collector all the values."""
        for step, (rows, blocks) in enumerate(self.places):
            collector.begin(blocks)
            for layer, own in enumerate(self.layers):
                collector.add(layer, own[step].to(device), rows, blocks)
        collector.check()
        return collector


def least(seconds: Sequence[float]) -> float:
    """The time that nothing else disturbed."""
    return min(seconds)


def decoding(setting: harness.Setting, model: npti.Model, section: harness.Section) -> None:
    """Time added to plain decoding."""
    rows_at_once, tokens = setting.sized(32, 8), setting.sized(48, 8)
    questions = npti.PersonalityBench.embedded().questions("N", "search", rows_at_once)
    rows = [Row(tuple(model.encode(q.text)), 0, k % 8, key=k) for k, q in enumerate(questions)]
    fingerprint, on_cpu = model.fingerprint, setting.device == "cpu"
    makers: dict[str, Callable[[], Any]] = {
        "no collection": lambda: None,
        PUBLISHED: lambda: Published(fingerprint),
        OURS: lambda: ActivationCollector(fingerprint),
    }
    inside: dict[str, list[float]] = {name: [] for name in makers}

    def work(name: str) -> None:
        made = makers[name]()
        if made is not None and on_cpu:
            made = Timed(made)
        model.backend.generate(rows, [None], Decoding(tokens), collector=made, max_rows=rows_at_once)
        if made is not None:
            made.check()
        inside[name].append(made.seconds if isinstance(made, Timed) else 0.0)

    times = harness.measure({name: lambda name=name: work(name) for name in makers}, setting.repeats)
    plain = times["no collection"]
    added: dict[str, float] = {}
    for name, own in times.items():
        share = own.median / plain.median - 1
        # The difference of two decoding times is mostly noise; on a CPU the time inside the collector is known.
        added[name] = least(inside[name][1:]) if on_cpu else own.median - plain.median
        section.rows.append(
            [
                f"decoding, {rows_at_once} rows × {tokens} tokens",
                name,
                own.median,
                f"{share:+.1%}",
                added[name],
                None,
                None,
            ]
        )
    section.target(
        "decoding: time added, relative to the published algorithm", added[OURS] / added[PUBLISHED], at_most=0.25
    )
    section.data["decoding"] = {
        "rows": rows_at_once, "tokens": tokens, "seconds": {n: t.seconds for n, t in times.items()},
        "inside": {n: own[1:] for n, own in inside.items()},
    }  # fmt: skip

    kept = Kept(fingerprint.n_layers)
    model.backend.generate(rows, [None], Decoding(tokens), collector=kept, max_rows=rows_at_once)  # type: ignore[arg-type]
    memory(setting, fingerprint, kept, section)
    errors(setting, fingerprint, kept, section)


def memory(setting: harness.Setting, fingerprint: ModelFingerprint, kept: Kept, section: harness.Section) -> None:
    """Most memory held at once while the same values are collected, temporaries included."""
    peaks = {
        PUBLISHED: harness.peak_memory(lambda: kept.feed(Published(fingerprint), setting.device)),
        OURS: harness.peak_memory(lambda: kept.feed(ActivationCollector(fingerprint), setting.device)),
    }
    neurons = fingerprint.n_layers * fingerprint.d_mlp
    for name, peak in peaks.items():
        section.rows.append([f"memory, {neurons:,} neurons", name, None, None, None, peak / 2**20, peak / neurons])
    section.target("memory, relative to the published algorithm", peaks[OURS] / peaks[PUBLISHED], at_most=0.25)
    section.data["memory"] = {"neurons": neurons, **peaks}


def errors(setting: harness.Setting, fingerprint: ModelFingerprint, kept: Kept, section: harness.Section) -> None:
    """Both 95th percentiles against those of the stored values."""
    published = kept.feed(Published(fingerprint), setting.device)
    statistics: ActivationStatistics = kept.feed(ActivationCollector(fingerprint), setting.device).result()
    exact = np.stack([np.quantile(np.maximum(torch.cat(own).double().numpy(), 0), 0.95, axis=0) for own in kept.layers])
    counted = np.stack([(torch.cat(own) > 0).sum(dim=0).numpy() for own in kept.layers])
    assert np.array_equal(statistics.active_count.sum(axis=0), counted), "counts must be exact"
    some = exact > 0
    found: dict[str, Any] = {}
    for name, p95 in ((PUBLISHED, published.p95()), (OURS, statistics.p95)):
        with np.errstate(invalid="ignore"):
            off = np.abs(p95[some] - exact[some]) / exact[some]
        known = np.isfinite(off)
        own = {
            "median": float(np.median(off[known])), "99 %": float(np.quantile(off[known], 0.99)),
            "largest": float(off[known].max()), "unknown": float(1 - known.mean()),
        }  # fmt: skip
        found[name] = own
        section.notes.append(
            f"a95, {name}: relative error {own['median']:.2%} in the median, {own['99 %']:.2%} at the 99th percentile, "
            f"{own['largest']:.2%} at most; NaN or −∞ for {own['unknown']:.3%} of the {int(some.sum()):,} neurons where "
            "it is positive."
        )
    section.target("a95, largest relative error", found[OURS]["largest"], at_most=0.01)
    section.data["a95"] = found


def kernels(setting: harness.Setting, section: harness.Section) -> None:
    """One layer's reduction alone, on synthetic values: 32 rows a step."""
    steps, n_rows = setting.sized(48, 8), 32
    rows, blocks = np.arange(n_rows), np.arange(n_rows) % 8
    synchronize = harness.synchronize
    for width in WIDTHS:
        rng = np.random.default_rng(0)
        shift, scale = rng.normal(-0.7, 0.5, width), rng.lognormal(-0.3, 0.4, width)
        z = rng.normal(shift, scale, (steps, n_rows, width)).astype(np.float32)
        values = torch.nn.functional.silu(torch.from_numpy(z)).to(setting.device, getattr(torch, setting.dtype))
        fingerprint = ModelFingerprint("Synthetic", 1, width, 1, 1, "silu", "", "", "")
        makers: dict[str, Callable[[], Any]] = {
            PUBLISHED: lambda f=fingerprint: Published(f),
            OURS: lambda f=fingerprint: ActivationCollector(f),
        }
        if setting.device == "cpu":
            makers[f"{OURS}, as on a device"] = lambda f=fingerprint: ActivationCollector(f, reduce="device")
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        for repeat in range(1 + max(5, setting.repeats)):
            for name, make in makers.items():
                collector = make()
                synchronize()
                start = time.perf_counter()
                for own in values:
                    collector.begin(blocks)
                    collector.add(0, own, rows, blocks)
                collector.check()
                synchronize()
                end = time.perf_counter()
                if repeat:
                    seconds[name].append(end - start)
        per_value = {name: least(own) / values.numel() * 1e9 for name, own in seconds.items()}
        for name, own in seconds.items():
            section.rows.append(
                [f"alone, {n_rows} × {width:,}, {steps} steps ({per_value[name]:.2f} ns a value)", name, None, None,
                 least(own), None, None]
            )  # fmt: skip
        section.target(
            f"alone, {width:,} neurons a layer: time, relative to the published algorithm",
            per_value[OURS] / per_value[PUBLISHED], at_most=0.25,
        )  # fmt: skip
        section.data[f"alone {width}"] = seconds


def run(setting: harness.Setting) -> harness.Section:
    """Both collections side by side."""
    section = harness.Section(
        "Collection: against the published histogram",
        ["what", "way", "seconds", "over plain", "seconds added", "MiB", "bytes a neuron"],
    )
    with torch.no_grad():
        kernels(setting, section)
        decoding(setting, harness.load(setting), section)
    for row in section.rows:
        row[:] = ["" if v is None else v for v in row]
    return section
