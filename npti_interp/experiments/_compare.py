"""Every method in one harness: the same search data, questions, decoding and judges, and an iso-fluency comparison.

Each method is prepared on the run's search data, then answers *validation* questions (search questions, never test
ones) over its whole range of settings. For each trait and pole the setting of the largest effect is chosen among those
that keep the fluency floor, the same for all methods; the chosen settings answer the test questions. A method that
keeps the floor at no setting enters with its most fluent one, and is marked.

The main table has the published form: mean and variance of the pole pair's score, 2 … 10 (METHOD.md section 3). The
trade-off curves show the whole range on the validation questions; a method's area is the mean gain that it can reach
over fluency budgets from 0 to `BUDGET` nats a token, where answering unchanged is always possible.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from npti_interp._files import read_json, write_json
from npti_interp.evaluation import EmbeddingFit, EmbeddingJudge, Judge, bootstrap_mean, cliffs_delta, holm
from npti_interp.experiments._cost import measure_cost
from npti_interp.experiments._lab import (
    Condition,
    ExperimentConfig,
    ExperimentResult,
    Lab,
    Session,
    interval_columns,
    judge_conditions,
)
from npti_interp.experiments._paired import ALPHA, BOTH, RESAMPLES, measures, paired_columns, preset
from npti_interp.experiments._search_data import search_data
from npti_interp.figures._compare import plot_cost, plot_main_scores, plot_trade_off
from npti_interp.methods import LAPE, METHODS, Method, PASItems, Prepared, SearchData, Setting
from npti_interp.paper import MODELS, automatic_scores
from npti_interp.runs import read_table
from npti_interp.traits import POLES, TRAITS, Pole, Trait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COMPARE_PRESETS", "CompareConfig", "CompareResult", "choose_setting", "compare", "compare_models"]

BUDGET = 2.0
"""Largest loss of fluency, in nats a token, in the area under a trade-off curve."""
_PLAIN = "none"
_ORDINARY = tuple(name for name in METHODS if name != PASItems.name)


@dataclass(frozen=True)
class CompareConfig(ExperimentConfig):
    """Settings of `compare`.

    Attributes:
        methods: names of methods in `npti_interp.methods.METHODS`; by default all that learn from the run alone, which
            leaves out ``pas_items`` (it needs a questionnaire).
        n_validation: validation questions a trait, out of the search questions.
        max_nll_increase: fluency floor: most nats a token that a setting may cost on the validation questions.
        max_repetition_increase: fluency floor: largest increase of the share of repeated 4-grams.
        n_texts: neutral texts on which what changes the model is compared with the unedited one; 0 leaves that out.
        n_cost: questions on which costs are measured; 0 leaves that out.
    """

    methods: tuple[str, ...] = _ORDINARY
    n_validation: int = 12
    max_nll_increase: float = 0.5
    max_repetition_increase: float = 0.1
    n_texts: int = 8
    n_cost: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods must be at least one, and differ; got {self.methods}")
        if self.n_validation < 2:
            raise ValueError(f"n_validation must be at least 2, got {self.n_validation}")
        for name in ("max_nll_increase", "max_repetition_increase"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.n_texts < 0 or self.n_cost < 0:
            raise ValueError(f"n_texts and n_cost must be at least 0, got {self.n_texts} and {self.n_cost}")


COMPARE_PRESETS: dict[str, CompareConfig] = {
    "tiny": CompareConfig(
        traits=("Neuroticism",), methods=("npti", "random", "simple", "caa"), n_questions=4, n_validation=4,
        max_new_tokens=8, n_texts=2, n_cost=2,
    ),
    "quick": CompareConfig(traits=("Neuroticism",), n_questions=24, n_validation=12),
    "full": CompareConfig(n_questions=90, n_validation=36, max_new_tokens=400, n_texts=200, n_cost=32),
}  # fmt: skip
"""``tiny``: one trait, four methods. ``quick``: one trait and every method on two cores. ``full``: for a real model on a
GPU."""


# -- choosing --------------------------------------------------------------------------------------------------------


def choose_setting(table: pd.DataFrame, *, max_nll_increase: float, max_repetition_increase: float) -> tuple[str, bool]:
    """The setting of the largest effect among those that keep the fluency floor.

    Args:
        table: one method, trait and pole, a row a setting: ``setting``, ``gain``, ``nll_cost``, ``repetition_cost``.
        max_nll_increase: floor, in nats a token.
        max_repetition_increase: floor, in share of repeated 4-grams.

    Returns:
        the setting and whether it keeps the floor; if none does, the one that costs the fewest nats (NaN costs most).

    Raises:
        ValueError: no settings, or none with a finite effect.
    """
    rows: Any = table[np.isfinite(table["gain"])]
    if not len(rows):
        raise ValueError("no setting has a scored answer")
    fluent: Any = rows[(rows["nll_cost"] <= max_nll_increase) & (rows["repetition_cost"] <= max_repetition_increase)]
    if len(fluent):
        return str(fluent.loc[fluent["gain"].idxmax(), "setting"]), True
    return str(rows.loc[rows["nll_cost"].fillna(math.inf).idxmin(), "setting"]), False


def area_under_front(cost: Any, gain: Any, budget: float = BUDGET) -> float:
    """Mean over budgets in [0, ``budget``] of the largest gain that is to be had for it; 0 where nothing is gained.

    Args:
        cost: nats a token of each setting; below 0 counts as 0.
        gain: its gain.
        budget: the largest budget.
    """
    points = sorted(
        (max(0.0, float(c)), float(g)) for c, g in zip(cost, gain, strict=True) if math.isfinite(c) and math.isfinite(g)
    )
    area, best, at = 0.0, 0.0, 0.0
    for c, g in points:
        if c >= budget:
            break
        area += best * (c - at)
        best, at = max(best, g), c
    return (area + best * (budget - at)) / budget


# -- running ---------------------------------------------------------------------------------------------------------


def _key(setting: Setting) -> str:
    return json.dumps(dict(setting), sort_keys=True)


def _prepared(session: Session, method: Method, data: SearchData) -> Prepared:
    """Prepared once, then read from its files."""
    name = f"prepared/{data.trait}/{method.name}"
    folder, about = session.run.path / name, f"{name}/about.json"
    if not session.run.done(about):
        folder.mkdir(parents=True, exist_ok=True)
        files = method.prepare(data).save(folder)
        write_json(folder / "about.json", {"method": method.name, "settings": method.settings()})
        session.run.record(*(str(p.relative_to(session.run.path)) for p in files), about)
    return method.load(folder, data)


def condition_of(
    method: Method, prepared: Prepared, questions: Sequence[Any], pole: Pole, setting: Setting, name: str
) -> Condition:
    """One method at one setting as a condition."""
    return Condition(
        name,
        pole,
        prepared.interventions(pole, setting),
        prepared.prompts(questions, pole),
        prepared.model(pole, setting),
        facts={"method": method.name, "setting": _key(setting)},
    )


def _plain() -> Condition:
    return Condition(_PLAIN, facts={"method": _PLAIN, "setting": "{}"})


def _trait_steps(
    session: Session, config: CompareConfig, trait: Trait, methods: Mapping[str, Method], judges: Sequence[Judge]
) -> None:
    lab, run = session.lab, session.run
    data = replace(search_data(lab, trait), seed=config.seed)
    validation = list(data.questions[-config.n_validation :])
    if len(validation) < config.n_validation:
        raise ValueError(
            f"{config.n_validation} validation questions asked for, the run searched {len(data.questions)}"
        )
    cache: dict[str, Prepared] = {}

    def prepared(name: str) -> Prepared:
        if name not in cache:
            session.bar.set_postfix_str(f"{trait}: preparing {name}")
            cache[name] = _prepared(session, methods[name], data)
        return cache[name]

    def whole_range() -> list[Condition]:
        return [_plain()] + [
            condition_of(method, prepared(name), validation, pole, setting, f"{name} {_key(setting)}")
            for name, method in methods.items()
            for pole in POLES
            for setting in method.grid(lab.model)
        ]

    facts = ("method", "setting")
    scores = session.test(f"validation-{trait}", trait, validation, whole_range, facts=facts)
    choices = run.table(f"choices/{trait}.parquet", lambda: _choices(_range_rows(scores, config.seed), trait, config))
    questions = session.questions(trait)

    def chosen() -> list[Condition]:
        return [_plain()] + [
            condition_of(
                methods[row["method"]], prepared(row["method"]), questions, Pole(row["pole"]),
                json.loads(row["setting"]), row["method"],
            )
            for row in choices.to_dict("records")
        ]  # fmt: skip

    session.test(f"test-{trait}", trait, questions, chosen, facts=facts)
    answers = read_table(run.path / f"answers/test-{trait}.parquet")
    for judge in judges:
        run.table(
            f"scores/test-{trait}-{judge.name}.parquet",
            lambda judge=judge: judge_conditions(judge, questions, answers, [trait], facts=facts),
        )
    if config.n_texts:
        run.table(f"retention/{trait}.parquet", lambda: _retention(lab, methods, prepared, trait, config.n_texts))
    if config.n_cost and trait == config.trait_list[0]:
        small = replace(
            data, questions=data.questions[: config.n_cost],
            prompts={p: data.prompts[p][: config.n_cost] for p in POLES},
            answers={p: data.answers[p][: config.n_cost] for p in POLES},
        )  # fmt: skip
        settings = {row["method"]: json.loads(row["setting"]) for row in choices.to_dict("records")}
        run.table("cost.parquet", lambda: measure_cost(small, methods, prepared, settings, config.max_new_tokens))


def _retention(
    lab: Lab, methods: Mapping[str, Method], prepared: Callable[[str], Prepared], trait: Trait, n_texts: int
) -> pd.DataFrame:
    """What each setting costs on neutral text, where it changes the model; a prompt is not part of such text."""
    from npti_interp.evaluation.retention import neutral_texts, retention_many

    rows, conditions = list[dict[str, Any]](), list[tuple[str, Any]]()
    for name, method in methods.items():
        for pole in POLES:
            for setting in method.grid(lab.model):
                own = prepared(name)
                change = own.intervention(pole, setting) or own.model(pole, setting)
                if change is None:
                    continue
                about = {"trait": trait.value, "method": name, "pole": pole.value, "setting": _key(setting)}
                conditions.append((str(len(conditions)), change))
                rows.append(about)
    if not rows:
        return pd.DataFrame(columns=["trait", "method", "pole", "setting", "kl"])
    measured = retention_many(lab.model, conditions, neutral_texts()[:n_texts])
    frame = pd.DataFrame(rows)
    own: Any = measured.set_index("condition").loc[[name for name, _ in conditions]].reset_index(drop=True)
    return pd.concat([frame, own], axis=1)


def compare(
    lab: Lab,
    config: CompareConfig | str = "quick",
    folder: str | Path | None = None,
    *,
    methods: Sequence[Method] | None = None,
    judges: Sequence[Judge] | None = None,
    progress: bool = True,
) -> CompareResult:
    """Put methods through the same questions, decoding and judges, each at its best setting above one fluency floor.

    Args:
        lab: model, neurons and judge, made from a finished run (`Lab.from_run`), whose search answers the methods
            learn from.
        config: the settings, or the name of a preset (`COMPARE_PRESETS`).
        folder: the run folder; by default ``compare`` in the lab's run. A run that was stopped continues there.
        methods: the methods themselves, with settings of their own; by default those that the config names.
        judges: further judges of the test answers; settings are chosen by the lab's own. By default the run's
            embedding judge, where the run has fitted one. Others may be added to a finished comparison.
        progress: show a bar.

    Raises:
        ValueError: unknown preset or method; no neurons of a trait; the lab was not made from a run.
        UnsupportedMethodError: a method has no meaning on this model.
        RunFolderError: the folder belongs to other settings, or another process works in it.
    """
    chosen = preset(config, COMPARE_PRESETS)
    if methods is not None:
        chosen = replace(chosen, methods=tuple(m.name for m in methods))
        own = {m.name: m for m in methods}
    else:
        if unknown := [m for m in chosen.methods if m not in METHODS]:
            raise ValueError(f"unknown methods {', '.join(unknown)}; choose from {', '.join(METHODS)}")
        own = {name: METHODS[name] for name in chosen.methods}
        if "lape" in own and len(lab.traits) > 1:  # the multi-class method sees every trait of the run
            own["lape"] = LAPE(others={(t, p): lab.statistics(t, p) for t in lab.traits for p in POLES})
    for method in own.values():
        method.check(lab.model)
    judges = run_judges(lab, chosen.trait_list) if judges is None else judges
    if len({j.name for j in (lab.judge, *judges)}) != len(judges) + 1:
        raise ValueError("judges must have different names, and the lab's own takes part already")
    about = {
        "method_settings": {name: m.settings() for name, m in own.items()},
        "model_name": lab.model.name,
    }
    with lab.session(CompareResult.name, chosen, folder, progress=progress, more=about) as session:
        grid = sum(2 * len(m.grid(lab.model)) for m in own.values())
        session.plan(
            [(chosen.n_validation, 1 + grid, 1), (chosen.n_questions, 1 + 2 * len(own), 1)] * len(chosen.traits)
        )
        for trait in chosen.trait_list:
            _trait_steps(session, chosen, trait, own, judges)
        result = CompareResult.from_folder(session.run.path, chosen)
        for name, table in result.latex_tables().items():
            session.run.texts(
                {f"{name}.tex": table.to_latex(hrules=True), f"{name}.html": table.to_html(table_uuid="npti")}
            )
        session.finish(result)
    return result


def run_judges(lab: Lab, traits: Sequence[Trait]) -> list[Judge]:
    """The embedding judge as the lab's run has fitted it; none if the run has no fit of one of the traits."""
    files = {t: lab.run / f"scores/embedding-{t}.safetensors" for t in traits} if lab.run else {}
    if not files or not all(path.is_file() for path in files.values()):
        return []
    judge = EmbeddingJudge(lab.bench)
    for trait, path in files.items():
        judge.use_fit(trait, EmbeddingFit.load(path))
    return [judge]


