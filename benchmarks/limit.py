"""What a run must do at least, over what this machine reaches, and the share of it that is reached.

Must be done: the matrix products of all weights for each prompt token and each generated token, and reading each row's
keys and values once a step. What the machine reaches is measured in the same run: one pass through all of the model's
own weight matrices, one after the other (so that they come from memory, as they do while decoding), for as many rows
as are decoded at once and for a chunk of prompts; and the bandwidth of reading a large array.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import npti_interp as npti
from benchmarks.harness import Section, Setting, clock, load, measure
from npti_interp.generation import _PREFILL_TOKENS, Decoding, Row


def products(model: Any, rows: int, head_rows: int, repeats: int) -> float:
    """Seconds of one pass of ``rows`` through all weight matrices, and of ``head_rows`` through the unembedding."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weight = layers[0].weight
    inputs = {m.in_features: torch.randn(rows, m.in_features, dtype=weight.dtype, device=weight.device) for m in layers}
    last = torch.randn(head_rows, head.in_features, dtype=weight.dtype, device=weight.device)

    def work() -> None:
        with torch.no_grad():
            for m in layers:
                m(inputs[m.in_features])
            head(last)

    work()
    return min(clock(work) for _ in range(repeats))


def bandwidth(device: Any, dtype: torch.dtype, repeats: int) -> float:
    """Bytes a second, reading 512 MiB."""
    big = torch.ones(2**29 // dtype.itemsize, dtype=dtype, device=device)
    big.amax()
    return 2**29 / min(clock(lambda: big.amax()) for _ in range(repeats))


def run(setting: Setting) -> Section:
    model = load(setting)
    engine: Any = model.backend
    n, tokens = setting.sized(64, 8), setting.sized(40, 5)
    questions = npti.PersonalityBench.embedded().questions("N", "search", n)
    rows = [Row(model.encode(q.text), key=k, block=k % 8) for k, q in enumerate(questions)]
    engine._stop = frozenset()  # every row runs its full length, so that what must be done is known
    decoding = Decoding(tokens)
    collector = lambda: npti.activations.ActivationCollector(model.fingerprint)  # noqa: E731
    fed = sum(len(row.prompt) - len(engine_shared(rows).beginning(row.prompt)) for row in rows)
    ways = {
        "plain": lambda: engine.generate(rows, [None], decoding, max_rows=n),
        "collecting": lambda: engine.generate(rows, [None], decoding, max_rows=n, collector=collector()),
    }
    repeats = max(3, setting.repeats)
    times = measure(ways, repeats)
    config, dtype = model.hf_model.config, next(model.hf_model.parameters()).dtype
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * model.fingerprint.n_layers * heads * width * dtype.itemsize  # bytes of keys and values a place
    read = each * sum(len(row.prompt) + step for row in rows for step in range(1, tokens))
    step = products(engine._model, n, n, repeats)
    chunk = products(engine._model, min(_PREFILL_TOKENS, fed), 8, repeats)
    speed = bandwidth(engine.device, dtype, repeats)
    parts = {
        "products, prompts": chunk * fed / min(_PREFILL_TOKENS, fed),
        "products, generated tokens": step * (tokens - 1),
        "keys and values": read / speed,
    }
    least = sum(parts.values())
    section = Section(
        f"Limit: {n} rows × {tokens} tokens after {fed:,} prompt tokens",
        ["", "seconds", "share of the limit that is reached"],
    )
    section.rows += [[name, value, ""] for name, value in parts.items()]
    section.rows.append(["limit, their sum", least, 1.0])
    section.rows += [[f"decoding, {name}", own.median, least / own.median] for name, own in times.items()]
    weights = sum(p.numel() for p in model.hf_model.parameters())
    section.notes.append(
        f"{weights / 1e6:.0f} M weights; products at {2e-9 * weights * n / step:.0f} GFLOP/s for {n} rows and "
        f"{2e-9 * (weights - config.vocab_size * config.hidden_size) * min(_PREFILL_TOKENS, fed) / chunk:.0f} for a chunk of "
        f"prompts; {speed / 1e9:.1f} GB/s of memory. The rest is attention's arithmetic, norms, activations, and Python."
    )
    section.data = {
        "parts": parts, "limit": least, "seconds": {k: v.seconds for k, v in times.items()},
        "share": {k: least / v.median for k, v in times.items()},
    }  # fmt: skip
    return section


def engine_shared(rows: list[Row]) -> Any:
    """What the rows' prompts have in common, as the engine divides them."""
    from npti_interp.generation import _Shared

    return _Shared([row.prompt for row in rows])
