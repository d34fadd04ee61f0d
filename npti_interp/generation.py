r"""Batched decoding with interventions, replay, and log-likelihoods, on a Hugging Face model in memory.

The model's own forward pass is the truth; this module only decides what is fed to it and keeps its key–value cache.

*One prompt pass for many interventions.* Edits do not touch the prompt pass, so the cache of a prompt is computed once
and copied to one row for each intervention; the rows of a batch then differ in their edits only. Edits of the prompt's
front do touch it: interventions share a pass where these are equal.

*Batches never change a result.* Rows are aligned on the right, positions and mask are passed explicitly. A row that has
ended leaves the batch and the next one takes its place, whatever its length.

*Cache.* Keys and values are written into buffers of a fixed size. The library's own growing cache copies itself whole
at each step.

*Shared beginnings.* Prompts that begin alike (a chat template's head, a persona) have that part passed once.

*Out of memory.* The batch halves and the work goes on: rows that leave are taken up again later, with the tokens they
have, and no token is counted twice.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from npti_interp._programs import (
    INPUTS,
    SITES,
    Edits,
    Means,
    choose,
    edited_places,
    generators,
    placed,
    places_read,
    right_padded,
)
from npti_interp.activations import ActivationCollector
from npti_interp.errors import NonFiniteActivationError
from npti_interp.interventions import Intervention, edit_plan
from npti_interp.models._sites import FFNSites
from npti_interp.models._weights import compute_dtype, execution_device, layer_devices

__all__ = ["Answer", "Decoding", "LocalEngine", "Progress", "Row"]

DEFAULT_ROWS = 64
MOST_ROWS = 256
"""Rows decoded at once, however large the memory: beyond it a processor gains nothing."""
_PREFILL_TOKENS = 1024
"""Prompt tokens, or tokens replayed, in one pass: large enough for the matrix products, small enough for the processor's cache."""
_SCORE_TOKENS = 1024
_LEAST_SHARED = 8
"""Tokens that prompts must have in common before it pays to pass them apart."""
_FEW_GROUPS = 0.9
"""One beginning is used instead of several longer ones if it saves this share of what they save."""
_SHARED_BYTES = 2**28
"""Keys and values of shared beginnings that are kept at once; those used longest ago are passed anew if need be."""
_REPLACED_SHARE = 8
"""One in so many rows must have ended before others take their places: each time costs a pass over prompts."""


class Progress(Protocol):
    """Anything that can be told of work done, such as a tqdm bar."""

    def update(self, n: float = 1) -> Any:
        """``n`` more units are done."""
        ...


class Answer(str):
    """A generated answer: a string that remembers its tokens.

    Attributes:
        tokens: the generated token ids, the end-of-sequence token included if it was generated.
        finished: whether the model ended the answer itself.
    """

    tokens: tuple[int, ...]
    finished: bool

    def __new__(cls, text: str, tokens: Sequence[int] = (), *, finished: bool = False) -> Answer:
        """Make an answer from its text and tokens."""
        self = super().__new__(cls, text)
        self.tokens = tuple(tokens)
        self.finished = finished
        return self


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy; above it tokens are drawn, by a generator seeded for each row.
        top_p: draw from the smallest set of tokens with this much probability.
        repetition_penalty: logits of tokens seen in prompt or answer are divided (or multiplied, if negative) by it;
            padding is not "seen". 1 is none.
        seed: of the drawing.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def to_dict(self) -> dict[str, Any]:
        """The settings, for files."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One answer to make: a prompt, which intervention acts on it, and where its tokens are counted.

    Attributes:
        prompt: token ids.
        intervention: index into the interventions of the call.
        block: block in which its tokens are counted; −1 counts nothing.
        key: seeds the drawing of tokens when the temperature is above 0.
    """

    prompt: tuple[int, ...]
    intervention: int = 0
    block: int = -1
    key: int = 0


class _BufferLayer(DynamicLayer):
    """One layer's keys and values in a buffer of fixed capacity; places before ``low`` are no longer needed."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._low = self._end = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, not garbage: padded places are masked, but 0 · NaN would still be NaN.
        self._k = key_states.new_zeros(*key_states.shape[:2], self._capacity, key_states.shape[3])
        self._v = value_states.new_zeros(*value_states.shape[:2], self._capacity, value_states.shape[3])
        self.keys, self.values = self._k[:, :, :0], self._v[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._end + key_states.shape[2]
        self._k[:, :, self._end : end] = key_states
        self._v[:, :, self._end : end] = value_states
        self._set(self._low, end)
        return self.keys, self.values  # pyright: ignore[reportReturnType]

    def _set(self, low: int, end: int) -> None:
        self._low, self._end = low, end
        self.keys, self.values = self._k[:, :, low:end], self._v[:, :, low:end]

    def get_seq_length(self) -> int:
        return self._end - self._low

    def take(self, source: DynamicLayer, index: Tensor, rows: Tensor, n_rows: int, at: int) -> None:
        """Copy ``source``'s rows ``index`` into this layer's ``rows``, ending at place ``at``."""
        keys, values = cast(Tensor, source.keys), cast(Tensor, source.values)
        if not self.is_initialized:
            self.lazy_initialization(keys[:1].expand(n_rows, -1, -1, -1), values[:1].expand(n_rows, -1, -1, -1))
        start = at - keys.shape[2]
        for own, new in ((self._k, keys), (self._v, values)):
            # The layers of one model may be on several devices.
            to, chosen = rows.to(own.device), index.to(new.device)
            own[to, :, :start] = 0  # what the row before left there may not be finite
            own[to, :, start:at] = new.index_select(0, chosen)
        self._set(self._low, at)

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Take these as what has been filled so far."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = keys.shape[2]
        self._k[:, :, :end], self._v[:, :, :end] = keys, values
        self._set(0, end)

    def rearrange(self, index: Int[Tensor, "row pos"]) -> None:
        """Let each row's place ``j`` hold what its place ``index[row, j]`` holds now."""
        at = index[:, None, :, None].expand(-1, self._k.shape[1], -1, self._k.shape[3]).to(self._k.device)
        self._k, self._v = self._k.gather(2, at), self._v.gather(2, at)
        self._capacity = index.shape[1]
        self._set(0, self._capacity)

    def forget(self, end: int) -> None:
        """Take back what was written from place ``end`` on (none, if a pass did not come so far)."""
        if self.is_initialized:
            self._set(self._low, min(self._end, end))

    def keep(self, index: Tensor) -> None:
        """Keep only some rows, in ascending order; where there is no memory for a smaller buffer, in the old one."""
        if not self.is_initialized:
            return
        index = index.to(self._k.device)
        try:
            self._k, self._v = self._k.index_select(0, index), self._v.index_select(0, index)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for own in (self._k, self._v):
                for to, row in enumerate(index.tolist()):
                    own[to] = own[row]
            self._k, self._v = self._k[: len(index)], self._v[: len(index)]
        self._set(self._low, self._end)

    def window(self, low: int) -> None:
        """Forget the places before ``low``."""
        self._set(low, self._end)

    def shift(self, places: int) -> None:
        """Move everything ``places`` to the left."""
        low, end = max(0, self._low - places), self._end - places
        for own in (self._k, self._v):
            for part in own.split(8):  # a few rows at a time: this must not need much memory
                part[:, :, :end] = part[:, :, places : self._end].clone()
        self._set(low, end)


