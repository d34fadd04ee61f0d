r"""What an intervention changes on given text: the next-token distribution, and the loss.

A text's first tokens are its *prompt*, the rest its *continuation*. The prompt is passed as a prompt is in generation,
the continuation is fed teacher-forced, and the intervention acts on it as it acts on generated tokens. With prompt
t₁ … t_k and continuation t_{k+1} … t_n, each of t_{k+2} … t_n is scored: it is predicted at a continuation token, so
that the intervention has acted there. (t_{k+1} is predicted at the prompt's last token, which most interventions leave
alone, so that its divergence would be 0 by construction; it is left out for all of them.)

At each scored token, over the whole vocabulary and in nats,

.. math:: KL = \sum_v p(v) (\log p(v) - \log q(v))

with *p* the unedited and *q* the edited model, and the loss is −log of the probability of the text's token. A text's
number is the mean over its scored tokens; a condition's the mean over texts, with an interval from resampling texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from npti_interp.errors import FingerprintMismatchError
from npti_interp.evaluation._statistics import Interval, bootstrap_mean, interval_columns, sign_flip_test
from npti_interp.evaluation.retention._conditions import Change, Conditions, named, shadow
from npti_interp.generation import Progress, Row, by_tokens, require_room
from npti_interp.interventions import Intervention
from npti_interp.models import Model
from npti_interp.models._weights import execution_device

__all__ = [
    "MAX_TOKENS",
    "PROMPT_TOKENS",
    "continued_logits",
    "kl_divergence",
    "neutral_prompts",
    "neutral_texts",
    "read_data",
    "retention_many",
    "summarise_texts",
    "text_costs",
    "token_loss",
]

PROMPT_TOKENS = 8
MAX_TOKENS = 128
_LOGITS = 2**25
"""Logits of one pass: 128 MiB in float32. Two such tensors are held at once."""


def read_data(name: str) -> list[dict[str, Any]]:
    """The rows of a packaged JSON-lines file."""
    text = files("npti_interp.evaluation.retention").joinpath(f"data/{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def neutral_texts() -> list[str]:
    """Forty-four short encyclopaedic paragraphs, written for this purpose; none is about a person."""
    return [row["text"] for row in read_data("neutral")]


def neutral_prompts() -> list[str]:
    """Open prompts on the topics of `neutral_texts`, in the same order."""
    return [f"Write a short paragraph about {row['topic']}." for row in read_data("neutral")]


# -- passes ----------------------------------------------------------------------------------------------------------


class _FromPromptEnd:
    """An intervention whose prompt end is fed by itself, together with what follows: hooks need not know of it."""

    edit_prompt_end = False

    def __init__(self, inner: Intervention) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _forward(hf_model: Any, ids: Tensor, cache: Cache, mask: Tensor, keep: int = 0) -> Float[Tensor, "row pos vocab"]:
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return hf_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=keep,
    ).logits  # fmt: skip


def _fork(cache: Cache, rows: Tensor, length: int) -> Cache:
    """A cache of its own with some rows of another, up to ``length`` places."""
    own = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (cast(Tensor, t) for t in (cast(DynamicLayer, layer).keys, cast(DynamicLayer, layer).values))
        at = rows.to(keys.device)
        own.update(keys[at, :, :length], values[at, :, :length], index)
    return own


class Continuations:
    """Prompts and what continues them, passed again under one intervention after another.

    The unedited prompts are passed once; every intervention that leaves the prompt pass alone starts from their cache.

    Args:
        model: a `shadow`: hooks are put on its ``hf_model``.
        prompts: token ids; none may be empty.
        continuations: the token ids that are fed after each; none may be empty.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> None:
        self._model = model
        device = execution_device(model.hf_model.get_input_embeddings())
        width, room = max(map(len, prompts)), max(map(len, continuations))
        ids, fed = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), room, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
            fed[row, : len(continuation)] = torch.tensor(list(continuation))
        self._ids, self._mask, self._fed = ids.to(device), mask.to(device), fed.to(device)
        self._cache: Cache | None = None
        self._ends: Tensor | None = None

    def _pass_prompts(self, rows: Tensor, length: int) -> tuple[Cache, Tensor]:
        cache = DynamicCache()
        logits = _forward(self._model.hf_model, self._ids[rows, :length], cache, self._mask[rows, :length], keep=1)
        return cache, logits[:, -1:]

    @torch.no_grad()
    def logits(
        self, change: Intervention | None, rows: Sequence[int] | None = None, *, first: bool = False
    ) -> Float[Tensor, "row pos vocab"]:
        """Logits at each token of the continuations, in the order of ``rows``; padding stands on the right.

        Args:
            change: the intervention; it acts on the continuation's tokens as on generated ones.
            rows: by default all.
            first: put the logits at the prompt's last token in front.

        Raises:
            ValueError: a prompt is too short for what the intervention does to prompts.
        """
        device = self._ids.device
        picked = torch.arange(len(self._ids)) if rows is None else torch.tensor(list(rows))
        picked = picked.to(device)
        width = self._ids.shape[1]
        early = change is not None and change.edit_prompt_end
        fronts = change is not None and bool(change.front_additions(self._model.sites))
        require_room([Row((0,) * int(n)) for n in self._mask.sum(dim=1)], [change], self._model.sites)
        if self._cache is None and not fronts:
            self._cache, self._ends = self._pass_prompts(torch.arange(len(self._ids), device=device), width)
        own = _FromPromptEnd(change) if early and change is not None else change
        with nullcontext() if own is None else self._model.editing(cast(Intervention, own)):
            if fronts:
                cache, ends = self._pass_prompts(picked, width - early)
            else:
                assert self._cache is not None
                assert self._ends is not None
                cache, ends = _fork(self._cache, picked, width - early), self._ends[picked]
            fed = torch.cat([self._ids[picked, width - early :], self._fed[picked]], dim=1)
            mask = torch.cat([self._mask[picked], torch.ones_like(self._fed[picked])], dim=1)
            logits = _forward(self._model.hf_model, fed, cache, mask)
        if first:
            return logits if early else torch.cat([ends, logits], dim=1)
        return logits[:, 1:] if early else logits


