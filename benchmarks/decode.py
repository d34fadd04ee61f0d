"""Side by side in one run: plain Hugging Face `generate`, this toolkit plain, with an edit, with collection.

    python benchmarks/decode.py [--rows 32] [--tokens 48] [--repeats 3]

Prints Markdown: tokens a second, and the ratio to plain Hugging Face with the same batch (median of the repeats, which
are interleaved). Also the two float32 matrix libraries, in products a layer does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

import npti_interp as npti
from npti_interp.backends._kernels import keep_heap, linear_kernel


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keep_heap()
    transformers.logging.set_verbosity_error()

    model = npti.load_model("smollm2-135m")
    questions = npti.PersonalityBench.embedded().questions("N", "search", args.rows)
    prompts = [q.text for q in questions]
    fingerprint = model.fingerprint
    rng = np.random.default_rng(0)
    n = 3600  # the size of a usual edit: 8 % of the neurons
    where = rng.choice(fingerprint.n_layers * fingerprint.d_mlp, n, replace=False)
    edit = npti.NeuronEdit(
        where // fingerprint.d_mlp, where % fingerprint.d_mlp, np.where(np.arange(n) % 2, 0.0, 0.05),
        (np.arange(n) % 2).astype(bool), fingerprint,
    )  # fmt: skip
    encoded = [model.encode(p) for p in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(e)) + list(e) for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])

    def plain_hf() -> None:
        with torch.no_grad():
            model.hf_model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False)

    ways: dict[str, Callable[[], object]] = {
        "Hugging Face generate": plain_hf,
        "npti generate": lambda: model.generate(prompts, max_new_tokens=args.tokens),
        "npti generate, edited": lambda: model.generate(prompts, intervention=edit, max_new_tokens=args.tokens),
        "npti generate, collecting": lambda: model.collect(prompts, max_new_tokens=args.tokens),
    }
    for work in ways.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, work in ways.items():
            times[name].append(clock(work))
    base = statistics.median(times["Hugging Face generate"])
    print(f"{args.rows} prompts × {args.tokens} tokens, {torch.get_num_threads()} threads, linear: {linear_kernel()}\n")
    print("| way | tokens/s | speed relative to Hugging Face | spread |\n|---|---|---|---|")
    for name, own in times.items():
        middle = statistics.median(own)
        spread = (max(own) - min(own)) / middle
        print(f"| {name} | {args.rows * args.tokens / middle:.0f} | {base / middle:.2f} | {spread:.0%} |")

    print("\n| float32 product | default, GFLOP/s | oneDNN, GFLOP/s | ratio |\n|---|---|---|---|")
    for rows, a, b in ((64, 576, 1536), (64, 1536, 576), (512, 576, 1536)):
        x, w = torch.randn(rows, a), torch.randn(b, a)
        repeats = max(1, int(4e9 / (rows * a * b)))
        kinds = {
            "default": lambda x=x, w=w: torch.nn.functional.linear(x, w),
            "onednn": lambda x=x, w=w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        }
        speed = {}
        for name, product in kinds.items():
            product()
            speed[name] = 2e-9 * rows * a * b * repeats / clock(lambda p=product, r=repeats: [p() for _ in range(r)])
        print(
            f"| {rows} × {a} → {b} | {speed['default']:.0f} | {speed['onednn']:.0f} | "
            f"{speed['onednn'] / speed['default']:.2f} |"
        )


if __name__ == "__main__":
    main()