def _buffers(n_layers: int, capacity: int) -> Cache:
    return Cache(layers=[_BufferLayer(capacity) for _ in range(n_layers)])


_FRONT, _WITHIN = SITES[:1], SITES[1:]
"""The sites that are edited in passes over prompts, and in those over generated tokens."""


@dataclass
class Pass:
    """What the hooks of `hook_sites` do during one forward pass.

    Attributes:
        edits: the edits; None edits nothing.
        sites: the sites at which they act.
        which: each row's intervention.
        steps: each row's step, for random masks.
        start: each row's first place that is not padding, for edits of the prompt's front.
        where: mask ``[row, pos]`` of the places that are edited; ``"all"`` are. The front is edited besides.
        wanted: the site that is read.
        take: gets each layer's ``[row, pos, width]`` there, edited; None reads nothing.
    """

    edits: Edits | None = None
    sites: Sequence[str] = ()
    which: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    steps: list[int] = field(default_factory=list[int])
    start: Tensor | None = None
    where: Any = "all"
    wanted: str = ""
    take: Callable[[int, Tensor], None] | None = None


def hook_sites(modules: Mapping[str, Sequence[nn.Module]], state: Pass) -> Generator[Any]:
    """Put hooks on the modules that ``state`` edits or reads now, and on no others; they do what it says when called.

    Args:
        modules: by site, a module a layer (`FFNSites.modules`).
        state: may be changed between two passes.

    Yields:
        each hook's handle, once it is there: for `hooked`.
    """
    for site in SITES:
        for layer, module in enumerate(modules[site]):
            reads = state.take is not None and state.wanted == site
            if reads or (state.edits is not None and site in state.sites and layer in state.edits.tables[site]):
                register = module.register_forward_pre_hook if site in INPUTS else module.register_forward_hook
                yield register(_hook(site, layer, state))


@contextlib.contextmanager
def hooked(registering: Iterable[Any]) -> Generator[None]:
    """Inside the block hooks are there, and after it they are gone, also if putting them there was interrupted.

    Args:
        registering: registers one hook after the other while it is read, and gives their handles.
    """
    handles: list[Any] = []
    try:
        handles.extend(registering)  # what it gave before it was interrupted is kept
        yield
    finally:
        try:
            _remove(handles)
        finally:  # an interrupt may fall into the line above; removing a hook twice does nothing
            _remove(handles)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _hook(site: str, layer: int, state: Pass) -> Callable[..., Any]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        whole = inputs if site in INPUTS else output
        values: Tensor = whole[0] if isinstance(whole, tuple) else whole
        edits, changed = state.edits, values
        if edits is not None and site in state.sites and layer in edits.tables[site]:
            where = "all" if site == "before" else state.where
            changed = placed(
                values, lambda v: edits.change(site, layer, v, state.which, state.steps, state.start), where
            )
        if state.take is not None and state.wanted == site:
            state.take(layer, changed)
        if changed is values:
            return None
        return (changed, *whole[1:]) if isinstance(whole, tuple) else changed

    return hook


_Key = tuple[tuple[int, ...], int]
"""Token ids of a prompt, and the number of its front's edit (`Edits.fronts`)."""


