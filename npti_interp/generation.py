r"""Batched decoding with interventions, replay, and log-likelihoods, on a Hugging Face model in memory.

The model's own forward pass is the truth; this module only decides what is fed to it and keeps its key–value cache.

*One prompt pass for many interventions.* Edits never touch the prompt pass, so the cache of a prompt is computed once
and copied to one row for each intervention; the rows of a batch then differ in their edits only.

*Batches never change a result.* Rows are padded on the left, positions and mask are passed explicitly, and rows that
have ended leave the batch.

*Cache.* Keys and values are written into buffers of the final size. The library's own growing cache copies itself
whole at each step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from npti_interp.activations import ActivationCollector
from npti_interp.errors import NonFiniteActivationError
from npti_interp.interventions import Intervention, LayerEdit
from npti_interp.models._sites import FFNSites

__all__ = ["Answer", "Decoding", "LocalEngine", "Progress", "Row"]

DEFAULT_ROWS = 64
_PREFILL_TOKENS = 1024
"""Prompt tokens in one pass: large enough for the matrix products, small enough for the processor's cache."""
_SCORE_TOKENS = 1024


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
    """One layer's keys and values in a buffer of fixed capacity, filled from the left."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

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
        end = self._length + key_states.shape[2]
        self._k[:, :, self._length : end] = key_states
        self._v[:, :, self._length : end] = value_states
        self._set(end)
        return self._k[:, :, :end], self._v[:, :, :end]

    def _set(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self._k[:, :, :length], self._v[:, :, :length]

    def get_seq_length(self) -> int:
        return self._length

    def take(self, source: DynamicLayer, index: Tensor, rows: Tensor, n_rows: int, at: int) -> None:
        """Copy ``source``'s rows ``index`` into this layer's ``rows``, ending at place ``at``."""
        keys, values = cast(Tensor, source.keys), cast(Tensor, source.values)
        if not self.is_initialized:
            self.lazy_initialization(keys[:1].expand(n_rows, -1, -1, -1), values[:1].expand(n_rows, -1, -1, -1))
        start = at - keys.shape[2]
        self._k[rows, :, start:at] = keys.index_select(0, index)
        self._v[rows, :, start:at] = values.index_select(0, index)
        self._set(at)

    def keep(self, index: Tensor) -> None:
        """Keep only some rows."""
        self._k, self._v = self._k.index_select(0, index), self._v.index_select(0, index)
        self._set(self._length)


def _buffers(n_layers: int, capacity: int) -> Cache:
    return Cache(layers=[_BufferLayer(capacity) for _ in range(n_layers)])


class _EditTable:
    """The edits of several interventions, stacked so that each row of a batch finds its own."""

    def __init__(self, interventions: Sequence[Intervention | None], sites: FFNSites, device: torch.device) -> None:
        neutral = LayerEdit(torch.full((sites.d_mlp,), math.inf), torch.zeros(sites.d_mlp))
        per = [dict(i.layer_edits(sites.n_layers, sites.d_mlp)) if i is not None else {} for i in interventions]
        self.prompt_end = [i is not None and i.edit_prompt_end for i in interventions]
        self.n = len(interventions)
        self._layers: dict[int, tuple[Tensor, Tensor, list[tuple[float, int]]]] = {}
        for layer in sorted({layer for edits in per for layer in edits}):
            stack = [edits.get(layer, neutral) for edits in per]
            self._layers[layer] = (
                torch.stack([e.bound for e in stack]).to(device),
                torch.stack([e.add for e in stack]).to(device),
                [(e.drop, e.seed) for e in stack],
            )

    def __contains__(self, layer: int) -> bool:
        return layer in self._layers

    def apply(self, layer: int, values: Tensor, which: Tensor, step: int) -> Tensor:
        """``min(v, bound) + add`` with each row's own edit; ``values`` is ``[row, pos, d_mlp]``."""
        bound, add, masks = self._layers[layer]
        if any(drop > 0 for drop, _ in masks):
            add = torch.stack([_thin(a, drop, seed, step, layer) for a, (drop, seed) in zip(add, masks, strict=True)])
        if self.n == 1:
            b, a = bound[0], add[0]
        else:
            b, a = bound.index_select(0, which)[:, None], add.index_select(0, which)[:, None]
        return torch.minimum(values, b.to(values.dtype)) + a.to(values.dtype)


def _thin(add: Tensor, drop: float, seed: int, step: int, layer: int) -> Tensor:
    """Leave out a share of the additions: the same for every row, so that the batch does not matter."""
    if drop == 0:
        return add
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + layer) % 2**63)
    return add * (torch.rand(add.shape, generator=generator) >= drop).to(add)


