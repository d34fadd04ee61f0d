"""How time and memory grow with tokens, layers, conditions and traits: fitted exponents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import npti_interp as npti
from benchmarks.harness import Section, Setting, exponent, load, timed_peak
from benchmarks.sweep import layer_edits


def random_model(like: npti.Model, n_layers: int) -> npti.Model:
    """Random weights of a model's shape with another depth; it never ends an answer by itself."""
    import transformers

    config: Any = type(like.hf_model.config)(**{**like.hf_model.config.to_dict(), "num_hidden_layers": n_layers})
    config.eos_token_id, config.architectures = None, [type(like.hf_model).__name__]
    parameter = next(like.hf_model.parameters())
    torch.manual_seed(0)
    with torch.device(parameter.device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=parameter.dtype)
    tokenizer = npti.load_model("smollm2-135m").tokenizer
    tokenizer.eos_token = None
    made.generation_config.eos_token_id = None
    return npti.Model(made, tokenizer, f"random, {n_layers} layers")


def run(setting: Setting) -> Section:
    like = load(setting)
    bench = npti.PersonalityBench.embedded()
    rows, depth = setting.sized(16, 3), like.fingerprint.n_layers
    prompts: list[Any] = [q.text for q in bench.questions("N", "search", rows)]
    short = setting.sized(16, 4)
    depths = [max(1, depth * k // 6) for k in setting.sized((1, 2, 3, 6), (1, 2))]
    models = {n: random_model(like, n) for n in depths}
    deep = models[depths[-1]]
    edits = layer_edits(deep, 16)
    traits = list(npti.TRAITS)

    def locate(n: int) -> list[npti.Location]:
        return [
            npti.locate(
                like, bench, t, n_questions=setting.sized(16, 8), max_new_tokens=short, threshold=0.05, progress=False
            )
            for t in traits[:n]
        ]

    grown: dict[str, tuple[list[int], Callable[[int], object]]] = {
        "new tokens, decoding": (
            setting.sized([16, 32, 64, 128], [4, 8]),
            lambda n: deep.generate(prompts, max_new_tokens=n),
        ),
        "new tokens, collecting": (
            setting.sized([16, 32, 64, 128], [4, 8]),
            lambda n: deep.collect(prompts, max_new_tokens=n),
        ),
        "layers, collecting": (depths, lambda n: models[n].collect(prompts, max_new_tokens=short)),
        "conditions of a sweep": (
            setting.sized([2, 4, 8, 16], [1, 2]),
            lambda n: deep.generate_sweep(prompts, edits[:n], max_new_tokens=short),
        ),
        "traits located": (setting.sized([1, 2, 3, 5], [1, 2]), locate),
    }
    section = Section(
        "Growth", ["of", "sizes", "seconds", "exponent of time", "peak memory, MiB", "exponent of memory"]
    )
    for name, (sizes, work) in grown.items():
        work(sizes[0])
        runs = [[timed_peak(lambda n=n, w=work: w(n)) for _ in range(setting.few)] for n in sizes]
        seconds = [min(own for own, _ in repeats) for repeats in runs]
        peaks = [max(2**12, *(own for _, own in repeats)) / 2**20 for repeats in runs]
        time, memory = exponent(sizes, seconds), exponent(sizes, peaks)
        section.rows.append(
            [
                name, ", ".join(map(str, sizes)), ", ".join(f"{s:.2f}" for s in seconds), time,
                ", ".join(f"{p:.0f}" for p in peaks), memory,
            ]
        )  # fmt: skip
        section.data[name] = {
            "sizes": sizes, "seconds": seconds, "peak_mib": peaks, "time_exponent": time, "memory_exponent": memory,
        }  # fmt: skip
    section.notes.append(
        f"Random weights of the model's shape ({rows} rows, nothing ends early), but for the traits. Time: the fastest of "
        f"{setting.few}. An exponent of 1 is proportional, below it something is shared; attention and cache alone grow faster "
        "than tokens. Memory holds what is returned (statistics grow with layers and traits, not with tokens)."
    )
    return section