class _Shared:
    """Beginnings that several prompts of a call have in common.

    Prompts are divided into groups so that few tokens are passed: a group's beginning once, the rest of each prompt.

    Args:
        prompts: all prompts of the call.

    Attributes:
        kept: a beginning's keys and values, by layer.
    """

    def __init__(self, prompts: Iterable[tuple[int, ...]]) -> None:
        self.kept: dict[tuple[int, ...], list[DynamicLayer]] = {}
        self._length = _shared_lengths(sorted(set(prompts)))

    def beginning(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The part of a prompt that others share; () if there is none."""
        return prompt[: self._length.get(prompt, 0)]

    def make_room(self, wanted: Iterable[tuple[int, ...]]) -> None:
        """Forget beginnings that are not wanted now, those that were wanted longest ago first, down to a limit of bytes."""
        for own in wanted:
            if own in self.kept:
                self.kept[own] = self.kept.pop(own)
        sizes = {
            own: sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor))
            for own, layers in self.kept.items()
        }
        total, needed = sum(sizes.values()), set(wanted)
        for own, size in sizes.items():
            if total <= _SHARED_BYTES:
                break
            if own not in needed:
                del self.kept[own]
                total -= size


@dataclass
class _Run:
    """Neighbours among sorted prompts that begin with the same ``length`` tokens; such runs form a tree.

    Attributes:
        length: tokens in common.
        left: the first of them.
        best: most tokens that a division of the runs inside it saves.
        groups: that division: members, length.
        loose: its prompts that are in none of these groups.
    """

    length: int
    left: int
    best: int = 0
    groups: list[tuple[Sequence[int], int]] = field(default_factory=list[tuple[Sequence[int], int]])
    loose: list[int] = field(default_factory=list[int])

    def adopt(self, child: _Run) -> None:
        """Take in a run that lies inside this one."""
        self.best += child.best
        for name in ("groups", "loose"):
            small, large = sorted((getattr(self, name), getattr(child, name)), key=len)
            large.extend(small)
            setattr(self, name, large)

    def close(self, right: int) -> None:
        """It ends here: it is one group, unless those inside it, and one of the rest, save a good deal more."""
        if self.length < _LEAST_SHARED:
            return
        whole, rest = (right - self.left - 1) * self.length, max(0, len(self.loose) - 1) * self.length
        divided = self.best + rest
        self.best = max(whole, divided)
        if whole >= _FEW_GROUPS * divided:
            self.groups, self.loose = [(range(self.left, right), self.length)], []
        elif rest:
            self.groups, self.loose = [*self.groups, (self.loose, self.length)], []


def _shared_lengths(prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """How many first tokens each prompt shares with its group; 0 is left out.

    Args:
        prompts: sorted, all different.
    """
    common: list[int] = []  # with the next prompt; at least one token of each must be left to pass
    for a, b in itertools.pairwise(prompts):
        n, most = 0, min(len(a), len(b)) - 1
        while n < most and a[n] == b[n]:
            n += 1
        common.append(n)
    root = _Run(0, 0)
    stack = [root]
    for k, n in enumerate([*common, 0]):  # prompts k and k + 1 have n tokens in common
        left, child = k, None
        if stack[-1].length < n:
            stack.append(_Run(n, k))
        stack[-1].loose.append(k)
        while stack[-1].length > n:
            run = stack.pop()
            if child is not None:
                run.adopt(child)
            run.close(k + 1)
            left, child = run.left, run
        if stack[-1].length < n:
            stack.append(_Run(n, left))
        if child is not None:
            stack[-1].adopt(child)
    return {prompts[k]: length for members, length in root.groups for k in members}


def _new_tokens(prompts: Sequence[tuple[int, ...]], shared: _Shared | None) -> list[int]:
    """Tokens of each prompt that must be passed."""
    return [len(p) - (len(shared.beginning(p)) if shared is not None else 0) for p in prompts]


@dataclass
class _Batch:
    """The rows being decoded; a slot whose row has ended waits for the next one."""

    cache: Cache
    mask: Tensor  # [slot, capacity]
    row: Any  # int64 [slot]: which row, −1 for none
    step: Any  # int64 [slot]: number of the pass that comes next for this row; −1 feeds the prompt's last token
    start: Any  # int64 [slot]: first place of its prompt
    token: Any  # int64 [slot]: what is fed next
    which: Tensor  # [slot]
    end: int  # places filled


class LocalEngine:
    """Runs a Hugging Face causal language model that is in memory.

    Args:
        model: the model; hooks are put on it during a call and are gone after it, whatever happens.
        sites: its FFN neurons.
        pad_token_id: any valid id; what stands in padded places is masked.
        stop_token_ids: tokens that end an answer.
    """

    def __init__(self, model: nn.Module, sites: FFNSites, pad_token_id: int, stop_token_ids: Sequence[int]) -> None:
        self._model: Any = model
        self._sites = sites
        self._pad = pad_token_id
        self._stop = frozenset(stop_token_ids)
        self._modules = sites.modules(model)

    @property
    def device(self) -> torch.device:
        """Where token tensors go: to the embedding. Of a model on several devices, logits come back there."""
        return execution_device(self._model.get_input_embeddings())

    # -- hooks ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hooked(self, state: Pass) -> Generator[None]:
        with hooked(hook_sites(self._modules, state)), torch.no_grad():
            yield

    def _edits(self, interventions: Sequence[Intervention | None]) -> Edits:
        return Edits(edit_plan(interventions, self._sites), layer_devices(self._model, self._sites))

    def _forward(self, ids: Tensor, mask: Tensor, cache: Cache, keep: int | Tensor) -> Float[Tensor, "row pos vocab"]:
        length = ids.shape[1]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    # -- prompts -------------------------------------------------------------------------------------------------

    def _left_pad(self, prompts: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
        width = width or max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _prompt_pass(
        self, prompts: Sequence[tuple[int, ...]], edits: Edits, which: Sequence[int], shared: _Shared | None = None
    ) -> tuple[Cache, Tensor, Tensor]:
        """Cache, mask and last position's logits of some prompts, padded on the left to one width.

        Args:
            prompts: token ids.
            edits: of these, those of the prompt's front.
            which: each prompt's intervention.
            shared: what is known of their beginnings (`_pass_beginnings`); only where no prompt is edited.
        """
        beginnings = [shared.beginning(p) if shared is not None else () for p in prompts]
        if shared is not None and any(beginnings):
            return self._continued_pass(prompts, beginnings, shared)
        ids, mask = self._left_pad(prompts)
        cache = _buffers(self._sites.n_layers, ids.shape[1])
        start = torch.tensor([ids.shape[1] - len(p) for p in prompts], device=self.device)
        chosen = torch.tensor(which, device=self.device)
        with self._hooked(Pass(edits, _FRONT, chosen, start=start)):
            return cache, mask, self._forward(ids, mask, cache, keep=1)[:, -1]

    def _pass_beginnings(self, prompts: Sequence[tuple[int, ...]], shared: _Shared) -> None:
        """Pass the beginnings of these prompts that are not known yet."""
        wanted = dict.fromkeys(own for p in prompts if (own := shared.beginning(p)))
        missing = sorted((own for own in wanted if own not in shared.kept), key=len)
        shared.make_room(wanted)
        for chunk in by_tokens(range(len(missing)), [len(own) for own in missing], _PREFILL_TOKENS):
            ids, mask = self._left_pad([missing[k] for k in chunk])
            cache = _buffers(self._sites.n_layers, ids.shape[1])
            with torch.no_grad():
                self._forward(ids, mask, cache, keep=1)
            for row, k in enumerate(chunk):
                shared.kept[missing[k]] = _one_row(cache, row, len(missing[k]))

    def _continued_pass(
        self, prompts: Sequence[tuple[int, ...]], beginnings: Sequence[tuple[int, ...]], shared: _Shared
    ) -> tuple[Cache, Tensor, Tensor]:
        """`_prompt_pass` where some of the prompts' beginnings are known."""
        # [padding, beginning, rest, padding]: each row in one piece, as windows of attention count places.
        lengths = torch.tensor([len(own) for own in beginnings])[:, None]
        rests = [p[len(own) :] for p, own in zip(prompts, beginnings, strict=True)]
        first, width = int(lengths.max()), max(map(len, rests))
        ids = torch.full((len(prompts), width), self._pad)
        for row, rest in enumerate(rests):
            ids[row, : len(rest)] = torch.tensor(rest)
        sizes = torch.tensor([len(rest) for rest in rests])[:, None]
        mask = torch.cat([torch.arange(first) >= first - lengths, torch.arange(width) < sizes], dim=1).long()
        cache = _buffers(self._sites.n_layers, first + width)
        rows_of = {own: [k for k, other in enumerate(beginnings) if other == own] for own in set(beginnings) if own}
        for layer, buffer in enumerate(cache.layers):
            parts = {
                own: [cast(Tensor, t) for t in (held.keys, held.values)]
                for own in rows_of
                if (held := shared.kept[own][layer])
            }
            whole = [t.new_zeros(len(prompts), t.shape[1], first, t.shape[3]) for t in next(iter(parts.values()))]
            for own, rows in rows_of.items():
                for big, small in zip(whole, parts[own], strict=True):
                    big[rows, :, first - len(own) :] = small
            cast(_BufferLayer, buffer).load(*whole)
        ends, at = torch.unique(sizes[:, 0] - 1, return_inverse=True)
        with torch.no_grad():
            logits = self._forward(ids.to(self.device), mask.to(self.device), cache, keep=ends.to(self.device))
        # What follows expects the rows to end in one place.
        total = lengths + sizes
        back = torch.arange(int(total.max())).flip(0)  # places counted from the end
        index = (first + sizes - 1 - back).clamp(min=0)
        for buffer in cache.layers:
            cast(_BufferLayer, buffer).rearrange(index)
        last = logits[torch.arange(len(prompts), device=logits.device), at.to(logits.device)]
        return cache, (back < total).long().to(self.device), last

    def _prefill(
        self, prompts: Sequence[tuple[int, ...]], edits: Edits, rows_of: Sequence[Sequence[int]], n_rows: int,
        width: int, room: int, shared: _Shared | None = None,
    ) -> tuple[Cache, Tensor, Tensor]:  # fmt: skip
        """One pass over each prompt, under the first of ``edits``; its cache goes to all of its rows.

        Returns:
            the rows' cache (``width`` places filled), their mask over those places, and the last position's logits
            ``[row, vocab]``.
        """
        cache = _buffers(self._sites.n_layers, width + room)
        mask = torch.zeros((n_rows, width), dtype=torch.long, device=self.device)
        logits: list[Tensor] = [torch.empty(0)] * n_rows
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
        if shared is not None:
            self._pass_beginnings(prompts, shared)
        for chunk in by_tokens(order, _new_tokens(prompts, shared), _PREFILL_TOKENS):
            small, own, last = self._prompt_pass([prompts[p] for p in chunk], edits, [0] * len(chunk), shared)
            source = [k for k, p in enumerate(chunk) for _ in rows_of[p]]
            target = [row for p in chunk for row in rows_of[p]]
            index = torch.tensor(source, device=self.device)
            rows = torch.tensor(target, device=self.device)
            for big, little in zip(cache.layers, small.layers, strict=True):
                cast(_BufferLayer, big).take(cast(_BufferLayer, little), index, rows, n_rows, width)
            mask[rows, width - own.shape[1] :] = own.index_select(0, index)
            for k, row in zip(source, target, strict=True):
                logits[row] = last[k]
        return cache, mask, torch.stack(logits)

    # -- decoding ------------------------------------------------------------------------------------------------

    def rows_within(self, budget: int, rows: Sequence[Row], decoding: Decoding) -> int:
        """How many rows' keys and values fit into ``budget`` bytes, at least 1 and at most `MOST_ROWS`."""
        size = compute_dtype(self._model).itemsize
        return cache_rows(self._model.config, self._sites.n_layers, size, budget, rows, decoding)

    def generate(
        self,
        rows: Sequence[Row],
        interventions: Sequence[Intervention | None],
        decoding: Decoding,
        *,
        collector: ActivationCollector | None = None,
        max_rows: int = DEFAULT_ROWS,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Decode one answer a row.

        Args:
            rows: what to answer.
            interventions: what `Row.intervention` points into; None leaves the model alone.
            decoding: how tokens are chosen.
            collector: takes in the (edited) neuron values of the generated tokens that are fed back.
            max_rows: most rows decoded at once.
            progress: advanced by one a finished row.

        Returns:
            generated token ids of each row, the end-of-sequence token included where one was generated.
        """
        require_room(rows, interventions, self._sites)
        edits = self._edits(interventions)
        early, fronts = edits.early, edits.fronts()
        counted = _Counted(collector, len(rows))
        state = Pass(edits, _WITHIN, wanted="value", take=counted.take if collector is not None else None)
        out: list[list[int]] = [[] for _ in rows]
        chooser = _Chooser(rows, decoding, collector)
        # What a row's prompt pass takes in: with edit_prompt_end the last prompt token is fed by itself, edited.
        fed = [row.prompt[:-1] if early[row.intervention] else row.prompt for row in rows]
        # Rows of one key share a pass over the prompt.
        keys = [(prompt, fronts[row.intervention]) for prompt, row in zip(fed, rows, strict=True)]
        shared = None if edits.tables["before"] else _Shared(fed)
        # Those side by side; prompts by length, so that little is padding.
        waiting = sorted(range(len(rows)), key=lambda r: (len(fed[r]), *keys[r], r))
        width = max((len(prompt) for prompt in fed), default=0)
        slack = _slack(decoding.max_new_tokens) if len(rows) > max_rows else 0
        capacity = width + decoding.max_new_tokens + slack
        batch = self._empty_batch(min(max_rows, len(rows)), width, capacity)
        prepared: dict[_Key, tuple[list[DynamicLayer], Tensor]] = {}  # prompts with rows still to come
        least = max(1, len(batch.row) // _REPLACED_SHARE)  # ended rows that are waited for
        while waiting or (batch.row >= 0).any():
            free = np.flatnonzero(batch.row < 0)
            end, steps = batch.end, batch.step.copy()
            try:
                if waiting and (len(free) >= least or len(free) == len(batch.row)):
                    coming, rest = waiting[: len(free)], waiting[len(free) :]
                    first = self._admit(batch, free[: len(coming)], coming, rest, rows, keys, edits, prepared, shared)
                    begun = [k for k, r in enumerate(coming) if not early[rows[r].intervention]]
                    for k, r in enumerate(coming):
                        if early[rows[r].intervention]:
                            batch.token[free[k]], batch.step[free[k]] = rows[r].prompt[-1], -1
                    if begun:
                        self._take_tokens(batch, free[begun], first[begun], chooser, out, decoding, progress)
                    waiting = rest
                if not waiting and (batch.row < 0).sum() >= least:
                    self._compact(batch, np.flatnonzero(batch.row >= 0))
                if not (batch.row >= 0).any():
                    continue
                self._make_room(batch, rows)
                end, steps = batch.end, batch.step.copy()
                logits = self._step(batch, state, counted, rows)
                alive = np.flatnonzero(batch.row >= 0)
                own = logits if len(alive) == len(logits) else logits[torch.from_numpy(alive).to(logits.device)]
                batch.step[alive] += 1
                self._take_tokens(batch, alive, own, chooser, out, decoding, progress)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                counted.interrupted()
                batch.step = steps
                waiting = self._halve(batch, end, capacity, waiting, error) + waiting
                least = max(1, len(batch.row) // _REPLACED_SHARE)
        return out

    def _halve(self, batch: _Batch, end: int, capacity: int, coming: Sequence[int], error: Exception) -> list[int]:
        """Memory did not suffice: undo what was begun after place ``end``, and go on with half of the slots.

        Returns:
            the rows that left; they are taken up again, with the tokens that they have.

        Raises:
            MemoryError: there was one slot only.
        """
        slots = len(batch.row)
        if slots == 1:
            raise MemoryError(
                f"not even one row fits into the memory: a cache of {capacity} places beside the model. Use shorter "
                "prompts or fewer new tokens, a smaller dtype, or a larger device"
            ) from error
        error.__traceback__ = None  # its frames hold on to the tensors of the pass that failed
        warnings.warn(f"out of memory with {slots} rows at once; going on with {slots // 2}", stacklevel=4)
        batch.row[np.isin(batch.row, coming)] = -1  # being admitted: they still count as waiting
        alive = np.flatnonzero(batch.row >= 0)
        kept = np.concatenate([alive, np.flatnonzero(batch.row < 0)])[: slots // 2]
        leaving = batch.row[np.setdiff1d(alive, kept)].tolist()
        if batch.end > end:  # the pass that failed had begun to write this place
            batch.mask[:, end:] = 0
            batch.end = end
        for layer in batch.cache.layers:
            cast(_BufferLayer, layer).forget(end)
        if not len(alive):  # nothing to keep, and the buffers may not even be whole
            batch.cache = _buffers(self._sites.n_layers, capacity)
        _release_memory()
        self._compact(batch, np.sort(kept))
        return leaving

    def _empty_batch(self, slots: int, width: int, capacity: int) -> _Batch:
        none = np.full(slots, -1)
        return _Batch(
            _buffers(self._sites.n_layers, capacity),
            torch.zeros(slots, capacity, dtype=torch.long, device=self.device),
            none.copy(), np.zeros(slots, np.int64), np.full(slots, width), np.full(slots, self._pad),
            torch.zeros(slots, dtype=torch.long, device=self.device), width,
        )  # fmt: skip

    def _admit(
        self, batch: _Batch, slots: Any, coming: Sequence[int], waiting: Sequence[int], rows: Sequence[Row],
        keys: Sequence[_Key], edits: Edits, prepared: dict[_Key, tuple[list[DynamicLayer], Tensor]],
        shared: _Shared | None,
    ) -> Tensor:  # fmt: skip
        """Put rows into free slots, after one pass for each key among them; returns their first logits."""
        logits: list[Tensor] = [torch.empty(0)] * len(coming)
        slots_of: dict[_Key, list[int]] = {}
        for k, r in enumerate(coming):
            slots_of.setdefault(keys[r], []).append(k)
            batch.row[slots[k]], batch.step[slots[k]] = r, 0
            batch.start[slots[k]] = batch.end - len(keys[r][0])
        which = [rows[r].intervention for r in coming]
        batch.which[torch.from_numpy(slots).to(self.device)] = torch.tensor(which, device=self.device)

        def place(layers: Sequence[Any], last: Tensor, source: list[int], target: list[int]) -> None:
            index = torch.tensor(source, device=self.device)
            at = torch.from_numpy(slots[target]).to(self.device)
            for big, little in zip(batch.cache.layers, layers, strict=True):
                cast(_BufferLayer, big).take(little, index, at, len(batch.row), batch.end)
            for k, j in zip(source, target, strict=True):
                logits[j] = last[k]

        new = [key for key in slots_of if key not in prepared]
        for key in [key for key in slots_of if key in prepared]:
            place(*prepared[key], [0] * len(slots_of[key]), slots_of[key])
        still = {keys[r] for r in waiting}
        lengths = [len(prompt) for prompt, _ in new]
        if shared is not None:
            self._pass_beginnings([prompt for prompt, _ in new], shared)
        fresh = _new_tokens([prompt for prompt, _ in new], shared)
        for chunk in by_tokens(sorted(range(len(new)), key=lambda p: lengths[p]), fresh, _PREFILL_TOKENS):
            of = [slots_of[new[p]] for p in chunk]
            begun = [which[own[0]] for own in of]
            small, _, last = self._prompt_pass([new[p][0] for p in chunk], edits, begun, shared)
            place(small.layers, last, [k for k, own in enumerate(of) for _ in own], [k for own in of for k in own])
            for k, p in enumerate(chunk):
                if new[p] in still:
                    prepared[new[p]] = _one_row(small, k, lengths[p]), last[k : k + 1]
        for key in [key for key in prepared if key not in still]:
            del prepared[key]
        mask = torch.zeros(len(coming), batch.mask.shape[1], dtype=torch.long)
        for k, r in enumerate(coming):
            mask[k, batch.end - len(keys[r][0]) : batch.end] = 1
        batch.mask[torch.from_numpy(slots).to(self.device)] = mask.to(self.device)
        return torch.stack(logits)

    def _take_tokens(
        self, batch: _Batch, slots: Any, logits: Tensor, chooser: _Chooser, out: list[list[int]], decoding: Decoding,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        """Choose the next token of the rows in ``slots``; rows that end with it leave.

        A row that had left for lack of memory has its next tokens already.
        """
        known = np.array([batch.step[slot] < len(out[batch.row[slot]]) for slot in slots])
        open_ = np.flatnonzero(~known)
        if len(open_):
            own = logits if len(open_) == len(slots) else logits[torch.from_numpy(open_).to(logits.device)]
            for slot, token in zip(slots[open_], chooser.choose(own, batch.row[slots[open_]], out), strict=True):
                out[batch.row[slot]].append(token)
        ended = 0
        for slot in slots:
            own_tokens, place = out[batch.row[slot]], batch.step[slot]
            batch.token[slot] = token = own_tokens[place]
            if token in self._stop or place + 1 == decoding.max_new_tokens:
                batch.row[slot], batch.token[slot] = -1, self._pad
                ended += 1
        if ended and progress is not None:
            progress.update(ended)

    def _compact(self, batch: _Batch, kept: npt.NDArray[np.int64]) -> None:
        """Drop all slots but some."""
        index = torch.from_numpy(kept).to(self.device)
        for layer in batch.cache.layers:
            cast(_BufferLayer, layer).keep(index)
        batch.mask, batch.which = batch.mask.index_select(0, index), batch.which.index_select(0, index)
        batch.row, batch.step, batch.start, batch.token = (
            a[kept] for a in (batch.row, batch.step, batch.start, batch.token)
        )

    def _step(self, batch: _Batch, state: Pass, counted: _Counted, rows: Sequence[Row]) -> Tensor:
        """Feed each slot its token; returns ``[slot, vocab]``."""
        low = int(batch.start[batch.row >= 0].min())
        for layer in batch.cache.layers:
            cast(_BufferLayer, layer).window(low)
        batch.mask[:, batch.end] = 1
        batch.end += 1
        state.which, state.steps = batch.which, batch.step.tolist()
        blocks = np.array([rows[r].block if r >= 0 else -1 for r in batch.row])
        taken = np.flatnonzero((blocks >= 0) & (batch.step >= 0))
        counted.begin(taken, blocks[taken], batch.row[taken], batch.step[taken])
        ids = torch.from_numpy(batch.token).to(self.device)[:, None]
        with self._hooked(state):
            logits = self._forward(ids, batch.mask[:, low : batch.end], batch.cache, keep=1)[:, -1]
        counted.finish()
        return logits

    def _make_room(self, batch: _Batch, rows: Sequence[Row]) -> None:
        """Where the buffers are full, what no row needs any more makes room."""
        if batch.end < batch.mask.shape[1]:
            return
        start = batch.start[batch.row >= 0]
        places = min(int(start.min()), batch.end - max(int((batch.end - start).max()), self._room(rows)))
        for layer in batch.cache.layers:
            cast(_BufferLayer, layer).shift(places)
        batch.mask = torch.roll(batch.mask, -places, dims=1)
        batch.mask[:, batch.end - places :] = 0
        batch.start, batch.end = batch.start - places, batch.end - places

    @staticmethod
    def _room(rows: Sequence[Row]) -> int:
        """Places that must stay filled so that any prompt still fits in front."""
        return max(len(row.prompt) for row in rows)

    # -- replay --------------------------------------------------------------------------------------------------

    def replay(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        interventions: Sequence[Intervention | None],
        collector: ActivationCollector,
        *,
        progress: Progress | None = None,
    ) -> None:
        """Feed given answers teacher-forced, and collect on them.

        Args:
            rows: their prompts, interventions and blocks.
            answers: token ids that are fed back (so without the last one of a decoded answer).
            interventions: as for `generate`.
            collector: takes in the values at the answers' tokens.
            progress: advanced by one a row.
        """
        counted = _Counted(collector, len(rows))

        def run(chunk: list[int], state: Pass, batch: Any, answering: Tensor) -> None:
            which = np.repeat(chunk, answering.sum(dim=1).numpy())
            blocks = np.array([rows[r].block for r in which])
            places = np.flatnonzero(answering.flatten().numpy())
            own = blocks >= 0
            counted.begin(places[own], blocks[own], which[own], np.zeros(int(own.sum()), np.int64))
            state.wanted, state.take = "value", counted.take
            try:
                self._feed(state, batch)
            except Exception:
                counted.interrupted()
                raise
            counted.finish()

        fed = [r for r in range(len(rows)) if len(answers[r])]
        self._replay(rows, answers, interventions, fed, run, progress)

    def read(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        interventions: Sequence[Intervention | None],
        *,
        site: str,
        at: str,
        progress: Progress | None = None,
    ) -> Float[Tensor, "row place layer width"]:
        """What every layer holds at a site, in chosen places, by teacher-forced replay.

        Args:
            rows: as for `replay`.
            answers: token ids, all of which are fed; none where ``at`` is about the prompt.
            interventions: as for `generate`.
            site: one of `npti_interp._programs.SITES`.
            at: which places; see `npti_interp._programs.places_read`. With ``"every"`` prompts must have one length.
            progress: advanced by one a row.

        Returns:
            float32 on the CPU.

        Raises:
            ValueError: an empty answer, or an intervention that cannot be replayed.
        """
        require_readable(answers, at)
        out: list[Tensor] = [torch.empty(0)] * len(rows)

        def run(chunk: list[int], state: Pass, batch: Any, answering: Tensor) -> None:
            prompts, own = [list(rows[r].prompt) for r in chunk], [list(answers[r]) for r in chunk]
            mask, owner, sizes = places_read(at, prompts, own, answering)
            means = Means(owner, sum(sizes))
            wanted = mask.to(self.device)
            state.wanted = site
            state.take = lambda layer, values: means.take(layer, values[wanted.to(values.device)])
            self._feed(state, batch)
            for r, part in zip(chunk, means.result().split(sizes), strict=True):
                out[r] = part

        self._replay(rows, answers, interventions, range(len(rows)), run, progress)
        return torch.stack(out)

    def _replay(
        self, rows: Sequence[Row], answers: Sequence[Sequence[int]], interventions: Sequence[Intervention | None],
        fed: Sequence[int], run: Callable[[list[int], Pass, Any, Tensor], None], progress: Progress | None,
    ) -> None:  # fmt: skip
        """Hand prompts with their answers to ``run``, several at once, with the edits that act on them."""
        require_replayable(interventions, self._sites)
        require_room(rows, interventions, self._sites)
        edits = self._edits(interventions)
        lengths = [len(row.prompt) + len(answer) for row, answer in zip(rows, answers, strict=True)]

        def work(chunk: list[int]) -> None:
            prompts = [list(rows[r].prompt) for r in chunk]
            batch, answering = right_padded(prompts, [list(answers[r]) for r in chunk], self._pad)
            which = torch.tensor([rows[r].intervention for r in chunk])
            where = edited_places(edits, which, prompts, answering)
            start = torch.zeros(len(chunk), dtype=torch.long, device=self.device)
            state = Pass(edits, SITES, which.to(self.device), [0] * len(chunk), start, where.to(self.device))
            run(chunk, state, batch, answering)
            if progress is not None:
                progress.update(len(chunk))

        for chunk in by_tokens(sorted(fed, key=lambda r: lengths[r]), lengths, _PREFILL_TOKENS):
            in_halves(chunk, work)

    def _feed(self, state: Pass, batch: Any) -> None:
        with self._hooked(state):
            own = {name: tensor.to(self.device) for name, tensor in batch.items()}
            self._model(**own, use_cache=False, logits_to_keep=1)

    # -- likelihood ----------------------------------------------------------------------------------------------

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        intervention: Intervention | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """Summed log-probability of each continuation given its prompt.

        Args:
            prompts: token ids; each is passed once for all of its continuations.
            continuations: for each prompt, the token ids to score; an empty one gets 0.
            intervention: acts where it would if the continuation had been generated.
            progress: advanced by one a prompt.

        Returns:
            natural logarithms, in the shape of ``continuations``.

        Raises:
            ValueError: an intervention that cannot be replayed, or a prompt too short for it.
        """
        require_replayable([intervention], self._sites)
        require_room([Row(tuple(p)) for p in prompts], [intervention], self._sites)
        edits = self._edits([intervention])
        early = int(edits.early[0])  # the last prompt token is then fed with the continuation, and edited like it
        out = [[0.0] * len(c) for c in continuations]
        known = [tuple(p[: len(p) - early]) for p in prompts]
        shared = None if edits.tables["before"] else _Shared(known)
        jobs = [(p, c) for p in range(len(prompts)) for c in range(len(continuations[p])) if len(continuations[p][c])]

        def work(chosen: list[int]) -> None:
            own = [jobs[j] for j in chosen]
            chunk = list(dict.fromkeys(p for p, _ in own))
            rows_of: list[list[int]] = [[] for _ in chunk]
            for r, (p, _) in enumerate(own):
                rows_of[chunk.index(p)].append(r)
            texts = [[*prompts[p][len(prompts[p]) - early :], *continuations[p][c]] for p, c in own]
            begun = [known[p] for p in chunk]
            for (p, c), value in zip(own, self._scores(begun, rows_of, texts, edits, early, shared), strict=True):
                out[p][c] = value

        order = sorted((p for p in range(len(prompts)) if any(continuations[p])), key=lambda p: len(prompts[p]))
        size = [sum(len(c) for c in continuations[p]) for p in range(len(prompts))]
        at = {p: [] for p in order}
        for j, (p, _) in enumerate(jobs):
            at[p].append(j)
        for chunk in by_tokens(order, size, _SCORE_TOKENS):
            in_halves([j for p in chunk for j in at[p]], work)
            if progress is not None:
                progress.update(len(chunk))
        return out

    def _scores(
        self, prompts: Sequence[tuple[int, ...]], rows_of: Sequence[Sequence[int]], texts: Sequence[Sequence[int]],
        edits: Edits, early: int, shared: _Shared | None,
    ) -> list[float]:  # fmt: skip
        """Log-probability of texts, in one pass; with ``early`` the first token of each is the prompt's last."""
        room = max(len(t) for t in texts)
        cache, mask, first = self._prefill(
            prompts, edits, rows_of, len(texts), max(len(p) for p in prompts), room, shared
        )
        ids = torch.full((len(texts), room), self._pad)
        for r, text in enumerate(texts):
            ids[r, : len(text)] = torch.tensor(text)
        ids = ids.to(self.device)
        total = torch.zeros(len(texts), dtype=torch.float64, device=self.device)
        if not early:
            total = _gather_log_prob(first, ids[:, 0]).double()
        if room > 1:
            full = torch.cat([mask, mask.new_ones(len(texts), room - 1)], dim=1)
            which = torch.zeros(len(texts), dtype=torch.long, device=self.device)
            with self._hooked(Pass(edits, _WITHIN, which, [0] * len(texts))):
                logits = self._forward(ids[:, :-1], full, cache, keep=0)
            scored = _gather_log_prob(logits.flatten(0, 1), ids[:, 1:].flatten()).double()
            lengths = torch.tensor([len(t) for t in texts], device=self.device)
            wanted = torch.arange(1, room, device=self.device) < lengths[:, None]
            total = total + (scored.view(len(texts), -1) * wanted).sum(dim=1)
        return total.tolist()

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], intervention: Intervention | None = None
    ) -> Float[Tensor, "prompt vocab"]:
        """Logits after each prompt, float32 on the CPU; an intervention acts as in `log_likelihoods`."""
        require_replayable([intervention], self._sites)
        require_room([Row(tuple(p)) for p in prompts], [intervention], self._sites)
        edits = self._edits([intervention])
        early = int(edits.early[0])
        own = [tuple(p[: len(p) - early]) for p in prompts]
        rows = [[k] for k in range(len(own))]
        cache, mask, logits = self._prefill(own, edits, rows, len(own), max(map(len, own)), early)
        if early:
            which = torch.zeros(len(own), dtype=torch.long, device=self.device)
            ids = torch.tensor([list(p[-1:]) for p in prompts], device=self.device)
            full = torch.cat([mask, mask.new_ones(len(own), 1)], dim=1)
            with self._hooked(Pass(edits, _WITHIN, which, [-1] * len(own))):
                logits = self._forward(ids, full, cache, keep=1)[:, -1]
        return logits.float().cpu()


