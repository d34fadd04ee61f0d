r"""Memory planned before a run: what weights, keys and values, statistics, edits and a pass's own tensors take, by device.

Weights are counted tensor by tensor, from a skeleton on the meta device where the model is not loaded; keys and values,
statistics and the edits' tables are exact as well, as their shapes are known. What a forward pass takes beside them (its
working set) is an estimate from above of the largest of three passes: over prompts, one decoding step, scoring. Python and
the libraries themselves (0.5 to 1 GiB) are not in it.

On the CPU the room is what the machine, the control groups (both versions) and ``RLIMIT_AS`` leave; on a GPU what its
driver says, with what PyTorch keeps but does not use. ``$NPTI_ALLOW_OVERCOMMIT=1``, or ``allow_overcommit=True``, turns
refusals off.
"""

from __future__ import annotations

import ctypes
import html
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import nn

from npti_interp._programs import COARSE_BINS
from npti_interp._sketch import BYTES_PER_STREAM
from npti_interp.errors import ArtifactError, NotEnoughMemoryError
from npti_interp.models._sites import FFNSites, find_sites
from npti_interp.models._weights import compute_dtype, execution_device, layer_devices, quantisation_of

if TYPE_CHECKING:
    from npti_interp.backends import RemoteSettings
    from npti_interp.backends._ndif import Estimate
    from npti_interp.models._model import Model

__all__ = [
    "ALLOW_VARIABLE",
    "QUANTISATIONS",
    "Available",
    "MemoryItem",
    "MemoryPlan",
    "ModelShape",
    "available_memory",
    "plan_memory",
    "require_gguf",
    "require_load",
    "require_quantization",
    "statistics_bytes",
]