@dataclass
class _Pass:
    """What the hooks do during one forward pass."""

    edits: _EditTable | None = None
    which: Tensor | None = None
    step: int = 0
    collector: ActivationCollector | None = None
    rows: Any = None  # indices into the flattened [row · pos] that are counted
    blocks: Any = None


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
        self._activations = sites.activation_modules(model)

    @property
    def device(self) -> torch.device:
        """Where token tensors go."""
        return next(self._model.parameters()).device

    # -- hooks ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hooked(self, state: _Pass, *, wanted: bool) -> Generator[None]:
        handles: list[Any] = []
        try:
            if wanted:
                for layer, module in enumerate(self._activations):
                    handles.append(module.register_forward_hook(self._hook(layer, state)))
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, state: _Pass) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            values = output
            if state.edits is not None and state.which is not None and layer in state.edits:
                values = state.edits.apply(layer, output, state.which, state.step)
            if state.collector is not None and len(state.rows):
                flat = values.reshape(-1, values.shape[-1])
                state.collector.add(layer, flat, state.rows, state.blocks)
            return values if values is not output else None

        return hook

    def _forward(self, ids: Tensor, mask: Tensor, cache: Cache, keep: int) -> Float[Tensor, "row pos vocab"]:
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

    def _prefill(
        self, prompts: Sequence[tuple[int, ...]], rows_of: Sequence[Sequence[int]], n_rows: int, width: int, room: int
    ) -> tuple[Cache, Tensor, Tensor]:
        """One pass over each prompt; its cache goes to all of its rows.

        Returns:
            the rows' cache (``width`` places filled), their mask over those places, and the last position's logits
            ``[row, vocab]``.
        """
        cache = _buffers(self._sites.n_layers, width + room)
        mask = torch.zeros((n_rows, width), dtype=torch.long, device=self.device)
        logits: list[Tensor] = [torch.empty(0)] * n_rows
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
        for chunk in _by_tokens(order, [len(p) for p in prompts], _PREFILL_TOKENS):
            ids, own = self._left_pad([prompts[p] for p in chunk])
            small = _buffers(self._sites.n_layers, ids.shape[1])
            last = self._forward(ids, own, small, keep=1)[:, -1]
            source = [k for k, p in enumerate(chunk) for _ in rows_of[p]]
            target = [row for p in chunk for row in rows_of[p]]
            index = torch.tensor(source, device=self.device)
            rows = torch.tensor(target, device=self.device)
            for big, little in zip(cache.layers, small.layers, strict=True):
                cast(_BufferLayer, big).take(cast(_BufferLayer, little), index, rows, n_rows, width)
            mask[rows, width - ids.shape[1] :] = own.index_select(0, index)
            for k, row in zip(source, target, strict=True):
                logits[row] = last[k]
        return cache, mask, torch.stack(logits)

    # -- decoding ------------------------------------------------------------------------------------------------

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
        edits = _EditTable(interventions, self._sites, self.device)
        out: list[list[int]] = [[] for _ in rows]
        # Rows of one prompt side by side, so that they share its pass; prompts by length, so that little is padding.
        order = sorted(range(len(rows)), key=lambda r: (len(rows[r].prompt), rows[r].prompt, r))
        early = [edits.prompt_end[row.intervention] for row in rows]
        if any(e and len(row.prompt) < 2 for e, row in zip(early, rows, strict=True)):
            raise ValueError("edit_prompt_end needs prompts of at least two tokens")
        for group in ([r for r in order if not early[r]], [r for r in order if early[r]]):
            for start in range(0, len(group), max_rows):
                wave = group[start : start + max_rows]
                made = self._wave([rows[r] for r in wave], edits, decoding, collector, early=early[wave[0]])
                for r, tokens in zip(wave, made, strict=True):
                    out[r] = tokens
                if progress is not None:
                    progress.update(len(wave))
        return out

    def _wave(
        self,
        rows: Sequence[Row],
        edits: _EditTable,
        decoding: Decoding,
        collector: ActivationCollector | None,
        *,
        early: bool,
    ) -> list[list[int]]:
        fed = [row.prompt[:-1] if early else row.prompt for row in rows]
        prompts = list(dict.fromkeys(fed))
        place = {prompt: k for k, prompt in enumerate(prompts)}
        rows_of: list[list[int]] = [[] for _ in prompts]
        for r, prompt in enumerate(fed):
            rows_of[place[prompt]].append(r)
        width = max(len(prompt) for prompt in prompts)
        state = _Pass(edits=edits, collector=collector)
        out: list[list[int]] = [[] for _ in rows]
        # A collector checks by itself, and names the layer.
        chooser = _Chooser(rows, decoding, check=collector is None)
        with self._hooked(state, wanted=False):
            cache, mask, logits = self._prefill(prompts, rows_of, len(rows), width, decoding.max_new_tokens)
        alive = np.arange(len(rows))
        blocks = np.array([row.block for row in rows])
        which = torch.tensor([row.intervention for row in rows], device=self.device)
        touched = any(layer in edits for layer in range(self._sites.n_layers))
        with self._hooked(state, wanted=touched or collector is not None):
            if early:
                logits, mask = self._prompt_end(rows, state, which, cache, mask)
            for step in range(decoding.max_new_tokens):
                chosen = chooser.choose(logits, alive, out)
                for r, token in zip(alive, chosen, strict=True):
                    out[r].append(token)
                going = np.array([token not in self._stop for token in chosen], dtype=bool)
                if step + 1 == decoding.max_new_tokens or not going.any():
                    break
                if not going.all():
                    index = torch.from_numpy(np.flatnonzero(going)).to(self.device)
                    for layer in cache.layers:
                        cast(_BufferLayer, layer).keep(index)
                    alive, mask, which = alive[going], mask.index_select(0, index), which.index_select(0, index)
                    chosen = [token for token, go in zip(chosen, going, strict=True) if go]
                ids = torch.tensor(chosen, device=self.device)[:, None]
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                state.which, state.step = which, step
                state.rows = np.flatnonzero(blocks[alive] >= 0)
                state.blocks = blocks[alive][state.rows]
                if collector is not None:
                    collector.begin(state.blocks)
                logits = self._forward(ids, mask, cache, keep=1)[:, -1]
        return out

    def _prompt_end(
        self, rows: Sequence[Row], state: _Pass, which: Tensor, cache: Cache, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Feed each row's last prompt token by itself: edited, but not counted."""
        ids = torch.tensor([row.prompt[-1] for row in rows], device=self.device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        collector, state.collector = state.collector, None
        state.which, state.step = which, -1
        logits = self._forward(ids, mask, cache, keep=1)[:, -1]
        state.collector = collector
        return logits, mask

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
        edits = _EditTable(interventions, self._sites, self.device)
        state = _Pass(edits=edits, collector=collector)
        if any(edits.prompt_end):
            raise ValueError("replay does not edit prompts; use an intervention without edit_prompt_end")
        if any(edit.drop > 0 for i in interventions if i is not None for edit in _all_edits(i, self._sites)):
            raise ValueError("an edit with a random mask changes at every step; it cannot be replayed in one pass")
        order = sorted((r for r in range(len(rows)) if len(answers[r])), key=lambda r: len(rows[r].prompt))
        lengths = [len(row.prompt) + len(answer) for row, answer in zip(rows, answers, strict=True)]
        for chunk in _by_tokens(order, lengths, _PREFILL_TOKENS):
            prompts = [rows[r].prompt for r in chunk]
            with self._hooked(state, wanted=False):
                width, room = max(len(p) for p in prompts), max(len(answers[r]) for r in chunk)
                cache, mask, _ = self._prefill(prompts, [[k] for k in range(len(chunk))], len(chunk), width, room)
            ids = torch.full((len(chunk), room), self._pad)
            counted: list[int] = []
            blocks: list[int] = []
            for k, r in enumerate(chunk):
                ids[k, : len(answers[r])] = torch.tensor(list(answers[r]))
                if rows[r].block >= 0:
                    counted.extend(range(k * room, k * room + len(answers[r])))
                    blocks.extend([rows[r].block] * len(answers[r]))
            # Right padding after an answer is never attended to by that answer: attention is causal.
            full = torch.cat([mask, mask.new_ones(len(chunk), room)], dim=1)
            state.which = torch.tensor([rows[r].intervention for r in chunk], device=self.device)
            state.rows, state.blocks = np.array(counted, np.int64), np.array(blocks, np.int64)
            with self._hooked(state, wanted=True):
                collector.begin(state.blocks)
                self._forward(ids.to(self.device), full, cache, keep=1)
            if progress is not None:
                progress.update(len(chunk))

    # -- likelihood ----------------------------------------------------------------------------------------------

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """Summed log-probability of each continuation given its prompt, by the unedited model.

        Args:
            prompts: token ids; each is passed once for all of its continuations.
            continuations: for each prompt, the token ids to score; an empty one gets 0.
            progress: advanced by one a prompt.

        Returns:
            natural logarithms, in the shape of ``continuations``.
        """
        out = [[0.0] * len(c) for c in continuations]
        order = sorted((p for p in range(len(prompts)) if any(continuations[p])), key=lambda p: len(prompts[p]))
        size = [sum(len(c) for c in continuations[p]) for p in range(len(prompts))]
        with self._hooked(_Pass(), wanted=False):
            for chunk in _by_tokens(order, size, _SCORE_TOKENS):
                jobs = [(p, c) for p in chunk for c in range(len(continuations[p])) if len(continuations[p][c])]
                rows_of: list[list[int]] = [[] for _ in chunk]
                for r, (p, _) in enumerate(jobs):
                    rows_of[chunk.index(p)].append(r)
                texts = [continuations[p][c] for p, c in jobs]
                room = max(len(t) for t in texts)
                own = [tuple(prompts[p]) for p in chunk]
                width = max(len(p) for p in own)
                cache, mask, first = self._prefill(own, rows_of, len(jobs), width, room)
                ids = torch.full((len(jobs), room), self._pad)
                for r, text in enumerate(texts):
                    ids[r, : len(text)] = torch.tensor(list(text))
                ids = ids.to(self.device)
                total = _gather_log_prob(first, ids[:, 0]).double()
                if room > 1:
                    full = torch.cat([mask, mask.new_ones(len(jobs), room - 1)], dim=1)
                    logits = self._forward(ids[:, :-1], full, cache, keep=0)
                    scored = _gather_log_prob(logits.flatten(0, 1), ids[:, 1:].flatten()).double()
                    lengths = torch.tensor([len(t) for t in texts], device=self.device)
                    wanted = torch.arange(1, room, device=self.device) < lengths[:, None]
                    total = total + (scored.view(len(jobs), -1) * wanted).sum(dim=1)
                for (p, c), value in zip(jobs, total.tolist(), strict=True):
                    out[p][c] = value
                if progress is not None:
                    progress.update(len(chunk))
        return out

    def next_token_logits(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "prompt vocab"]:
        """Logits after each prompt, by the unedited model, float32 on the CPU."""
        with self._hooked(_Pass(), wanted=False):
            own = [tuple(p) for p in prompts]
            logits = self._prefill(own, [[k] for k in range(len(own))], len(own), max(map(len, own)), 0)[2]
        return logits.float().cpu()


def _all_edits(intervention: Intervention, sites: FFNSites) -> list[LayerEdit]:
    return list(intervention.layer_edits(sites.n_layers, sites.d_mlp).values())


def _by_tokens(order: Sequence[int], lengths: Sequence[int], budget: int) -> Generator[list[int]]:
    """Split ``order`` into chunks of at most ``budget`` tokens (at least one member each)."""
    chunk: list[int] = []
    total = 0
    for member in order:
        if chunk and total + lengths[member] > budget:
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
    """Chooses each row's next token."""

    def __init__(self, rows: Sequence[Row], decoding: Decoding, *, check: bool) -> None:
        self._rows, self._decoding, self._check = rows, decoding, check
        self._generators = [
            torch.Generator().manual_seed((decoding.seed * 1_000_003 + row.key) % 2**63)
            for row in (rows if decoding.temperature > 0 else ())
        ]

    def choose(self, logits: Float[Tensor, "row vocab"], alive: Any, out: Sequence[Sequence[int]]) -> list[int]:
        d = self._decoding
        if self._check and not torch.isfinite(logits.amax(dim=-1)).all():
            raise NonFiniteActivationError(
                "NaN or infinite logits while generating: an edit with too large a γ, half precision overflowing, or "
                "damaged weights do this; `collect_activations` names the layer"
            )
        if d.repetition_penalty != 1.0:
            logits = logits.clone()
            for k, r in enumerate(alive):
                seen = torch.tensor(sorted({*self._rows[r].prompt, *out[r]}), device=logits.device)
                value = logits[k, seen]
                logits[k, seen] = torch.where(value < 0, value * d.repetition_penalty, value / d.repetition_penalty)
        if d.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        probability = torch.softmax(logits.float() / d.temperature, dim=-1).cpu()
        chosen: list[int] = []
        for k, r in enumerate(alive):
            p, token = probability[k].sort(descending=True)
            p = torch.where(p.cumsum(0) - p < d.top_p, p, torch.zeros_like(p))
            chosen.append(int(token[torch.multinomial(p, 1, generator=self._generators[r])]))
        return chosen