class _Counted:
    """Hands the values of chosen places to a collector, each token's once, though a pass may have to be repeated.

    Args:
        collector: takes them in; None takes nothing.
        n_rows: rows of the call.
    """

    def __init__(self, collector: ActivationCollector | None, n_rows: int) -> None:
        self._collector = collector
        self._steps = np.zeros(n_rows, np.int64)  # passes of each row that are counted
        self._layers = np.zeros(n_rows, np.int64)  # layers that are counted of the one after them
        self._places = self._blocks = self._rows = self._pass = self._first = np.zeros(0, np.int64)
        self._taken = 0

    def begin(self, places: Any, blocks: Any, rows: Any, steps: Any) -> None:
        """A pass begins: count these places of the flattened ``[row · pos]``, in these blocks.

        Args:
            places: the places.
            blocks: each place's block.
            rows: each place's row.
            steps: number of the row's pass, from 0 on; what has been counted of it before is not counted again.
        """
        if self._collector is None:
            return
        new = steps >= self._steps[rows]
        self._places, self._blocks, self._rows, self._pass = places[new], blocks[new], rows[new], steps[new]
        self._first, self._taken = self._layers[self._rows], 0
        if (fresh := self._first == 0).any():
            with _final_memory():
                self._collector.begin(self._blocks[fresh])

    def take(self, layer: int, values: Float[Tensor, "row pos d_mlp"]) -> None:
        """Take in a layer."""
        if self._collector is None:
            return
        places, blocks = self._places, self._blocks
        if self._first.any():
            due = self._first <= layer
            places, blocks = places[due], blocks[due]
        if len(places):
            with _final_memory():
                self._collector.add(layer, values.reshape(-1, values.shape[-1]), places, blocks)
        self._taken = layer + 1

    def finish(self) -> None:
        """The pass has come to its end."""
        self._steps[self._rows], self._layers[self._rows] = self._pass + 1, 0
        self._places = self._blocks = self._rows = self._pass = self._first = np.zeros(0, np.int64)

    def interrupted(self) -> None:
        """The pass, if one has begun, has failed and will be repeated."""
        self._layers[self._rows] = np.maximum(self._first, self._taken)
        self._places = self._blocks = self._rows = self._pass = self._first = np.zeros(0, np.int64)


