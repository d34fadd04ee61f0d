"""Locating one trait end to end, against the loop everyone writes, and what each measure is worth.

The loop: plain `generate` on batches of the questions as they come, and a hook on each activation module that counts,
for generated tokens, which neurons are above 0 (nothing else: no moments, no percentiles, no blocks). Ours does all of
that as well. Then ours again with each measure taken away by itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import StoppingCriteria

import npti_interp as npti
from benchmarks.decode import left_padded
from benchmarks.harness import Section, Setting, load, measure
from npti_interp import generation
from npti_interp.backends import _kernels
from npti_interp.prompts import persona_prompts

BATCH = 32


def straightforward(model: npti.Model, prompts: list[Any], tokens: int) -> tuple[np.ndarray, int]:
    """Active counts ``[layer, neuron]`` and tokens, by `generate` and hooks."""
    f, stop = model.fingerprint, set(model._stop_tokens())
    device = model.hf_model.get_input_embeddings().weight.device
    counts = torch.zeros(f.n_layers, f.d_mlp, dtype=torch.int64, device=device)
    total = limit = 0
    going: torch.Tensor | None = None

    def hook(layer: int) -> Callable[..., None]:
        def count(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            if output.shape[1] == 1 and going is not None:
                counts[layer] += ((output[:, 0] > 0) & going[:, None]).sum(dim=0)

        return count

    class Watch(StoppingCriteria):
        """Knows which rows are still being generated: what ended is fed padding, and must not count."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            nonlocal going, total
            ended = torch.tensor([t in stop for t in ids[:, -1].tolist()], device=ids.device)
            going = ~ended if going is None else going & ~ended
            if ids.shape[1] < limit:
                total += int(going.sum())
            return ~going

    handles = [
        module.register_forward_hook(hook(layer))
        for layer, module in enumerate(model.sites.activation_modules(model.hf_model))
    ]
    try:
        for start in range(0, len(prompts), BATCH):
            ids, mask = left_padded(model, prompts[start : start + BATCH])
            going, limit = None, ids.shape[1] + tokens
            with torch.no_grad():
                model.hf_model.generate(
                    ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, stopping_criteria=[Watch()]
                )
    finally:
        for handle in handles:
            handle.remove()
    return counts.cpu().numpy(), total


class _Growing(generation._BufferLayer):
    """Keys and values copied whole at each step, as the library's own cache does."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys.clone(), values.clone()


@contextlib.contextmanager
def without(measure_: str) -> Generator[None]:
    """One of the measures taken away."""
    with contextlib.ExitStack() as stack:
        if measure_ == "shared beginnings":
            stack.enter_context(patch.object(generation, "_LEAST_SHARED", 10**9))
        elif measure_ == "preallocated cache":
            stack.enter_context(patch.object(generation, "_BufferLayer", _Growing))
        elif measure_ == "rows replaced at once":
            stack.enter_context(patch.object(generation, "_REPLACED_SHARE", 1))
        yield


def run(setting: Setting) -> Section:
    model = load(setting)
    bench, trait = npti.PersonalityBench.embedded(), npti.Trait("Neuroticism")
    n, tokens = setting.sized(84, 8), setting.sized(40, 5)
    questions = bench.questions(trait, "search", n)
    prompts = [p for pole in npti.POLES for p in persona_prompts(bench, trait, pole, questions)]

    def ours(used: npti.Model = model) -> npti.Location:
        return npti.locate(used, bench, trait, n_questions=n, max_new_tokens=tokens, progress=False)

    plain = copy.copy(model)  # the same weights, its products by the default library
    with patch.object(_kernels, "linear_kernel", lambda: "default"):
        plain.backend = type(model.backend)(model.hf_model, model.tokenizer, model.sites, 0, model._stop_tokens())  # type: ignore[call-arg]

    def ablated(measure_: str) -> Callable[[], object]:
        def work() -> object:
            with without(measure_):
                return ours()

        return work

    found, (counted, total) = ours(), straightforward(model, prompts, tokens)
    own = found.high.active_count.sum(axis=0) + found.low.active_count.sum(axis=0)
    share = float(np.mean(own == counted)) if total == found.high.total_tokens + found.low.total_tokens else 0.0
    ways: dict[str, Callable[[], object]] = {
        "straightforward loop": lambda: straightforward(model, prompts, tokens),
        "npti.locate": ours,
        "without shared beginnings": ablated("shared beginnings"),
        "without rows replaced at once": ablated("rows replaced at once"),
        "without preallocated cache": ablated("preallocated cache"),
    }
    if _kernels.linear_kernel() == "onednn" and setting.device == "cpu":
        ways["without the faster products"] = lambda: ours(plain)
    times = measure(ways, setting.few, warm_up=False)
    section = Section(
        f"Locating one trait: 2 poles × {n} questions × {tokens} tokens",
        ["way", "seconds", "speed relative to the loop (range)", "time relative to npti.locate", "spread"],
    )
    for name, taken in times.items():
        ratio, low, high = taken.ratio(times["straightforward loop"])
        section.rows.append(
            [
                name, taken.median, f"{ratio:.2f} ({low:.2f} … {high:.2f})", 1 / taken.ratio(times["npti.locate"])[0],
                f"{taken.spread:.0%}",
            ]
        )  # fmt: skip
    section.notes += [
        f"Interleaved repeats of each way: {setting.few}.",
        f"The loop counted {total:,} tokens, ours {found.high.total_tokens + found.low.total_tokens:,}; neurons with the very "
        f"same count: {share:.1%} (greedy answers part where two tokens are a rounding error apart).",
        "Grouped-query attention without repeated keys and values is the library's own by now (for single-token queries), so "
        "it is on both sides.",
    ]
    section.target(
        "npti.locate against the loop", times["npti.locate"].ratio(times["straightforward loop"])[0], at_least=1.5
    )
    section.data = {"seconds": {k: v.seconds for k, v in times.items()}, "tokens": total, "equal_counts": share}
    return section
