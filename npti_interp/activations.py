r"""Statistics of neuron values over generated tokens: streaming, mergeable, bound to their model.

For every neuron: how often it fired (value above 0) in each block of questions, mean and variance of its value, and
a sketch that gives the 95th percentile to 1 % (METHOD.md section 1). Counted are generated tokens that were fed back:
never prompt, padding, or anything after a row's end.

Memory is 295 bytes a neuron with the default eight blocks, whatever the number of tokens: 32 for the counts, 16 for
the moments, 247 for the sketch; 4 more once `p95` has been asked for. (The published code's 302 float32 bins are
1,208, saturate at 2²⁴ and end at 3.0.) Where values lie on a device, so does this memory until the result is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from npti_interp import _sketch
from npti_interp._coarse import CoarseSketch
from npti_interp._device import DeviceReducer, Part, not_finite
from npti_interp._files import library_versions, read_tensors, require_array, write_tensors
from npti_interp._sketch import QuantileSketch
from npti_interp.errors import ArtifactError
from npti_interp.models._fingerprint import ModelFingerprint

if TYPE_CHECKING:
    from npti_interp.models import Model

__all__ = ["ActivationCollector", "ActivationStatistics", "collect_activations"]

DEFAULT_BLOCKS = 8
SITE = "ffn_activation"
"""The site's name in files: the output of the FFN's activation function, before any product."""

WAYS = ("auto", "host", "device", "triton")
"""How a collector reduces values; see `ActivationCollector`."""

_MOST_TOKENS = 2**31 - 1  # what counts of 32 bits hold

_KIND = "ActivationStatistics"
_VERSION = 1


class ActivationStatistics:
    """Counts, moments and sketch of every neuron's value. Made by `collect_activations` or `locate`.

    Attributes:
        active_count: ``int32 [block, layer, neuron]`` (int64 where a merge has outgrown that), tokens on which the
            value was above 0.
        n_tokens: ``int64 [block]``, tokens counted.
        mean: ``float64 [layer, neuron]``.
        m2: ``float64 [layer, neuron]``, summed squared deviations from the mean.
        fingerprint: the model.
        metadata: what produced the numbers (decoding, bench, trait, pole, seed, library versions).
    """

    def __init__(
        self,
        active_count: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        n_tokens: npt.NDArray[np.int64],
        mean: npt.NDArray[np.float64],
        m2: npt.NDArray[np.float64],
        sketch: QuantileSketch | CoarseSketch,
        fingerprint: ModelFingerprint,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.active_count = active_count
        self.n_tokens = n_tokens
        self.mean = mean
        self.m2 = m2
        self._sketch = sketch
        self.fingerprint = fingerprint
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._p95: npt.NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and neurons a layer."""
        return self.mean.shape[0], self.mean.shape[1]

    @property
    def n_blocks(self) -> int:
        """Question blocks that are counted apart."""
        return len(self.n_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens counted, over all blocks."""
        return int(self.n_tokens.sum())

    @property
    def probability(self) -> npt.NDArray[np.float64]:
        """Fraction of tokens on which each neuron was active, ``float64 [layer, neuron]``."""
        return self.active_count.sum(axis=0) / max(1, self.total_tokens)

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """Population variance of each neuron's value, ``float64 [layer, neuron]``."""
        return self.m2 / max(1, self.total_tokens)

    @property
    def p95(self) -> npt.NDArray[np.float32]:
        """95th percentile of each neuron's value, ``float32 [layer, neuron]``.

        All counted tokens enter, those where the value is not positive included (as 0: it is the percentile of
        ``max(0, value)``). Within 1 % where it is positive, 0 where it is not; NaN for the rare neuron whose percentile
        has left the sketch's window (never guessed). Of statistics that were reduced on a server it is known only for
        the neurons that `Model.fill_percentiles` was asked for.
        """
        if self._p95 is None:
            positive = self.active_count.sum(axis=0).reshape(-1)
            self._p95 = self._sketch.quantile(0.95, self.total_tokens, positive).reshape(self.shape).astype(np.float32)
        return self._p95

    @property
    def complete(self) -> bool:
        """Whether `p95` is known of all neurons; if not, `Model.fill_percentiles` makes it known for chosen ones."""
        return self._sketch.complete

    def percentile_windows(
        self, where: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], dict[int, tuple[Tensor, Tensor]]]:
        """What a second pass has to count: for `Model.fill_percentiles`.

        Args:
            where: ``bool [layer, neuron]``, neurons whose 95th percentile is wanted.

        Returns:
            the neurons' flat indices, and by layer the neurons and their windows' first bins.
        """
        assert isinstance(self._sketch, CoarseSketch)
        chosen = np.flatnonzero(where.reshape(-1))
        starts = self._sketch.windows(chosen, 0.95, self.total_tokens)
        layers = chosen // self.shape[1]
        return chosen, {
            int(layer): (
                torch.from_numpy((chosen[layers == layer] % self.shape[1]).astype(np.int32)),
                torch.from_numpy(starts[layers == layer]),
            )
            for layer in np.unique(layers)
        }

    def with_percentiles(self, chosen: npt.NDArray[np.int64], fine: npt.NDArray[np.int32]) -> ActivationStatistics:
        """The same statistics with a second pass's counts; see `Model.fill_percentiles`.

        Raises:
            ValueError: the counts are of other answers.
        """
        assert isinstance(self._sketch, CoarseSketch)
        sketch = self._sketch.with_fine(chosen, fine, 0.95, self.total_tokens)
        return ActivationStatistics(
            self.active_count, self.n_tokens, self.mean, self.m2, sketch, self.fingerprint, self.metadata
        )

    def blocks(self, which: Sequence[int]) -> tuple[npt.NDArray[np.int64], int]:
        """Active counts ``[layer, neuron]`` and tokens over some of the blocks."""
        index = list(which)
        return self.active_count[index].sum(axis=0), int(self.n_tokens[index].sum())

    def require_comparable(self, other: ActivationStatistics) -> None:
        """Raise unless ``other`` was collected on the same model, site and blocks.

        Raises:
            FingerprintMismatchError: another model.
            ValueError: another site, shape or number of blocks.
        """
        self.fingerprint.require_same(other.fingerprint, "the two sets of statistics")
        for name, mine, theirs in (
            ("shape", self.shape, other.shape),
            ("number of blocks", self.n_blocks, other.n_blocks),
            ("site", self.metadata.get("site", SITE), other.metadata.get("site", SITE)),
        ):
            if mine != theirs:
                raise ValueError(f"statistics differ in {name}: {mine} and {theirs}")

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Statistics of both sets of tokens together.

        Counts and tokens add up exactly, as integers; mean and ``m2`` to the rounding of float64, so their last digits
        depend on the order of merging. A 95th percentile that is known is the one that counting all tokens in one go
        would give (`QuantileSketch.merge`); it is unknown (NaN) for a few neurons more.

        Raises:
            FingerprintMismatchError: other model.
            ValueError: other site, shape or number of blocks.
        """
        self.require_comparable(other)
        n, m = self.total_tokens, other.total_tokens
        total = n + m
        if n == 0 or m == 0:  # a sketch that has seen nothing is of neither kind
            merged: QuantileSketch | CoarseSketch = (self if m == 0 else other)._sketch.copy()
        elif type(self._sketch) is type(other._sketch):
            merged = self._sketch.merge(cast(Any, other._sketch), total)
        else:
            raise ValueError(
                "statistics that were reduced on a server hold another sketch than those collected here, and the two "
                "do not add up; collect both in one way"
            )
        step = other.mean - self.mean
        shared = {k: v for k, v in self.metadata.items() if other.metadata.get(k) == v and k != "n_prompts"}
        if "n_prompts" in self.metadata and "n_prompts" in other.metadata:
            shared["n_prompts"] = self.metadata["n_prompts"] + other.metadata["n_prompts"]
        return ActivationStatistics(
            _narrow(self.active_count.astype(np.int64) + other.active_count),
            self.n_tokens + other.n_tokens,
            self.mean + step * (m / max(1, total)),
            self.m2 + other.m2 + step**2 * (n * m / max(1, total)),
            merged,
            self.fingerprint,
            shared,
        )

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file (whole or not at all); DESIGN section 3 names its arrays."""
        write_tensors(
            Path(path),
            _KIND,
            _VERSION,
            {
                "active_count": self.active_count,
                "n_tokens": self.n_tokens,
                "mean": self.mean,
                "m2": self.m2,
                "p95": self.p95,
                **self._sketch.tensors(),
            },
            {
                "site": SITE,
                "versions": library_versions(),
                **self.metadata,
                "fingerprint": self.fingerprint.to_json(),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: truncated, altered, of another kind, of a newer format version, or numbers that no counting
                gives.
        """
        arrays, metadata = read_tensors(path, _KIND, _VERSION)
        try:
            fingerprint = ModelFingerprint.from_json(metadata.pop("fingerprint"))
            sketch = (CoarseSketch if "coarse" in arrays else QuantileSketch).from_tensors(arrays)
            shape = fingerprint.n_layers, fingerprint.d_mlp
            n_tokens = require_array(arrays, "n_tokens", (None,), np.int64)
            count = require_array(arrays, "active_count", (len(n_tokens), *shape), np.int32, np.int64)
            mean, m2 = (require_array(arrays, name, shape, np.float64) for name in ("mean", "m2"))
        except KeyError as error:
            raise ArtifactError(f"{path} lacks {error}") from error
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error
        streams = len(sketch.coarse if isinstance(sketch, CoarseSketch) else sketch.base)
        sound = (
            streams == mean.size
            and len(n_tokens) > 0
            and ((n_tokens >= 0) & (n_tokens < 2**48)).all()
            and ((count >= 0) & (count <= n_tokens[:, None, None])).all()
            and np.isfinite(mean).all()
            and np.isfinite(m2).all()
            and (m2 >= 0).all()
        )
        if not sound:
            raise ArtifactError(f"{path}: its arrays do not fit together")
        return cls(count, n_tokens, mean, m2, sketch, fingerprint, metadata)

    def __repr__(self) -> str:
        layers, neurons = self.shape
        who = " ".join(str(self.metadata[k]) for k in ("trait", "pole") if self.metadata.get(k))
        return (
            f"ActivationStatistics({layers} layers × {neurons:,} neurons, {self.total_tokens:,} tokens, {who or '—'})"
        )

    def _repr_html_(self) -> str:
        p = self.probability
        rows = {
            "model": str(self.fingerprint),
            "condition": " / ".join(str(self.metadata[k]) for k in ("trait", "pole") if self.metadata.get(k)) or "—",
            "tokens": f"{self.total_tokens:,} in {self.n_blocks} blocks",
            "neurons": f"{self.shape[0]} layers × {self.shape[1]:,}",
            "active": f"{p.mean():.1%} of tokens on average; {np.mean(p == 0):.1%} of neurons never",
        }
        cells = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{v}</td></tr>" for k, v in rows.items())
        return f"<table><caption>Activation statistics</caption>{cells}</table>"


def _narrow(counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """As 32-bit integers where they fit: a file half the size."""
    return counts.astype(np.int32) if counts.max(initial=0) <= np.iinfo(np.int32).max else counts


def _fused() -> Callable[..., None]:
    try:
        from npti_interp._device_triton import reduce
    except ImportError as error:
        raise ImportError(
            "values are to be reduced by Triton, which is not installed: pip install triton, or leave out "
            "reduce='triton' (NPTI_REDUCE=triton)"
        ) from error
    return reduce


class ActivationCollector:
    """Takes in neuron values layer by layer while a model runs, and reduces them at once.

    Values on a CPU are reduced by compiled loops (`npti_interp._sketch`), those on any other device there, without
    waiting for it (`npti_interp._device`, not timed on such hardware as yet). Both give the same counts, moments to
    float32's precision, and percentiles with the same promise; where a layer's values are when its first come in
    decides which it is.

    Args:
        fingerprint: the model's.
        n_blocks: question blocks to count apart.
        reduce: ``"host"`` copies all values to the host first, ``"device"`` takes the device's way on a CPU too, and
            ``"auto"`` chooses. ``"triton"`` is ``"auto"``, but on a device in one kernel (`npti_interp._device_triton`:
            tested in Triton's interpreter alone). By default what the environment variable ``NPTI_REDUCE`` says, else
            ``"auto"``.

    Raises:
        ValueError: fewer than two blocks, or no such way to reduce.
        ImportError: Triton is asked for and not installed.
    """

    def __init__(
        self, fingerprint: ModelFingerprint, n_blocks: int = DEFAULT_BLOCKS, *, reduce: str | None = None
    ) -> None:
        if n_blocks < 2:
            raise ValueError(f"at least 2 question blocks are needed for a standard error, got {n_blocks}")
        self._way = reduce or os.environ.get("NPTI_REDUCE") or "auto"
        if self._way not in WAYS:
            raise ValueError(
                f"values can be reduced in the ways {', '.join(WAYS)}, got {self._way!r} "
                f"({'the argument reduce' if reduce else 'the environment variable NPTI_REDUCE'})"
            )
        layers, neurons = fingerprint.n_layers, fingerprint.d_mlp
        self._fingerprint = fingerprint
        self.n_blocks = n_blocks
        self._neurons = neurons
        self._counts = np.zeros((layers, n_blocks, neurons), np.int32)
        self._mean = np.zeros((layers, neurons))
        self._m2 = np.zeros((layers, neurons))
        self._size = layers * neurons
        self._sketch: QuantileSketch | CoarseSketch | None = None
        self._seen = np.zeros(layers, np.int64)
        self._tokens = np.zeros(n_blocks, np.int64)
        self._device = DeviceReducer(
            layers, neurons, n_blocks, _fused() if self._way == "triton" else None, self._upload
        )
        # Triton's interpreter runs on a CPU.
        interpreted = self._way == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        self._cpu_too = self._way == "device" or interpreted

    def _upload(self, part: Part) -> None:
        """What has been counted before, and the windows that a pilot has laid, go where the values are."""
        assert isinstance(self._sketch, QuantileSketch)
        first = part.layers.start * self._neurons
        if self._seen[part.layers.start] or self._sketch.width[first : first + len(part.layers) * self._neurons].any():
            part.upload(self._counts, self._mean, self._m2, self._sketch, self._seen)

    def check(self) -> None:
        """Look now whether all values were finite; `result` does so too.

        Raises:
            NonFiniteActivationError: one was not; names the first layer.
        """
        self._device.check()

    @classmethod
    def resume(cls, statistics: ActivationStatistics) -> Self:
        """A collector that goes on where one stopped: the end is the same, bit for bit, as without the break.

        Args:
            statistics: from `so_far` or `result`.

        Raises:
            OverflowError: they are of more tokens than one collector takes.
        """
        own = cls(statistics.fingerprint, statistics.n_blocks)
        if (total := statistics.total_tokens) > _MOST_TOKENS:
            raise OverflowError("one collector takes at most 2³¹ tokens; collect in shards and merge the statistics")
        own._counts[:] = statistics.active_count.transpose(1, 0, 2)
        own._mean[:], own._m2[:] = statistics.mean, statistics.m2
        own._tokens[:], own._seen[:] = statistics.n_tokens, total
        sketch = statistics._sketch
        if isinstance(sketch, CoarseSketch):
            own._sketch = CoarseSketch(sketch.coarse.copy())
        elif total or sketch.width.any():  # otherwise it may be of either kind
            own._sketch = sketch.copy()
        return own

    def emptied(self) -> Self:
        """A collector that has counted nothing, but whose sketch begins with the windows of this one's.

        Parts of one stream of tokens that all begin with the windows of one short pilot have them in common when they
        are merged, and so know as many percentiles as one collector.
        """
        own = type(self)(self._fingerprint, self.n_blocks)
        if isinstance(self._sketch, QuantileSketch):
            own._sketch = self._sketch.emptied()
        return own

    def begin(self, blocks: npt.NDArray[np.int64]) -> None:
        """Announce a pass over tokens of the given blocks (one entry a token); all layers follow."""
        self._device.flush()
        if int(self._tokens.sum()) + len(blocks) > _MOST_TOKENS:
            raise OverflowError("one collector takes at most 2³¹ tokens; collect in shards and merge the statistics")
        self._tokens += np.bincount(blocks, minlength=self.n_blocks)

    def add(
        self, layer: int, values: Float[Tensor, "row d_mlp"], rows: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64]
    ) -> None:
        """Take in one layer's values.

        Args:
            layer: which layer.
            values: neuron values. On a device they are not copied, and must not be changed before the next `begin`.
            rows: the rows of ``values`` that hold a token to count.
            blocks: their blocks.

        Raises:
            NonFiniteActivationError: NaN or infinity among them; on a device, or among values of earlier passes.
        """
        if self._sketch is None:
            self._sketch = QuantileSketch.empty(self._size)
        assert isinstance(self._sketch, QuantileSketch)
        elsewhere = self._way != "host" and (values.device.type != "cpu" or self._cpu_too)
        if layer in self._device or elsewhere:
            self._device.add(layer, values, rows, blocks)
            return
        array = values.detach().to("cpu", torch.float32).contiguous().numpy()
        if not _sketch.accumulate(
            array, rows, blocks, self._counts[layer], self._mean[layer], self._m2[layer], int(self._seen[layer]),
            self._sketch, layer * self._neurons,
        ):  # fmt: skip
            self._device.check()  # what an earlier layer holds there has not been looked at yet
            raise not_finite(layer)
        self._seen[layer] += len(rows)

    def absorb(self, counted: Mapping[str, Tensor]) -> None:
        """Take in what a server has reduced: the result of `npti_interp._programs.Counts`."""
        tokens = counted["tokens"].numpy().astype(np.int64)
        fresh = int(tokens.sum())
        if fresh == 0:
            return
        if self._sketch is None:
            self._sketch = CoarseSketch.empty(self._size)
        assert isinstance(self._sketch, CoarseSketch)
        n = int(self._tokens.sum())
        if n + fresh > _MOST_TOKENS:
            raise OverflowError("one collector takes at most 2³¹ tokens; collect in shards and merge the statistics")
        self._counts += counted["count"].to(torch.int32).numpy()
        step = counted["mean"].double().numpy() - self._mean
        self._mean += step * (fresh / (n + fresh))
        self._m2 += counted["m2"].double().numpy() + step**2 * (n * fresh / (n + fresh))
        self._sketch.coarse += counted["coarse"].to(torch.int32).numpy().reshape(self._size, -1)
        self._tokens += tokens
        self._seen += fresh

    def result(self, metadata: Mapping[str, Any] | None = None) -> ActivationStatistics:
        """The statistics so far.

        Raises:
            ValueError: no token was counted.
            NonFiniteActivationError: NaN or infinity among values on a device.
        """
        if self._sketch is None or self._tokens.sum() == 0:
            raise ValueError(
                "no generated token was fed back, so there is nothing to count; raise max_new_tokens above 1"
            )
        return self.so_far(metadata)

    def so_far(self, metadata: Mapping[str, Any] | None = None) -> ActivationStatistics:
        """The same, where it does not matter if no token has been counted yet.

        What is on devices comes here, and goes back with the next values: a collector that goes on from this and one
        that goes on from its file (`resume`) count with the very same numbers.
        """
        self._device.check()
        for part in self._device.parts:
            assert isinstance(self._sketch, QuantileSketch)
            part.download(self._counts, self._mean, self._m2, self._sketch)
            self._seen[part.layers.start : part.layers.stop] = part.seen
        self._device.forget()
        sketch = self._sketch.copy() if self._sketch is not None else QuantileSketch.empty(self._size)
        return ActivationStatistics(
            np.ascontiguousarray(self._counts.transpose(1, 0, 2)),
            self._tokens.copy(),
            self._mean.copy(),
            self._m2.copy(),
            sketch,
            self._fingerprint,
            {"site": SITE, **dict(metadata or {})},
        )


def collect_activations(
    model: Model,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    answers: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 100,
    blocks: Sequence[int] | None = None,
    n_blocks: int = DEFAULT_BLOCKS,
    metadata: Mapping[str, Any] | None = None,
) -> ActivationStatistics:
    """Statistics of every neuron over the answers to ``prompts``.

    Args:
        model: from `load_model`.
        prompts: user messages, or lists of chat messages.
        answers: None decodes greedily and counts meanwhile; given, they are replayed teacher-forced, which gives the
            same numbers. An `Answer` is replayed as the tokens it was decoded as; of a plain string all tokens count.
        max_new_tokens: length of an answer while decoding.
        blocks: block of each prompt, 0 … ``n_blocks`` − 1; by default prompt *i* is in block *i* modulo ``n_blocks``.
        n_blocks: question blocks counted apart (for standard errors and split halves).
        metadata: kept with the result.

    Returns:
        Statistics of the model's σ(ĥW1) on generated tokens that were fed back.

    Raises:
        ValueError: no prompts; an empty prompt; unequal numbers of prompts, answers and blocks; nothing to count.
        NonFiniteActivationError: NaN or infinity in a layer.
    """
    return model.collect(
        prompts, answers, max_new_tokens=max_new_tokens, blocks=blocks, n_blocks=n_blocks, metadata=metadata
    )[0]
