"""What the experiments share that compare edits question by question: making and running the conditions, and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from npti_interp.evaluation import bootstrap_mean, pair_scores, sign_flip_test
from npti_interp.evaluation._statistics import paired_interval
from npti_interp.experiments._lab import Condition, ExperimentConfig, Session, interval_columns
from npti_interp.interventions import NeuronEdit
from npti_interp.neurons import NeuronSet
from npti_interp.runs import read_table
from npti_interp.traits import POLES, TRAITS, Pole, Trait

__all__ = [
    "ALPHA",
    "BOTH",
    "MEASURES",
    "RESAMPLES",
    "does_nothing",
    "edit_condition",
    "level_columns",
    "measures",
    "paired_columns",
    "preset",
    "random_draws",
    "rating_changes",
    "read_test",
    "run_edits",
    "span",
    "verdicts",
]

ALPHA = 0.05
RESAMPLES = 2000
BOTH = "both"
MEASURES = ("induced", "nll", "repetition")

C = TypeVar("C", bound=ExperimentConfig)


# -- conditions ------------------------------------------------------------------------------------------------------


def preset(config: C | str, presets: Mapping[str, C]) -> C:
    """A config, or the preset of that name.

    Raises:
        ValueError: no preset of that name.
    """
    if not isinstance(config, str):
        return config
    if config not in presets:
        raise ValueError(f"unknown preset {config!r}; choose one of {', '.join(presets)}")
    return presets[config]


def edit_condition(
    name: str, pole: Pole, edits: Sequence[NeuronEdit], n_questions: int, **facts: Any
) -> Condition:  # fmt: skip
    """A condition under an edit, with what was edited among its facts; several edits are dealt over the questions."""
    first = edits[0]
    seeds = facts.pop("random_seeds", None)
    return Condition(
        name,
        pole,
        edits,
        facts={
            **facts,
            "n_raised": int((~first.clamp).sum()),
            "n_clamped": int(first.clamp.sum()),
            "random_seed": [seeds[k % len(seeds)] for k in range(n_questions)] if seeds else None,
        },
    )


def random_draws(neurons: NeuronSet, trait: Trait, seed: int, n: int) -> tuple[list[NeuronSet], list[int]]:
    """Draws of the random-matched control and their seeds, the same ones that `reproduce` takes."""
    seeds = [seed * 1000 + 100 * TRAITS.index(trait) + d for d in range(n)]
    return [neurons.random_matched(s) for s in seeds], seeds


def does_nothing(condition: Condition) -> bool:
    """Whether a condition's edits leave the model as it is (a layer without neurons, say)."""
    if condition.name == "none" or condition.prompts is not None:
        return False
    return all(
        edit is None or (isinstance(edit, NeuronEdit) and not edit.clamp.any() and not edit.amount.any())
        for edit in condition.interventions
    )


