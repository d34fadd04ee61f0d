r"""Personality neurons: which fire more often under one pole of a trait than under the other.

``δ = Pr(high persona) − Pr(low persona)`` (METHOD.md section 1). ``δ > threshold`` makes a neuron of the high pole,
``δ < −threshold`` one of the low pole. Standard errors come from question blocks (never from tokens, which are not
independent), q-values from Benjamini and Hochberg, and each selection carries its split-half agreement.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from scipy import stats as _stats
from scipy.special import xlogy

from npti_interp._files import (
    from_fields,
    library_versions,
    read_json,
    read_tensors,
    require_array,
    write_atomic,
    write_tensors,
)
from npti_interp.activations import ActivationStatistics
from npti_interp.errors import ArtifactError, FingerprintMismatchError
from npti_interp.interventions import NeuronEdit, npti_weight
from npti_interp.models._fingerprint import ModelFingerprint
from npti_interp.traits import Pole, Trait, as_pole

if TYPE_CHECKING:
    from npti_interp.models import Model

__all__ = ["RULES", "DeltaEstimate", "NeuronSet", "Stability", "estimate_delta", "select_lape", "select_neurons"]

RULES = ("npti", "top_k", "random_matched")
"""Rules that `select_neurons` knows."""

_KIND = "NeuronSet"
_VERSION = 1

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DeltaEstimate:
    """δ of every neuron with its uncertainty, all ``float64 [layer, neuron]``.

    Attributes:
        delta: Pr(high) − Pr(low).
        se: standard error, by the delete-one jackknife over question blocks.
        q: Benjamini–Hochberg q-value of δ = 0 (t with blocks − 1 degrees of freedom).
    """

    delta: Floats
    se: Floats
    q: Floats


@dataclass(frozen=True)
class Stability:
    """How far two halves of the questions select the same neurons.

    Attributes:
        jaccard_high: overlap of the two halves' high-pole sets (intersection over union); NaN if both are empty.
        jaccard_low: the same of the low pole.
        jaccard_chance: what two random sets of these sizes would share, the poles averaged.
        rank_correlation: Spearman correlation of the halves' δ over all neurons.
        rank_correlation_selected: the same over the selected neurons. They were selected on both halves, so even noise
            correlates here: compare with the random control, not with 0.
    """

    jaccard_high: float
    jaccard_low: float
    jaccard_chance: float
    rank_correlation: float
    rank_correlation_selected: float


def estimate_delta(high: ActivationStatistics, low: ActivationStatistics) -> DeltaEstimate:
    """δ of every neuron with standard error and q-value.

    Args:
        high: statistics under the high pole's personas.
        low: under the low pole's, the same questions in the same blocks.

    Raises:
        FingerprintMismatchError: of different models.
        ValueError: other site, shape or blocks; a block without tokens.
    """
    high.require_comparable(low)
    for name, stats in (("high", high), ("low", low)):
        if (stats.n_tokens == 0).any():
            empty = np.flatnonzero(stats.n_tokens == 0).tolist()
            raise ValueError(
                f"question blocks {empty} of the {name} pole hold no token; use more questions or fewer blocks"
            )
    delta = high.probability - low.probability
    blocks = high.n_blocks
    mean, spread = np.zeros_like(delta), np.zeros_like(delta)
    totals = [(s.active_count.sum(axis=0), s.total_tokens) for s in (high, low)]
    for b in range(blocks):
        left = [
            (count - s.active_count[b]) / (n - int(s.n_tokens[b]))
            for s, (count, n) in zip((high, low), totals, strict=True)
        ]
        without = left[0] - left[1]
        step = without - mean
        mean += step / (b + 1)
        spread += step * (without - mean)
    se = np.sqrt(spread * (blocks - 1) / blocks)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(se > 0, np.abs(delta) / se, np.where(delta == 0, 0.0, np.inf))
    p = 2 * _stats.t.sf(t, df=blocks - 1)
    q = _stats.false_discovery_control(p.reshape(-1)).reshape(p.shape)
    return DeltaEstimate(delta, se, q)


def _half_deltas(high: ActivationStatistics, low: ActivationStatistics) -> tuple[Floats, Floats]:
    halves: list[Floats] = []
    for first in (0, 1):
        which = range(first, high.n_blocks, 2)
        (count_h, n_h), (count_l, n_l) = high.blocks(which), low.blocks(which)
        halves.append(count_h / max(1, n_h) - count_l / max(1, n_l))
    return halves[0], halves[1]


def _jaccard(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else math.nan


def _spearman(a: Floats, b: Floats) -> float:
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    result: Any = _stats.spearmanr(a, b)
    return float(result.statistic)


def beyond(delta: Floats, threshold: float) -> npt.NDArray[np.bool_]:
    """Where δ is above a threshold, as the fractions it is made of are: 8/10 − 7/10 is not above 0.1.

    In floating point that difference is 0.1 and 5 parts in 10¹⁶ more; two fractions that really differ from 0.1 by less
    than the margin would be of 10¹⁴ tokens.
    """
    return delta - threshold > 1e-15


def _masks(delta: Floats, rule: Mapping[str, Any]) -> dict[Pole, npt.NDArray[np.bool_]]:
    masks: dict[Pole, npt.NDArray[np.bool_]] = {}
    for pole in Pole:
        toward = delta * pole.sign
        mask = beyond(toward, rule["threshold"]) if rule["name"] != "top_k" else np.zeros(delta.shape, bool)
        at_least = rule["k"] if rule["name"] == "top_k" else rule["floor"]
        if at_least and int(mask.sum()) < at_least:
            flat = toward.reshape(-1)
            best = np.lexsort((np.arange(flat.size), -flat))[:at_least]
            mask = np.zeros(flat.size, bool)
            mask[best[flat[best] > 0]] = True
            mask = mask.reshape(delta.shape)
        masks[pole] = mask
    return masks


def _require_poles(high: ActivationStatistics, low: ActivationStatistics) -> None:
    for pole, stats in ((Pole.HIGH, high), (Pole.LOW, low)):
        if stats.metadata.get("pole") not in (None, pole.value):
            raise ValueError(f"statistics of the {stats.metadata['pole']} pole were given as those of the {pole} pole")
    for key in ("trait", "bench", "decoding"):
        mine, theirs = high.metadata.get(key), low.metadata.get(key)
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(f"the two poles' statistics differ in {key}: {mine!r} and {theirs!r}")


def select_neurons(
    high: ActivationStatistics,
    low: ActivationStatistics,
    rule: str = "npti",
    *,
    threshold: float = 0.10,
    floor: int | None = None,
    k: int | None = None,
    seed: int = 0,
) -> NeuronSet:
    """Choose the neurons of both poles.

    Args:
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        rule: ``"npti"``: δ beyond ±``threshold``. ``"top_k"``: the ``k`` largest δ of each pole. ``"random_matched"``:
            the control, see `NeuronSet.random_matched`, of what ``"npti"`` gives.
        threshold: in (0, 1].
        floor: with ``"npti"``: at least so many neurons a pole, below the threshold if need be (the published code
            has a hidden floor of 2,000; here none by default).
        k: with ``"top_k"``: neurons a pole.
        seed: with ``"random_matched"``.

    Returns:
        the neurons, strongest first, with their standard errors, q-values and split-half agreement.

    Raises:
        ValueError: unknown rule; threshold outside (0, 1]; ``k`` or ``floor`` missing, below 1 or misplaced.
        FingerprintMismatchError: statistics of different models.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold!r}")
    if (rule == "top_k") != (k is not None) or (k is not None and k < 1):
        raise ValueError(f"k (at least 1) goes with rule 'top_k', and only with it; got k={k} and rule {rule!r}")
    if floor is not None and (floor < 1 or rule == "top_k"):
        raise ValueError(f"floor (at least 1) goes with rules 'npti' and 'random_matched'; got {floor} and {rule!r}")
    _require_poles(high, low)
    estimate = estimate_delta(high, low)
    described: dict[str, Any] = {"name": rule, "threshold": float(threshold), "floor": floor, "k": k}
    masks = _masks(estimate.delta, described)
    a, b = _half_deltas(high, low)
    half_a, half_b = _masks(a, described), _masks(b, described)
    size = estimate.delta.size
    chance: list[float] = []
    for pole in Pole:
        x, y = int(half_a[pole].sum()), int(half_b[pole].sum())
        shared = x * y / size
        chance.append(shared / (x + y - shared) if x + y else math.nan)
    either = masks[Pole.HIGH] | masks[Pole.LOW]
    stability = Stability(
        jaccard_high=_jaccard(half_a[Pole.HIGH], half_b[Pole.HIGH]),
        jaccard_low=_jaccard(half_a[Pole.LOW], half_b[Pole.LOW]),
        jaccard_chance=float(np.nanmean(chance)) if np.isfinite(chance).any() else math.nan,
        rank_correlation=_spearman(a.reshape(-1), b.reshape(-1)),
        rank_correlation_selected=_spearman(a[either], b[either]),
    )
    chosen = _chosen(either, high, low, estimate, described, stability)
    return chosen.random_matched(seed) if rule == "random_matched" else chosen