def continued_logits(
    model: Model, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], change: Intervention | None
) -> Float[Tensor, "row pos vocab"]:
    """Logits that predict each continuation's tokens, the first at its prompt's end.

    The last token of a continuation is not fed. Padding stands on the right.

    Args:
        model: a `shadow`.
        prompts: token ids; none may be empty.
        continuations: token ids; none may be empty.
        change: acts on the continuations' tokens as on generated ones.
    """
    # Of one token nothing is fed back; what stands there instead is not read.
    fed = [list(c[:-1]) or [0] for c in continuations]
    return Continuations(model, prompts, fed).logits(change, first=True)


def unsupported(model: Model, change: Change, prompt: Sequence[int]) -> str | None:
    """Why a change cannot be measured on texts with prompts as long as ``prompt``; None if it can.

    Raises:
        FingerprintMismatchError: an intervention belongs to another model, or a model has another tokenizer.
    """
    if isinstance(change, Model):
        if not change.has_weights:
            return f"the weights of {change.name} are on a server"
        mine, other = model.fingerprint, change.fingerprint
        if (mine.tokenizer, mine.vocab_size) != (other.tokenizer, other.vocab_size):
            raise FingerprintMismatchError(
                f"{change.name} has another tokenizer or vocabulary than {model.name}: their distributions over the next "
                "token cannot be compared"
            )
        return None
    if change is None or isinstance(change, str):
        return None
    try:
        require_room([Row(tuple(prompt))], [change], model.sites)
        with model.editing(cast(Intervention, _FromPromptEnd(change)) if change.edit_prompt_end else change):
            return None
    except FingerprintMismatchError:
        raise
    except ValueError as error:
        return str(error)


