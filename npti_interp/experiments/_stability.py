r"""Stability: how far the chosen neurons, and what their edit does, depend on how they were located.

*Number of questions.* The statistics are counted in blocks of questions, so neurons can be chosen anew from any of the
blocks at no cost. A subset agrees with the full set partly because it is contained in it; two *disjoint* subsets of one
size tell what agreement a new set of questions would reach. For δ that is carried to larger sizes by Spearman and Brown's
formula: if single blocks correlate by r, means of n blocks correlate by ``n r / (1 + (n − 1) r)``.

*Persona wording, length of the answers, decoding.* Neurons are located anew with half of the persona descriptions and
with the other half, on the first part of each answer, and on answers decoded with a repetition penalty; the former two
by replaying the run's own answers. Each variant's set and δ are compared with the full set's, and its edit is tested: that
of as many neurons a pole, at the variant's own δ and a95.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as _stats

from npti_interp.activations import ActivationStatistics
from npti_interp.evaluation import benjamini_hochberg, bootstrap_mean, sign_flip_test
from npti_interp.experiments._lab import (
    Condition,
    ExperimentConfig,
    ExperimentResult,
    Lab,
    Meter,
    Session,
    decoding_cost,
    interval_columns,
)
from npti_interp.experiments._locate import collect_plan
from npti_interp.experiments._paired import edit_condition, preset, random_draws, rating_changes, span
from npti_interp.experiments._search_plan import DEFAULT_CHUNK, SearchPlan, question_blocks
from npti_interp.figures._stability import plot_stability
from npti_interp.generation import Answer
from npti_interp.models import Prompt
from npti_interp.neurons import NeuronSet, beyond
from npti_interp.prompts import persona_prompt
from npti_interp.runs import read_table, write_table
from npti_interp.traits import POLES, TRAITS, Pole, Trait, as_trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "STABILITY_PRESETS",
    "VARIANTS",
    "StabilityConfig",
    "StabilityResult",
    "agreement",
    "agreement_curve",
    "choose_neurons",
    "reliability",
    "spearman_brown",
    "stability",
]

Floats = npt.NDArray[np.float64]
Masks = dict[Pole, npt.NDArray[np.bool_]]
StatisticsPair = tuple[ActivationStatistics, ActivationStatistics]
"""Statistics under the high pole's personas and under the low pole's."""

VARIANTS = {
    "questions_half": "half the questions",
    "personas_a": "half the personas",
    "personas_b": "other half of personas",
    "short": "first part of answers",
    "penalty": "repetition penalty",
}
"""Ways of locating anew, with the names people read."""

_UNITS = {"questions": ("questions_half",), "personas": ("personas_a", "personas_b"), "short": ("short",), "penalty": ("penalty",)}  # fmt: skip
_TARGET = 0.9


@dataclass(frozen=True)
class StabilityConfig(ExperimentConfig):
    """Settings of `stability`.

    Attributes:
        variant_traits: traits that are located anew; the others get the curves alone, which cost nothing.
        n_subsets: random subsets of the question blocks of each size.
        length_fraction: ``short`` keeps this share of the run's answer length.
        repetition_penalty: of ``penalty`` (the published search uses 1.1).
        random_draws: draws of the random control.
    """

    variant_traits: tuple[str, ...] = ()
    n_subsets: int = 40
    length_fraction: float = 0.5
    repetition_penalty: float = 1.1
    random_draws: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "variant_traits", tuple(as_trait(t).value for t in self.variant_traits))
        if len(set(self.variant_traits)) != len(self.variant_traits) or set(self.variant_traits) - set(self.traits):
            raise ValueError(f"variant_traits must differ and be among {self.traits}, got {self.variant_traits}")
        if self.n_subsets < 2 or self.random_draws < 1:
            raise ValueError(
                f"n_subsets must be at least 2 and random_draws at least 1, got {self.n_subsets} and {self.random_draws}"
            )
        if not 0 < self.length_fraction < 1:
            raise ValueError(f"length_fraction must lie between 0 and 1, got {self.length_fraction}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0) or self.repetition_penalty == 1:
            raise ValueError(f"repetition_penalty must be above 0 and not 1, got {self.repetition_penalty}")


STABILITY_PRESETS: dict[str, StabilityConfig] = {
    "tiny": StabilityConfig(
        traits=("Extraversion", "Neuroticism"), variant_traits=("Neuroticism",), n_questions=2, max_new_tokens=12,
        n_subsets=6, random_draws=2,
    ),
    "quick": StabilityConfig(variant_traits=("Extraversion", "Neuroticism"), n_questions=12),
    "full": StabilityConfig(
        variant_traits=tuple(t.value for t in TRAITS), n_questions=48, max_new_tokens=200, n_subsets=70, random_draws=5
    ),
}  # fmt: skip
"""``tiny`` takes half a minute on one core; ``quick`` (curves of five traits; two located anew four times) six minutes on
two; ``full`` is for a GPU. A trait that is located anew costs about as much as locating it twice, and its test."""


# -- agreement, from statistics alone --------------------------------------------------------------------------------


def _delta(pair: StatisticsPair, blocks: Iterable[int]) -> Floats:
    """δ over some of the question blocks; NaN if they hold no token."""
    which = list(blocks)
    shares: list[Floats] = []
    for stats in pair:
        count, n = stats.blocks(which)
        shares.append(count / n if n else np.full(stats.shape, np.nan))
    return shares[0] - shares[1]


def _strongest(toward: Floats, k: int) -> npt.NDArray[np.bool_]:
    flat = toward.reshape(-1)
    mask = np.zeros(flat.size, bool)
    best = np.argsort(-flat, kind="stable")[:k]
    mask[best[flat[best] > 0]] = True
    return mask.reshape(toward.shape)


def _masks(delta: Floats, rule: Mapping[str, Any]) -> Masks:
    """The neurons that a set's own rule chooses."""
    chosen: Masks = {}
    for pole in POLES:
        toward = delta * pole.sign
        if rule["name"] == "top_k":
            chosen[pole] = _strongest(toward, rule["k"])
            continue
        mask = beyond(toward, rule["threshold"])
        floor = rule.get("floor")
        chosen[pole] = _strongest(toward, floor) if floor and int(mask.sum()) < floor else mask
    return chosen