def _tested(conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions that need answers of their own."""
    return [c for c in conditions if not does_nothing(c)]


# -- answers ---------------------------------------------------------------------------------------------------------


def run_edits(session: Session, conditions: Mapping[Trait, Sequence[Condition]], n_questions: int) -> None:
    """Answer and judge each trait's conditions; one that edits nothing is written down as such, not generated."""
    session.plan([(n_questions, len(_tested(own)), 1) for own in conditions.values()])
    for trait, own in conditions.items():
        rows = [
            {"condition": c.name, "pole": c.pole.value if c.pole else None, "reused": does_nothing(c), **_scalars(c)}
            for c in own
        ]
        session.run.table(f"plans/{trait}.parquet", lambda rows=rows: pd.DataFrame(rows))
        session.test(trait.value, trait, session.questions(trait), _tested(own))


def _scalars(condition: Condition) -> dict[str, Any]:
    return {name: value for name, value in condition.facts.items() if not isinstance(value, list | tuple)}


def read_test(folder: Path, trait: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Plan and scores that `run_edits` wrote; what edits nothing gets the unedited answers' scores."""
    plan, scores = read_table(folder / f"plans/{trait}.parquet"), read_table(folder / f"scores/{trait}.parquet")
    plain = scores[scores["condition"] == "none"]
    same: Any = plan[plan["reused"]]
    reused = [
        plain.assign(condition=row["condition"], pole=row["pole"])
        for row in same.to_dict("records")
    ]  # fmt: skip
    return plan, pd.concat([scores, *reused], ignore_index=True)


def measures(scores: pd.DataFrame, pole: str) -> dict[str, pd.DataFrame]:
    """Induced rating, NLL and repetition of one trait's answers, each a frame ``question × condition``.

    Args:
        scores: of one trait, with a condition ``none``.
        pole: ``high``, ``low`` or ``both``: the score out of 10, and the mean NLL and repetition of the two answers.
    """
    if pole == BOTH:
        one = {p: measures(scores, p.value) for p in POLES}
        high, low = one[Pole.HIGH], one[Pole.LOW]
        shared = [c for c in high["induced"] if c in low["induced"]]
        total: Any = pair_scores(high["induced"][shared], 6.0 - low["induced"][shared])
        frame = pd.DataFrame(total, index=high["induced"].index, columns=shared)
        means: dict[str, Any] = {name: (high[name][shared] + low[name][shared]) / 2 for name in MEASURES[1:]}
        return {"induced": frame, **means}
    own: Any = scores[(scores["pole"] == pole) | (scores["condition"] == "none")]
    columns = {"induced": "rating", "nll": "nll", "repetition": "repetition_4"}
    found = {
        name: pd.DataFrame(
            {
                # A question that is there twice must raise, not be averaged.
                c: part.set_index("question_id", verify_integrity=True)[column]
                for c, part in own.groupby("condition", sort=False)
            },
            index=own["question_id"].unique(),
            dtype=float,
        )
        for name, column in columns.items()
    }
    if pole == Pole.LOW:
        found["induced"] = 6.0 - found["induced"]
    return found


def rating_changes(scores: pd.DataFrame, by: Sequence[str]) -> dict[tuple[Any, ...], pd.Series]:
    """Change of the rating from the unedited answer to the same question.

    Args:
        scores: judged on one trait, with a condition ``none``; one answer a group and question.
        by: columns that make a group of edited answers; a missing value is a group of its own.

    Returns:
        by group, a series over question ids.
    """
    plain: Any = scores[scores["condition"] == "none"].set_index("question_id")["rating"]
    edited: Any = scores[scores["condition"] != "none"]
    found: dict[tuple[Any, ...], pd.Series] = {}
    for key, part in edited.groupby(list(by), sort=False, dropna=False):
        after = part.set_index("question_id")["rating"]
        found[key] = after - plain.reindex(after.index)
    return found


# -- columns and words -----------------------------------------------------------------------------------------------


def level_columns(found: Mapping[str, pd.DataFrame], condition: str, *, seed: int = 0) -> dict[str, Any]:
    """Mean induced rating, NLL and repetition of a condition with intervals, and how many questions they rest on."""
    row: dict[str, Any] = {}
    for name in MEASURES:
        interval = bootstrap_mean(found[name][condition], n_resamples=RESAMPLES, seed=seed)
        row |= interval_columns(name, interval)
        if name == "induced":
            row |= {"n": interval.n, "unscored": interval.unscored}
    return row


def paired_columns(name: str, *groups: Any, seed: int = 0) -> dict[str, float]:
    """``name``, ``name_low``, ``name_high`` and ``name_p`` of paired differences (of several groups: mean of means).

    The 95 % interval is `paired_interval`'s, p is `sign_flip_test`'s.
    """
    found = paired_interval(*groups, n_resamples=RESAMPLES, seed=seed)
    return {**interval_columns(name, found), f"{name}_p": sign_flip_test(*groups, seed=seed)}


def verdicts(change: Any, q: Any) -> list[str]:
    """``better``, ``worse`` or ``not distinguishable`` at 5 % after correction; ``unscored`` where q is unknown."""
    words: list[str] = []
    for d, value in zip(change, q, strict=True):
        if not math.isfinite(value):
            words.append("unscored")
        elif value >= ALPHA:
            words.append("not distinguishable")
        else:
            words.append("better" if d > 0 else "worse")
    return words


def span(row: Any, name: str, digits: int = 2, *, sign: str = "+") -> str:
    """``+1.23 [+0.80, +1.60]`` from a row's columns; ``sign=""`` leaves the plus signs out."""
    number = f"{sign}.{digits}f"
    return f"{row[name]:{number}} [{row[f'{name}_low']:{number}}, {row[f'{name}_high']:{number}}]"
