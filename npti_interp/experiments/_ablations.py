"""Ablations: which parts of the edit does it need?

One thing is changed at a time: the weight f(|δ|), γ, the threshold, raising, clamping, the published 10 % mask, where
the edit starts, and the neurons themselves (random ones). Every variant is compared with the reference edit question by
question, in induced rating (the rating for the high pole, 6 − rating for the low one) and in fluency.

Leaving out f(|δ|) at the same γ adds several times as much, so that it is no ablation of the weight but a larger edit.
The fair variant scales γ until the additions sum to what the reference adds; both are here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd

from npti_interp.evaluation import holm
from npti_interp.experiments._lab import Condition, ExperimentConfig, ExperimentResult, Lab
from npti_interp.experiments._paired import (
    ALPHA,
    BOTH,
    MEASURES,
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
from npti_interp.figures._ablations import plot_ablations
from npti_interp.interventions import npti_weight
from npti_interp.neurons import NeuronSet, select_neurons
from npti_interp.traits import POLES, Pole, Trait, as_pole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ABLATIONS_PRESETS", "AblationsConfig", "AblationsResult", "ablations", "equal_dose_gamma"]

MASK = 0.1
"""Share of the additions that the published code leaves out at random."""
ALL = "all traits"


@dataclass(frozen=True)
class AblationsConfig(ExperimentConfig):
    """Settings of `ablations`.

    Attributes:
        gammas: other strengths than ``gamma``, everything else as in the reference.
        thresholds: thresholds on |δ| at which neurons are selected anew from the run's statistics; that of a trait's
            own neurons is the reference and is not run again. Empty: none, and the lab needs no run.
        drop: share of additions left out at random in the variant with the mask.
        random_draws: draws of the random control; question *i* gets draw *i* modulo this.
    """

    gammas: tuple[float, ...] = (0.7, 1.0, 2.0)
    thresholds: tuple[float, ...] = (0.02, 0.04, 0.06, 0.10)
    drop: float = MASK
    random_draws: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, own in (("gammas", self.gammas), ("thresholds", self.thresholds)):
            if len(set(own)) != len(own) or not all(math.isfinite(v) and v > 0 for v in own):
                raise ValueError(f"{name} must be finite, above 0 and differ, got {own}")
            object.__setattr__(self, name, tuple(sorted(own)))
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")
        if self.gamma in self.gammas:
            raise ValueError(f"gammas must differ from the reference's gamma = {self.gamma:g}, got {self.gammas}")
        if any(t > 1 for t in self.thresholds):
            raise ValueError(f"thresholds must lie in (0, 1], got {self.thresholds}")
        if not 0 < self.drop < 1:
            raise ValueError(f"drop must lie in (0, 1), got {self.drop}")
        if self.random_draws < 1:
            raise ValueError(f"random_draws must be at least 1, got {self.random_draws}")


ABLATIONS_PRESETS: dict[str, AblationsConfig] = {
    "tiny": AblationsConfig(
        traits=("Neuroticism",), n_questions=6, max_new_tokens=12, gammas=(0.7,), thresholds=(0.03, 0.10)
    ),
    "quick": AblationsConfig(n_questions=12, max_new_tokens=20, gammas=(0.7, 2.0), thresholds=(0.03, 0.10)),
    "full": AblationsConfig(
        n_questions=48, max_new_tokens=120, gammas=(0.6, 0.8, 1.0, 1.2, 1.6, 2.0), thresholds=(0.03, 0.05, 0.08, 0.10, 0.15)
    ),
}  # fmt: skip
"""``tiny``: one trait, under a minute on one core. ``quick``: all traits, about 5 minutes on two cores. ``full``: for a
real model on a GPU."""


def equal_dose_gamma(neurons: NeuronSet, pole: Pole | str, gamma: float) -> float:
    """γ without f(|δ|) at which the additions sum to what γ gives with it: γ · Σ a95 f(|δ|) / Σ a95.

    Args:
        neurons: the neurons of the edit.
        pole: the pole that is induced.
        gamma: γ of the edit with f(|δ|).

    Raises:
        ValueError: the a95 of the pole's neurons sum to 0 or less.
    """
    own = neurons.pole(as_pole(pole))
    if not len(own):
        return gamma
    known = np.isfinite(own.p95)
    total = float(own.p95[known].sum())
    if total <= 0:
        raise ValueError(f"the a95 of the {pole} pole's {len(own)} neurons sum to {total:g}: there is no dose to equal")
    return gamma * float((own.p95[known] * npti_weight(own.delta[known])).sum()) / total


def _known(neurons: NeuronSet, pole: Pole) -> NeuronSet:
    """Without the neurons of ``pole`` whose a95 is unknown: of a small set they may be too large a share for an edit."""
    lost = np.isnan(neurons.p95) & (np.sign(neurons.delta) == pole.sign)
    if not lost.any():
        return neurons
    warnings.warn(
        f"threshold {neurons.rule.get('threshold')}: a95 of {int(lost.sum())} of {len(neurons.pole(pole))} neurons of the "
        f"{pole} pole is unknown (the sketch lost it): they are left alone",
        stacklevel=2,
    )
    keep = ~lost
    arrays = ("layer", "neuron", "delta", "probability", "p95", "se", "q")
    return replace(neurons, **{name: getattr(neurons, name)[keep] for name in arrays})


def _conditions(lab: Lab, config: AblationsConfig, trait: Trait) -> list[Condition]:
    neurons, gamma, n = lab.of(trait), config.gamma, config.n_questions
    threshold = neurons.rule.get("threshold")
    reselected: dict[float, NeuronSet] = {}
    if config.thresholds:
        high, low = (lab.statistics(trait, pole) for pole in POLES)
        reselected = {t: select_neurons(high, low, threshold=t) for t in config.thresholds if t != threshold}
    draws, seeds = random_draws(neurons, trait, config.seed, config.random_draws)
    nothing = {"kind": "none", "value": 0.0, "gamma": 0.0, "threshold": threshold, "n_raised": 0, "n_clamped": 0}
    made = [Condition("none", facts=nothing)]
    for pole in POLES:

        def add(name: str, kind: str, own: NeuronSet, value: float = math.nan, pole: Pole = pole, **edit: Any) -> None:
            own_gamma = edit.pop("gamma", gamma)
            made.append(
                edit_condition(
                    name, pole, [own.edit(own_gamma, pole, **edit)], n, kind=kind, value=value, gamma=own_gamma,
                    threshold=own.rule.get("threshold"),
                )
            )  # fmt: skip

        add("reference", "reference", neurons)
        add("no f(δ), same γ", "weight", neurons, weight="none")
        add(
            "no f(δ), equal dose", "weight", neurons, weight="none", gamma=equal_dose_gamma(neurons, pole, gamma)
        )  # fmt: skip
        for value in config.gammas:
            add(f"γ = {value:g}", "gamma", neurons, value, gamma=value)
        for value, own in reselected.items():
            add(f"threshold {value:g}", "threshold", _known(own, pole), value)
        add("raise only", "part", neurons, clamp_opposite=False)
        add("clamp only", "part", neurons, raise_wanted=False)
        add(f"{config.drop:.0%} mask", "mask", neurons, config.drop, drop=config.drop, seed=config.seed)
        add("from the prompt's end", "prompt end", neurons, edit_prompt_end=True)
        controls = [d.edit(gamma, pole) for d in draws]
        made.append(
            edit_condition(
                "random", pole, controls, n, kind="random", value=math.nan, gamma=gamma, threshold=threshold,
                random_seeds=seeds,
            )
        )  # fmt: skip
    return made


def ablations(
    lab: Lab, config: AblationsConfig | str = "quick", folder: str | Path | None = None, *, progress: bool = True
) -> AblationsResult:
    """Induce each pole by variants of the edit, and compare each with the reference edit.

    Args:
        lab: model, neurons and judge; with thresholds in the config, one of `Lab.from_run`.
        config: the settings, or the name of a preset (`ABLATIONS_PRESETS`).
        folder: the run folder; by default ``ablations`` in the lab's run. A run that was stopped continues there.
        progress: show a bar.

    Raises:
        ValueError: unknown preset; thresholds, but a lab without a run; no neurons of a trait.
        RunFolderError: the folder belongs to other settings, or another process works in it.
    """
    chosen = preset(config, ABLATIONS_PRESETS)
    if chosen.thresholds and lab.run is None:
        raise ValueError(
            "thresholds need the statistics behind the neurons: make the lab with Lab.from_run, or set thresholds=()"
        )
    with lab.session(AblationsResult.name, chosen, folder, progress=progress) as session:
        own = {trait: _conditions(lab, chosen, trait) for trait in chosen.trait_list}
        run_edits(session, own, chosen.n_questions)
        result = AblationsResult.from_folder(session.run.path, chosen)
        session.finish(result)
    return result


def _rows(
    plan: pd.DataFrame, scores: pd.DataFrame, trait: str, config: AblationsConfig
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Table rows of a trait, and each variant's differences to the reference over both poles, per pole on average."""
    rows: list[dict[str, Any]] = []
    kept: dict[str, dict[str, Any]] = {}
    for pole in (*(p.value for p in POLES), BOTH):
        found = measures(scores, pole)
        own: Any = plan[(plan["pole"] == pole) | (plan["condition"] == "none")]
        if pole == BOTH:
            own = plan[(plan["pole"] == POLES[0].value) | (plan["condition"] == "none")]
        for about in own.to_dict("records"):
            name = about["condition"]
            change = {m: found[m][name] - found[m]["none"] for m in MEASURES}
            short = {m: found[m][name] - found[m]["reference"] for m in MEASURES}
            if pole == BOTH:
                kept[name] = {**short, "induced": short["induced"] / 2}
            counts: Any = plan[(plan["condition"] == name) & ((plan["pole"] == pole) | (pole == BOTH))]
            n_raised, n_clamped = int(counts["n_raised"].sum()), int(counts["n_clamped"].sum())
            gammas = set(counts["gamma"]) or {about["gamma"]}  # at equal dose the poles differ
            rows.append(
                {
                    "trait": trait, "pole": pole, "condition": name, "kind": about["kind"], "value": about["value"],
                    "gamma": gammas.pop() if len(gammas) == 1 else math.nan, "threshold": about["threshold"],
                    "n_raised": n_raised, "n_clamped": n_clamped, "edited": n_raised + n_clamped > 0,
                    **level_columns(found, name, seed=config.seed),
                    **paired_columns("gain", change["induced"], seed=config.seed),
                    **paired_columns("nll_cost", change["nll"], seed=config.seed),
                    **paired_columns("difference", short["induced"], seed=config.seed),
                    **paired_columns("nll_difference", short["nll"], seed=config.seed),
                    **paired_columns("repetition_difference", short["repetition"], seed=config.seed),
                    "judge_auc": float(scores["auc"].iloc[0]),
                }
            )  # fmt: skip
    return rows, kept