def _matched(delta: Floats, sizes: Mapping[Pole, int]) -> Masks:
    """As many neurons of each pole as another set has."""
    return {pole: _strongest(delta * pole.sign, sizes[pole]) for pole in POLES}


def _sizes(delta: Floats, rule: Mapping[str, Any]) -> dict[Pole, int]:
    return {pole: int(mask.sum()) for pole, mask in _masks(delta, rule).items()}


def _require_rule(rule: Mapping[str, Any]) -> None:
    if rule.get("name") not in ("npti", "top_k"):
        raise ValueError(f"only sets chosen by 'npti' or 'top_k' can be chosen anew, not by {rule.get('name')!r}")


def choose_neurons(
    high: ActivationStatistics,
    low: ActivationStatistics,
    rule: Mapping[str, Any],
    sizes: Mapping[Pole, int] | None = None,
) -> NeuronSet:
    """Choose by another set's rule, from statistics whose question blocks may be empty.

    `npti_interp.select_neurons` refuses those, as it also gives standard errors; here they are NaN.

    Args:
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        rule: `NeuronSet.rule` of a set chosen by ``"npti"`` or ``"top_k"``.
        sizes: as many neurons of each pole instead, strongest first. Noise lifts neurons over a fixed threshold, so fewer
            questions choose *more* of them; with sizes given, edits of different statistics touch equally many.

    Raises:
        ValueError: another rule, or statistics that do not go together.
        FingerprintMismatchError: statistics of different models.
    """
    _require_rule(rule)
    high.require_comparable(low)
    delta = high.probability - low.probability
    masks = _masks(delta, rule) if sizes is None else _matched(delta, sizes)
    layer, neuron = np.nonzero(masks[Pole.HIGH] | masks[Pole.LOW])
    order = np.argsort(-np.abs(delta[layer, neuron]), kind="stable")
    at = (layer[order], neuron[order])
    up, unknown = delta[at] > 0, np.full(len(order), np.nan)
    return NeuronSet(
        layer=at[0].astype(np.int64), neuron=at[1].astype(np.int64), delta=delta[at],
        probability=np.where(up, high.probability[at], low.probability[at]),
        p95=np.where(up, high.p95[at], low.p95[at]).astype(np.float64), se=unknown, q=unknown.copy(),
        fingerprint=high.fingerprint, rule=dict(rule),
    )  # fmt: skip


def _jaccard(a: Masks, b: Masks) -> float:
    """Intersection over union, the poles averaged."""
    each = [float((a[p] & b[p]).sum() / union) if (union := int((a[p] | b[p]).sum())) else math.nan for p in POLES]
    return float(np.nanmean(each)) if np.isfinite(each).any() else math.nan


def _chance(a: Masks, b: Masks) -> float:
    """What random sets of these sizes would share, the poles averaged."""
    each: list[float] = []
    for pole in POLES:
        x, y = int(a[pole].sum()), int(b[pole].sum())
        shared = x * y / a[pole].size
        each.append(shared / (x + y - shared) if x + y else math.nan)
    return float(np.nanmean(each)) if np.isfinite(each).any() else math.nan


def _pearson(a: Floats, b: Floats) -> float:
    x, y = a.reshape(-1), b.reshape(-1)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan


