"""Choosing the neurons of five traits from ten poles' statistics of Llama-3-8B's shape: 458,752 neurons, 8 blocks."""

from __future__ import annotations

import numpy as np

import npti_interp as npti
from benchmarks import harness
from npti_interp._sketch import BINS, QuantileSketch
from npti_interp.activations import ActivationStatistics
from npti_interp.models import ModelFingerprint

BLOCKS = 8
SECONDS = 5.0
"""For all five traits."""


def statistics(fingerprint: ModelFingerprint, trait: npti.Trait, pole: npti.Pole, tokens: int) -> ActivationStatistics:
    """Made up: each neuron has a probability that differs a little between poles, and counts scatter over blocks."""
    shape = fingerprint.n_layers, fingerprint.d_mlp
    n, k = int(np.prod(shape)), list(npti.Trait).index(trait)
    common = np.random.default_rng(0).beta(0.8, 1.6, n)
    shift = np.random.default_rng(1 + k).normal(0, 0.06, n)
    rng = np.random.default_rng([k, pole.sign + 1])
    p = np.clip(common + 0.5 * pole.sign * shift, 0, 1)
    per_block = np.full(BLOCKS, tokens // BLOCKS)
    counts = np.stack([rng.binomial(m, np.clip(p + rng.normal(0, 0.01, n), 0, 1)) for m in per_block])
    # Each window holds the top of its counts, thinning out upwards, so that the percentile lies within.
    positive = counts.sum(axis=0)
    weight = np.arange(BINS, 0, -1, dtype=np.float32)
    weight /= weight.sum()
    bins = np.minimum(np.outer(np.minimum(positive, 20_000), weight), 255).astype(np.uint8)
    base = rng.integers(-300, -100, n).astype(np.int16)
    sketch = QuantileSketch(bins, base, np.full(n, BINS, np.uint8), np.zeros(n, np.int32))
    return ActivationStatistics(
        counts.reshape(BLOCKS, *shape).astype(np.int32), per_block.astype(np.int64),
        rng.normal(size=shape), rng.gamma(2.0, size=shape), sketch, fingerprint,
        {"trait": str(trait), "pole": pole.value},
    )  # fmt: skip


def run(setting: harness.Setting) -> harness.Section:
    """Seconds for δ, standard errors, q-values, stability and a95 of all five traits."""
    layers, width, tokens = setting.sized(32, 4), 14_336, 20_000
    fingerprint = ModelFingerprint("Synthetic", layers, width, 4096, 128_256, "silu", "", "", "")
    section = harness.Section(
        f"Selection: {layers * width:,} neurons, five traits", ["trait", "seconds", "spread", "neurons"]
    )
    total, found = 0.0, 0
    for trait in npti.Trait:
        high, low = (statistics(fingerprint, trait, pole, tokens) for pole in npti.Pole)
        chosen: list[npti.NeuronSet] = []

        def work(
            high: ActivationStatistics = high, low: ActivationStatistics = low, out: list[npti.NeuronSet] = chosen
        ) -> None:
            high._p95 = low._p95 = None  # as freshly collected: what is asked for first has to be computed
            out[:] = [npti.select_neurons(high, low)]

        timing = harness.measure({"ours": work}, setting.repeats)["ours"]
        section.rows.append([str(trait), timing.median, f"{timing.spread:.0%}", len(chosen[0])])
        section.data[str(trait)] = timing.seconds
        total, found = total + timing.median, found + len(chosen[0])
        assert np.isfinite(chosen[0].p95).all(), "every a95 is known here"
        assert chosen[0].stability is not None
    section.rows.append(["all", total, "", found])
    section.notes.append(
        f"Of each trait: δ, jackknife standard errors over {BLOCKS} blocks, q-values, a95, and the agreement of two halves."
    )
    section.target("seconds for all five traits", total, at_most=SECONDS)
    return section