_COMPARED = ("difference", "nll_difference", "repetition_difference")


def _adjusted(table: pd.DataFrame, family: list[Any]) -> pd.DataFrame:
    """Holm over all variants of a family; the reference and the unedited model are not variants."""
    out: Any = table.copy()
    variant = ~out["condition"].isin(["none", "reference"])
    for name in _COMPARED:
        p = out[f"{name}_p"].where(variant)
        out[f"{name}_q"] = p.groupby([out[f] for f in family]).transform(lambda x: holm(x.to_numpy()))
    out["verdict"] = pd.Series(verdicts(out["difference"], out["difference_q"]), index=out.index).where(variant, "")
    fluency = pd.Series(verdicts(-out["nll_difference"], out["nll_difference_q"]), index=out.index)
    out["fluency_verdict"] = fluency.where(variant, "")
    return out


@dataclass(frozen=True)
class AblationsResult(ExperimentResult):
    """What `ablations` found. ``tables`` holds:

    - ``conditions``: a row a trait × pole (``high``, ``low``, ``both``) × variant. ``induced`` is the induced rating (of
      ``both``: the score out of 10), with ``nll`` and ``repetition``; ``gain`` and ``nll_cost`` are paired changes from
      the unedited model; ``difference``, ``nll_difference`` and ``repetition_difference`` from the reference edit, with
      p-values by sign flips and Holm's adjustment over a trait's variants and poles (the score out of 10 by itself).
      ``verdict`` is of the rating, ``fluency_verdict`` of the NLL (better: lower).
    - ``pooled``: a row a variant: the differences a pole, averaged over poles and traits, resampled by question within
      traits; Holm over the variants.
    """  # noqa: D415

    name: ClassVar[str] = "ablations"
    config_type: ClassVar[type[ExperimentConfig]] = AblationsConfig

    @classmethod
    def from_folder(cls, folder: Path, config: AblationsConfig) -> Self:
        """Make the tables from the folder's answers and scores."""
        rows: list[dict[str, Any]] = []
        kept: dict[str, dict[str, dict[str, Any]]] = {}
        for trait in config.traits:
            own, kept[trait] = _rows(*read_test(folder, trait), trait, config)
            rows += own
        table: Any = pd.DataFrame(rows)
        single = _adjusted(table[table["pole"] != BOTH], ["trait"])
        both = _adjusted(table[table["pole"] == BOTH], ["trait"])
        conditions = pd.concat([single, both]).sort_index()
        pooled: list[dict[str, Any]] = []
        for name in dict.fromkeys(table["condition"]):
            has = [t for t in config.traits if name in kept[t]]
            if name in ("none", "reference"):
                continue
            row: dict[str, Any] = {"traits": ALL, "condition": name, "n_traits": len(has)}
            for column, measure in zip(_COMPARED, MEASURES, strict=True):
                row |= paired_columns(column, *(kept[t][name][measure] for t in has), seed=config.seed)
            pooled.append(row)
        return cls(folder, config, {"conditions": conditions, "pooled": _adjusted(pd.DataFrame(pooled), ["traits"])})

    def summary(self) -> str:
        """What each part of the edit contributes, with intervals (Markdown)."""
        c, table = self.config, self.tables["conditions"]
        pooled: Any = self.tables["pooled"]
        both: Any = table[table["pole"] == BOTH]
        singles: Any = table[table["pole"] != BOTH]
        lines = [
            "# Ablations of the edit",
            "",
            f"{c.n_questions} test questions a trait × {c.max_new_tokens} tokens; reference: γ = {c.gamma:g}, f(|δ|), the "
            "opposite pole clamped. Differences to it are in induced rating a pole (1–5, larger is better) and in nats a "
            "token of NLL (larger is less fluent), paired on questions, with 95 % intervals by bootstrap over questions; "
            "q is Holm's.",
            "",
            "**The reference edit, and the same at random neurons** (score out of 10; change from unedited):",
            "",
        ]
        for trait in c.traits:
            own = both[both["trait"] == trait]
            edit, random = (own[own["condition"] == name].iloc[0] for name in ("reference", "random"))
            moved = "moves the trait" if edit["gain_low"] > 0 else "does NOT move the trait measurably"
            lines.append(
                f"- {trait} (judge's AUC {edit['judge_auc']:.2f}): {span(edit, 'gain')} for {span(edit, 'nll_cost')} "
                f"nats: {moved}; random {span(random, 'gain')} for {span(random, 'nll_cost')} nats."
            )
        n = int(pooled["n_traits"].max())
        lines += ["", f"**Against the reference, mean over {n} trait{'s' * (n > 1)} and both poles:**", ""]
        for row in pooled.to_dict("records"):
            own = singles[singles["condition"] == row["condition"]]
            rating, fluency = own["verdict"].value_counts(), own["fluency_verdict"].value_counts()
            lines.append(
                f"- {row['condition']}: rating {span(row, 'difference')} ({row['verdict']}, q = "
                f"{row['difference_q']:.3f}); NLL {span(row, 'nll_difference')} ({row['fluency_verdict']} in "
                f"fluency, q = {row['nll_difference_q']:.3f}). Of {len(own)} trait-poles the rating is better in "
                f"{rating.get('better', 0)} and worse in {rating.get('worse', 0)}, fluency better in "
                f"{fluency.get('better', 0)} and worse in {fluency.get('worse', 0)}."
            )
        compared = singles[~singles["condition"].isin(["none", "reference"])].groupby("trait").size().max()
        if (least := compared * 2.0 ** (1 - c.n_questions)) >= ALPHA:
            lines += [
                "",
                f"A single trait's {c.n_questions} questions are too few for any verdict: with {compared} comparisons the "
                f"smallest q they can give is {min(1.0, least):.2f}.",
            ]
        lines += ["", f"**Is the weight f(|δ|) needed?** {self._weight()}"]
        same: Any = singles[singles["n_raised"] + singles["n_clamped"] == 0]
        if empty := [
            f"{row['trait']} {row['pole']} at {row['condition']}"
            for row in same.to_dict("records")
            if row["condition"] != "none"
        ]:
            lines += ["", f"No neuron was left to edit, so that the answers are the unedited ones: {'; '.join(empty)}."]
        return "\n".join(lines) + "\n"

    def _weight(self) -> str:
        pooled: Any = self.tables["pooled"].set_index("condition")
        same, equal = (pooled.loc[name].to_dict() for name in ("no f(δ), same γ", "no f(δ), equal dose"))
        both: Any = self.tables["conditions"]
        both = both[(both["pole"] == BOTH) & (both["condition"] == "no f(δ), same γ")]
        fewer = int((both["nll_difference"] > 0).sum())
        text = (
            f"Left out at the same γ, fluency falls in {fewer} of {len(both)} traits (by Holm's test in "
            f"{int((both['fluency_verdict'] == 'worse').sum())}); on average NLL changes by "
            f"{span(same, 'nll_difference')}. "
        )
        if equal["verdict"] == "unscored":
            return text + "The comparison at equal dose has no scores."
        if equal["verdict"] == "not distinguishable" and equal["fluency_verdict"] == "not distinguishable":
            return text + (
                "With γ scaled so that the additions sum to the same, leaving it out is not distinguishable from the "
                f"reference (rating {span(equal, 'difference')}, NLL {span(equal, 'nll_difference')}): no evidence here "
                "that the weight does more than set the dose."
            )
        return text + (
            "With γ scaled so that the additions sum to the same, leaving it out is "
            f"{equal['verdict']} in rating ({span(equal, 'difference')}) and {equal['fluency_verdict']} in fluency (NLL "
            f"{span(equal, 'nll_difference')})."
        )

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """The score out of 10 against fluency, and the induced rating of each pole."""
        table = self.tables["conditions"]
        drawn = {"ablations": plot_ablations(table)}
        return drawn | {f"ablations_{pole}": plot_ablations(table, pole=pole.value) for pole in POLES}
