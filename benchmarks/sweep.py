"""Many interventions over the same prompts: one sweep against a loop of plain `generate` with hooks.

The loop is what everyone writes: for each condition, hooks on the activation modules that edit generated tokens, and
Hugging Face's `generate` on the batch of all questions. Each condition is the NPTI edit in one layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import npti_interp as npti
from benchmarks.decode import hf_generate, left_padded
from benchmarks.harness import Section, Setting, exponent, load, measure, timed_peak
from npti_interp.generation import Decoding, Row


def layer_edits(model: npti.Model, n: int) -> list[npti.NeuronEdit]:
    """``n`` edits of one layer each: a twelfth of its neurons, half raised and half clamped."""
    f, rng = model.fingerprint, np.random.default_rng(0)
    edits: list[npti.NeuronEdit] = []
    for k in range(n):
        neuron = rng.choice(f.d_mlp, f.d_mlp // 12, replace=False)
        clamp = np.arange(len(neuron)) % 2 == 0
        layer = np.full(len(neuron), k % f.n_layers)
        edits.append(npti.NeuronEdit(layer, neuron, np.where(clamp, 0.0, 0.3), clamp, f))
    return edits


def loop(
    model: npti.Model, ids: torch.Tensor, mask: torch.Tensor, edits: list[npti.NeuronEdit], tokens: int
) -> list[list[list[int]]]:
    """One `generate` a condition, with hooks."""
    stop = set(model._stop_tokens())
    out: list[list[list[int]]] = []
    for edit in edits:
        with edit.on(model):
            made = hf_generate(model, ids, mask, tokens)
        answers: list[list[int]] = []
        for row in made[:, ids.shape[1] :].tolist():
            ends = [k for k, token in enumerate(row) if token in stop]
            answers.append(row[: ends[0] + 1] if ends else row)
        out.append(answers)
    return out


def run(setting: Setting) -> Section:
    model = load(setting)
    n, tokens, compared = setting.sized(12, 3), setting.sized(28, 5), setting.sized(32, 4)
    counts = setting.sized(64, 4)
    sizes = [c for c in (1, 2, 4, 8, 16, 32, 64) if c <= counts]
    prompts = [q.text for q in npti.PersonalityBench.embedded().questions("N", "search", n)]
    ids, mask = left_padded(model, prompts)
    rows = [Row(model.encode(p), c, key=k) for c in range(compared) for k, p in enumerate(prompts)]
    at_once = model.backend.rows_within(model.cache_bytes, rows, Decoding(tokens))
    edits = layer_edits(model, max(*sizes, compared))

    made: dict[str, Any] = {}

    def sweep_all() -> None:
        made["sweep"] = model.generate_sweep(prompts, edits[:compared], max_new_tokens=tokens)

    def loop_all() -> None:
        made["loop"] = loop(model, ids, mask, edits[:compared], tokens)

    model.generate_sweep(prompts[:2], edits[:2], max_new_tokens=3)  # warms up
    times = measure({"loop": loop_all, "sweep": sweep_all}, setting.few, warm_up=False)
    swept, looped = made["sweep"], made["loop"]
    pairs = [(list(a.tokens), b) for x, y in zip(swept, looped, strict=True) for a, b in zip(x, y, strict=True)]
    alike = float(np.mean([a == b for a, b in pairs]))
    section = Section(
        f"Sweep: conditions × {n} questions × {tokens} tokens",
        ["conditions", "seconds", "seconds a condition", "answers a second", "peak memory, MiB"],
    )
    growth: list[dict[str, float]] = []
    for c in sizes:
        seconds, peak = timed_peak(lambda c=c: model.generate_sweep(prompts, edits[:c], max_new_tokens=tokens))
        peak /= 2**20
        growth.append({"conditions": c, "seconds": seconds, "peak_mib": peak})
        section.rows.append([c, seconds, seconds / c, c * n / seconds, peak])
    power = exponent([g["conditions"] for g in growth], [g["seconds"] for g in growth])
    ratio, low, high = times["sweep"].ratio(times["loop"])
    section.notes += [
        f"Interleaved repeats of each way: {setting.few}.",
        f"{at_once} rows at once in {model.cache_bytes / 2**30:g} GiB of keys and values. Seconds grow as conditions to the "
        f"power {power:.2f}.",
        f"{compared} conditions: sweep {times['sweep'].median:.1f} s, loop of `generate` with hooks "
        f"{times['loop'].median:.1f} s: **{ratio:.2f} times as fast** ({low:.2f} … {high:.2f}); answers alike: {alike:.1%}.",
    ]
    section.target(f"sweep of {compared} conditions against a loop", ratio, at_least=3.0 if compared == 32 else 1.0)
    section.data = {
        "growth": growth, "exponent": power, "alike": alike,
        "seconds": {name: own.seconds for name, own in times.items()},
    }  # fmt: skip
    return section