def select_lape(
    statistics: Mapping[tuple[Trait, Pole], ActivationStatistics], *, percentile: float = 0.95, share: float = 0.01
) -> dict[Trait, NeuronSet]:
    """Choose the neurons of several conditions at once, by the entropy of where they fire (LAPE, arXiv 2402.16438).

    The multi-class alternative to pairwise δ (METHOD.md section 7), with poles of traits in the place of languages.
    ``Pr_c`` is the fraction of tokens on which a neuron is active under condition *c*, ``p_c = Pr_c / Σ Pr`` and its
    entropy is ``−Σ p_c ln p_c``. Of the neurons with some ``Pr_c`` above the bar, the ``percentile`` of all neurons'
    probabilities under all conditions, the ``share`` of all neurons with the lowest entropy are specific; a specific
    neuron belongs to every condition under which its ``Pr_c`` is above the bar. (A bar this high favours neurons that
    fire on nearly every token.)

    A neuron of both poles of a trait does not tell them apart and is left out of that trait's set; all others have
    δ > 0 if they are of the high pole and δ < 0 if of the low one.

    Args:
        statistics: by trait and pole; both poles of each trait. Two conditions, one trait's, are the least.
        percentile: of the bar, in (0, 1).
        share: of all neurons, in (0, 1].

    Returns:
        for each trait the neurons of its poles, largest |δ| first; a set may be empty.

    Raises:
        ValueError: no statistics, a trait with one pole only, a setting out of range, or statistics that do not fit
            together.
        FingerprintMismatchError: statistics of different models.
    """
    if not 0 < percentile < 1 or not 0 < share <= 1:
        raise ValueError(f"percentile must lie in (0, 1) and share in (0, 1], got {percentile!r} and {share!r}")
    traits = list(dict.fromkeys(trait for trait, _ in statistics))
    if not traits or len(statistics) != 2 * len(traits):
        given = ", ".join(f"{trait} {pole}" for trait, pole in statistics) or "none"
        raise ValueError(f"LAPE needs the statistics of both poles of at least one trait, got {given}")
    first = next(iter(statistics.values()))
    for own in statistics.values():
        first.require_comparable(own)
    conditions = list(statistics)
    probability = np.stack([statistics[c].probability for c in conditions])
    bar = float(np.sort(probability, axis=None)[max(1, round(percentile * probability.size)) - 1])
    above = probability > bar
    total = probability.sum(axis=0)
    parts = np.divide(probability, total, out=np.zeros_like(probability), where=total > 0)
    entropy = np.where(above.any(axis=0), -xlogy(parts, parts).sum(axis=0), np.inf).reshape(-1)
    lowest = np.argsort(entropy, kind="stable")[: round(share * entropy.size)]
    specific = np.zeros(entropy.size, bool)
    specific[lowest[np.isfinite(entropy[lowest])]] = True
    of = {c: above[k] & specific.reshape(first.shape) for k, c in enumerate(conditions)}
    described: dict[str, Any] = {
        "name": "lape",
        "percentile": float(percentile),
        "share": float(share),
        "bar": bar,
        "conditions": [f"{trait} {pole}" for trait, pole in conditions],
    }
    found: dict[Trait, NeuronSet] = {}
    for trait in traits:
        high, low = statistics[trait, Pole.HIGH], statistics[trait, Pole.LOW]
        _require_poles(high, low)
        one_pole = of[trait, Pole.HIGH] ^ of[trait, Pole.LOW]
        found[trait] = _chosen(one_pole, high, low, estimate_delta(high, low), described, None)
    return found


