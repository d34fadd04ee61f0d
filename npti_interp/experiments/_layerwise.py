"""Layer by layer: is any window of consecutive layers as good as all of them?

Each trait and pole is induced by the neurons of single layers, of windows of consecutive layers, and of all layers, at
one γ. A window edits fewer neurons and so costs less fluency; hence two comparisons with all layers, question by
question: at the same γ, and at the same fluency, against what all layers reach at smaller γ for the window's NLL.

Ratings enter as *induced* ratings: the rating for the high pole and 6 − rating for the low one, so that larger is
better; of both poles together they sum to the score out of 10 (`pair_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from npti_interp.evaluation import benjamini_hochberg, sign_flip_test
from npti_interp.experiments._lab import Condition, ExperimentConfig, ExperimentResult, Lab
from npti_interp.experiments._paired import (
    ALPHA,
    BOTH,
    RESAMPLES,
    edit_condition,
    level_columns,
    measures,
    paired_columns,
    preset,
    random_draws,
    read_test,
    run_edits,
    span,
    verdicts,
)
from npti_interp.figures._layerwise import plot_layerwise
from npti_interp.interventions import NeuronEdit
from npti_interp.runs import read_table
from npti_interp.traits import POLES, Pole, Trait, as_trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LAYERWISE_PRESETS", "LayerwiseConfig", "LayerwiseResult", "layerwise"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerwiseConfig(ExperimentConfig):
    """Settings of `layerwise`.

    Attributes:
        window: consecutive layers of a window (published: 5).
        stride: layers from one window's start to the next's; ``window`` tiles the model, 1 slides. A last window that
            ends at the top layer is added where the stride leaves layers over.
        single_stride: every how many layers one is edited alone; 0 leaves single layers out.
        frontier: fractions of γ at which all layers are edited too, for the comparison at equal fluency.
        random_draws: draws of the random control; question *i* gets draw *i* modulo this.
        margin: loss in induced rating, a pole, up to which a window counts as as good as all layers.
    """

    window: int = 5
    stride: int = 5
    single_stride: int = 1
    frontier: tuple[float, ...] = (0.25, 0.5, 0.75)
    random_draws: int = 3
    margin: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or self.stride < 1 or self.single_stride < 0:
            raise ValueError(
                "window must be at least 2, stride at least 1 and single_stride at least 0, got "
                f"{self.window}, {self.stride} and {self.single_stride}"
            )
        if self.random_draws < 1:
            raise ValueError(f"random_draws must be at least 1, got {self.random_draws}")
        if len(set(self.frontier)) != len(self.frontier) or not all(0 < f < 1 for f in self.frontier):
            raise ValueError(f"frontier must hold different fractions between 0 and 1, got {self.frontier}")
        if not (math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(f"margin must be above 0, got {self.margin}")
        object.__setattr__(self, "frontier", tuple(sorted(self.frontier)))

    def windows(self, n_layers: int) -> list[tuple[int, int]]:
        """First and last layer of each window.

        Raises:
            ValueError: a window would be the whole model.
        """
        if self.window >= n_layers:
            raise ValueError(f"a window of {self.window} layers is no part of a model of {n_layers}; choose a smaller")
        last = n_layers - self.window
        starts = list(range(0, last + 1, self.stride))
        return [(s, s + self.window - 1) for s in (starts if starts[-1] == last else [*starts, last])]


LAYERWISE_PRESETS: dict[str, LayerwiseConfig] = {
    "tiny": LayerwiseConfig(
        traits=("Neuroticism",), n_questions=6, max_new_tokens=12, single_stride=6, frontier=(0.5,)
    ),
    "quick": LayerwiseConfig(
        traits=("Conscientiousness", "Neuroticism"), n_questions=12, max_new_tokens=20, single_stride=2,
        frontier=(0.5,),
    ),
    "full": LayerwiseConfig(n_questions=48, max_new_tokens=120, stride=1),
}  # fmt: skip
"""``tiny``: one trait, under a minute on one core. ``quick``: two traits (those whose edit beats the control in both
directions most clearly), every second single layer, about 5 minutes on two cores. ``full``: all traits, every layer and
sliding windows, for a real model on a GPU."""


def _within(edit: NeuronEdit, first: int, last: int) -> NeuronEdit:
    """The part of an edit in some layers.

    Cut from the whole edit, not made from the layers' neurons: a few neurons whose a95 is unknown are left alone in the
    whole, but may be too large a share of one layer for an edit of its own.
    """
    here = (edit.layer >= first) & (edit.layer <= last)
    return replace(
        edit, layer=edit.layer[here], neuron=edit.neuron[here], amount=edit.amount[here], clamp=edit.clamp[here]
    )


def _conditions(lab: Lab, config: LayerwiseConfig, trait: Trait) -> list[Condition]:
    neurons, n_layers, gamma = lab.of(trait), lab.model.fingerprint.n_layers, config.gamma
    n = config.n_questions
    draws, seeds = random_draws(neurons, trait, config.seed, config.random_draws)
    nothing = {"kind": "none", "first_layer": -1, "last_layer": -1, "gamma": 0.0, "n_raised": 0, "n_clamped": 0}
    made = [Condition("none", facts=nothing)]
    for pole in POLES:
        edit = neurons.edit(gamma, pole)
        groups = [("layer", k, k) for k in range(n_layers) if config.single_stride and k % config.single_stride == 0]
        groups += [("window", *w) for w in config.windows(n_layers)]
        for kind, first, last in groups:
            name = f"layer {first}" if first == last else f"layers {first}-{last}"
            made.append(
                edit_condition(
                    name, pole, [_within(edit, first, last)], n, kind=kind, first_layer=first, last_layer=last,
                    gamma=gamma,
                )
            )  # fmt: skip
        whole: dict[str, Any] = {"first_layer": 0, "last_layer": n_layers - 1}
        for fraction in config.frontier:
            less = neurons.edit(fraction * gamma, pole)
            made.append(
                edit_condition(f"all × {fraction:g}", pole, [less], n, kind="frontier", gamma=fraction * gamma, **whole)
            )
        made.append(edit_condition("all", pole, [edit], n, kind="all", gamma=gamma, **whole))
        controls = [d.edit(gamma, pole) for d in draws]
        made.append(
            edit_condition("random", pole, controls, n, kind="random", gamma=gamma, random_seeds=seeds, **whole)
        )
    return made


def layerwise(
    lab: Lab, config: LayerwiseConfig | str = "quick", folder: str | Path | None = None, *, progress: bool = True
) -> LayerwiseResult:
    """Induce each pole by single layers, windows of layers and all layers, and compare.

    Args:
        lab: model, neurons and judge.
        config: the settings, or the name of a preset (`LAYERWISE_PRESETS`).
        folder: the run folder; by default ``layerwise`` in the lab's run. A run that was stopped continues there.
        progress: show a bar.

    Raises:
        ValueError: unknown preset; a window as large as the model; no neurons of a trait.
        RunFolderError: the folder belongs to other settings, or another process works in it.
    """
    chosen = preset(config, LAYERWISE_PRESETS)
    chosen.windows(lab.model.fingerprint.n_layers)
    with lab.session(LayerwiseResult.name, chosen, folder, progress=progress) as session:
        own = {trait: _conditions(lab, chosen, trait) for trait in chosen.trait_list}
        run_edits(session, own, chosen.n_questions)
        for trait in own:
            session.run.table(f"neurons/{trait}.parquet", lambda t=trait: _per_layer(lab, t))
        result = LayerwiseResult.from_folder(session.run.path, chosen)
        session.finish(result)
    return result


def _per_layer(lab: Lab, trait: Trait) -> pd.DataFrame:
    n_layers = lab.model.fingerprint.n_layers
    counts = {pole: lab.of(trait).pole(pole).per_layer(n_layers) for pole in POLES}
    return pd.DataFrame(
        {
            "trait": trait.value,
            "layer": np.arange(n_layers),
            "n_high": counts[Pole.HIGH],
            "n_low": counts[Pole.LOW],
        }
    )


def _interpolate(x: Floats, xs: Floats, ys: Floats) -> Floats:
    """Row by row, the piecewise-linear curve through ``(xs, ys)`` at ``x``; constant beyond its ends.

    ``xs`` is made non-decreasing first: where a smaller γ already costs as much, the larger one counts.
    """
    xs = np.maximum.accumulate(xs, axis=1)
    x = np.maximum(x, xs[:, 0])
    rows, top = np.arange(len(x)), xs.shape[1] - 1
    at = np.clip((xs <= x[:, None]).sum(axis=1) - 1, 0, top)
    after = np.minimum(at + 1, top)
    x0, x1, y0, y1 = xs[rows, at], xs[rows, after], ys[rows, at], ys[rows, after]
    wide = x1 > x0
    t = np.where(wide, np.clip((x - x0) / np.where(wide, x1 - x0, 1.0), 0.0, 1.0), 0.0)
    return y0 + t * (y1 - y0)


@cache
def _weights(n: int, seed: int) -> Floats:
    """Weights of *n* questions: row 0 is the sample itself, the others are bootstrap resamples."""
    index = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    again = [np.bincount(row, minlength=n) for row in index]
    return np.vstack([np.ones(n), *again]) / n


def _trade_off(found: Mapping[str, pd.DataFrame], name: str, curve: Sequence[str], seed: int) -> dict[str, float]:
    """Of a condition: gain per nat of NLL, and gain beyond the curve of all layers at the same NLL.

    One bootstrap over questions for both, so that a resample moves the condition and the curve together. Questions with
    an unscored answer of either are left out.
    """
    columns = [name, *curve]
    gain, cost = (
        np.stack([(found[m][c] - found[m]["none"]).to_numpy() for c in columns], axis=1) for m in ("induced", "nll")
    )
    whole = np.isfinite(gain).all(axis=1) & np.isfinite(cost).all(axis=1)
    keys = [f"{of}{end}" for of in ("beyond", "per_nat") for end in ("", "_low", "_high")]
    row: dict[str, float] = dict.fromkeys([*keys, "beyond_p"], math.nan)
    if (n := int(whole.sum())) < 2:
        return row
    weights = _weights(n, seed)
    gain, cost = weights @ gain[whole], weights @ cost[whole]
    beyond = gain[:, 0] - _interpolate(cost[:, 0], cost[:, 1:], gain[:, 1:])
    low, high = np.quantile(beyond[1:], [0.025, 0.975])
    tail = min((beyond[1:] <= 0).sum(), (beyond[1:] >= 0).sum())
    row |= {"beyond": float(beyond[0]), "beyond_low": float(low), "beyond_high": float(high)}
    row["beyond_p"] = min(1.0, 2 * float(tail + 1) / (RESAMPLES + 1))
    if np.quantile(cost[1:, 0], 0.025) > 0:  # else it costs nothing measurable, and the ratio means nothing
        ratio = gain[:, 0] / np.where(cost[:, 0] > 0, cost[:, 0], math.nan)
        low, high = np.nanquantile(ratio[1:], [0.025, 0.975])
        row |= {"per_nat": float(ratio[0]), "per_nat_low": float(low), "per_nat_high": float(high)}
    return row


def _table(plan: pd.DataFrame, scores: pd.DataFrame, trait: str, config: LayerwiseConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pole in (*(p.value for p in POLES), BOTH):
        found = measures(scores, pole)
        curve = ["none", *(f"all × {f:g}" for f in config.frontier), "all"]
        own: Any = plan[(plan["pole"] == (POLES[0].value if pole == BOTH else pole)) | (plan["condition"] == "none")]
        for about in own.to_dict("records"):
            name = about["condition"]
            neurons = _of_condition(plan, name, pole)
            gain, cost = (found[m][name] - found[m]["none"] for m in ("induced", "nll"))
            short, fluency = (found[m][name] - found[m]["all"] for m in ("induced", "nll"))
            margin = config.margin * (2 if pole == BOTH else 1)
            rows.append(
                {
                    "trait": trait, "pole": pole, "condition": name,
                    **{key: about[key] for key in ("kind", "first_layer", "last_layer", "gamma")}, **neurons,
                    **level_columns(found, name, seed=config.seed),
                    **paired_columns("gain", gain, seed=config.seed),
                    **paired_columns("nll_cost", cost, seed=config.seed),
                    **paired_columns("difference", short, seed=config.seed),
                    **paired_columns("nll_difference", fluency, seed=config.seed),
                    "as_good_p": sign_flip_test(short + margin, alternative="greater", seed=config.seed),
                    **_trade_off(found, name, curve, config.seed), "judge_auc": float(scores["auc"].iloc[0]),
                }
            )  # fmt: skip
    return rows


def _of_condition(plan: pd.DataFrame, name: str, pole: str) -> dict[str, Any]:
    own: Any = plan[(plan["condition"] == name) & ((plan["pole"] == pole) | (pole == BOTH) | plan["pole"].isna())]
    # With both poles, each neuron is raised in one answer and clamped in the other: counted once.
    raised = int(own["n_raised"].sum())
    clamped = int(own["n_clamped"].sum()) if pole != BOTH else 0
    return {"n_neurons": raised + clamped, "n_raised": raised, "n_clamped": clamped, "edited": raised + clamped > 0}


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """q-values by Benjamini and Hochberg over all traits and both poles of one kind of condition.

    The score out of 10 rests on the same answers and is a family of its own.
    """
    out: Any = table.copy()
    family = [out["kind"], out["pole"] == BOTH]
    own = out["kind"].isin(["layer", "window", "random"])
    for name in ("gain", "difference", "nll_difference", "as_good", "beyond"):
        p: Any = out[f"{name}_p"].where(out["condition"] != "none" if name == "gain" else own)
        out[f"{name}_q"] = p.groupby(family).transform(lambda x: benjamini_hochberg(x.to_numpy()))
    for name, of in (("verdict", "difference"), ("verdict_at_equal_nll", "beyond")):
        out[name] = pd.Series(verdicts(out[of], out[f"{of}_q"]), index=out.index).where(own, "")
    out["as_good"] = own & (out["as_good_q"] < ALPHA)
    return out


@dataclass(frozen=True)
class LayerwiseResult(ExperimentResult):
    """What `layerwise` found. ``tables`` holds:

    - ``conditions``: a row a trait × pole (``high``, ``low``, ``both``) × condition. ``induced`` is the induced rating
      (of ``both``: the score out of 10), with ``nll`` and ``repetition``; ``gain`` and ``nll_cost`` are paired changes
      from the unedited model, ``difference`` and ``nll_difference`` from all layers at the same γ; ``beyond`` is the
      gain beyond what all layers reach at a γ that costs the same NLL; ``per_nat`` is gain per nat of NLL (NaN where
      the cost is not distinguishable from 0). p-values are by sign flips, of ``beyond`` by the bootstrap; q-values by
      Benjamini and Hochberg. ``verdict`` and ``verdict_at_equal_nll`` say better, worse or not
      distinguishable at q < 0.05; ``as_good`` whether the loss is shown to be smaller than the margin.
    - ``layers``: neurons of each pole in each layer.
    """  # noqa: D415

    name: ClassVar[str] = "layerwise"
    config_type: ClassVar[type[ExperimentConfig]] = LayerwiseConfig

    @classmethod
    def from_folder(cls, folder: Path, config: LayerwiseConfig) -> Self:
        """Make the tables from the folder's answers and scores."""
        rows: list[dict[str, Any]] = []
        for trait in config.traits:
            plan, scores = read_test(folder, trait)
            rows += _table(plan, scores, trait, config)
        layers = pd.concat([read_table(folder / f"neurons/{t}.parquet") for t in config.traits], ignore_index=True)
        return cls(folder, config, {"conditions": _corrected(pd.DataFrame(rows)), "layers": layers})

    def answer(self, trait: Trait | str) -> str:
        """In one sentence: whether a window is as good as all layers for ``trait``, by the score out of 10."""
        own: Any = self.tables["conditions"]
        own = own[(own["trait"] == as_trait(trait).value) & (own["pole"] == BOTH)]
        whole = own[own["condition"] == "all"].iloc[0]
        windows = own[own["kind"] == "window"]
        named = {w: list(windows[windows["verdict"] == w]["condition"]) for w in ("better", "not distinguishable")}
        if named["better"]:
            return f"yes: {', '.join(named['better'])} better than all layers"
        if not whole["gain_low"] > 0:
            return (
                f"all layers do not move the score measurably ({span(whole, 'gain')} against unedited), so that no "
                "window could fall short of them: nothing can be said"
            )
        shown = list(windows[windows["as_good"]]["condition"])
        if shown:
            return f"yes, within the margin of {2 * self.config.margin:g} points out of 10: {', '.join(shown)}"
        if named["not distinguishable"]:
            return (
                f"not shown: {', '.join(named['not distinguishable'])} cannot be told from all layers with "
                f"{int(whole['n'])} questions, nor be shown to be as good within {2 * self.config.margin:g} points"
            )
        return "no window is as good as all layers"

    def _best(self, own: Any, trait: str) -> list[str]:
        c = self.config
        windows = own[own["kind"] == "window"]
        count = windows["verdict"].value_counts()
        equal = windows["verdict_at_equal_nll"].value_counts()
        best = windows.loc[windows["induced"].idxmax()]
        told = ", ".join(f"{count.get(w, 0)} {w}" for w in ("better", "not distinguishable", "worse"))
        told_equal = ", ".join(f"{equal.get(w, 0)} {w}" for w in ("better", "not distinguishable", "worse"))
        whole, random = (own[own["condition"] == name].iloc[0] for name in ("all", "random"))
        lines = [
            f"- **{trait}** (judge's AUC {whole['judge_auc']:.2f}, {int(whole['n'])} questions). All layers: score "
            f"{whole['induced']:.2f} [{whole['induced_low']:.2f}, {whole['induced_high']:.2f}] out of 10, "
            f"{span(whole, 'gain')} against unedited, for {span(whole, 'nll_cost')} nats a token; random neurons: "
            f"{span(random, 'gain')} for {span(random, 'nll_cost')} nats.",
            f"  Windows of {c.window} against all layers at the same γ: {told}. Best one (picked on the same "
            f"questions): {best['condition']}, difference {span(best, 'difference')} (q = {best['difference_q']:.3f}), "
            f"NLL {span(best, 'nll_difference')} nats a token (q = {best['nll_difference_q']:.3f}).",
            f"  Against all layers at a γ of the same NLL: {told_equal}; that best window: {span(best, 'beyond')} "
            f"(q = {best['beyond_q']:.3f}).",
        ]
        singles = own[own["kind"] == "layer"]
        if len(singles):
            top = singles.loc[singles["gain"].idxmax()]
            lines.append(
                f"  Single layers that move the score on their own (q < 0.05, upwards): "
                f"{int(((singles['gain_q'] < ALPHA) & (singles['gain'] > 0)).sum())} of {len(singles)}; the strongest "
                f"is {top['condition']} with {span(top, 'gain')}."
            )
        return lines

    def summary(self) -> str:
        """Whether any window is as good as all layers, with intervals (Markdown)."""
        c, table = self.config, self.tables["conditions"]
        lines = [
            f"# Layer-wise induction: windows of {c.window} consecutive layers against all layers",
            "",
            f"{c.n_questions} test questions a trait × {c.max_new_tokens} tokens, γ = {c.gamma:g}. Scores out of 10 sum "
            "the induced ratings of both poles (unedited: 6 by construction). 95 % intervals by bootstrap over questions; "
            "differences are paired on questions, their q-values Benjamini–Hochberg's over all traits.",
            "",
            "**Is any window as good as all layers?**",
            "",
            *(f"- {trait}: {self.answer(trait)}." for trait in c.traits),
            "",
            "“At the same γ” favours all layers in score and windows in fluency; “at the same NLL” compares with all "
            f"layers at smaller γ (interpolated between γ × {', '.join(f'{f:g}' for f in (0.0, *c.frontier, 1.0))}).",
            "",
        ]
        for trait in c.traits:
            own: Any = table[(table["trait"] == trait) & (table["pole"] == BOTH)]
            lines += self._best(own, trait)
        empty: Any = table[(table["pole"] == BOTH) & ~table["edited"] & (table["kind"] != "none")]
        if len(empty):
            told = "; ".join(f"{row['trait']} {row['condition']}" for row in empty.to_dict("records"))
            lines += ["", f"Without neurons, so that editing them changes nothing: {told}."]
        return "\n".join(lines) + "\n"

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """The score out of 10, and the induced rating of each pole."""
        table = self.tables["conditions"]
        drawn = {"layerwise": plot_layerwise(table)}
        return drawn | {f"layerwise_{pole}": plot_layerwise(table, pole=pole.value) for pole in POLES}
