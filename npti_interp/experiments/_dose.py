"""Dose–response: how the trait and fluency follow γ, and which γ to use.

Every trait and pole is induced over a grid of γ. `choose_gamma` finds the usable range: the γ at which the trait moves
(the paired 95 % interval against the unedited model excludes 0, on the right side) while NLL and repetition stay below
a stated limit (by the upper end of their intervals); within it the γ of the largest effect is recommended. The choice
is made on half of the questions and its effect is reported on the other half, so that it is not picked on its own
noise.

Ratings enter as induced ratings: the rating for the high pole and 6 − rating for the low one, so that larger is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
from scipy import stats as _stats

from npti_interp.evaluation import holm
from npti_interp.experiments._lab import Condition, ExperimentConfig, ExperimentResult, Lab
from npti_interp.experiments._paired import (
    ALPHA,
    MEASURES,
    edit_condition,
    level_columns,
    measures,
    paired_columns,
    preset,
    read_test,
    run_edits,
    span,
)
from npti_interp.figures._dose import plot_dose_response
from npti_interp.traits import POLES, Trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DOSE_PRESETS", "DoseConfig", "DoseResult", "GammaChoice", "choose_gamma", "dose_response"]

MAX_NLL_INCREASE = 0.5
MAX_REPETITION_INCREASE = 0.1
_HALVES = ("all", "selection", "report")


@dataclass(frozen=True)
class GammaChoice:
    """The usable range of γ and the γ recommended in it.

    Attributes:
        recommended: the γ of the largest effect in the range; None if the range is empty.
        low: smallest γ of the range; None if it is empty.
        high: largest γ of it.
        moving: every γ at which the trait moves to the right side.
        fluent: every γ up to the first that breaks a limit of fluency.
        limit: what stopped the range at its upper end: ``"NLL"``, ``"repetition"``, ``"effect"`` (the trait no longer
            moves) or ``"grid"``; of an empty range, what left nothing.
    """

    recommended: float | None
    low: float | None
    high: float | None
    moving: tuple[float, ...]
    fluent: tuple[float, ...]
    limit: str

    @property
    def empty(self) -> bool:
        """Whether no γ is usable."""
        return self.recommended is None

    def __contains__(self, gamma: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= gamma <= self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None or self.recommended is None:
            if not self.moving:
                return "no usable γ: the trait moves to the right side at none"
            if not self.fluent:
                return f"no usable γ: even the smallest breaks the limit of {self.limit}"
            return (
                f"no usable γ: fluency holds up to {self.fluent[-1]:g} only (limit: {self.limit}), and the trait moves "
                f"from {self.moving[0]:g} on"
            )
        ended = {"grid": "the grid ends there", "effect": "the trait no longer moves beyond"}
        why = ended.get(self.limit, f"{self.limit} breaks its limit beyond")
        return f"usable γ {self.low:g} to {self.high:g} ({why}), recommended {self.recommended:g}"


def choose_gamma(
    table: pd.DataFrame,
    *,
    max_nll_increase: float = MAX_NLL_INCREASE,
    max_repetition_increase: float = MAX_REPETITION_INCREASE,
) -> GammaChoice:
    """The usable range of γ, and the γ of the largest effect in it.

    A γ moves the trait if ``gain_low`` is above 0. It is fluent if the upper ends of NLL and repetition, its own and
    those of every smaller γ, are within the limits: a dip back below a limit is not trusted. The range is the run of
    neighbouring γ of the grid with both properties that holds the largest effect (of equal ones, the smaller γ).

    Args:
        table: one trait and pole, a row a γ: ``gamma``, ``gain``, ``gain_low`` (change of induced rating from the
            unedited model, and the lower end of its interval), ``nll_cost_high`` and ``repetition_cost_high`` (upper
            ends of the changes of NLL in nats a token and of the share of repeated 4-grams). A row of γ = 0 is ignored.
        max_nll_increase: limit of the NLL's increase, in nats a token.
        max_repetition_increase: limit of the increase of the share of repeated 4-grams.

    Raises:
        ValueError: a column is missing; no γ above 0; a γ twice or below 0; a limit below 0.
    """
    needed = ("gamma", "gain", "gain_low", "nll_cost_high", "repetition_cost_high")
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"the table lacks {', '.join(missing)}")
    if not (max_nll_increase >= 0 and max_repetition_increase >= 0):
        raise ValueError(f"limits must be at least 0, got {max_nll_increase} and {max_repetition_increase}")
    rows = table[list(needed)].to_numpy(np.float64)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    if (rows[:, 0] < 0).any() or len(np.unique(rows[:, 0])) != len(rows) or not (rows[:, 0] > 0).any():
        raise ValueError(f"gamma must hold different strengths, some above 0, got {rows[:, 0].tolist()}")
    gamma, gain, gain_low, nll, repeated = rows[rows[:, 0] > 0].T
    moves = gain_low > 0
    broken = ["NLL" if not a <= max_nll_increase else "repetition" if not b <= max_repetition_increase else ""
              for a, b in zip(nll, repeated, strict=True)]  # fmt: skip
    n_fluent = next((k for k, what in enumerate(broken) if what), len(gamma))
    usable = moves & (np.arange(len(gamma)) < n_fluent)
    moving, fluent = tuple(gamma[moves].tolist()), tuple(gamma[:n_fluent].tolist())
    if not usable.any():
        limit = broken[n_fluent] if moving else "effect"
        return GammaChoice(None, None, None, moving, fluent, limit)
    best = int(np.argmax(np.where(usable, gain, -np.inf)))
    first = last = best
    while first > 0 and usable[first - 1]:
        first -= 1
    while last + 1 < len(gamma) and usable[last + 1]:
        last += 1
    limit = "grid" if last + 1 == len(gamma) else broken[last + 1] if last + 1 == n_fluent else "effect"
    return GammaChoice(float(gamma[best]), float(gamma[first]), float(gamma[last]), moving, fluent, limit)


@dataclass(frozen=True)
class DoseConfig(ExperimentConfig):
    """Settings of `dose_response`.

    Attributes:
        gammas: strengths; ``gamma`` (the one in use elsewhere) is always among them.
        max_nll_increase: limit of the NLL's increase over the unedited model, in nats a token.
        max_repetition_increase: limit of the increase of the share of repeated 4-grams.
    """

    gammas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.4, 2.0, 3.0)
    max_nll_increase: float = MAX_NLL_INCREASE
    max_repetition_increase: float = MAX_REPETITION_INCREASE

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.gammas)) != len(self.gammas) or not all(math.isfinite(g) and g > 0 for g in self.gammas):
            raise ValueError(f"gammas must be finite, above 0 and differ, got {self.gammas}")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")
        if self.n_questions < 4:
            raise ValueError(f"n_questions must be at least 4, two for each half, got {self.n_questions}")
        for name in ("max_nll_increase", "max_repetition_increase"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        object.__setattr__(self, "gammas", tuple(sorted(self.gammas)))

    @property
    def grid(self) -> list[float]:
        """All strengths, in order."""
        return sorted({*self.gammas, self.gamma})


DOSE_PRESETS: dict[str, DoseConfig] = {
    "tiny": DoseConfig(traits=("Neuroticism",), n_questions=6, max_new_tokens=12, gammas=(0.5, 1.0, 2.0)),
    "quick": DoseConfig(n_questions=20, max_new_tokens=20, gammas=(0.5, 0.75, 1.0, 1.4, 2.0, 3.0)),
    "full": DoseConfig(
        n_questions=72, max_new_tokens=120, gammas=(0.1, 0.25, 0.5, 0.75, 1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0)
    ),
}  # fmt: skip
"""``tiny``: one trait, under a minute on one core. ``quick``: all traits, about 5 minutes on two cores. ``full``: for a
real model on a GPU."""


def _name(gamma: float) -> str:
    return f"γ = {gamma:g}" if gamma else "none"


def _conditions(lab: Lab, config: DoseConfig, trait: Trait) -> list[Condition]:
    neurons = lab.of(trait)
    made = [Condition("none", facts={"gamma": 0.0, "n_raised": 0, "n_clamped": 0})]
    for pole in POLES:
        for gamma in config.grid:
            edit = neurons.edit(gamma, pole)
            made.append(edit_condition(_name(gamma), pole, [edit], config.n_questions, gamma=gamma))
    return made


def dose_response(
    lab: Lab, config: DoseConfig | str = "quick", folder: str | Path | None = None, *, progress: bool = True
) -> DoseResult:
    """Induce each pole over a grid of γ, and find the usable range.

    Args:
        lab: model, neurons and judge.
        config: the settings, or the name of a preset (`DOSE_PRESETS`).
        folder: the run folder; by default ``dose`` in the lab's run. A run that was stopped continues there.
        progress: show a bar.

    Raises:
        ValueError: unknown preset; no neurons of a trait.
        RunFolderError: the folder belongs to other settings, or another process works in it.
    """
    chosen = preset(config, DOSE_PRESETS)
    with lab.session(DoseResult.name, chosen, folder, progress=progress) as session:
        own = {trait: _conditions(lab, chosen, trait) for trait in chosen.trait_list}
        run_edits(session, own, chosen.n_questions)
        result = DoseResult.from_folder(session.run.path, chosen)
        session.finish(result)
    return result


def split_halves(n_questions: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which questions select; shifted every six, since questions are dealt facet by facet and both halves shall hold all."""
    return np.array([(i + i // 6) % 2 == 0 for i in range(n_questions)])


def page_test(induced: pd.DataFrame, gammas: list[float]) -> float:
    """p-value of Page's trend test: does the induced rating rise with γ, from the unedited model on?

    Args:
        induced: question × condition.
        gammas: the strengths, in order, without 0.

    Returns:
        the p-value; NaN with fewer than two strengths or two questions without a gap.
    """
    frame: Any = induced[["none", *map(_name, gammas)]].dropna()
    if len(gammas) < 2 or len(frame) < 2:
        return math.nan
    # Questions' ratings at tiny γ tie with the unedited one; Page's test ranks ties at their mean.
    return float(_stats.page_trend_test(frame.to_numpy()).pvalue)


def _curve(found: dict[str, pd.DataFrame], mask: Any, grid: list[float], seed: int) -> list[dict[str, Any]]:
    part: dict[str, Any] = {m: frame[mask] for m, frame in found.items()}
    rows: list[dict[str, Any]] = []
    for gamma in (0.0, *grid):
        name = _name(gamma)
        row: dict[str, Any] = {"gamma": gamma, **level_columns(part, name, seed=seed)}
        for column, measure in zip(("gain", "nll_cost", "repetition_cost"), MEASURES, strict=True):
            row |= paired_columns(column, part[measure][name] - part[measure]["none"], seed=seed)
        rows.append(row)
    return rows


_REPORTED = [
    f"{name}{end}" for name in ("gain", "nll_cost", "repetition_cost") for end in ("", "_low", "_high", "_p")
]  # fmt: skip


def _choice(curve: pd.DataFrame, found: dict[str, pd.DataFrame], config: DoseConfig) -> dict[str, Any]:
    """The choice on the selection half, and what it is worth on the other half."""
    limits = {
        "max_nll_increase": config.max_nll_increase,
        "max_repetition_increase": config.max_repetition_increase,
    }
    selection: Any = curve[curve["half"] == "selection"]
    report: Any = curve[curve["half"] == "report"].set_index("gamma")
    choice = choose_gamma(selection, **limits)
    held: dict[str, Any] = {m: frame[~split_halves(len(frame))] for m, frame in found.items()}
    row: dict[str, Any] = {
        "recommended": choice.recommended, "range_low": choice.low, "range_high": choice.high, "limit": choice.limit,
        "words": str(choice), "default_in_range": config.gamma in choice,
        **dict.fromkeys(_REPORTED, math.nan), "n_report": len(held["induced"]), "holds": False,
        "trend_range_p": math.nan, "trend_grid_p": page_test(found["induced"], config.grid),
    }  # fmt: skip
    if choice.recommended is not None and choice.high is not None:
        there = report.loc[choice.recommended]
        row |= {name: float(there[name]) for name in _REPORTED}
        row["holds"] = bool(
            there["gain_low"] > 0
            and there["nll_cost_high"] <= config.max_nll_increase
            and there["repetition_cost_high"] <= config.max_repetition_increase
        )
        row["trend_range_p"] = page_test(held["induced"], [g for g in config.grid if g <= choice.high])
    return row


@dataclass(frozen=True)
class DoseResult(ExperimentResult):
    """What `dose_response` found. ``tables`` holds:

    - ``curve``: a row a trait × pole × half of the questions (``all``, ``selection``, ``report``) × γ: induced rating,
      ``nll`` and ``repetition``, and their paired changes from the unedited model ``gain``, ``nll_cost`` and
      ``repetition_cost``, with intervals.
    - ``choices``: a row a trait × pole: the range and the γ chosen on the selection half (empty: NaN), and its effect on
      the report half. ``holds`` says whether there, too, the interval of the effect excludes 0 and the limits hold;
      ``gain_q`` is Holm's over traits and poles.
      ``trend_range_p`` is Page's test up to the top of the range on the report half, ``trend_grid_p`` over the whole
      grid on all questions; ``_q`` after Holm over traits and poles.
    """  # noqa: D415

    name: ClassVar[str] = "dose"
    config_type: ClassVar[type[ExperimentConfig]] = DoseConfig

    @classmethod
    def from_folder(cls, folder: Path, config: DoseConfig) -> Self:
        """Make the tables from the folder's answers and scores."""
        curves: list[pd.DataFrame] = []
        choices: list[dict[str, Any]] = []
        for trait in config.traits:
            _, scores = read_test(folder, trait)
            for pole in POLES:
                found = measures(scores, pole.value)
                first = split_halves(len(found["induced"]))
                parts = dict(zip(_HALVES, (np.ones(len(first), bool), first, ~first), strict=True))
                curve = pd.concat(
                    [
                        pd.DataFrame(_curve(found, mask, config.grid, config.seed)).assign(half=half)
                        for half, mask in parts.items()
                    ],
                    ignore_index=True,
                )
                about = {"trait": trait, "pole": pole.value}
                curves.append(curve.assign(**about))
                choices.append({**about, **_choice(curve, found, config), "judge_auc": float(scores["auc"].iloc[0])})
        whole: Any = pd.concat(curves, ignore_index=True)
        front = ["trait", "pole", "half", "gamma"]
        chosen: Any = pd.DataFrame(choices)
        for name in ("recommended", "range_low", "range_high"):
            chosen[name] = chosen[name].astype(float)
        for name in ("gain", "trend_range", "trend_grid"):
            chosen[f"{name}_q"] = holm(chosen[f"{name}_p"])
        return cls(folder, config, {"curve": whole[[*front, *whole.columns.drop(front)]], "choices": chosen})

    def summary(self) -> str:
        """Which γ to use for which trait and pole, and what it does (Markdown)."""
        c = self.config
        choices: Any = self.tables["choices"]
        some = choices[choices["recommended"].notna()]
        lines = [
            "# Dose–response and the usable range of γ",
            "",
            f"{c.n_questions} test questions a trait × {c.max_new_tokens} tokens, γ in {', '.join(f'{g:g}' for g in c.grid)}. "
            "Usable: the 95 % interval of the change in induced rating excludes 0 on the right side, and the upper ends "
            f"of the increases lie within {c.max_nll_increase:g} nats of NLL a token and {c.max_repetition_increase:g} of "
            "repeated 4-grams (at this γ and at all smaller ones). Chosen on half of the questions; effects are those on "
            "the other half.",
            "",
            f"**A usable γ exists for {len(some)} of {len(choices)} trait-poles; on the other half of the questions effect "
            f"and limits hold for {int(some['holds'].sum())} of them** (with Holm's q < {ALPHA:g} of the effect for "
            f"{int((some['holds'] & (some['gain_q'] < ALPHA)).sum())}). γ = {c.gamma:g} lies in the range of "
            f"{int(choices['default_in_range'].sum())}.",
            "",
            *(self._line(row) for row in choices.to_dict("records")),
            "",
            f"Over the whole grid the induced rating rises with γ (Page's test, Holm q < {ALPHA:g}, all questions) for "
            f"{int((choices['trend_grid_q'] < ALPHA).sum())} of {len(choices)} trait-poles; up to the top of the range (on "
            f"the other half) for {int((choices['trend_range_q'] < ALPHA).sum())} of "
            f"{int(choices['trend_range_q'].notna().sum())} that can be tested.",
        ]
        return "\n".join(lines) + "\n"

    def _line(self, row: dict[str, Any]) -> str:
        text = f"- {row['trait']} {row['pole']} (judge's AUC {row['judge_auc']:.2f}): {row['words']}."
        if math.isfinite(row["recommended"]):
            text += (
                f" On the other {row['n_report']} questions: {span(row, 'gain')} in rating (q = {row['gain_q']:.3f}) "
                f"for {span(row, 'nll_cost')} nats and {span(row, 'repetition_cost')} repeated 4-grams: "
                f"{'it holds' if row['holds'] else 'it does NOT hold'}."
            )
        trends = [
            f"{words} q = {row[f'{name}_q']:.3f}"
            for name, words in (("trend_range", "up to the top of the range"), ("trend_grid", "over the grid"))
            if math.isfinite(row[f"{name}_q"])
        ]
        return f"{text} Trend {', '.join(trends)}." if trends else text

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """Change of rating, NLL and repetition against γ, with the usable range."""
        limits = {"nll_cost": self.config.max_nll_increase, "repetition_cost": self.config.max_repetition_increase}
        return {"dose_response": plot_dose_response(self.tables["curve"], self.tables["choices"], limits=limits)}