# -- numbers ---------------------------------------------------------------------------------------------------------


def _compare(
    base: Float[Tensor, "token vocab"], logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """KL from ``base`` (log-probabilities) and loss of each token, in pieces of few rows: a vocabulary is long."""
    divergence: list[Tensor] = []
    loss: list[Tensor] = []
    for p, raw, token in zip(base.split(32), logits.split(32), targets.split(32), strict=True):
        q = raw.float().log_softmax(dim=-1)
        divergence.append((p.exp() * (p - q)).sum(dim=-1))
        loss.append(-q.gather(1, token[:, None])[:, 0])
    return torch.cat(divergence).double().cpu(), torch.cat(loss).double().cpu()


def _tokens(model: Model, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text (a BOS, say), and the text's own tokens."""
    whole: list[int] = list(model.tokenizer(text)["input_ids"])
    plain: list[int] = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    for lead in range(len(whole) - len(plain) + 1):
        if whole[lead : lead + len(plain)] == plain:
            return whole[:lead], plain  # what it may put behind is no part of a text that goes on
    raise ValueError(f"the tokenizer reads {text[:40]!r} differently with special tokens; give texts it reads one way")


def text_costs(
    model: Model,
    conditions: Conditions,
    texts: Sequence[str] | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    max_tokens: int = MAX_TOKENS,
    progress: bool | Progress = False,
) -> pd.DataFrame:
    """KL and loss of every text under every condition, against the unedited model.

    Interventions act on the continuation (see the module). Another model passes prompt and continuation by itself. A
    string stands in front of the text, an empty line between them, and is part of the prompt; the text's own tokens are
    scored at the same places.

    Args:
        model: the unedited model, with its weights here.
        conditions: what is compared with it.
        texts: plain texts, not wrapped in a chat template; by default `neutral_texts`.
        prompt_tokens: a text's first tokens that are its prompt, not counting those that the tokenizer adds.
        max_tokens: tokens of a text that are used; what is beyond is counted in ``cut``.
        progress: show a bar, or advance the one given by one a text and condition.

    Returns:
        a row a condition × text: ``condition``, ``text`` (its place), ``n_tokens`` scored, ``cut``, ``kl``, ``loss``,
        ``unedited_loss``, and ``unscored``: why there are no numbers, or None.

    Raises:
        ValueError: no texts or conditions; a setting out of range; the weights are on a server; an edit is active.
        FingerprintMismatchError: an intervention belongs to another model.
    """
    own = named(conditions)
    given = neutral_texts() if texts is None else list(texts)
    if isinstance(texts, str) or not given:
        raise ValueError("no texts were given, or one string; put texts in a list")
    if prompt_tokens < 1 or max_tokens < prompt_tokens + 2:
        raise ValueError(
            f"prompt_tokens must be at least 1 and max_tokens at least 2 more, got {prompt_tokens} and {max_tokens}"
        )
    twin = shadow(model)
    read = [_tokens(model, text) for text in given]
    shortest = min((lead for lead, _ in read), key=len)
    example = [*shortest, *[0] * prompt_tokens]
    reasons = {id(change): unsupported(twin, change, example) for _, changes in own for change in changes}
    cut = [max(0, len(tokens) - max_tokens) for _, tokens in read]
    used = [tokens[:max_tokens] for _, tokens in read]
    scored = [max(0, len(tokens) - prompt_tokens - 1) for tokens in used]
    shape = (len(own), len(given))
    kl, loss, plain = np.full(shape, math.nan), np.full(shape, math.nan), np.full(len(given), math.nan)
    budget = max(64, _LOGITS // model.fingerprint.vocab_size)
    order = sorted((k for k in range(len(given)) if scored[k]), key=lambda k: scored[k])
    bar: Any = tqdm(total=len(order) * len(own), desc="texts", disable=progress is not True, delay=2)
    for chunk in by_tokens(order, scored, budget):
        prompts = [[*read[k][0], *used[k][:prompt_tokens]] for k in chunk]
        fed = [used[k][prompt_tokens:-1] for k in chunk]
        targets = [torch.tensor(used[k][prompt_tokens + 1 :]) for k in chunk]
        passes = Continuations(twin, prompts, fed)
        base = [
            rows[: len(own_fed)].float().log_softmax(dim=-1)
            for rows, own_fed in zip(passes.logits(None), fed, strict=True)
        ]
        for row, k in enumerate(chunk):
            plain[k] = -float(base[row].gather(1, targets[row].to(base[row].device)[:, None]).double().mean())
        for c, (_, changes) in enumerate(own):
            for place, change in enumerate(changes):
                rows = [row for row, k in enumerate(chunk) if k % len(changes) == place]
                if not rows or reasons[id(change)] is not None:
                    continue
                logits = _under(twin, passes, change, rows, [prompts[r] for r in rows], [fed[r] for r in rows],
                                [read[chunk[r]][0] for r in rows])  # fmt: skip
                for row, found in zip(rows, logits, strict=True):
                    divergence, losses = _compare(
                        base[row], found[: len(fed[row])], targets[row].to(base[row].device)
                    )  # fmt: skip
                    if torch.isfinite(divergence).all() and torch.isfinite(losses).all():
                        kl[c, chunk[row]], loss[c, chunk[row]] = float(divergence.mean()), float(losses.mean())
            bar.update(len(chunk))
            if not isinstance(progress, bool):
                progress.update(len(chunk))
    bar.close()
    rows_out: list[dict[str, Any]] = []
    for c, (name, changes) in enumerate(own):
        for k in range(len(given)):
            reason = reasons[id(changes[k % len(changes)])]
            if not scored[k]:
                reason = f"fewer than {prompt_tokens + 2} tokens"
            elif reason is None and not math.isfinite(kl[c, k]):
                reason = "NaN or infinite logits"
            rows_out.append(
                {
                    "condition": name, "text": k, "n_tokens": scored[k], "cut": cut[k], "kl": kl[c, k],
                    "loss": loss[c, k], "unedited_loss": plain[k], "unscored": reason,
                }
            )  # fmt: skip
    return pd.DataFrame(rows_out)


def _under(
    model: Model, passes: Continuations, change: Change, rows: list[int], prompts: list[list[int]],
    fed: list[list[int]], leads: list[list[int]],
) -> Float[Tensor, "row pos vocab"]:  # fmt: skip
    """Logits at the continuations' tokens under one change."""
    if isinstance(change, str):
        front = list(model.tokenizer(f"{change}\n\n", add_special_tokens=False)["input_ids"])
        longer = [[*lead, *front, *prompt[len(lead) :]] for lead, prompt in zip(leads, prompts, strict=True)]
        return Continuations(model, longer, fed).logits(None)
    if isinstance(change, Model):
        return Continuations(change, prompts, fed).logits(None)
    return passes.logits(change, rows)


def summarise_texts(costs: pd.DataFrame, by: Sequence[str] = ("condition",), *, seed: int = 0) -> pd.DataFrame:
    """The conditions' numbers from those of their texts, with 95 % intervals from resampling texts.

    Args:
        costs: from `text_costs`.
        by: columns that make a group.
        seed: of the resampling.

    Returns:
        ``by``; ``kl``, ``loss`` and ``loss_change`` (paired on texts), each with ``_low`` and ``_high``, in nats a token;
        ``loss_change_p`` by sign flips; ``perplexity`` and ``unedited_perplexity`` (exp of the mean loss); ``n`` texts,
        ``unscored`` texts, ``n_tokens`` scored and ``cut``. Everything but the names is a number.
    """
    rows: list[dict[str, Any]] = []
    groups: Any = costs.groupby(list(by), sort=False, dropna=False)
    for key, part in groups:
        known: Any = part[part["unscored"].isna()]
        change = part["loss"] - part["unedited_loss"]
        loss = bootstrap_mean(part["loss"], seed=seed)
        rows.append(
            {
                **dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)),
                **interval_columns("kl", bootstrap_mean(part["kl"], seed=seed)),
                **interval_columns("loss", loss),
                **interval_columns("loss_change", bootstrap_mean(change, seed=seed)),
                "loss_change_p": sign_flip_test(change, seed=seed),
                "perplexity": math.exp(loss.mean) if loss.n else math.nan,
                "unedited_perplexity": math.exp(known["unedited_loss"].mean()) if len(known) else math.nan,
                "n": loss.n,
                "unscored": loss.unscored,
                "n_tokens": int(known["n_tokens"].sum()),
                "cut": int(part["cut"].sum()),
            }
        )
    return pd.DataFrame(rows)


def retention_many(
    model: Model,
    conditions: Conditions,
    texts: Sequence[str] | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    max_tokens: int = 64,
    seed: int = 0,
    progress: bool | Progress = False,
) -> pd.DataFrame:
    """KL and loss of many conditions, from one pass of the unedited model; light enough for a sweep.

    A condition that cannot be measured on texts (an edit with a random mask changes at every step) has NaN and all its
    texts ``unscored``; `text_costs` gives the reason.

    Args:
        model: the unedited model.
        conditions: names and changes.
        texts: by default `neutral_texts`; sixteen of them give 24 conditions in about two minutes on one core.
        prompt_tokens: as for `text_costs`.
        max_tokens: as for `text_costs`.
        seed: of the resampling.
        progress: as for `text_costs`.

    Returns:
        a row a condition: see `summarise_texts`.

    Raises:
        ValueError: see `text_costs`.
        FingerprintMismatchError: an intervention belongs to another model.
    """
    costs = text_costs(
        model, conditions, texts, prompt_tokens=prompt_tokens, max_tokens=max_tokens, progress=progress
    )  # fmt: skip
    return summarise_texts(costs, seed=seed)


def _one(
    model: Model, texts: Sequence[str] | None, change: Change, column: str, seed: int, settings: dict[str, Any]
) -> Interval:
    costs = text_costs(model, [("edited", change)], texts, **settings)
    lost: Any = costs["unscored"].dropna()
    if len(lost) == len(costs):
        raise ValueError(f"no text could be scored: {lost.iloc[0]}")
    return bootstrap_mean(costs[column], seed=seed)


def kl_divergence(
    model: Model, texts: Sequence[str] | None, intervention: Change, *, seed: int = 0, **settings: Any
) -> Interval:
    """KL(unedited ‖ edited) a token in nats, over the whole vocabulary, with a 95 % interval over texts.

    Args:
        model: the unedited model, with its weights here.
        texts: plain texts; None takes `neutral_texts`.
        intervention: acts on the continuation of each text (see the module).
        seed: of the resampling.
        settings: ``prompt_tokens``, ``max_tokens``, ``progress`` of `text_costs`.

    Raises:
        ValueError: as `text_costs`; no text could be scored.
        FingerprintMismatchError: an intervention belongs to another model.
    """
    return _one(model, texts, intervention, "kl", seed, settings)


def token_loss(
    model: Model, texts: Sequence[str] | None = None, intervention: Change = None, *, seed: int = 0, **settings: Any
) -> Interval:
    """Loss a token in nats (the logarithm of the perplexity), on the same tokens as `kl_divergence`.

    Args:
        model: the unedited model, with its weights here.
        texts: plain texts; None takes `neutral_texts`.
        intervention: None is the unedited model.
        seed: of the resampling.
        settings: ``prompt_tokens``, ``max_tokens``, ``progress`` of `text_costs`.

    Raises:
        ValueError: as `text_costs`; no text could be scored.
        FingerprintMismatchError: an intervention belongs to another model.
    """
    return _one(model, texts, intervention, "loss", seed, settings)