# -- tables ----------------------------------------------------------------------------------------------------------


def _range_rows(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Effect and cost of every setting, a row a method × pole × setting; and of both poles together."""
    names: Any = scores[["condition", "method", "setting"]].drop_duplicates().set_index("condition")
    rows: list[dict[str, Any]] = []
    for pole in (*(p.value for p in POLES), BOTH):
        found = measures(scores, pole)
        for condition in found["induced"].columns:
            if condition == _PLAIN:
                continue
            row = {"pole": pole, "method": names.loc[condition, "method"], "setting": names.loc[condition, "setting"]}
            for column, measure in (("gain", "induced"), ("nll_cost", "nll"), ("repetition_cost", "repetition")):
                change = found[measure][condition] - found[measure][_PLAIN]
                # Of both poles the score out of 10 moves by both ratings: halved, gains are on one scale.
                halved = change / 2 if pole == BOTH and measure == "induced" else change
                row |= interval_columns(column, bootstrap_mean(halved, n_resamples=RESAMPLES, seed=seed))
            rows.append(row)
    return pd.DataFrame(rows)


def _choices(rows: pd.DataFrame, trait: Trait, config: CompareConfig) -> pd.DataFrame:
    made: list[dict[str, Any]] = []
    apart: Any = rows[rows["pole"] != BOTH]
    for (method, pole), part in apart.groupby(["method", "pole"], sort=False):
        setting, fluent = choose_setting(
            part,
            max_nll_increase=config.max_nll_increase,
            max_repetition_increase=config.max_repetition_increase,
        )
        at: Any = part[part["setting"] == setting].iloc[0]
        made.append(
            {"trait": trait.value, "method": method, "pole": pole, "setting": setting, "keeps_floor": fluent}
            | {name: float(at[name]) for name in ("gain", "nll_cost", "repetition_cost")}
        )
    return pd.DataFrame(made)


def _judge_scores(folder: Path, trait: str) -> dict[str, pd.DataFrame]:
    """Scores of the test answers by judge, the lab's own first; other judges do not measure fluency."""
    own = read_table(folder / f"scores/test-{trait}.parquet")
    found = {str(own["judge"].iloc[0]): own}
    for path in sorted((folder / "scores").glob(f"test-{trait}-*.parquet")):
        other = read_table(path)
        for column in ("nll", "repetition_4"):
            if column not in other:
                other[column] = math.nan
        found[str(other["judge"].iloc[0])] = other
    return found


def _main_rows(found: Mapping[str, pd.DataFrame], about: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for method in found["induced"].columns:
        score = bootstrap_mean(found["induced"][method], n_resamples=RESAMPLES, seed=seed)
        row = {**about, "method": method, **interval_columns("score", score), "variance": score.variance}
        row |= {"n": score.n, "unscored": score.unscored}
        for column, measure in (("nll_cost", "nll"), ("repetition_cost", "repetition")):
            change = found[measure][method] - found[measure][_PLAIN]
            row |= interval_columns(column, bootstrap_mean(change, n_resamples=RESAMPLES, seed=seed))
        rows.append(row)
    return rows


def _test_rows(found: Mapping[str, pd.DataFrame], about: dict[str, Any], seed: int) -> pd.DataFrame:
    """Every two methods, question by question."""
    induced = found["induced"]
    rows = [
        {
            **about, "a": a, "b": b, **paired_columns("difference", induced[a] - induced[b], seed=seed),
            "cliffs_delta": cliffs_delta(induced[a], induced[b], seed=seed).mean,
        }
        for a, b in itertools.combinations(induced.columns, 2)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table["difference_q"] = holm(table["difference_p"])
    return table


def _area_rows(scores: pd.DataFrame, trait: str, seed: int) -> list[dict[str, Any]]:
    """Area under each method's trade-off curve, with an interval over questions."""
    found = measures(scores, BOTH)
    names: Any = scores[["condition", "method"]].drop_duplicates().set_index("condition")["method"]
    gain = (found["induced"].sub(found["induced"][_PLAIN], axis=0) / 2).drop(columns=_PLAIN)
    cost = found["nll"].sub(found["nll"][_PLAIN], axis=0).drop(columns=_PLAIN)
    rng = np.random.default_rng(seed)
    n = len(gain)
    draws = np.concatenate([np.arange(n)[None], rng.integers(0, n, (500, n))])
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(names[gain.columns]):
        own = [c for c in gain.columns if names[c] == method]
        g, c = gain[own].to_numpy(), cost[own].to_numpy()
        areas = [area_under_front(_scored_mean(c[d]), _scored_mean(g[d])) for d in draws]
        low, high = np.quantile(areas[1:], [0.025, 0.975])
        rows.append({"trait": trait, "method": method, "area": areas[0], "area_low": low, "area_high": high})
    return rows


def _scored_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over questions, of those that were scored; NaN if none was."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


def _pareto(curve: pd.DataFrame) -> list[bool]:
    """Whether no other setting of the trait gains as much for less (both poles together)."""
    flags: list[bool] = []
    for row in curve.to_dict("records"):
        others: Any = curve[(curve["trait"] == row["trait"])]
        better = (others["gain"] >= row["gain"]) & (others["nll_cost"] <= row["nll_cost"])
        strictly = (others["gain"] > row["gain"]) | (others["nll_cost"] < row["nll_cost"])
        flags.append(not bool((better & strictly).any()))
    return flags


@dataclass(frozen=True)
class CompareResult(ExperimentResult):
    """What `compare` found. ``tables`` holds:

    - ``main``: a row a judge × trait × method (``none`` is the unedited model): the pole pair's ``score`` out of 10 with
      its interval and ``variance``, ``nll_cost`` and ``repetition_cost`` against the unedited model (mean of both
      poles), ``label``, ``keeps_floor`` (at both poles), and, where the paper has the model, ``published`` and
      ``published_variance``.
    - ``tests``: a row a judge × trait × pair of methods: paired difference of scores, Holm's ``difference_q`` within
      judge and trait, Cliff's delta.
    - ``choices``: a row a trait × method × pole: the chosen setting and its effect on the validation questions.
    - ``curve``: a row a trait × method × setting × pole (``both``: their mean): ``gain`` and costs on the validation
      questions; ``pareto`` for ``both``; ``kl`` on neutral text where it was measured.
    - ``area``: a row a trait × method: the area under its trade-off curve with an interval.
    - ``cost``: a row a method: seconds and memory to prepare and to generate, relative to the plain model.
    """  # noqa: D415

    name: ClassVar[str] = "compare"
    config_type: ClassVar[type[ExperimentConfig]] = CompareConfig

    @classmethod
    def from_folder(cls, folder: Path, config: CompareConfig) -> Self:
        """Make the tables from the folder's answers and scores."""
        main: list[dict[str, Any]] = []
        tests, curves, choices, area = list[pd.DataFrame](), list[pd.DataFrame](), list[pd.DataFrame](), list[Any]()
        for trait in config.traits:
            own = read_table(folder / f"choices/{trait}.parquet")
            choices.append(own)
            for judge, scores in _judge_scores(folder, trait).items():
                found = measures(scores, BOTH)
                about = {"judge": judge, "trait": trait}
                main += _main_rows(found, about, config.seed)
                tests.append(_test_rows(found, about, config.seed))
            validation = read_table(folder / f"scores/validation-{trait}.parquet")
            curves.append(_range_rows(validation, config.seed).assign(trait=trait))
            area += _area_rows(validation, trait, config.seed)
        every: Any = pd.concat(choices, ignore_index=True)
        whole: Any = pd.DataFrame(main)
        floor = every.groupby(["trait", "method"])["keeps_floor"].all()
        whole["keeps_floor"] = [
            bool(floor.get((t, m), True)) for t, m in zip(whole["trait"], whole["method"], strict=True)
        ]
        whole["label"] = [label_of(m) for m in whole["method"]]
        whole = _beside_published(whole, str(read_json(folder / "config.json").get("model_name", "")))
        curve: Any = pd.concat(curves, ignore_index=True)
        curve = curve[
            ["trait", "method", "pole", "setting", *curve.columns.drop(["trait", "method", "pole", "setting"])]
        ]
        if config.n_texts:
            kept: Any = pd.concat(
                [read_table(folder / f"retention/{t}.parquet") for t in config.traits], ignore_index=True
            )
            curve = _with_retention(curve, kept)
        both = curve["pole"] == BOTH
        curve["pareto"] = pd.Series(_pareto(curve[both]), index=curve.index[both]).reindex(curve.index)
        tables = {
            "main": whole, "tests": pd.concat(tests, ignore_index=True), "choices": every, "curve": curve,
            "area": pd.DataFrame(area),
        }  # fmt: skip
        if config.n_cost:
            tables["cost"] = read_table(folder / "cost.parquet")
        return cls(folder, config, tables)

    def published(self) -> pd.DataFrame:
        """The paper's table for its first model, for the traits and methods compared here."""
        paper: Any = automatic_scores(MODELS[0])
        return paper[paper["trait"].isin(self.config.traits)].reset_index(drop=True)

    def latex_tables(self) -> dict[str, Any]:
        """The main table of each judge as a `Styler`, in the published form, with the published one beside it."""
        found: dict[str, Any] = {}
        main = self.tables["main"]
        for judge, part in main.groupby("judge", sort=False):
            cells: Any = part.assign(
                cell=[
                    f"{r['score']:.2f} [{r['score_low']:.2f}, {r['score_high']:.2f}] / {r['variance']:.2f}"
                    + ("" if r["keeps_floor"] else " †")
                    for r in part.to_dict("records")
                ]
            )
            found[f"main-{judge}"] = _spread(
                cells,
                "label",
                "cell",
                f"Score out of 10 [95 % interval] / variance ({judge}); † below the fluency floor",
            )
        paper = self.published()
        paper["cell"] = [f"{m:.2f} / {v:.2f}" for m, v in zip(paper["mean"], paper["variance"], strict=True)]
        paper["label"] = [label_of(m) for m in paper["method"]]
        found["published"] = _spread(paper, "label", "cell", f"Published: {MODELS[0]}, mean / variance")
        return found

    def summary(self) -> str:
        """Which method induces what at which cost (Markdown)."""
        c = self.config
        main: Any = self.tables["main"]
        tests: Any = self.tables["tests"]
        choices: Any = self.tables["choices"]
        lines = [
            "# Methods compared at one fluency floor",
            "",
            f"{len(c.methods)} methods, settings chosen on {c.n_validation} validation questions a trait (largest effect "
            f"for at most {c.max_nll_increase:g} nats a token and {c.max_repetition_increase:g} of repeated 4-grams), "
            f"tested on {c.n_questions} test questions × {c.max_new_tokens} tokens. Scores are out of 10 for the pole pair; "
            "the unedited model scores 6 by definition. † keeps the floor at no setting of one pole.",
        ]
        if len(set(main["judge"])) == 1:
            lines += ["", "Only one judge: the run has no fit of the embedding judge, and no other was given."]
        for judge, part in main.groupby("judge", sort=False):
            lines += ["", f"## {judge}", ""]
            for trait in c.traits:
                rows: Any = part[(part["trait"] == trait) & (part["method"] != _PLAIN)].sort_values(
                    "score", ascending=False
                )
                if not len(rows):
                    continue
                best = rows.iloc[0]
                own: Any = tests[(tests["judge"] == judge) & (tests["trait"] == trait)]
                even = _undecided(own, best["method"])
                lines.append(
                    f"- **{trait}**: "
                    + ", ".join(
                        f"{r['label']} {r['score']:.2f} [{r['score_low']:.2f}, {r['score_high']:.2f}]"
                        + ("" if r["keeps_floor"] else " †")
                        for r in rows.to_dict("records")
                    )
                    + f". Not distinguishable from the first (Holm, paired): {', '.join(map(label_of, even)) or 'none'}."
                )
        lines += ["", "## Trade-off", ""]
        for trait in c.traits:
            area: Any = self.tables["area"]
            rows = area[area["trait"] == trait].sort_values("area", ascending=False)
            lines.append(
                f"- **{trait}**, mean gain in rating within {BUDGET:g} nats a token: "
                + ", ".join(
                    f"{label_of(r['method'])} {r['area']:.2f} [{r['area_low']:.2f}, {r['area_high']:.2f}]"
                    for r in rows.to_dict("records")
                )
                + "."
            )
        below = choices[~choices["keeps_floor"]]
        if len(below):
            named = ", ".join(f"{label_of(r['method'])} ({r['trait']}, {r['pole']})" for r in below.to_dict("records"))
            lines += ["", f"Below the fluency floor at every setting: {named}."]
        if "cost" in self.tables:
            lines += ["", "## Cost, relative to the plain model", ""]
            lines += [
                f"- {label_of(r['method'])}: prepare {r['prepare_seconds']:.1f} s"
                + (f" (+ {r['search_seconds']:.1f} s of search answers)" if r["search_seconds"] else "")
                + f", generate × {r['generate_ratio']:.2f}"
                for r in self.tables["cost"].to_dict("records")
            ]
        return "\n".join(lines) + "\n"

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """Main scores, trade-off curves, and costs."""
        curve: Any = self.tables["curve"]
        made = {
            "compare_main": plot_main_scores(self.tables["main"]),
            "compare_trade_off": plot_trade_off(curve[curve["pole"] == BOTH], self.config.max_nll_increase, label_of),
        }
        if "cost" in self.tables:
            made["compare_cost"] = plot_cost(
                self.tables["cost"].assign(label=[label_of(m) for m in self.tables["cost"]["method"]])
            )
        return made


def label_of(method: str) -> str:
    """A method's name in figures."""
    if method == _PLAIN:
        return "unedited"
    return METHODS[method].label if method in METHODS else method


def _undecided(tests: pd.DataFrame, best: str) -> list[str]:
    """Methods that no test tells from ``best``."""
    own: Any = tests[((tests["a"] == best) | (tests["b"] == best)) & ~(tests["difference_q"] < ALPHA)]
    return [r["b"] if r["a"] == best else r["a"] for r in own.to_dict("records")]


def _beside_published(main: pd.DataFrame, model: str) -> pd.DataFrame:
    name = next((m for m in MODELS if m.casefold() == model.rsplit("/", 1)[-1].casefold()), None)
    if name is None:
        return main
    paper: Any = automatic_scores(name).rename(columns={"mean": "published", "variance": "published_variance"})
    joined = main.merge(paper.drop(columns="model"), on=["trait", "method"], how="left")
    return joined.assign(difference_from_published=joined["score"] - joined["published"])


def _with_retention(curve: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """KL and loss beside each setting; of both poles their mean."""
    keys = ["trait", "method", "pole", "setting"]
    values = [c for c in kept.columns if c.removesuffix("_low").removesuffix("_high") in ("kl", "loss_change")]
    means: Any = kept.groupby(["trait", "method", "setting"], as_index=False, sort=False)[values].mean()
    both = means.assign(pole=BOTH)
    return curve.merge(pd.concat([kept[[*keys, *values]], both[[*keys, *values]]]), on=keys, how="left")


def _spread(table: pd.DataFrame, rows: str, cells: str, caption: str) -> Any:
    order = [t.value for t in TRAITS if t.value in set(table["trait"])]
    wide: Any = table.pivot_table(index=rows, columns="trait", values=cells, aggfunc="first", sort=False)
    wide = wide.loc[list(dict.fromkeys(table[rows])), order]
    wide.index.name = wide.columns.name = None
    return wide.style.set_caption(caption)


def compare_models(results: Mapping[str, CompareResult]) -> pd.DataFrame:
    """The paper's second table: several models side by side, each with the published numbers where there are any.

    Args:
        results: by the model's name.

    Returns:
        ``model, judge, method, trait, score, score_low, score_high, variance, published, published_variance``.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("no results were given")
    parts: list[pd.DataFrame] = []
    for model, result in results.items():
        main = _beside_published(
            result.tables["main"].drop(
                columns=["published", "published_variance", "difference_from_published"], errors="ignore"
            ),
            model,
        )
        for column in ("published", "published_variance"):
            if column not in main:
                main[column] = math.nan
        names = [
            "judge",
            "method",
            "trait",
            "score",
            "score_low",
            "score_high",
            "variance",
            "published",
            "published_variance",
        ]
        parts.append(main[names].assign(model=model))
    whole: Any = pd.concat(parts, ignore_index=True)
    return whole[["model", *whole.columns.drop("model")]]