def _measure(a: Floats, b: Floats, rule: Mapping[str, Any], sizes: Mapping[Pole, int]) -> dict[str, float]:
    """Agreement of two δ: of the sets by the rule, of sets of given sizes, and of the numbers."""
    chosen, matched = (_masks(a, rule), _masks(b, rule)), (_matched(a, sizes), _matched(b, sizes))
    ranks = [_stats.rankdata(x.reshape(-1)) for x in (a, b)]
    return {
        "jaccard": _jaccard(*matched),
        "jaccard_rule": _jaccard(*chosen),
        "correlation": _pearson(a, b),
        "rank_correlation": _pearson(*ranks),
        "chance": _chance(*matched),
        "chance_rule": _chance(*chosen),
    }


def spearman_brown(r: npt.ArrayLike, n: npt.ArrayLike) -> Floats:
    """Reliability of the mean of ``n`` parts that correlate by ``r`` with each other."""
    single, times = np.asarray(r, np.float64), np.asarray(n, np.float64)
    return times * single / (1 + (times - 1) * single)


def agreement_curve(
    high: ActivationStatistics,
    low: ActivationStatistics,
    rule: Mapping[str, Any],
    *,
    n_subsets: int = 40,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement against the number of question blocks.

    Args:
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        rule: how the set is chosen; see `choose_neurons`.
        n_subsets: random subsets of each size (all of them, where there are fewer).
        seed: of their choice.

    Returns:
        one row a ``kind`` × ``blocks``: ``contained`` compares subsets with the full set, which holds them (inflated);
        ``disjoint`` two subsets of that size without a block in common, up to half of the blocks. ``jaccard`` of as many neurons of
        each pole as the full set has, so that only their order counts; ``jaccard_rule`` of what the rule itself chooses
        (with few questions a threshold lets much noise through); ``correlation`` and ``rank_correlation`` of δ over all
        neurons; each with the central 95 % of the subsets as ``_low`` and ``_high``. ``chance`` and ``chance_rule`` for
        the Jaccard indices; ``neurons`` of a pole that the rule chooses.

    Raises:
        ValueError: another rule, or statistics that do not go together.
    """
    _require_rule(rule)
    high.require_comparable(low)
    pair, blocks = (high, low), high.n_blocks
    full = _delta(pair, range(blocks))
    sizes = _sizes(full, rule)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for kind, most in (("contained", blocks), ("disjoint", blocks // 2)):
        for m in range(1, most + 1):
            found: list[dict[str, float]] = []
            for first, second in _subsets(blocks, m, kind == "disjoint", n_subsets, rng):
                a, b = _delta(pair, first), full if kind == "contained" else _delta(pair, second)
                if not (np.isfinite(a).all() and np.isfinite(b).all()):
                    continue
                size = float(np.mean([mask.sum() for mask in _masks(a, rule).values()]))
                found.append({**_measure(a, b, rule, sizes), "neurons": size})
            if not found:
                continue
            table = pd.DataFrame(found)
            row: dict[str, Any] = {"kind": kind, "blocks": m, "n_subsets": len(found)}
            for name in ("jaccard", "jaccard_rule", "correlation", "rank_correlation"):
                values: Any = table[name].dropna()
                ends = np.quantile(values, [0.025, 0.975]) if len(values) else (math.nan, math.nan)
                row |= {name: values.mean(), f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}
            rows.append({**row, **{name: table[name].mean() for name in ("chance", "chance_rule", "neurons")}})
    return pd.DataFrame(rows)


def _subsets(
    blocks: int, m: int, disjoint: bool, n: int, rng: np.random.Generator
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Random subsets of ``m`` blocks, or pairs of them without a common block; none twice."""
    possible = math.comb(blocks, m) * (math.comb(blocks - m, m) if disjoint else 1) // (2 if disjoint else 1)
    if possible <= n:
        every = itertools.combinations(range(blocks), m)
        if not disjoint:
            return [(first, ()) for first in every]
        return [
            (first, second)
            for first in every
            for second in itertools.combinations([b for b in range(blocks) if b not in first], m)
            if first < second
        ]
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
    while len(found) < n:
        order = [int(b) for b in rng.permutation(blocks)]
        first, second = tuple(sorted(order[:m])), tuple(sorted(order[m : 2 * m])) if disjoint else ()
        found[min(first, second) if disjoint else first, max(first, second) if disjoint else ()] = None
    return list(found)


def reliability(
    high: ActivationStatistics,
    low: ActivationStatistics,
    rule: Mapping[str, Any],
    *,
    n_orders: int = 40,
    seed: int = 0,
) -> dict[str, float]:
    """How reliable δ is, and how many question blocks that takes.

    Args:
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        rule: how the set is chosen.
        n_orders: random orders in which blocks are added, for ``contained_90``.
        seed: of the orders.

    Returns:
        ``single``: mean correlation of δ between two single blocks; ``full``: what a second set of as many questions
        would correlate by (Spearman–Brown). ``final_90``: blocks at which δ has 90 % of the full set's reliability;
        ``reliable_90``: blocks that give a reliability of 0.9, more than there are if it is not reached. Each with a
        95 % interval by the jackknife over blocks (on Fisher's scale); where single blocks correlate negatively, the
        reliability is 0 and the numbers of blocks are NaN. ``contained_90``: blocks at which the subset's Jaccard index
        with the full set that contains it, equally many neurons taken, reaches 0.9 (interpolated; median and central
        95 % of the orders).

    Raises:
        ValueError: another rule, statistics that do not go together, or fewer than three blocks with tokens.
    """
    _require_rule(rule)
    high.require_comparable(low)
    pair = (high, low)
    used = [b for b in range(high.n_blocks) if high.n_tokens[b] and low.n_tokens[b]]
    n = len(used)
    if n < 3:
        raise ValueError(f"{n} question blocks hold tokens; at least 3 are needed")
    each = np.stack([_delta(pair, [b]).reshape(-1) for b in used])
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix: Any = np.corrcoef(each)

    def mean_of(kept: Sequence[int]) -> float:
        part = matrix[np.ix_(kept, kept)]
        return float(part[np.triu_indices(len(kept), 1)].mean())

    single = mean_of(range(n))
    deleted = np.array([mean_of([k for k in range(n) if k != out]) for out in range(n)])
    z = math.atanh(min(single, 1 - 1e-12))
    reach = _jackknife(np.arctanh(np.minimum(deleted, 1 - 1e-12))) * float(_stats.t.ppf(0.975, n - 1))
    ends = [math.tanh(z - reach), math.tanh(z + reach)]

    def final(r: float) -> float:
        target = _TARGET * float(spearman_brown(r, n))
        return target * (1 - r) / (r * (1 - target)) if r > 0 else math.nan

    def enough(r: float) -> float:
        return _TARGET / (1 - _TARGET) * (1 - r) / r if r > 0 else math.nan

    found: dict[str, float] = {"blocks": n}
    for name, of in (
        ("single", lambda r: r),
        ("full", lambda r: float(spearman_brown(max(r, 0.0), n))),
    ):
        found |= {name: of(single), f"{name}_low": of(ends[0]), f"{name}_high": of(ends[1])}
    for name, of in (("final_90", final), ("reliable_90", enough)):  # the less they correlate, the more it takes
        found |= {
            name: of(single),
            f"{name}_low": of(ends[1]),
            f"{name}_high": of(ends[0]) if ends[0] > 0 else math.inf,
        }
        if not single > 0:
            found |= {f"{name}_low": math.nan, f"{name}_high": math.nan}
    delta = _delta(pair, used)
    sizes = _sizes(delta, rule)
    full = _matched(delta, sizes)
    rng = np.random.default_rng(seed)
    crossings: list[float] = []
    for _ in range(n_orders):
        order = [used[k] for k in rng.permutation(n)]
        curve = [_jaccard(_matched(_delta(pair, order[:m]), sizes), full) for m in range(1, n + 1)]
        crossings.append(_crossing(curve, _TARGET))
    known = np.array([c for c in crossings if math.isfinite(c)])
    low_end, middle, high_end = np.quantile(known, [0.025, 0.5, 0.975]) if len(known) else [math.nan] * 3
    return {
        **found,
        "contained_90": float(middle),
        "contained_90_low": float(low_end),
        "contained_90_high": float(high_end),
    }


def _jackknife(values: Floats) -> float:
    n = len(values)
    return float(np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))