@contextlib.contextmanager
def _final_memory() -> Generator[None]:
    """Where a collector lacks memory the call ends: half an update cannot be taken back."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError("no memory was left to count neurons; decode fewer rows at once") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says that memory was lacking: on a GPU by a class of its own, elsewhere in words."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(own in str(error) for own in words)
    )


def in_halves(chunk: list[int], work: Callable[[list[int]], None]) -> None:
    """Do ``work`` on a chunk; where memory is lacking, on its halves.

    Raises:
        MemoryError: it is lacking for a single member.
    """
    try:
        work(chunk)
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(chunk) == 1:
            raise MemoryError(
                "not even one row fits into the memory beside the model. Use shorter texts, a smaller dtype, or a larger "
                "device"
            ) from error
    warnings.warn(f"out of memory with {len(chunk)} rows at once; going on with {len(chunk) // 2}", stacklevel=3)
    _release_memory()
    for half in (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]):
        in_halves(half, work)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_replayable(interventions: Sequence[Intervention | None], sites: FFNSites) -> None:
    """Raise unless the interventions act alike in decoding and in one teacher-forced pass.

    Raises:
        ValueError: one has a random mask, which changes at every step.
    """
    for own in interventions:
        if own is not None and any(e.drop > 0 for e in own.layer_edits(sites.n_layers, sites.d_mlp).values()):
            raise ValueError("an edit with a random mask changes at every step; it cannot be replayed in one pass")


def require_room(rows: Sequence[Row], interventions: Sequence[Intervention | None], sites: FFNSites) -> None:
    """Raise unless each row's prompt is as long as what its intervention does to prompts needs.

    With ``edit_prompt_end`` the last token is fed by itself: others must come before it, and the front's edit end there.

    Raises:
        ValueError: a prompt is too short.
    """
    front = [
        max((len(v) for v in own.front_additions(sites).values()), default=0) if own is not None else 0
        for own in interventions
    ]
    early = [own is not None and own.edit_prompt_end for own in interventions]
    for row in rows:
        n, c = len(row.prompt), row.intervention
        if early[c] and n < 2:
            raise ValueError("edit_prompt_end needs prompts of at least two tokens")
        if n < front[c] + early[c]:
            beside = ", and edit_prompt_end needs one token more" if early[c] else ""
            raise ValueError(
                f"a prompt of {n} tokens is shorter than the {front[c]} positions that are added to at its front{beside}; "
                "use a longer prompt or fewer positions"
            )


def require_readable(answers: Sequence[Sequence[int]], at: str) -> None:
    """Raise if answers are to be read of which some are empty.

    Raises:
        ValueError: which.
    """
    empty = [r for r, answer in enumerate(answers) if not len(answer)]
    if at in ("answer", "answer_end") and empty:
        raise ValueError(f"rows {empty[:5]} have empty answers: there is nothing to read")


def cache_rows(
    config: Any, n_layers: int, item_bytes: int, budget: int, rows: Sequence[Row], decoding: Decoding
) -> int:
    """Rows whose keys and values fit into ``budget`` bytes, at least 1 and at most `MOST_ROWS`."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    places = max(len(row.prompt) for row in rows) + decoding.max_new_tokens + _slack(decoding.max_new_tokens)
    return max(1, min(MOST_ROWS, budget // (2 * n_layers * heads * width * item_bytes * places)))


def _slack(max_new_tokens: int) -> int:
    """Places beyond one answer in the buffers: they are moved together whenever these are used up."""
    return max(16, max_new_tokens // 4)


def _one_row(cache: Cache, row: int, length: int) -> list[DynamicLayer]:
    """One prompt's keys and values, without its padding."""
    layers: list[DynamicLayer] = []
    for layer in cache.layers:
        own, source = DynamicLayer(), cast(DynamicLayer, layer)
        own.keys = cast(Tensor, source.keys)[row : row + 1, :, -length:].clone()
        own.values = cast(Tensor, source.values)[row : row + 1, :, -length:].clone()
        layers.append(own)
    return layers


def by_tokens(
    order: Sequence[int], lengths: Sequence[int], budget: int, most: int | None = None
) -> Generator[list[int]]:
    """Split ``order`` into chunks of at most ``budget`` tokens and ``most`` members (at least one member each)."""
    chunk: list[int] = []
    total = 0
    for member in order:
        if chunk and (total + lengths[member] > budget or len(chunk) == most):
            yield chunk
            chunk, total = [], 0
        chunk.append(member)
        total += lengths[member]
    if chunk:
        yield chunk


def _gather_log_prob(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    # In small pieces: what a whole batch's softmax would allocate costs more than computing it.
    pieces = [
        part.float().gather(1, own[:, None])[:, 0] - part.float().logsumexp(dim=1)
        for part, own in zip(logits.split(32), tokens.split(32), strict=True)
    ]
    return torch.cat(pieces)


class _Chooser:
    """Chooses each row's next token.

    Args:
        rows: their keys seed what is drawn.
        decoding: how.
        collector: checks values before the logits come, and names the layer.
    """

    def __init__(self, rows: Sequence[Row], decoding: Decoding, collector: ActivationCollector | None) -> None:
        self._rows, self._collector = rows, collector
        self._decoding = decoding.to_dict()
        self._streams = generators(self._decoding, [row.key for row in rows])

    def choose(self, logits: Float[Tensor, "row vocab"], which: Any, out: Sequence[Sequence[int]]) -> list[int]:
        # Also beside a collector, which names the layer but does not see what lies behind the last layer's neurons.
        if not torch.isfinite(logits.amax(dim=-1)).all():
            if self._collector is not None:
                self._collector.check()
            raise NonFiniteActivationError(
                "NaN or infinite logits while generating: an edit with too large a γ, half precision overflowing, or "
                "damaged weights do this; `collect_activations` names the layer in which they begin"
            )
        penalised = self._decoding["repetition_penalty"] != 1.0
        seen = [[*self._rows[r].prompt, *out[r]] for r in which] if penalised else None
        streams = [self._streams[r] for r in which] if self._streams else []
        return choose(logits, self._decoding, seen, streams)
