"""Decoding: plain, collecting, edited, and replay, against plain Hugging Face `generate` on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import npti_interp as npti
from benchmarks.harness import Section, Setting, load, measure, peak_memory
from npti_interp.generation import Answer


def some_edit(model: npti.Model, share: float = 0.08) -> npti.NeuronEdit:
    """An edit of usual size: 8 % of the neurons, half raised and half clamped."""
    f, rng = model.fingerprint, np.random.default_rng(0)
    n = int(share * f.n_layers * f.d_mlp)
    where = rng.choice(f.n_layers * f.d_mlp, n, replace=False)
    clamp = (np.arange(n) % 2).astype(bool)
    return npti.NeuronEdit(where // f.d_mlp, where % f.d_mlp, np.where(clamp, 0.0, 0.05), clamp, f)


def left_padded(model: npti.Model, prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask as Hugging Face's `generate` takes them."""
    encoded = [model.encode(p) for p in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(e)) + list(e) for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    device = model.hf_model.get_input_embeddings().weight.device
    return ids.to(device), mask.to(device)


def hf_generate(model: npti.Model, ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Plain Hugging Face, greedy."""
    with torch.no_grad():
        return model.hf_model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)


def run(setting: Setting) -> Section:
    model = load(setting)
    n, tokens = setting.sized(32, 4), setting.sized(48, 6)
    questions = npti.PersonalityBench.embedded().questions("N", "search", n)
    prompts: list[Any] = [q.text for q in questions]
    ids, mask = left_padded(model, prompts)
    edit = some_edit(model)
    answers: list[Answer] = model.generate(prompts, max_new_tokens=tokens)
    made = hf_generate(model, ids, mask, tokens)[:, ids.shape[1] :].tolist()
    alike = np.mean([list(a.tokens) == row[: len(a.tokens)] for a, row in zip(answers, made, strict=True)])
    fed = sum(len(a.tokens) for a in answers)

    base = "Hugging Face generate"
    ways: dict[str, Callable[[], object]] = {
        base: lambda: hf_generate(model, ids, mask, tokens),
        "plain": lambda: model.generate(prompts, max_new_tokens=tokens),
        "with an edit": lambda: model.generate(prompts, intervention=edit, max_new_tokens=tokens),
        "collecting": lambda: model.collect(prompts, max_new_tokens=tokens),
        "collecting, with an edit": lambda: model.collect(prompts, intervention=edit, max_new_tokens=tokens),
        "replay, collecting": lambda: model.collect(prompts, answers),
    }
    times = measure(ways, setting.repeats)
    memory = {name: peak_memory(work) / 2**20 for name, work in ways.items()}
    section = Section(
        f"Decoding: {n} prompts × {tokens} tokens",
        [
            "way",
            "tokens/s",
            "speed relative to Hugging Face (range)",
            "relative to plain",
            "spread",
            "peak memory, MiB",
        ],
    )
    for name, own in times.items():
        ratio, low, high = own.ratio(times[base])
        section.rows.append(
            [
                name, fed / own.median, f"{ratio:.2f} ({low:.2f} … {high:.2f})", own.ratio(times["plain"])[0],
                f"{own.spread:.0%}", memory[name],
            ]
        )  # fmt: skip
        if name.startswith(("with", "collecting")):
            section.target(f"{name}, speed relative to Hugging Face", ratio, at_least=0.97)
    section.notes.append(f"Answers equal to Hugging Face's token for token: {alike:.0%}.")
    section.data = {
        "seconds": {name: own.seconds for name, own in times.items()}, "tokens": fed, "alike": float(alike),
        "peak_mib": memory,
    }  # fmt: skip
    return section