ALLOW_VARIABLE = "NPTI_ALLOW_OVERCOMMIT"
QUANTISATIONS = ("8bit", "4bit")
NF4_BLOCK = 64
"""Weights that share a scale in 4 bits."""
PASS_TOKENS = 1024
"""Tokens in one pass over prompts, or of continuations scored at once (`npti_interp.generation`)."""
LOAD_PLACES = 256
"""Tokens of the one row that must fit beside the weights for a model to be loaded at all."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# -- what there is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Available:
    """Memory that is left on a device.

    Attributes:
        bytes: how much.
        limit: what sets it.
    """

    bytes: int
    limit: str


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(folder: Path) -> int:
    """Bytes of files that the group has read and the kernel gives up when asked."""
    try:
        lines = dict(
            line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines() if " " in line
        )
        return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _groups(root: Path) -> list[tuple[int, str]]:
    """What each control group above this process leaves, of both versions."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, str]] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        # In a container the path is the host's, and only its top is visible.
        parts = [p for p in path.split("/") if p not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            most, used = _read_number(folder / limit), _read_number(folder / usage)
            if most is not None and used is not None and most < 2**60:
                found.append(
                    (most - max(0, used - _reclaimable(folder)), f"control group {'/' + '/'.join(parts[:depth])}")
                )
    return found


def _address_space() -> list[tuple[int, str]]:
    if sys.platform == "win32":
        return []
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return []
    return [(most - psutil.Process().memory_info().vms, "limit of address space (ulimit -v)")]


def available_memory(device: str | torch.device = "cpu", *, root: Path = Path("/")) -> Available:
    """Memory that is left on a device, and what limits it.

    Args:
        device: ``"cpu"``, or a GPU.
        root: where ``/proc`` and ``/sys`` are; for tests.
    """
    where = torch.device(device)
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return Available(free + kept, "the GPU")
    if where.type == "mps":
        most, used = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        return Available(max(0, most - used), "the GPU's recommended most")
    limits = [(psutil.virtual_memory().available, "the machine"), *_groups(root), *_address_space()]
    least, name = min(limits)
    return Available(max(0, least), name)


def _after_trimming(device: str) -> Available:
    """As `available_memory`, after the allocator has given back what it kept."""
    if torch.device(device).type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return available_memory(device)


def overcommit_allowed(allowed: bool = False) -> bool:
    """Whether refusals are off."""
    return allowed or os.environ.get(ALLOW_VARIABLE, "") not in ("", "0")


# -- what is needed ----------------------------------------------------------------------------------------------------


def statistics_bytes(
    n_layers: int, d_mlp: int, n_blocks: int = 8, *, percentiles: bool = False, coarse: bool = False
) -> int:
    """Bytes of an `ActivationStatistics`' arrays (one pole of a trait).

    Args:
        n_layers: layers.
        d_mlp: neurons a layer.
        n_blocks: question blocks.
        percentiles: whether `p95` has been asked for, and is kept.
        coarse: whether they were reduced on a server, whose sketch is another.
    """
    sketch = 4 * COARSE_BINS if coarse else BYTES_PER_STREAM
    return n_layers * d_mlp * (4 * n_blocks + 16 + sketch + 4 * percentiles) + 8 * n_blocks


def _held(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def _quantised_bytes(module: nn.Module, quantization: str) -> int:
    """Bytes of a projection's weight as bitsandbytes stores it."""
    rows, columns = cast("tuple[int, int]", tuple(cast(torch.Tensor, module.weight).shape))
    if type(module).__name__ == "Conv1D":
        rows, columns = columns, rows
    if quantization == "8bit":
        return rows * columns + 4 * rows  # a float32 scale a row
    return -(-rows * columns // 2) + 4 * -(-rows * columns // NF4_BLOCK) + 16 * 4  # scales, and the 16 levels


def _packed_extra(module: nn.Module) -> int:
    """Bytes that a quantised projection holds beside its parameters."""
    weight: Any = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return _held(state.absmax) + _held(state.code)
    if type(module).__name__ != "Linear8bitLt":
        return 0
    scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
    return 0 if scales is None else _held(scales)


def _not_quantised(skeleton: Any) -> list[str]:
    from transformers.quantizers.base import get_keys_to_not_convert

    return [str(name) for name in get_keys_to_not_convert(skeleton)]


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model.

    Attributes:
        name: what it is called.
        sites: its FFN neurons.
        dtype: of activations, keys and values.
        quantization: ``"8bit"``, ``"4bit"`` or ``""``.
        weights: bytes of weights and buffers, by device; ``"disk"`` for what is fetched from there.
        n_parameters: entries of its weights.
        devices: where each layer computes.
        embedding: where token ids go and logits come back.
        kv_heads: heads of keys and values.
        head_dim: their width.
        n_heads: heads of the queries.
        vocab: rows of the unembedding.
        largest: bytes of the largest tensor at full size in ``dtype``: what converting, fetching or multiplying out takes.
    """

    name: str
    sites: FFNSites
    dtype: torch.dtype
    quantization: str
    weights: Mapping[str, int]
    n_parameters: int
    devices: tuple[str, ...]
    embedding: str
    kv_heads: int
    head_dim: int
    n_heads: int
    vocab: int
    largest: int

    @classmethod
    def of_model(cls, hf_model: nn.Module, sites: FFNSites, name: str) -> ModelShape:
        """The shape of a model that is in memory (or is a skeleton, with all weights on ``meta``)."""
        weights: dict[str, int] = {}
        seen: set[int] = set()
        n = largest = 0
        dtype = compute_dtype(hf_model)
        for module in hf_model.modules():
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for own_name, own in tensors:
                if id(own) in seen:
                    continue
                seen.add(id(own))
                where = str(own.device)
                if where == "meta" and hasattr(module, "_hf_hook"):
                    where = _offloaded_to(module, own_name)
                size = _held(own)
                if own_name == "weight" and (extra := _packed_extra(module)):
                    size += extra
                    entries = int(cast(Any, module).in_features) * int(cast(Any, module).out_features)
                else:
                    entries = own.numel()
                if isinstance(own, nn.Parameter):
                    n += entries
                    largest = max(largest, entries * dtype.itemsize)
                weights[where] = weights.get(where, 0) + size
        devices = tuple(map(str, layer_devices(hf_model, sites)))
        entry: Any = hf_model
        embedding = str(execution_device(entry.get_input_embeddings()))
        return cls._made(name, sites, dtype, quantisation_of(hf_model), weights, n, devices, embedding, entry, largest)

    @classmethod
    def of_skeleton(
        cls, skeleton: nn.Module, name: str, dtype: torch.dtype, quantization: str, place: Callable[[str], str]
    ) -> ModelShape:
        """The shape that a model will have.

        Args:
            skeleton: the model on the meta device, in ``dtype``.
            name: what it is called.
            dtype: of its weights, or with quantisation of those that stay in floating point, and of activations.
            quantization: ``"8bit"``, ``"4bit"`` or ``""``.
            place: where the module or parameter of a dotted name goes.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        sites = find_sites(skeleton)
        kept = _not_quantised(skeleton) if quantization else []
        weights: dict[str, int] = {}
        seen: set[int] = set()
        n = largest = 0
        for path, module in skeleton.named_modules():
            packs = bool(quantization) and (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
            packs = packs and should_convert_module(path, kept)
            for own_name, own in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if id(own) in seen:
                    continue
                seen.add(id(own))
                size = _quantised_bytes(module, quantization) if packs and own_name == "weight" else _held(own)
                if isinstance(own, nn.Parameter):
                    n += own.numel()
                    largest = max(largest, own.numel() * dtype.itemsize)
                where = place(f"{path}.{own_name}" if path else own_name)
                weights[where] = weights.get(where, 0) + size
        blocks = sites.paths()["residual"]
        computes = [_computing(place(block)) for block in blocks]
        entry: Any = skeleton
        embedding = next(p for p, m in skeleton.named_modules() if m is entry.get_input_embeddings())
        return cls._made(
            name, sites, dtype, quantization, weights, n, tuple(computes), _computing(place(embedding)), entry, largest
        )

    @classmethod
    def _made(
        cls, name: str, sites: FFNSites, dtype: torch.dtype, quantization: str, weights: Mapping[str, int], n: int,
        devices: tuple[str, ...], embedding: str, hf_model: Any, largest: int,
    ) -> ModelShape:  # fmt: skip
        config = hf_model.config
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            name, sites, dtype, quantization, dict(weights), n, devices, embedding, int(kv), int(width), sites.n_heads,
            int(config.vocab_size), largest,
        )  # fmt: skip

    def per_place(self) -> dict[str, int]:
        """Bytes of keys and values a token and row, by device; sliding windows count as full."""
        each = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize
        return _by_device({d: each * self.devices.count(d) for d in dict.fromkeys(self.devices)})

    def edit_tables(self, conditions: int, layers: int | None = None) -> dict[str, int]:
        """Bytes of the tables of a sweep's neuron edits, by device.

        Args:
            conditions: interventions in one call.
            layers: layers that any of them touches; None is all. Which ones is not known, so the devices' shares are.
        """
        touched = self.sites.n_layers if layers is None else layers
        each = conditions * self.sites.d_mlp * 2 * 4
        share = {d: self.devices.count(d) for d in dict.fromkeys(self.devices)}
        return _by_device({d: -(-each * touched * n // self.sites.n_layers) for d, n in share.items()})

    def step(self, places: int, conditions: int) -> int:
        """Bytes that one row takes in a decoding step beside its keys and values: logits, and a layer's tensors."""
        item = self.dtype.itemsize
        repeated = 2 * self.n_heads * places * self.head_dim * item if self.kv_heads < self.n_heads else 0
        edits = 4 * self.sites.d_mlp * 4 if conditions > 1 else 0
        layer = item * (4 * self.sites.d_mlp + 8 * self.sites.d_model) + 4 * self.n_heads * places
        return repeated + edits + layer + self.vocab * (item + 4) + 12 * places

    def prompt_pass(self, prompt_tokens: int) -> int:
        """Bytes of a pass over prompts: a layer's tensors of all tokens, scores and masks, and its own keys and values."""
        item, tokens = self.dtype.itemsize, max(PASS_TOKENS, prompt_tokens)
        wide = 4 * self.sites.d_mlp + 8 * self.sites.d_model + 4 * self.n_heads * self.head_dim
        scores = self.n_heads * prompt_tokens * 4 + 2 * prompt_tokens * item
        rows = -(-tokens // max(1, prompt_tokens))
        own_cache = sum(self.per_place().values())
        return tokens * (wide * item + scores + own_cache) + rows * self.vocab * item

    def scoring(self) -> int:
        """Bytes of scoring continuations (`Model.log_likelihoods`) beside a prompt pass: logits at all their tokens."""
        return PASS_TOKENS * self.vocab * self.dtype.itemsize + 3 * 32 * self.vocab * 4

    def fetched(self) -> int:
        """Bytes for one tensor at full size, where weights are fetched from elsewhere or multiplied out."""
        return self.largest if self.quantization or "disk" in self.weights else 0


def _by_device(sizes: Mapping[str, int]) -> dict[str, int]:
    return {device: size for device, size in sizes.items() if size}


def _computing(place: str) -> str:
    """Where a module that is kept at ``place`` computes, if no GPU takes part."""
    return "cpu" if place == "disk" else place


def _offloaded_to(module: nn.Module, name: str) -> str:
    """``cpu`` for a tensor that is fetched from the processor's memory, ``disk`` for one from a file."""
    from npti_interp.models._weights import dispatch_hooks

    for hook in dispatch_hooks(module):
        held = getattr(hook, "weights_map", None)
        if held is None:
            continue
        dataset, key = getattr(held, "dataset", held), f"{getattr(held, 'prefix', '')}{name}"
        in_memory = getattr(dataset, "state_dict", dataset)
        return "cpu" if in_memory is not None and key in in_memory else "disk"
    return "meta"


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryItem:
    """One thing that takes memory.

    Attributes:
        what: ``"weights"``, ``"reading"`` (them), ``"keys and values"``, ``"statistics"``, ``"edits"``,
            ``"results under way"`` (from a server) or ``"working set"``.
        device: where.
        bytes: how much.
        how: how that comes about.
        present: it is in memory already, so what is available is without it.
    """

    what: str
    device: str
    bytes: int
    how: str
    present: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes, by device, beside what there is. Made by `plan_memory`.

    Attributes:
        model: the model's name.
        settings: what was asked for.
        items: what takes memory.
        available: what is left on each device; none for a server's.
        remote: for a model on a server, jobs and bytes of locating the traits; None in memory.
        notes: what else a reader should know.
    """

    model: str
    settings: Mapping[str, Any]
    items: tuple[MemoryItem, ...]
    available: Mapping[str, Available]
    remote: Estimate | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def devices(self) -> list[str]:
        """Devices that something is on, without ``disk``."""
        return [d for d in dict.fromkeys(item.device for item in self.items) if d not in ("disk", "server")]

    def bytes(self, what: str | None = None, device: str | None = None) -> int:
        """Bytes of one kind of thing, of one device, or of all."""
        return sum(i.bytes for i in self.items if what in (None, i.what) and device in (None, i.device))

    def total(self, device: str) -> int:
        """Bytes of everything on a device."""
        return self.bytes(device=device)

    def needed(self, device: str) -> int:
        """Bytes on a device that are not taken yet."""
        return sum(i.bytes for i in self.items if i.device == device and not i.present)

    @property
    def short(self) -> dict[str, int]:
        """Devices that it does not fit on, with the bytes that are missing."""
        over = {d: self.needed(d) - self.available[d].bytes for d in self.devices if d in self.available}
        return {device: missing for device, missing in over.items() if missing > 0}

    @property
    def fits(self) -> bool:
        """Whether it fits on every device."""
        return not self.short

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files."""
        return {
            "model": self.model,
            "settings": dict(self.settings),
            "items": [asdict(item) for item in self.items],
            "available": {device: asdict(own) for device, own in self.available.items()},
            "total": {device: self.total(device) for device in self.devices},
            "fits": self.fits,
            "remote": None if self.remote is None else asdict(self.remote),
            "notes": list(self.notes),
        }

    def _lines(self) -> list[tuple[str, str, str, str]]:
        rows: list[tuple[str, str, str, str]] = []
        for device in (*self.devices, *(d for d in ("disk", "server") if any(i.device == d for i in self.items))):
            own = [item for item in self.items if item.device == device]
            rows += [(device, i.what, _size(i.bytes), i.how) for i in own]
            if device not in self.available:
                continue
            room = self.available[device]
            loaded = sum(i.bytes for i in own if i.present)
            left = f"{_size(room.bytes)} left by {room.limit}{', beside the loaded weights' if loaded else ''}"
            verdict = f"{_size(self.short[device])} too much" if device in self.short else "fits"
            rows.append((device, "total", _size(self.total(device)), f"{left}: {verdict}"))
        return rows

    def _title(self) -> str:
        said = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v not in (None, "", False))
        return f"{self.model}: {said}"

    def __str__(self) -> str:
        rows = self._lines()
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(3)]
        lines = [
            f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
        ]  # fmt: skip
        if self.remote is not None:
            lines.append(f"  over the network: {self.remote}")
        return "\n".join([self._title(), *lines, *(f"  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str]) -> str:
            inside = (f"<td{_RIGHT if k == 2 else ''}>{html.escape(cell)}</td>" for k, cell in enumerate(cells))
            return f"<tr>{''.join(inside)}</tr>"

        cells = "".join(map(row, self._lines()))
        more = [*([f"over the network: {self.remote}"] if self.remote is not None else []), *self.notes]
        return (
            f"<table><caption>{html.escape(self._title())}</caption><tr><th>device</th><th>what</th><th>size</th>"
            f"<th>how</th></tr>{cells}</table>{''.join(f'<p>{html.escape(line)}</p>' for line in more)}"
        )


_RIGHT = " style='text-align:right'"


def _size(n: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while n >= 1024 and len(units) > 1:
        n, units = n / 1024, units[1:]
    return f"{n:.0f} B" if units[0] == "B" else f"{n:,.1f} {units[0]}"


def _cache_places(prompt_tokens: int, max_new_tokens: int, more_rows: bool) -> int:
    """Places of the buffers that a batch of rows is decoded in."""
    from npti_interp.generation import _slack

    return prompt_tokens + max_new_tokens + (_slack(max_new_tokens) if more_rows else 0)


def rows_that_fit(shape: ModelShape, free: Mapping[str, int], places: int, conditions: int) -> int:
    """Rows whose keys, values and decoding step fit into the free bytes of each device; may be 0."""
    per = {device: places * each for device, each in shape.per_place().items()}
    per[shape.embedding] = per.get(shape.embedding, 0) + shape.step(places, conditions)
    return min((max(0, free[d]) // each for d, each in per.items() if d in free), default=2**31)


def make_plan(
    shape: ModelShape, *, rows: int | None, prompt_tokens: int, max_new_tokens: int, conditions: int = 1,
    layers: int | None = None, traits: int = 1, n_blocks: int = 8, scoring: bool = False, loaded: bool = False,
    budget: int | None = None, available: Mapping[str, Available] | None = None, more_rows: bool = True,
) -> MemoryPlan:  # fmt: skip
    """The plan of a model's shape.

    Args:
        shape: the model.
        rows: answers decoded at once; None is as many as ``budget`` and the free memory allow.
        prompt_tokens: tokens of the longest prompt.
        max_new_tokens: length of an answer.
        conditions: interventions in one sweep.
        layers: layers that they touch; None is all.
        traits: traits whose statistics are held at once, both poles of each; 0 counts nothing.
        n_blocks: question blocks.
        scoring: whether likelihoods are computed as well.
        loaded: the weights are in memory already.
        budget: bytes for keys and values, where rows are to be chosen.
        available: what there is; by default asked for now.
        more_rows: more rows will come than are decoded at once.
    """
    from npti_interp.generation import MOST_ROWS

    items = [
        MemoryItem("weights", device, size, _about_weights(shape, device), loaded and device != "disk")
        for device, size in shape.weights.items()
    ]
    if traits:
        one = statistics_bytes(shape.sites.n_layers, shape.sites.d_mlp, n_blocks, percentiles=True)
        collecting = statistics_bytes(shape.sites.n_layers, shape.sites.d_mlp, n_blocks)
        items.append(
            MemoryItem(
                "statistics", "cpu", 2 * traits * one + collecting,
                f"{shape.sites.n_layers * shape.sites.d_mlp:,} neurons; {2 * traits} kept, 1 collecting",
            )
        )  # fmt: skip
    tables = shape.edit_tables(conditions, layers) if layers != 0 else {}
    about = f"{conditions} × {shape.sites.n_layers if layers is None else layers} layers × {shape.sites.d_mlp:,} × 8 B"
    items += [MemoryItem("edits", device, size, about) for device, size in tables.items()]
    devices = [
        d for d in dict.fromkeys((*shape.weights, *shape.devices, shape.embedding, "cpu")) if d not in ("disk", "meta")
    ]
    if available is None:
        available = {device: available_memory(device) for device in devices}
    places = _cache_places(prompt_tokens, max_new_tokens, more_rows)
    passing = shape.prompt_pass(prompt_tokens) + (shape.scoring() if scoring else 0) + shape.fetched()
    if rows is None:
        taken = {d: sum(i.bytes for i in items if i.device == d and not i.present) for d in devices}
        free = {
            d: available[d].bytes - taken[d] - (passing if d == shape.embedding else 0)
            for d in devices
            if d in available
        }
        per_row = places * sum(shape.per_place().values())
        most = MOST_ROWS if budget is None else max(1, min(MOST_ROWS, budget // per_row))
        rows = max(1, min(most, rows_that_fit(shape, free, places, conditions)))
    items += [
        MemoryItem("keys and values", device, rows * places * each, f"{rows} rows × {places} places × {each:,} B")
        for device, each in shape.per_place().items()
    ]
    step = rows * shape.step(places, conditions) + shape.fetched()
    items += [
        MemoryItem("working set", device, max(passing, step), "largest of a prompt pass, a decoding step, scoring")
        for device in dict.fromkeys((*shape.devices, shape.embedding))
    ]
    settings = {
        "dtype": str(shape.dtype).removeprefix("torch."), "quantization": shape.quantization, "rows": rows,
        "prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "conditions": conditions, "traits": traits,
    }  # fmt: skip
    order = ("weights", "keys and values", "statistics", "edits", "working set")
    items.sort(key=lambda item: order.index(item.what))
    return MemoryPlan(shape.name, settings, tuple(items), dict(available))


def _about_weights(shape: ModelShape, device: str) -> str:
    stored = f"{shape.quantization} beside {shape.dtype}" if shape.quantization else str(shape.dtype)
    where = ", fetched when needed" if device == "disk" else ""
    return f"{shape.n_parameters:,} parameters in all, {stored.replace('torch.', '')}{where}"


def skeleton_of(config: Any, dtype: torch.dtype) -> Any:
    """A model without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def read_config(name: str | Path, revision: str | None = None, *, cache_only: bool = False) -> Any:
    """The configuration of a hub id, a directory or an embedded model.

    Raises:
        ValueError: a GGUF file, which has none of its own.
        UnsupportedModelError: mixture-of-experts or unknown architecture.
    """
    from transformers import AutoConfig

    from npti_interp.models._embedded import EMBEDDED_MODELS, embedded_checkpoint
    from npti_interp.models._loading import require_supported

    text, path = str(name), Path(str(name)).expanduser()
    if path.suffix.lower() == ".gguf" or path.is_file():
        raise ValueError(
            f"{name}: a GGUF file is planned when it is loaded; name the checkpoint it was made of instead"
        )
    if text in EMBEDDED_MODELS:
        source, cache_only = str(embedded_checkpoint(text)), True
    else:
        source = str(path) if path.is_dir() else text
    local = cache_only or path.is_dir()
    config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=local, trust_remote_code=False)
    require_supported(config.model_type)
    return config


def placing(skeleton: Any, device_map: Any, device: str, dtype: torch.dtype) -> Callable[[str], str]:
    """Where a model's parts go.

    Args:
        skeleton: the model.
        device_map: None, ``"auto"`` (asked of accelerate), a device, or a mapping from dotted names to devices.
        device: where all goes without a map.
        dtype: of the weights, for ``"auto"``.
    """
    if device_map == "auto":
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        classes = list(getattr(skeleton, "_no_split_modules", None) or [])
        most = get_balanced_memory(skeleton, no_split_module_classes=classes, dtype=dtype)
        device_map = infer_auto_device_map(skeleton, max_memory=most, no_split_module_classes=classes, dtype=dtype)
    if device_map is None:
        device_map = {"": device}
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    named = {str(k): _device_name(v) for k, v in device_map.items()}

    def place(name: str) -> str:
        held = [k for k in named if k == "" or name == k or name.startswith(f"{k}.")]
        # A block whose parts are placed one by one computes where its first part is.
        inside = [k for k in named if k.startswith(f"{name}.")]
        if not held and not inside:
            raise ValueError(
                f"device_map says nothing of {name}; give a place for it, or one for everything: {{'': 'cpu'}}"
            )
        return named[max(held, key=len)] if held else named[inside[0]]

    return place


def _device_name(device: Any) -> str:
    if device == "disk":
        return "disk"
    return str(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))


def require_quantization(quantization: str | None) -> str:
    """The name of a way to store weights, ``""`` for none.

    Raises:
        ValueError: unknown.
    """
    if quantization not in (None, "", *QUANTISATIONS):
        raise ValueError(f"unknown quantization {quantization!r}; choose '8bit' or '4bit', or leave it out")
    return quantization or ""


def plan_memory(
    model: Model | str | Path | Any, *, dtype: torch.dtype | None = None, quantization: str | None = None,
    device: str | torch.device = "cpu", device_map: Any = None, rows: int | None = None, prompt_tokens: int = 150,
    max_new_tokens: int = 100, conditions: int = 1, edited_layers: int | None = None, traits: int = 1, n_blocks: int = 8,
    n_questions: int = 200, remote: bool | RemoteSettings = False, revision: str | None = None,
    trust_cache_only: bool = False,
) -> MemoryPlan:  # fmt: skip
    """What a run will take, and whether it fits, without running (or even loading) anything.

    Args:
        model: a loaded `Model`; the name of one (as for `load_model`, without GGUF files), of which only the configuration
            is read; or a Hugging Face configuration.
        dtype: of the weights, for a model that is not loaded; float32 by default, as in `load_model`.
        quantization: ``"8bit"``, ``"4bit"`` or None, likewise.
        device: where it runs, likewise.
        device_map: as for `load_model`, likewise.
        rows: answers decoded at once; None is what `Model` would choose.
        prompt_tokens: tokens of the longest prompt.
        max_new_tokens: length of an answer.
        conditions: interventions in one sweep.
        edited_layers: layers they touch; None is all.
        traits: traits whose statistics (both poles') are held at once.
        n_blocks: question blocks.
        n_questions: search questions a trait; counts for a server's jobs alone.
        remote: the model is on NDIF: what is here, what travels, and in how many jobs.
        revision: as for `load_model`.
        trust_cache_only: as for `load_model`.

    Returns:
        the plan: print it, or read `MemoryPlan.items`.

    Raises:
        ValueError: a setting out of range, or one that a loaded model has decided already.
        UnsupportedModelError: mixture-of-experts or unknown architecture.
    """
    from npti_interp.models._model import DEFAULT_CACHE_BYTES, Model

    for name, value, least in (
        ("rows", rows, 1), ("prompt_tokens", prompt_tokens, 1), ("max_new_tokens", max_new_tokens, 1),
        ("conditions", conditions, 1), ("edited_layers", edited_layers, 0), ("traits", traits, 0), ("n_blocks", n_blocks, 2),
        ("n_questions", n_questions, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    chosen = require_quantization(quantization)
    budget = DEFAULT_CACHE_BYTES
    if isinstance(model, Model):
        if dtype is not None or chosen or device_map is not None or str(device) != "cpu" or remote:
            raise ValueError("a loaded model has its dtype, quantization, devices and server already; leave them out")
        if model.remote_settings is not None:
            return _remote_plan(model.hf_model, model.name, model.remote_settings, traits, n_blocks, n_questions,
                                prompt_tokens, max_new_tokens)  # fmt: skip
        shape, loaded, budget = model.shape, True, model.cache_bytes
    else:
        named = isinstance(model, str | Path)
        config = read_config(model, revision, cache_only=trust_cache_only) if named else model
        name = str(model) if named else str(getattr(config, "_name_or_path", "") or config.model_type)
        skeleton = skeleton_of(config, dtype or torch.float32)
        if remote:
            from npti_interp.backends import RemoteSettings

            settings = remote if isinstance(remote, RemoteSettings) else RemoteSettings()
            return _remote_plan(skeleton, name, settings, traits, n_blocks, n_questions, prompt_tokens, max_new_tokens)
        kind = dtype or torch.float32
        place = placing(skeleton, device_map, _device_name(device), kind)
        shape, loaded = ModelShape.of_skeleton(skeleton, name, kind, chosen, place), False
    return make_plan(
        shape, rows=rows, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens, conditions=conditions,
        layers=edited_layers, traits=traits, n_blocks=n_blocks, scoring=True, loaded=loaded, budget=budget,
    )  # fmt: skip


def _remote_plan(
    skeleton: nn.Module, name: str, settings: RemoteSettings, traits: int, n_blocks: int, n_questions: int,
    prompt_tokens: int, max_new_tokens: int,
) -> MemoryPlan:  # fmt: skip
    """What a model on a server takes here, and what travels."""
    from npti_interp.backends._ndif import Estimate, counting_bytes, estimate_locate

    sites = find_sites(skeleton)
    one = statistics_bytes(sites.n_layers, sites.d_mlp, n_blocks, percentiles=True, coarse=True)
    collecting = statistics_bytes(sites.n_layers, sites.d_mlp, n_blocks, coarse=True)
    neurons = sites.n_layers * sites.d_mlp
    back = neurons * counting_bytes(n_blocks)
    n = sum(p.numel() for p in skeleton.parameters())
    items = (
        MemoryItem("weights", "server", 0, f"{n:,} parameters, which stay there; here is a skeleton without any"),
        MemoryItem("statistics", "cpu", 2 * traits * one + collecting,
                   f"{neurons:,} neurons; {2 * traits} kept, 1 collecting"),
        MemoryItem("results under way", "cpu", settings.at_once * back,
                   f"{settings.at_once} jobs at once × {neurons:,} neurons × {counting_bytes(n_blocks)} B"),
    )  # fmt: skip
    each = estimate_locate(
        sites.n_layers, sites.d_mlp, n_questions=n_questions, max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens,
        n_blocks=n_blocks, rows_per_job=settings.rows_per_job,
    )  # fmt: skip
    travels = Estimate(traits * each.jobs, traits * each.bytes_out, traits * each.bytes_back)
    notes = (
        f"a job that counts sends back {counting_bytes(n_blocks)} bytes a neuron ({_size(back)}); an edit goes out as 14 "
        "bytes an edited neuron and job",
    )
    asked = {"remote": settings.host or "NDIF", "rows": settings.rows_per_job, "prompt_tokens": prompt_tokens,
             "max_new_tokens": max_new_tokens, "traits": traits, "questions": n_questions}  # fmt: skip
    return MemoryPlan(name, asked, items, {"cpu": available_memory("cpu")}, travels, notes)


# -- refusing ----------------------------------------------------------------------------------------------------------


def refuse(plan: MemoryPlan, what: str, advice: Sequence[str], *, allowed: bool = False) -> None:
    """Raise if a plan does not fit, after the allocator has given back what it kept.

    Raises:
        NotEnoughMemoryError: with the numbers, and what could be done.
    """
    if plan.fits or overcommit_allowed(allowed):
        return
    measured = {d: _after_trimming(d) if d in plan.short else own for d, own in plan.available.items()}
    plan = MemoryPlan(plan.model, plan.settings, plan.items, measured, plan.remote, plan.notes)
    if plan.fits:
        return
    device, missing = max(plan.short.items(), key=lambda item: item[1])
    room = plan.available[device]
    parts = ", ".join(
        f"{i.what} {_size(i.bytes)}" for i in plan.items if i.device == device and not i.present and i.bytes
    )  # fmt: skip
    raise NotEnoughMemoryError(
        f"{what} needs {_size(plan.needed(device))} on {device} ({parts}), but {_size(room.bytes)} are left by "
        f"{room.limit}: {_size(missing)} too much. {'; '.join(advice)}{'; ' if advice else ''}or try it nonetheless with "
        f"allow_overcommit=True or {ALLOW_VARIABLE}=1"
    )


def require_load(
    config: Any,
    name: str,
    *,
    dtype: torch.dtype,
    quantization: str,
    device: str,
    device_map: Any,
    allowed: bool = False,
) -> None:
    """Raise unless a model's weights fit with one short row beside them; called before they are read.

    Raises:
        NotEnoughMemoryError: with the numbers, and what would fit.
        ValueError: a device map that leaves something out.
    """

    def plan(kind: torch.dtype, quantised: str, where: Any) -> MemoryPlan:
        skeleton = skeleton_of(config, kind)
        place = placing(skeleton, where, device, kind)
        shape = ModelShape.of_skeleton(skeleton, name, kind, quantised, place)
        own = make_plan(shape, rows=1, prompt_tokens=LOAD_PLACES // 2, max_new_tokens=LOAD_PLACES // 2, layers=0, traits=0,
                        more_rows=False)  # fmt: skip
        # Reading converts one tensor after another.
        items = (*own.items, MemoryItem("reading", "cpu", shape.largest, "the largest tensor, converted"))
        return MemoryPlan(own.model, own.settings, items, own.available)

    first = plan(dtype, quantization, device_map)
    if first.fits or overcommit_allowed(allowed):
        return
    fitting: list[str] = []
    for kind, quantised, said in (
        *((k, "", f"dtype=torch.{str(k).removeprefix('torch.')}") for k in _DTYPES[1:2]),
        *((torch.bfloat16, q, f"dtype=torch.bfloat16, quantization={q!r}") for q in QUANTISATIONS),
    ):
        other = plan(kind, quantised, None)
        smaller = sum(other.bytes("weights", d) for d in other.devices) < first.bytes("weights")
        if other.fits and smaller:
            fitting.append(f"{said} ({_size(other.needed(other.devices[0]))})")
    advice = [f"what would fit: {', '.join(fitting)}" if fitting else "no smaller dtype or quantization fits either"]
    if torch.cuda.is_available() and device_map is None:
        advice.append("device_map='auto' spreads the model over all devices")
    elif device_map is None:
        advice.append("device_map={…: 'disk'} with offload_folder leaves layers on the disk (slow)")
    advice.append("or run it on NDIF with backend='nnsight', remote=True")
    refuse(first, f"loading {name}", advice, allowed=allowed)


def require_gguf(path: Path, dtype: torch.dtype, *, allowed: bool = False) -> None:
    """Raise unless a GGUF file can be dequantised here: it takes its tensors in float32 beside the model that is made.

    Raises:
        NotEnoughMemoryError: with the numbers.
        ArtifactError: not a whole GGUF file.
    """
    from npti_interp.models._embedded import gguf_elements, is_gguf

    if not is_gguf(path):
        raise ArtifactError(f"{path} is not a GGUF file (its first four bytes are not 'GGUF')")
    n = gguf_elements(path)
    items = (
        MemoryItem("weights", "cpu", n * dtype.itemsize, f"{n:,} parameters, {str(dtype).removeprefix('torch.')}"),
        MemoryItem("reading", "cpu", 4 * n, "the file's tensors, dequantised to float32"),
    )
    plan = MemoryPlan(path.name, {"dtype": str(dtype)}, items, {"cpu": available_memory("cpu")})
    advice = ("a checkpoint in safetensors takes no more than its weights, and less with dtype= or quantization=",)
    refuse(plan, f"loading {path.name}", advice, allowed=allowed)