def _chosen(
    mask: npt.NDArray[np.bool_], high: ActivationStatistics, low: ActivationStatistics, estimate: DeltaEstimate,
    rule: Mapping[str, Any], stability: Stability | None,
) -> NeuronSet:  # fmt: skip
    """The neurons of ``mask``, largest |δ| first.

    Raises:
        ValueError: a95 of more than 1 % of them is unknown, as the second pass on a server left them out.
    """
    layer, neuron = np.nonzero(mask)
    order = np.argsort(-np.abs(estimate.delta[layer, neuron]), kind="stable")
    layer, neuron = layer[order], neuron[order]
    is_high = estimate.delta[layer, neuron] > 0
    p95 = np.where(is_high, high.p95[layer, neuron], low.p95[layer, neuron])
    if not (high.complete and low.complete) and np.isnan(p95).mean() > 0.01:
        raise ValueError(
            f"a95 of {int(np.isnan(p95).sum())} of {len(p95)} neurons is not known: these statistics were reduced on a "
            "server, and the second pass was made for fewer neurons; make it for these with Model.fill_percentiles"
        )
    metadata = {
        key: high.metadata[key]
        for key in ("site", "decoding", "bench", "trait", "n_prompts", "seed", "missing_shards")
        if key in high.metadata and high.metadata[key] == low.metadata.get(key)
    }
    return NeuronSet(
        layer=layer.astype(np.int64),
        neuron=neuron.astype(np.int64),
        delta=estimate.delta[layer, neuron],
        probability=np.where(is_high, high.probability[layer, neuron], low.probability[layer, neuron]),
        p95=p95,
        se=estimate.se[layer, neuron],
        q=estimate.q[layer, neuron],
        fingerprint=high.fingerprint,
        rule=rule,
        stability=stability,
        metadata=metadata,
    )


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Neurons of both poles of a trait. Made by `select_neurons`, `locate`, `load` or `from_npti_json`.

    Attributes:
        layer: ``int64 [n]``.
        neuron: ``int64 [n]``, index in the layer.
        delta: ``float64 [n]``, signed: above 0 for neurons of the high pole.
        probability: ``float64 [n]``, fraction active under the neuron's own pole.
        p95: ``float64 [n]``, a95: 95th percentile of its value under its own pole.
        se: ``float64 [n]``, standard error of δ (NaN where unknown, as in published files).
        q: ``float64 [n]``, q-value of δ (NaN where unknown).
        fingerprint: the model; None for published files, which do not say.
        rule: how they were chosen.
        stability: split-half agreement of the choice.
        metadata: what produced them.
    """

    layer: Ints
    neuron: Ints
    delta: Floats
    probability: Floats
    p95: Floats
    se: Floats
    q: Floats
    fingerprint: ModelFingerprint | None
    rule: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stability: Stability | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        sizes = {len(getattr(self, name)) for name in _ARRAYS}
        if len(sizes) != 1:
            raise ValueError(f"a neuron set's arrays must have one length, got {sorted(sizes)}")
        if len(self) and (not np.isfinite(self.delta).all() or (self.delta == 0).any()):
            raise ValueError("δ of a selected neuron must be finite and not 0")
        if len(self) and (self.layer.min() < 0 or self.neuron.min() < 0):
            raise ValueError("negative layer or neuron index")
        if len(self) and np.unique(np.stack([self.layer, self.neuron]), axis=1).shape[1] != len(self):
            raise ValueError("a neuron is named twice")

    def __len__(self) -> int:
        return len(self.layer)

    def _where(self, mask: npt.NDArray[np.bool_]) -> Self:
        return replace(self, **{name: getattr(self, name)[mask] for name in _ARRAYS})

    def pole(self, pole: Pole | str) -> Self:
        """The neurons of one pole."""
        return self._where(np.sign(self.delta) == as_pole(pole).sign)

    @property
    def digest(self) -> str:
        """SHA-256 over the arrays, the model and the rule: equal sets have equal digests."""
        sha = hashlib.sha256(json.dumps([dict(self.rule), str(self.fingerprint)], sort_keys=True).encode())
        for name in _ARRAYS:
            sha.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return sha.hexdigest()

    def keys(self, pole: Pole | str | None = None) -> set[tuple[int, int]]:
        """``(layer, neuron)`` of every neuron, or of one pole's."""
        chosen = self if pole is None else self.pole(pole)
        return set(zip(chosen.layer.tolist(), chosen.neuron.tolist(), strict=True))

    def jaccard(self, other: NeuronSet) -> float:
        """Intersection over union with another set (NaN if both are empty)."""
        mine, theirs = self.keys(), other.keys()
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else math.nan

    def per_layer(self, n_layers: int | None = None) -> Ints:
        """Number of neurons in each layer."""
        known = self.fingerprint.n_layers if self.fingerprint else int(self.layer.max(initial=-1)) + 1
        return np.bincount(self.layer, minlength=n_layers or known).astype(np.int64)

    def random_matched(self, seed: int = 0, n_layers: int | None = None, d_mlp: int | None = None) -> Self:
        """The control: as many random neurons in each layer, with the same δ and a95 handed to them.

        Layer by layer and pole by pole an edit then adds and clamps just what it would have, at other neurons; none
        of the original ones is among them as long as the layer has enough others.

        Args:
            seed: which neurons.
            n_layers: model size, where the set is bound to no model.
            d_mlp: neurons a layer, likewise.
        """
        if self.fingerprint is not None:
            n_layers, d_mlp = self.fingerprint.n_layers, self.fingerprint.d_mlp
        if n_layers is None or d_mlp is None:
            raise ValueError("these neurons are bound to no model; give n_layers and d_mlp")
        rng = np.random.default_rng(seed)
        neuron = self.neuron.copy()
        for layer in range(n_layers):
            here = np.flatnonzero(self.layer == layer)
            others = np.setdiff1d(np.arange(d_mlp), self.neuron[here])
            pool = others if len(others) >= len(here) else np.arange(d_mlp)
            neuron[here] = rng.choice(pool, size=len(here), replace=False)
        unknown = np.full(len(self), math.nan)
        return replace(
            self, neuron=neuron, se=unknown, q=unknown, stability=None,
            rule={**self.rule, "name": "random_matched", "of": self.rule.get("name"), "seed": seed},
        )  # fmt: skip

    def bound_to(self, model: Model) -> Self:
        """The same neurons, declared to belong to ``model``: overrides the check of the fingerprint, by name.

        Raises:
            ValueError: the model is too small to have them.
        """
        f = model.fingerprint
        if len(self) and (int(self.layer.max()) >= f.n_layers or int(self.neuron.max()) >= f.d_mlp):
            raise ValueError(
                f"layer {int(self.layer.max())} or neuron {int(self.neuron.max())} lies outside {f}: not its neurons"
            )
        return replace(self, fingerprint=f)

    def edit(
        self,
        gamma: float = 1.0,
        pole: Pole | str = "high",
        *,
        layers: Iterable[int] | None = None,
        weight: str = "npti",
        raise_wanted: bool = True,
        clamp_opposite: bool = True,
        edit_prompt_end: bool = False,
        drop: float = 0.0,
        seed: int = 0,
    ) -> NeuronEdit:
        """The edit that induces ``pole`` (METHOD.md section 2).

        Args:
            gamma: strength γ; published work uses 0.6 to 1.5.
            pole: the pole to induce; its neurons are raised by γ · a95 · f(|δ|), the other's clamped to min(0, value).
            layers: only these layers.
            weight: ``"npti"`` is f(|δ|); ``"none"`` adds γ · a95 (the published ablation).
            raise_wanted: whether the wanted pole's neurons are raised.
            clamp_opposite: whether the opposite pole's are clamped.
            edit_prompt_end: edit the last prompt position as well.
            drop: share of the additions left out at random at each step and layer (published: 0.1; off by default).
            seed: of that mask.

        Raises:
            ValueError: γ not finite; unknown weight; a layer outside the model; a95 unknown (NaN) for more than 1 % of
                the neurons to raise. Fewer are left alone, with a warning.
            FingerprintMismatchError: the set is bound to no model (published files); see `bound_to`.
        """
        wanted = as_pole(pole)
        if not math.isfinite(gamma):
            raise ValueError(f"gamma must be finite, got {gamma}")
        if weight not in ("npti", "none"):
            raise ValueError(f"unknown weight {weight!r}; choose 'npti' or 'none'")
        if self.fingerprint is None:
            raise FingerprintMismatchError(
                "these neurons do not say which model they belong to (published files don't); "
                "say it yourself with neurons.bound_to(model)"
            )
        chosen = self
        if layers is not None:
            asked = sorted({int(layer) for layer in layers})
            outside = [layer for layer in asked if not 0 <= layer < self.fingerprint.n_layers]
            if outside or not asked:
                raise ValueError(f"layers {outside or asked} are not among 0 … {self.fingerprint.n_layers - 1}")
            chosen = self._where(np.isin(self.layer, asked))
        up = np.sign(chosen.delta) == wanted.sign
        chosen = chosen._where((up & raise_wanted) | (~up & clamp_opposite))
        up = np.sign(chosen.delta) == wanted.sign
        unknown = up & np.isnan(chosen.p95)
        if (lost := int(unknown.sum())) > 0:
            # Judged on the whole pole: one lost neuron is no reason to refuse the edit of a layer that has few.
            whole = np.isnan(self.p95[np.sign(self.delta) == wanted.sign])
            if whole.mean() > 0.01:
                raise ValueError(
                    f"a95 of {int(whole.sum())} of {len(whole)} neurons to raise is unknown (the sketch lost it); "
                    "collect on more tokens"
                )
            warnings.warn(
                f"a95 of {lost} of {int(up.sum())} neurons to raise is unknown: they are left alone", stacklevel=2
            )
            chosen, up = chosen._where(~unknown), up[~unknown]
        strength = npti_weight(chosen.delta) if weight == "npti" else np.ones(len(chosen))
        return NeuronEdit(
            layer=chosen.layer,
            neuron=chosen.neuron,
            amount=np.where(up, gamma * np.where(up, chosen.p95, 0.0) * strength, 0.0),
            clamp=~up,
            fingerprint=self.fingerprint,
            edit_prompt_end=edit_prompt_end,
            drop=drop,
            seed=seed,
            label=f"{self.rule.get('name', 'neurons')} {wanted} γ={gamma:g}",
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file (whole or not at all)."""
        metadata = {
            "versions": library_versions(),
            **self.metadata,
            "rule": dict(self.rule),
            "stability": vars(self.stability) if self.stability else None,
            "fingerprint": self.fingerprint.to_json() if self.fingerprint else None,
        }
        write_tensors(Path(path), _KIND, _VERSION, {name: getattr(self, name) for name in _ARRAYS}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: truncated, altered, of another kind, or of a newer format version.
        """
        arrays, metadata = read_tensors(path, _KIND, _VERSION)
        try:
            fingerprint, stability, rule = (metadata.pop(name) for name in ("fingerprint", "stability", "rule"))
            model = None if fingerprint is None else ModelFingerprint.from_json(fingerprint)
            if not isinstance(rule, dict):
                raise ArtifactError(f"its rule is {rule!r}, no object")
            own = {
                name: require_array(arrays, name, (None,), *_KINDS["int" if name in ("layer", "neuron") else "float"])
                for name in _ARRAYS
            }
            _require_shares(own, model)
            return cls(
                **own,
                fingerprint=model,
                rule=rule,
                stability=None if stability is None else from_fields(Stability, stability, "its stability"),
                metadata=metadata,
            )
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path} is not a whole neuron set: {error}") from error

    @classmethod
    def from_npti_json(cls, high_path: str | Path, low_path: str | Path) -> Self:
        """Read the published files ``TRAIT_dict.json`` and ``TRAIT_reversed_dict.json``.

        Each maps a layer to rows ``[layer, neuron, |δ|, Pr under the pole, a95]``. They do not name their model, so
        the set is bound to none: see `bound_to`.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: not such a file, or a row that makes no sense; the message names file, layer and row.
        """
        rows: list[tuple[int, int, float, float, float]] = []
        for pole, path in ((Pole.HIGH, Path(high_path)), (Pole.LOW, Path(low_path))):
            if not path.is_file():
                raise FileNotFoundError(f"no file at {path}")
            content = read_json(path)
            if not isinstance(content, dict):
                raise ArtifactError(f"{path}: expected an object that maps layers to rows")
            for layer, block in content.items():
                if not isinstance(block, list):
                    raise ArtifactError(f"{path}: layer {layer!r} does not hold a list of rows")
                for place, row in enumerate(block):
                    rows.append(_published_row(row, layer, pole, f"{path}, layer {layer}, row {place}"))
        table = np.array(rows, dtype=np.float64).reshape(-1, 5)
        unknown = np.full(len(table), math.nan)
        try:
            return cls(
                layer=table[:, 0].astype(np.int64),
                neuron=table[:, 1].astype(np.int64),
                delta=table[:, 2],
                probability=table[:, 3],
                p95=table[:, 4],
                se=unknown,
                q=unknown,
                fingerprint=None,
                rule={"name": "published"},
                metadata={"source": [Path(high_path).name, Path(low_path).name]},
            )
        except ValueError as error:
            raise ArtifactError(f"{high_path}, {low_path}: {error}") from error

    def to_npti_json(self, high_path: str | Path, low_path: str | Path) -> None:
        """Write the published layout, one file a pole; rows and layers in the order they have here.

        Raises:
            ValueError: an a95 is unknown (NaN), which JSON cannot hold.
        """
        if not np.isfinite(self.p95).all():
            raise ValueError(f"a95 of {int((~np.isfinite(self.p95)).sum())} neurons is unknown; JSON cannot hold that")
        for pole, path in ((Pole.HIGH, Path(high_path)), (Pole.LOW, Path(low_path))):
            own = self.pole(pole)
            content: dict[str, list[list[float]]] = {}
            columns = (own.layer, own.neuron, np.abs(own.delta), own.probability, own.p95)
            for row in zip(*(column.tolist() for column in columns), strict=True):
                content.setdefault(str(row[0]), []).append(list(row))
            text = json.dumps(content, indent=4)
            write_atomic(path, lambda scratch, text=text: scratch.write_text(text, encoding="utf-8"))

    def __repr__(self) -> str:
        trait = self.metadata.get("trait", "neurons")
        return f"NeuronSet({trait}: {len(self.pole('high')):,} high, {len(self.pole('low')):,} low, {dict(sorted(self.rule.items()))})"

    def _repr_html_(self) -> str:
        total = self.fingerprint.n_layers * self.fingerprint.d_mlp if self.fingerprint else 0
        body = ""
        for pole in Pole:
            own = self.pole(pole)
            share = f" ({len(own) / total:.2%})" if total else ""
            top = ", ".join(f"L{a}.{b} ({c:+.2f})" for a, b, c in zip(own.layer, own.neuron, own.delta, strict=True))
            top = ", ".join(top.split(", ")[:4])
            late = float(np.mean(own.layer >= (own.per_layer().size / 2))) if len(own) else math.nan
            body += (
                f"<tr><th style='text-align:left'>{pole}</th><td>{len(own):,}{share}</td><td>{late:.0%}</td>"
                f"<td>{np.median(np.abs(own.delta)) if len(own) else math.nan:.3f}</td><td>{top}</td></tr>"
            )
        note = ""
        if (s := self.stability) is not None:
            note = (
                f"<p>Split halves: Jaccard {s.jaccard_high:.2f} (high), {s.jaccard_low:.2f} (low), by chance "
                f"{s.jaccard_chance:.3f}; δ correlates {s.rank_correlation:.2f} over all neurons.</p>"
            )
        who = f"{self.metadata.get('trait', 'Neurons')}, rule {self.rule.get('name', '?')}"
        head = "<tr><th>pole</th><th>neurons</th><th>in upper half</th><th>median |δ|</th><th>strongest</th></tr>"
        return f"<table><caption>{who}, model {self.fingerprint or 'unknown'}</caption>{head}{body}</table>{note}"