def _crossing(curve: Sequence[float], target: float) -> float:
    """Where a curve over 1, 2, … first reaches ``target``, interpolated; NaN if it does not."""
    for k, value in enumerate(curve):
        if value >= target:
            before = curve[k - 1] if k else math.nan
            return k + (target - before) / (value - before) if k and value > before else k + 1.0
    return math.nan


def agreement(
    first: StatisticsPair,
    second: StatisticsPair,
    rule: Mapping[str, Any],
    sizes: Mapping[Pole, int],
    *,
    blocks: tuple[Sequence[int], Sequence[int]] | None = None,
    reference: tuple[StatisticsPair, StatisticsPair] | None = None,
    reference_blocks: tuple[Sequence[int], Sequence[int]] | None = None,
) -> dict[str, float]:
    """Agreement of two ways of locating, counted in the same question blocks.

    Args:
        first: statistics of one way, high and low.
        second: of the other.
        rule: how the sets are chosen.
        sizes: neurons of each pole, where equally many are compared.
        blocks: blocks that each uses; all by default.
        reference: a second comparison; the first minus it is given as well.
        reference_blocks: the blocks of that.

    Returns:
        ``jaccard`` (equally many neurons, poles averaged), ``jaccard_rule`` (what the rule chooses), ``correlation`` and
        ``rank_correlation`` of δ, each with a 95 % interval by the jackknife over question blocks (a block is left out
        of both at once), and ``chance`` and ``chance_rule`` for the Jaccard indices; with a reference also
        ``difference_…`` of each.
    """
    every = range(first[0].n_blocks)
    used = blocks or (every, every)
    other = reference_blocks or (every, every)

    def measure(out: int | None) -> dict[str, float]:
        deltas = [_delta(p, [b for b in w if b != out]) for p, w in zip((first, second), used, strict=True)]
        found = _measure(deltas[0], deltas[1], rule, sizes)
        if reference is not None:
            deltas = [_delta(p, [b for b in w if b != out]) for p, w in zip(reference, other, strict=True)]
            found |= {f"difference_{k}": found[k] - v for k, v in _measure(deltas[0], deltas[1], rule, sizes).items()}
        return found

    whole = measure(None)
    without = [measure(b) for b in every]
    row: dict[str, float] = {name: whole[name] for name in ("chance", "chance_rule")}
    for name, value in whole.items():
        if "chance" in name:
            continue
        deleted = np.array([w[name] for w in without])
        deleted = deleted[np.isfinite(deleted)]
        reach = _jackknife(deleted) * float(_stats.t.ppf(0.975, len(deleted) - 1)) if len(deleted) > 1 else math.nan
        least, most = (
            (-2.0, 2.0) if name.startswith("difference") else (0.0 if name.startswith("jaccard") else -1.0, 1.0)
        )
        row |= {name: value, f"{name}_low": max(least, value - reach), f"{name}_high": min(most, value + reach)}
    return row


# -- work ------------------------------------------------------------------------------------------------------------


def stability(
    lab: Lab, config: StabilityConfig | str = "quick", folder: str | Path | None = None, *, progress: bool = True
) -> StabilityResult:
    """Locate anew from fewer questions, other personas, shorter answers and other decoding, and compare.

    Args:
        lab: made by `Lab.from_run`: it needs the statistics and answers behind the neurons.
        config: settings, or the name of a preset.
        folder: where the run goes; by default ``stability`` in the lab's run folder.
        progress: show a bar.

    Returns:
        the result; its files are in the folder.

    Raises:
        ValueError: unknown preset, bad settings, a lab without statistics, a set that no threshold chose, no neurons of
            a trait, too few questions, or a bench other than the run's.
        RunFolderError: the folder belongs to other settings.
    """
    chosen = preset(config, STABILITY_PRESETS)
    for trait in chosen.trait_list:
        _require_rule(lab.of(trait).rule)
        lab.statistics(trait, Pole.HIGH)
    with lab.session("stability", chosen, folder, progress=progress) as session:
        anew = [as_trait(t) for t in chosen.variant_traits]
        session.plan([(chosen.n_questions, 1 + 2 * (2 + len(VARIANTS)), 1)] * len(anew))
        answers = {(t, p): lab.search_answers(t, p) for t in anew for p in POLES}
        cost = {key: _locating_cost(table) for key, table in answers.items()}
        session.bar.total += sum(cost.values())
        for trait in chosen.trait_list:
            pair = (lab.statistics(trait, Pole.HIGH), lab.statistics(trait, Pole.LOW))
            _curves(session, chosen, trait, pair)
            if trait not in anew:
                continue
            own = {p: answers[trait, p] for p in POLES}
            _locate_anew(session, chosen, trait, pair, own, sum(cost[trait, p] for p in POLES))
            session.test(
                str(trait), trait, session.questions(trait),
                lambda trait=trait: _conditions(session, chosen, trait), facts=("gamma", "n_raised", "n_clamped"),
            )  # fmt: skip
        result = StabilityResult.from_folder(session.run.path, chosen)
        session.finish(result)
        return result


def _locating_cost(answers: pd.DataFrame) -> float:
    tokens = int(answers["max_new_tokens"].iloc[0])
    return len(answers) * (decoding_cost(tokens) + 2.5 * (90 + tokens))


def _curves(session: Session, config: StabilityConfig, trait: Trait, pair: StatisticsPair) -> None:
    rule, run = session.lab.of(trait).rule, session.run
    asked = len(session.lab.search_answers(trait, Pole.HIGH))
    name = {"trait": trait.value, "questions_per_block": asked / pair[0].n_blocks}
    session.bar.set_postfix_str(f"{trait}: subsets of the questions")
    run.table(
        f"agreement/{trait}-curve.parquet",
        lambda: agreement_curve(*pair, rule, n_subsets=config.n_subsets, seed=config.seed).assign(**name),
    )
    run.table(
        f"agreement/{trait}-reliability.parquet",
        lambda: pd.DataFrame(
            [{**name, **reliability(*pair, rule, n_orders=config.n_subsets, seed=config.seed)}]
        ),
    )  # fmt: skip


@dataclass
class _Search:
    """One pole's answers of the run: what was asked, by which persona, and in which block it was counted."""

    prompts: list[Prompt]
    answers: list[Answer]
    blocks: list[int]
    half: list[int]
    n_blocks: int