_ARRAYS = ("layer", "neuron", "delta", "probability", "p95", "se", "q")


_KINDS: dict[str, tuple[type[np.generic], ...]] = {"int": (np.int64,), "float": (np.float64, np.float32)}


def _require_shares(own: Mapping[str, npt.NDArray[Any]], model: ModelFingerprint | None) -> None:
    """Raise unless what is read lies where it can lie.

    Raises:
        ArtifactError: a share outside its range, an infinite a95, or a neuron outside the model.
    """
    for name, low in (("delta", -1), ("probability", 0), ("se", 0), ("q", 0)):
        with np.errstate(invalid="ignore"):
            wrong = (own[name] < low) | ((own[name] > 1) & (name != "se"))
        if wrong.any() or np.isinf(own[name]).any():
            raise ArtifactError(f"{name} of a neuron is {own[name][wrong | np.isinf(own[name])][0]}")
    if np.isinf(own["p95"]).any():
        raise ArtifactError("a95 of a neuron is infinite")
    if model is not None and ((own["layer"] >= model.n_layers).any() or (own["neuron"] >= model.d_mlp).any()):
        raise ArtifactError(f"a neuron lies outside {model}")


def _published_row(row: Any, layer: str, pole: Pole, where: str) -> tuple[int, int, float, float, float]:
    if (
        not isinstance(row, list)
        or len(row) != 5
        or any(isinstance(v, bool) or not isinstance(v, int | float) for v in row)
    ):
        raise ArtifactError(f"{where}: expected [layer, neuron, |δ|, Pr, a95], got {row!r}")
    a, b, delta, probability, p95 = row
    sane = (
        all(abs(v) < 1e300 for v in row)  # also false of NaN, and safe for whole numbers beyond any float
        and a == int(a) >= 0
        and b == int(b) >= 0
        and max(a, b) < 2**53
        and str(int(a)) == layer
        and 0 < delta <= 1
        and 0 <= probability <= 1
    )
    if not sane:
        raise ArtifactError(f"{where}: values out of range: {row!r}")
    return int(a), int(b), pole.sign * float(delta), float(probability), float(p95)