def _search(lab: Lab, trait: Trait, pole: Pole, table: pd.DataFrame, stats: ActivationStatistics) -> _Search:
    questions = {q.id: q for q in lab.bench.questions(trait, "search")}
    personas = {p.id: (k, p) for k, p in enumerate(lab.bench.personas(trait, pole, "elicit"))}
    rows = table.to_dict(orient="records")
    if any(r["question_id"] not in questions or r["persona"] not in personas for r in rows):
        raise ValueError(f"{trait}: the run's answers are to other questions or personas than this bench has")
    prompts = [persona_prompt(personas[r["persona"]][1], questions[r["question_id"]]) for r in rows]
    answers = [Answer(r["answer"], [int(t) for t in r["tokens"]], finished=bool(r["finished"])) for r in rows]
    blocks = question_blocks(len(rows), stats.n_blocks)  # as `SearchPlan` has them
    fed = np.bincount(blocks, [max(0, len(a.tokens) - 1) for a in answers], minlength=stats.n_blocks)
    if fed.astype(np.int64).tolist() != stats.n_tokens.tolist():
        raise ValueError(f"{trait}, {pole}: the run's answers are not those its statistics were counted on")
    halves = _persona_halves(len(personas))
    half = [halves[personas[r["persona"]][0]] for r in rows]
    return _Search(prompts, answers, blocks, half, stats.n_blocks)


def _persona_halves(n: int) -> list[int]:
    """Which half each persona belongs to.

    Personas go facet by facet, two or more each, and persona i mod n answers question i. Every other one, shifted in the
    second half of the list, gives either half all persona facets and all question facets: the halves differ in wording.
    """
    middle = max(1, n // 2)
    return [(k + k // middle) % 2 for k in range(n)]


def _locate_anew(
    session: Session,
    config: StabilityConfig,
    trait: Trait,
    full: StatisticsPair,
    answers: Mapping[Pole, pd.DataFrame],
    cost: float,
) -> None:
    """Each variant's neurons and agreement: two kinds of files, done together."""
    lab, run, rule = session.lab, session.run, session.lab.of(trait).rule
    every = list(range(full[0].n_blocks))
    halves = (every[0::2], every[1::2])
    sizes = _sizes(_delta(full, every), rule)
    for unit, names in _UNITS.items():
        files = {name: f"neurons/{trait}-{name}.safetensors" for name in names}
        table = f"agreement/{trait}-{unit}.parquet"
        share = cost * (0.4 if unit == "penalty" else 0.2)
        if run.done(table) and all(run.done(f) for f in files.values()):
            session.bar.update(share)
            continue
        session.bar.set_postfix_str(f"{trait}: locating anew ({VARIANTS[names[0]]})")
        made: dict[str, list[ActivationStatistics]] = {name: [] for name in names}
        for pole, stats in zip(POLES, full, strict=True):
            search = _search(lab, trait, pole, answers[pole], stats)
            for name in names:
                meter = Meter(session.bar, share / (2 * len(names) * len(search.prompts)))
                made[name].append(_collect(lab, config, trait, pole, answers[pole], search, name, meter))
        pairs: dict[str, StatisticsPair] = {name: (own[0], own[1]) for name, own in made.items()}
        rows = [
            {"trait": trait.value, "variant": name, "against": "full", **agreement(pair, full, rule, sizes)}
            for name, pair in pairs.items()
        ]
        if unit == "questions":
            found = agreement(full, full, rule, sizes, blocks=halves)
            rows.append({"trait": trait.value, "variant": "questions_half", "against": "other half", **found})
        if unit == "personas":
            found = agreement(
                pairs["personas_a"], pairs["personas_b"], rule, sizes, reference=(full, full), reference_blocks=halves
            )
            rows.append({"trait": trait.value, "variant": "personas_a", "against": "other half", **found})
        for name, pair in pairs.items():
            choose_neurons(*pair, rule, sizes).save(run.path / files[name])
        write_table(run.path / table, pd.DataFrame(rows))
        run.record(*files.values(), table)


def _collect(
    lab: Lab, config: StabilityConfig, trait: Trait, pole: Pole, table: pd.DataFrame, search: _Search, name: str,
    progress: Meter,
) -> ActivationStatistics:  # fmt: skip
    """Statistics of one pole under one variant, in the blocks of the full set."""
    tokens = int(table["max_new_tokens"].iloc[0])
    if name == "penalty":
        by_id = {q.id: q for q in lab.bench.questions(trait, "search")}
        plan = SearchPlan(
            lab.bench, trait, [by_id[i] for i in table["question_id"]], DEFAULT_CHUNK, search.n_blocks, tokens,
            config.repetition_penalty, config.batch_size,
        )  # fmt: skip
        return collect_plan(lab.model, plan, pole, progress)[0]
    keep: Callable[[int], bool]
    if name == "questions_half":
        keep = lambda i: search.blocks[i] % 2 == 0  # noqa: E731
    elif name == "short":
        keep = lambda _: True  # noqa: E731
    else:
        keep = lambda i: search.half[i] == (name == "personas_b")  # noqa: E731
    most = max(2, round(config.length_fraction * tokens)) if name == "short" else tokens
    chosen = [i for i in range(len(search.prompts)) if keep(i)]
    given = [Answer(search.answers[i], search.answers[i].tokens[:most]) for i in chosen]
    return lab.model.collect(
        [search.prompts[i] for i in chosen], given, blocks=[search.blocks[i] for i in chosen],
        n_blocks=search.n_blocks, metadata={"trait": trait.value, "pole": pole.value, "variant": name},
        progress=progress,
    )[0]  # fmt: skip


def _conditions(session: Session, config: StabilityConfig, trait: Trait) -> list[Condition]:
    own = session.lab.of(trait)
    sets = {"full": own, **{n: NeuronSet.load(session.run.path / f"neurons/{trait}-{n}.safetensors") for n in VARIANTS}}
    draws, _ = random_draws(own, trait, config.seed, config.random_draws)
    n, gamma = config.n_questions, config.gamma
    made = [Condition("none", facts={"gamma": 0.0, "n_raised": 0, "n_clamped": 0})]
    for pole in POLES:
        for name, neurons in sets.items():
            made.append(edit_condition(name, pole, [neurons.edit(gamma, pole)], n, gamma=gamma))
        made.append(edit_condition("random", pole, [draw.edit(gamma, pole) for draw in draws], n, gamma=gamma))
    return made


# -- result ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StabilityResult(ExperimentResult):
    """What `stability` found.

    Tables: ``curve`` (see `agreement_curve`, with ``questions``), ``reliability`` (see `reliability`, with the numbers of
    blocks as questions too), ``variants`` (see `agreement`; ``against`` the full set or the other half) and ``effects``:
    of each variant's edit the change of the rating toward the wanted pole, and ``difference`` from the full set's edit on
    the same questions, with p-values by sign flips and Benjamini–Hochberg's q over all variants.
    """

    config: StabilityConfig
    name: ClassVar[str] = "stability"
    config_type: ClassVar[type[ExperimentConfig]] = StabilityConfig

    @classmethod
    def from_folder(cls, folder: Path, config: Any) -> Self:
        """See `ExperimentResult.from_folder`."""
        chosen: StabilityConfig = config

        def read(stem: str, traits: Iterable[str]) -> pd.DataFrame:
            found = [read_table(folder / f"{stem.format(trait)}.parquet") for trait in traits]
            return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

        curve = read("agreement/{}-curve", chosen.traits)
        curve.insert(2, "questions", curve["blocks"] * curve["questions_per_block"])
        trust = read("agreement/{}-reliability", chosen.traits)
        for name in ("final_90", "reliable_90", "contained_90"):
            for end in ("", "_low", "_high"):
                trust[f"questions_{name}{end}"] = trust[f"{name}{end}"] * trust["questions_per_block"]
        trust["questions"] = trust["blocks"] * trust["questions_per_block"]
        variants = [read(f"agreement/{{}}-{unit}", chosen.variant_traits) for unit in _UNITS]
        effects = read("scores/{}", chosen.variant_traits)
        tables = {
            "curve": curve,
            "reliability": trust,
            "variants": pd.concat(variants, ignore_index=True),
            "effects": _effects(effects, chosen.seed) if len(effects) else effects,
        }
        return cls(folder, chosen, tables)

    def summary(self) -> str:
        """See `ExperimentResult.summary`."""
        c, curve, trust = self.config, self.tables["curve"], self.tables["reliability"]
        lines = [
            "# Stability",
            "",
            "**Would other questions give the same neurons?** Two disjoint halves of the search questions; δ's reliability "
            "carried to the full number by Spearman and Brown's formula, with 95 % intervals by the jackknife over question "
            "blocks. The *same* personas ask in both, so this is stability for new questions, not for new personas (see below). "
            "Compared are as many neurons of each pole as the full set has. The spread of the Jaccard index is over random splits, which share questions: no confidence interval.",
            "",
        ]
        for row in trust.to_dict(orient="records"):
            part = curve[(curve["trait"] == row["trait"]) & (curve["kind"] == "disjoint")]
            half = part.iloc[-1]
            lines.append(
                f"- {row['trait']}: two sets of {half['questions']:.0f} questions share {span(half, 'jaccard', sign='')} "
                f"of their neurons (chance {half['chance']:.3f}); δ's reliability with all {row['questions']:.0f} is {span(row, 'full', sign='')}."
            )
        lines += [
            "",
            "**How many questions are enough?** Three answers, from the most to the least flattering one.",
            "",
        ]
        for row in trust.to_dict(orient="records"):
            lines.append(
                f"- {row['trait']}: 90 % of the reliability that all {row['questions']:.0f} questions give is there with "
                f"{_ask(row, 'final_90')}; 90 % overlap with the final set, which contains the questions, with "
                f"{_ask(row, 'contained_90')}; a reliability of 0.90 with {_ask(row, 'reliable_90')}"
                + (
                    "."
                    if row["reliable_90"] <= row["blocks"]
                    else ", which is more than there are: not reached (extrapolated)."
                )
            )
        if c.variant_traits:
            lines += self._variant_lines()
        return "\n".join([*lines, ""])

    def _variant_lines(self) -> list[str]:
        c, variants, effects = self.config, self.tables["variants"], self.tables["effects"]
        lines = [
            "",
            "**Do personas, length and decoding matter?** Jaccard index and correlation of δ, with 95 % intervals by the "
            "jackknife over question blocks. All variants but the repetition penalty use part of the full set's answers, so "
            "compare them with half the questions, which does so too. All have as many neurons of each pole. Two halves of the "
            "personas that agree less than two halves of the questions mean that neurons of these *descriptions* were found "
            "besides those of the trait.",
            "",
        ]
        for row in variants.to_dict(orient="records"):
            label = VARIANTS[row["variant"]] + (" against the other half" if row["against"] == "other half" else "")
            lines.append(
                f"- {row['trait']}, {label}: Jaccard {span(row, 'jaccard', sign='')} (chance "
                f"{row['chance']:.3f}), δ correlates {span(row, 'correlation', sign='')}"
                + (
                    f"; against halves of the questions {span(row, 'difference_jaccard')} and "
                    f"{span(row, 'difference_correlation')}."
                    if math.isfinite(row.get("difference_jaccard", math.nan))
                    else "."
                )
            )
        both: Any = effects[(effects["pole"] == "both") & (effects["variant"] != "full")]
        tested: Any = both[both["variant"] != "random"]
        apart = int((tested["difference_q"] < 0.05).sum())
        lines += [
            "",
            f"**And the effect?** Change of the rating toward the wanted pole, both poles averaged, on {c.n_questions} test "
            f"questions. {apart} of {len(tested)} variants differ from the full set's edit with q < 0.05; where an interval "
            "holds 0, it also says how large a difference these questions cannot rule out.",
            "",
        ]
        for trait in c.variant_traits:
            full: Any = effects[
                (effects["trait"] == trait) & (effects["pole"] == "both") & (effects["variant"] == "full")
            ]
            lines.append(f"- {trait}, full set: {span(full.iloc[0], 'change')}.")
            for row in both[both["trait"] == trait].to_dict(orient="records"):
                label = VARIANTS.get(row["variant"], "random neurons (for scale)")
                lines.append(
                    f"  - {label}: {span(row, 'change')}; from the full set's {span(row, 'difference')}"
                    + (f", q = {row['difference_q']:.3f}" if math.isfinite(row["difference_q"]) else "")
                    + "."
                )
        return lines

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """See `ExperimentResult.figures`."""
        t = self.tables
        return {"stability": plot_stability(t["curve"], t["reliability"], t["variants"], t["effects"], VARIANTS)}


def _ask(row: Mapping[str, Any], name: str) -> str:
    low, value, high = (row[f"questions_{name}{end}"] for end in ("_low", "", "_high"))
    if not math.isfinite(value):
        return "no number of questions (blocks do not correlate)"
    return f"{value:.0f} [{low:.0f}, {f'{high:.0f}' if math.isfinite(high) else '∞'}]"


def _effects(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for trait, own in scores.groupby("trait", sort=False):
        part: Any = own
        change = {
            (v, pole): d * Pole(pole).sign for (v, pole), d in rating_changes(part, ["condition", "pole"]).items()
        }
        raised = part.groupby(["condition", "pole"])["n_raised"].first().astype(float).to_dict()
        for variant in dict.fromkeys(v for v, _ in change):
            change[variant, "both"] = (change[variant, "high"] + change[variant, "low"]) / 2
            raised[variant, "both"] = (raised[variant, "high"] + raised[variant, "low"]) / 2
        for (variant, pole), values in change.items():
            against = values - change["full", pole]
            tested = variant not in ("full", "random") and pole == "both"
            rows.append(
                {
                    "trait": trait, "variant": variant, "pole": pole, "n_raised": raised[variant, pole],
                    **interval_columns("change", bootstrap_mean(values, seed=seed)),
                    **interval_columns("difference", bootstrap_mean(against, seed=seed)),
                    "difference_p": sign_flip_test(against, seed=seed) if tested else math.nan,
                    "n": int(np.isfinite(against).sum()),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    table["difference_q"] = benjamini_hochberg(table["difference_p"])
    return table
