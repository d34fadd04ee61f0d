"""What people's rankings say: mean ranks with intervals, tests, agreement, attention, and what is missing.

Ranks are compared within an item only. Tied answers share the mean of their places (mid-ranks, whose sum is always
m (m + 1) / 2); beside the mean ranks stand two other customs, as publications differ: *competition* (1, 1, 3: ties take
the best place) and *dense* (1, 1, 2).

The unit of all tests and intervals is the question: a question's judgements, by several people and perhaps for both
poles, are averaged first (tests) or resampled together (intervals). A second interval resamples questions and judges at
once, for conclusions about other judges, too; with few judges it is rough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from npti_interp._files import read_json, write_atomic
from npti_interp.errors import ArtifactError
from npti_interp.evaluation._statistics import bootstrap_mean, cluster_bootstrap, friedman_test, holm, pairwise_wilcoxon
from npti_interp.evaluation.humans._page import SCHEMA, SCHEMA_VERSION
from npti_interp.evaluation.humans._task import RankingTask
from npti_interp.runs import at_work_in, write_table
from npti_interp.traits import TRAITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HumanReport", "human_report", "read_judge_file"]

Floats = npt.NDArray[np.float64]
ALL = "all"
"""Names the row over all traits."""
EVERYBODY, ATTENTIVE = "everybody", "attentive"
"""Whose judgements enter: all judges, or those that did not fail the attention checks."""


# --- files ---------------------------------------------------------------------------------------------------------


def _checksum(record: Mapping[str, Any]) -> str:
    """What the page computes over its own file (FNV-1a, 32 bit): it shows slips, not forgeries."""
    lines = ["|".join(str(record[k] if record[k] is not None else "") for k in _HEAD)]
    for own in record["items"]:
        ranks = ",".join(f"{k}:{own['ranks'][k]}" for k in sorted(own["ranks"]))
        lines.append("|".join((own["item"], own["status"], str(own["ms"]), own["decided"] or "", ranks)))
    value = 0x811C9DC5
    for character in "\n".join(lines):
        value = (value ^ ord(character)) * 0x01000193 & 0xFFFFFFFF
    return f"{value:08x}"


_HEAD = ("schema", "version", "task", "judge", "started", "exported")
_LONGEST = 1000 * 86_400 * 366
"""Milliseconds: no judge looks at one item for more than a year."""


def read_judge_file(path: str | Path, task: RankingTask) -> dict[str, Any]:
    """Read and check one file that a page of ``task`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: not such a file, of another task, of a judge or with items or answers that the task does not
            have, with an item twice, or changed after it was saved.
    """
    path = Path(path)

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(f"{path}: {what}")

    record: Any = read_json(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise refuse("not a judge's file (one that a page of `npti humans export` saved)")
    if record.get("version") != SCHEMA_VERSION:
        raise refuse(f"has version {record.get('version')!r}; this npti_interp reads {SCHEMA_VERSION}")
    if record.get("task") != task.digest:
        raise refuse(f"belongs to task {str(record.get('task'))[:12]}, the key to {task.digest[:12]}")
    if not isinstance(record.get("judge"), str) or record["judge"] not in task.layouts:
        raise refuse(f"comes from {record.get('judge')!r}, who is no judge of this task")
    layout = dict(task.layouts[record["judge"]])
    if not isinstance(record.get("items"), list) or not isinstance(record.get("exported"), str):
        raise refuse("lacks its items or its date")
    seen: set[str] = set()
    for own in record["items"]:
        if not isinstance(own, dict) or not {"item", "status", "ranks", "ms", "decided"} <= own.keys():
            raise refuse("an item lacks a field")
        item = own["item"]
        if not isinstance(item, str) or item not in layout:
            raise refuse(f"item {item!r} is not one that {record['judge']} was given")
        if item in seen:
            raise refuse(f"item {item} is there twice")
        seen.add(item)
        _check_item(own, layout[item], refuse)
    if len(seen) != len(layout):
        raise refuse(f"lists {len(seen)} of the {len(layout)} items of {record['judge']}; the file was cut")
    if record.get("started", "") is not None and not isinstance(record.get("started"), str):
        raise refuse("lacks its date")
    if record.get("checksum") != _checksum(record):
        raise refuse("its content was changed after it was saved (the checksum does not fit)")
    return record


def _check_item(own: Mapping[str, Any], answers: Sequence[str], refuse: Any) -> None:
    item, ranks = own["item"], own["ranks"]
    if own["status"] not in ("ranked", "skipped", "open"):
        raise refuse(f"item {item} has status {own['status']!r}")
    usable = type(own["ms"]) is int and 0 <= own["ms"] <= _LONGEST
    if not usable or not (own["decided"] is None or isinstance(own["decided"], str)):
        raise refuse(f"item {item} has no usable times")
    if not isinstance(ranks, dict) or not set(ranks) <= set(answers):
        raise refuse(f"item {item} ranks an answer that it does not have")
    if any(type(r) is not int or not 1 <= r <= len(answers) for r in ranks.values()):
        raise refuse(f"item {item} has a rank that is not a whole number from 1 to {len(answers)}")
    if own["status"] == "ranked" and len(ranks) != len(answers):
        raise refuse(f"item {item} counts as ranked, but {len(answers) - len(ranks)} of its answers have no rank")


def _collect(task: RankingTask, paths: Sequence[str | Path]) -> tuple[dict[str, dict[str, Any]], pd.DataFrame]:
    """One record a judge, and what became of each file: the newest of a judge's files is used."""
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any] | None] = []
    for path in paths:
        row: dict[str, Any] = {"file": Path(path).name, "judge": None, "exported": None, "use": "used", "reason": ""}
        record = None
        try:
            record = read_judge_file(path, task)
            row |= {"judge": record["judge"], "exported": record["exported"]}
        except (ArtifactError, OSError) as error:
            row |= {"use": "refused", "reason": str(error)}
        rows.append(row)
        records.append(record)
    chosen: dict[str, dict[str, Any]] = {}
    for judge in task.layouts:
        own = [k for k, r in enumerate(records) if r is not None and r["judge"] == judge]
        if not own:
            continue
        newest = max(cast(Any, records[k])["exported"] for k in own)
        last = [k for k in own if cast(Any, records[k])["exported"] == newest]
        if any(records[k] != records[last[0]] for k in last):
            for k in own:
                rows[k] |= {
                    "use": "refused",
                    "reason": f"files of {judge} saved at the same time contradict each other",
                }
            continue
        for k in own:
            if k != last[0]:
                same = records[k] == records[last[0]]
                rows[k] |= {
                    "use": "duplicate" if same else "superseded",
                    "reason": f"{'the same as' if same else 'older than'} {rows[last[0]]['file']}",
                }
        chosen[judge] = cast(dict[str, Any], records[last[0]])
    return chosen, pd.DataFrame(rows)


# --- tables --------------------------------------------------------------------------------------------------------


def _judgements(task: RankingTask, records: Mapping[str, Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a judge × item that was given out; and a row a judge × item × method that was ranked (no checks)."""
    duties: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    for judge, layout in task.layouts.items():
        done = {own["item"]: own for own in records[judge]["items"]} if judge in records else {}
        for place, (item_id, order) in enumerate(layout):
            item, own = task.items[item_id], done.get(item_id)
            base = {
                "judge": judge, "item": item_id, "trait": item.trait.value, "pole": item.pole.value,
                "question_id": item.question_id,
            }  # fmt: skip
            status = own["status"] if own else "no file"
            given = [own["ranks"][a] for a in order] if own and status == "ranked" else []
            passed = None
            if item.misfit and own and given:
                passed = own["ranks"][item.misfit] == max(given) and min(given) < max(given)
            duties.append(
                {
                    **base, "check": item.misfit is not None, "passed": passed, "place": place + 1, "status": status,
                    "seconds": own["ms"] / 1000 if own else math.nan, "decided": own["decided"] if own else None,
                    "all_tied": len(set(given)) == 1 if given else None,
                }
            )  # fmt: skip
            if item.misfit or not given:
                continue
            methods = {a.id: a.condition for a in item.answers}
            customs = {c: stats.rankdata(given, c) for c in ("average", "min", "dense")}
            ranks += [
                {
                    **base, "method": methods[a], "position": k + 1, "given": given[k],
                    "rank": float(customs["average"][k]), "competition": int(customs["min"][k]),
                    "dense": int(customs["dense"][k]),
                }
                for k, a in enumerate(order)
            ]  # fmt: skip
    return pd.DataFrame(duties), pd.DataFrame(ranks, columns=_RANK_COLUMNS)


_RANK_COLUMNS = [
    "judge", "item", "trait", "pole", "question_id", "method", "position", "given", "rank", "competition", "dense",
]  # fmt: skip


def _judge_table(duties: Any, ranks: Any, pass_share: float) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for judge, own in duties.groupby("judge", sort=False):
        items, checks = own[~own["check"]], own[own["check"]]
        status = items["status"].value_counts()
        answered = checks[checks["status"] == "ranked"]
        share = float(answered["passed"].astype(float).mean()) if len(answered) else math.nan
        seconds = own.loc[own["status"] == "ranked", "seconds"]
        rows.append(
            {
                "judge": judge,
                "items": len(items),
                **{s: int(status.get(s, 0)) for s in ("ranked", "skipped", "open", "no file")},
                "checks": len(checks),
                "checks_ranked": len(answered),
                "checks_passed": int(answered["passed"].astype(bool).sum()),
                "attention": "unknown" if math.isnan(share) else "passed" if share >= pass_share else "failed",
                "all_tied": float(items.loc[items["status"] == "ranked", "all_tied"].astype(float).mean()),
                "seconds_median": float(seconds.median()),
                "seconds_low": float(seconds.quantile(0.25)),
                "seconds_high": float(seconds.quantile(0.75)),
                "minutes": float(own["seconds"].sum() / 60),
                "agreement": _agreement_with_others(ranks, str(judge)),
            }
        )
    return pd.DataFrame(rows)


def _agreement_with_others(ranks: Any, judge: str) -> float:
    """Correlation of a judge's ranks with the mean ranks of the others, over answers that others ranked, too."""
    mine = ranks["judge"] == judge
    keys = ["item", "method"]
    both = ranks[mine].merge(ranks[~mine].groupby(keys)["rank"].mean().reset_index(), on=keys)
    if both["rank_x"].nunique() < 2 or both["rank_y"].nunique() < 2:
        return math.nan
    return float(np.corrcoef(both["rank_x"], both["rank_y"])[0, 1])


def _coverage(duties: Any) -> pd.DataFrame:
    items: Any = duties[~duties["check"]]
    rows: list[dict[str, Any]] = []
    for trait, own in _by_trait(items):
        status = own["status"].value_counts()
        each = own.assign(ranked=own["status"] == "ranked").groupby("item")["ranked"].sum()
        rows.append(
            {
                "trait": trait, "items": len(each), "due": len(own),
                **{s: int(status.get(s, 0)) for s in ("ranked", "skipped", "open", "no file")},
                "items_unranked": int((each == 0).sum()), "judges_per_item": float(each.mean()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _by_trait(table: Any) -> list[tuple[str, Any]]:
    """The rows of each trait, then all of them."""
    own = [(t.value, table[table["trait"] == t.value]) for t in TRAITS if t.value in set(table["trait"])]
    return [*own, (ALL, table)] if len(own) != 1 else own


class _Cube:
    """Rankings as arrays: sums [judge, question, method] and how many judgements [judge, question] are in them."""

    def __init__(self, ranks: Any, methods: Sequence[str]) -> None:
        self.methods = list(methods)
        judge, judges = pd.factorize(ranks["judge"])
        question, questions = pd.factorize(ranks["trait"] + "/" + ranks["question_id"])
        method = pd.Index(self.methods).get_indexer(ranks["method"])
        self.sums = np.zeros((len(judges), len(questions), len(self.methods)))
        np.add.at(self.sums, (judge, question, method), ranks["rank"].to_numpy(np.float64))
        self.counts = np.zeros(self.sums.shape)
        np.add.at(self.counts, (judge, question, method), 1.0)
        self.counts = self.counts[:, :, 0]  # a judgement ranks every method

    @property
    def whole(self) -> tuple[pd.DataFrame, float]:
        """Mean rank of each method, a row a question, in a unit that makes all of them whole numbers; and that unit.

        Equal differences are then equal in the last bit; tests would take anything else for an order.
        """
        counts = self.counts.sum(axis=0)
        unit = float(np.lcm.reduce(2 * counts.astype(np.int64)))
        return pd.DataFrame(self.sums.sum(axis=0) * (unit / counts)[:, None], columns=self.methods), unit

    def intervals(self, *, judges: bool, n_resamples: int, seed: int) -> Floats:
        """95 % bootstrap interval [2, method] of the mean ranks, over questions or over questions and judges."""
        n_judges, n_questions, m = self.sums.shape
        if n_questions < 2 or (judges and n_judges < 2):
            return np.full((2, m), math.nan)
        rng = np.random.default_rng(seed)
        by_question = rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), n_resamples)
        by_judge = (
            rng.multinomial(n_judges, np.full(n_judges, 1 / n_judges), n_resamples)
            if judges
            else np.ones((n_resamples, n_judges))
        )
        totals = np.einsum("bj,jbm->bm", by_judge, np.einsum("bq,jqm->jbm", by_question, self.sums, optimize=True))
        weights = np.einsum("bj,bj->b", by_judge, by_question @ self.counts.T)
        drawn = totals[weights > 0] / weights[weights > 0, None]  # judges who share no question leave some draws empty
        return np.quantile(drawn, [0.025, 0.975], axis=0)


def _mean_ranks(ranks: Any, methods: Sequence[str], judges: str, n_resamples: int, seed: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for trait, own in _by_trait(ranks):
        cube = _Cube(own, methods)
        over = cube.intervals(judges=False, n_resamples=n_resamples, seed=seed)
        both = cube.intervals(judges=True, n_resamples=n_resamples, seed=seed)
        for k, method in enumerate(methods):
            part: Any = own[own["method"] == method]
            rows.append(
                {
                    "judges": judges, "trait": trait, "method": method, "rank": part["rank"].mean(),
                    "rank_low": over[0, k], "rank_high": over[1, k],
                    "rank_low_judges": both[0, k], "rank_high_judges": both[1, k],
                    "competition": part["competition"].mean(), "dense": part["dense"].mean(),
                    "first": (part["competition"] == 1).mean(), "questions": cube.sums.shape[1],
                    "judgements": len(part), "n_judges": part["judge"].nunique(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _friedman(ranks: Any, methods: Sequence[str], judges: str, n_resamples: int, seed: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for trait, own in _by_trait(ranks):
        table, _ = _Cube(own, methods).whole
        row = {"judges": judges, "trait": trait, "questions": len(table), "df": len(methods) - 1}
        if min(table.shape) >= 2 and len(methods) >= 3:
            found = friedman_test(table, n_resamples=n_resamples, seed=seed)
            row |= {
                "chi2": found.statistic,
                "p": found.p,
                "w": found.w.mean,
                "w_low": found.w.low,
                "w_high": found.w.high,
            }
        else:
            row |= dict.fromkeys(("chi2", "p", "w", "w_low", "w_high"), math.nan)
        rows.append(row)
    out = pd.DataFrame(rows)
    single = (out["trait"] != ALL).to_numpy()
    out["p_holm"] = math.nan
    out.loc[single, "p_holm"] = holm(out.loc[single, "p"])
    return out


def _pairs(ranks: Any, methods: Sequence[str], judges: str, seed: int) -> pd.DataFrame:
    parts: list[pd.DataFrame] = []
    for trait, own in _by_trait(ranks):
        table, unit = _Cube(own, methods).whole
        part = pairwise_wilcoxon(table, seed=seed).rename(columns={"n": "questions"}).drop(columns="unscored")
        part[["difference", "difference_low", "difference_high"]] /= unit
        wide = _wide(own)
        better = [(wide[a] < wide[b]).mean() for a, b in zip(part["a"], part["b"], strict=True)]
        tied = [(wide[a] == wide[b]).mean() for a, b in zip(part["a"], part["b"], strict=True)]
        parts.append(part.assign(judges=judges, trait=trait, a_better=better, tied=tied))
    out = pd.concat(parts, ignore_index=True)
    first = ["judges", "trait", "a", "b"]
    return cast(pd.DataFrame, out[[*first, *(c for c in out.columns if c not in first)]])


def _wide(ranks: Any) -> Any:
    """A row a judgement, a column a method."""
    index = ["trait", "question_id", "item", "judge"]
    return ranks.set_index([*index, "method"])["rank"].unstack("method")  # noqa: PD010 - each is there once


def _agreement(ranks: Any, methods: Sequence[str], judges: str, n_resamples: int, seed: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"judges": judges, "trait": trait, **_agree(own, methods, n_resamples, seed)}
            for trait, own in _by_trait(ranks)
        ]
    )


def _agree(ranks: Any, methods: Sequence[str], n_resamples: int, seed: int) -> dict[str, Any]:
    """Kendall's W, mean Spearman correlation and Krippendorff's α among judges of the same answers."""
    m = len(methods)
    grouped = _wide(ranks)[list(methods)].groupby(level=["trait", "question_id", "item"], sort=False)
    blocks = [("/".join(key[:2]), part.to_numpy(np.float64)) for key, part in grouped if len(part) > 1]
    out: dict[str, Any] = {"items": len(blocks), "n_judges": ranks["judge"].nunique()}
    names = ("spearman", "spearman_low", "spearman_high", "alpha", "alpha_low", "alpha_high")
    if not blocks:
        return out | dict.fromkeys(("w", "w_chance", *names), math.nan)
    # W with its correction for ties is |mean deviation|² over the mean of |deviation|²; over items the two are summed,
    # so that an item counts as much as its judges tell answers apart.
    n = np.array([len(b) for _, b in blocks], np.float64)
    agreed = np.array([((b.mean(axis=0) - (m + 1) / 2) ** 2).sum() for _, b in blocks])
    total = np.array([((b - (m + 1) / 2) ** 2).sum(axis=1).mean() for _, b in blocks])
    pairwise = (n * agreed - total) / (n - 1)
    domain = np.arange(2, 2 * m + 1)  # mid-ranks, doubled
    counts = np.stack([(np.rint(2 * b)[:, :, None] == domain).sum(axis=0) for _, b in blocks])  # item, method, value

    def ratio(above: Floats, below: Floats) -> float:
        return float(above.sum() / below.sum()) if below.any() else math.nan

    def alpha(items: npt.NDArray[np.int64]) -> float:
        return _alpha(counts[items].reshape(-1, len(domain)))

    settings: Any = {"clusters": [key for key, _ in blocks], "n_resamples": n_resamples, "seed": seed}
    spearman = cluster_bootstrap(ratio, pairwise, total, **settings)
    ordinal = cluster_bootstrap(alpha, np.arange(len(blocks)), **settings)
    return out | {
        "w": ratio(agreed, total),
        "w_chance": ratio(total / n, total),
        "spearman": spearman.mean, "spearman_low": spearman.low, "spearman_high": spearman.high,
        "alpha": ordinal.mean, "alpha_low": ordinal.low, "alpha_high": ordinal.high,
    }  # fmt: skip


def _alpha(counts: npt.NDArray[Any]) -> float:
    """Krippendorff's ordinal α from a table of how often each answer got each rank."""
    import krippendorff

    used = counts[:, counts.any(axis=0)]
    if used.shape[1] < 2:
        return math.nan  # everybody gave every answer the same rank: nothing to agree about
    return float(
        krippendorff.alpha(value_counts=used, value_domain=np.arange(used.shape[1]), level_of_measurement="ordinal")
    )


def _positions(ranks: Any, n_resamples: int, seed: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for position, own in ranks.groupby("position"):
        interval = bootstrap_mean(
            own.groupby(["trait", "question_id"])["rank"].mean(), n_resamples=n_resamples, seed=seed
        )
        rows.append(
            {
                "position": position, "rank": interval.mean, "rank_low": interval.low, "rank_high": interval.high,
                "judgements": len(own),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _plain(name: str) -> str:
    """How a method's name is compared with a published one: NPTI is npti, P² is p2."""
    return name.casefold().replace("²", "2").replace(" ", "").replace("_", "")


def _comparison(means: Any, published: Any) -> pd.DataFrame:
    """Own and published mean ranks side by side; a method or trait that one side lacks is empty there."""
    if missing := [c for c in ("trait", "method", "rank") if c not in published.columns]:
        raise ValueError(f"the published table has no column {', '.join(missing)}; it needs trait, method and rank")
    theirs = published[["trait", "method", "rank"]].rename(columns={"rank": "published"})
    if ALL not in set(theirs["trait"]):
        mean = theirs.groupby("method", sort=False)["published"].mean().reset_index().assign(trait=ALL)
        theirs = pd.concat([theirs, mean], ignore_index=True)
    own = means.loc[
        means["judges"] == EVERYBODY, ["trait", "method", "rank", "rank_low", "rank_high", "competition", "dense"]
    ]
    keyed = [t.assign(key=[_plain(m) for m in t["method"]]) for t in (own, theirs)]
    merged = keyed[0].merge(keyed[1], on=["trait", "key"], how="outer", suffixes=("", "_theirs"), sort=False)
    merged["method"] = merged["method"].fillna(merged["method_theirs"])
    order = {t: k for k, t in enumerate([*(t.value for t in TRAITS), ALL])}
    places = {m: k for k, m in enumerate(dict.fromkeys([*keyed[0]["key"], *keyed[1]["key"]]))}
    merged = merged.sort_values(["trait", "key"], key=lambda c: c.map(order if c.name == "trait" else places))
    return merged.drop(columns=["key", "method_theirs"]).reset_index(drop=True)


# --- report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HumanReport:
    """What the judges of a task said.

    Attributes:
        task: the task.
        tables: by name: ``mean_ranks, friedman, pairs, agreement, judges, coverage, positions, files`` and, with
            published ranks, ``comparison``. Column ``judges`` tells whose judgements entered: ``everybody``, and
            ``attentive`` where somebody failed the attention checks.
        duties: a row a judge × item that was given out, with its status and seconds.
        ranks: a row a judge × item × method that was ranked; attention checks are not among them.
        pass_share: share of the attention checks that a judge had to pass.
        seed: of the resampling.
        n_resamples: of each interval.
    """

    task: RankingTask
    tables: dict[str, pd.DataFrame]
    duties: pd.DataFrame
    ranks: pd.DataFrame
    pass_share: float
    seed: int
    n_resamples: int

    def summary(self) -> str:
        """What came out, in words (Markdown)."""
        return (
            "\n\n".join(
                part
                for part in ("# Ranking by people", self._who(), self._outcome(), self._trust(), self._beside())
                if part
            )
            + "\n"
        )

    def _who(self) -> str:
        t, counted, checks = self.tables, len(self.task.counted), len(self.task.checks)
        total: Any = t["coverage"].iloc[-1]
        judges: Any = t["judges"]
        files = t["files"]
        absent = judges.loc[judges["no file"] > 0, "judge"].tolist()
        lines = [
            f"{len(judges) - len(absent)} of {len(judges)} judges sent a usable file. Of {total['due']} judgements due on "
            f"{counted} items ({len(self.task.methods)} methods each), {total['ranked']} were made, {total['skipped']} "
            f"skipped, {total['open']} left open, and {total['no file']} are missing with their judges' files"
            f"{' (' + ', '.join(absent) + ')' if absent else ''}. {total['items_unranked']} items have no judgement. "
            "What is missing is left out, nothing is filled in."
        ]
        lines += [
            f"- {f['file']} was not used ({f['use']}): {f['reason']}."
            for f in files.to_dict("records")
            if f["use"] != "used"
        ]
        failed = judges[judges["attention"] == "failed"]
        unknown = judges[(judges["attention"] == "unknown") & (judges["no file"] == 0)]
        if checks:
            lines.append(
                f"Attention checks ({checks} a judge, {self.pass_share:.0%} to pass): "
                + (
                    "nobody failed."
                    if failed.empty
                    else "; ".join(
                        f"{r['judge']} failed ({r['checks_passed']} of {r['checks_ranked']})"
                        for r in failed.to_dict("records")
                    )
                    + ". Every result is given with (everybody) and, where anybody is left, without them (attentive)."
                )
                + (
                    f" No check was answered by {', '.join(unknown['judge'])}, who count as attentive."
                    if len(unknown)
                    else ""
                )
            )
        else:
            lines.append("The task has no attention checks.")
        seconds = self.duties.loc[self.duties["status"] == "ranked", "seconds"]
        lines.append(
            f"An item took {seconds.median():.1f} s (median; quartiles {seconds.quantile(0.25):.1f} and "
            f"{seconds.quantile(0.75):.1f} s)."
        )
        if self.task.identical:
            lines.append(f"Items in which at least two methods gave the very same answer: {self.task.identical}.")
        return "\n".join(lines)

    def _sets(self) -> list[str]:
        return list(dict.fromkeys(self.tables["mean_ranks"]["judges"]))

    def _outcome(self) -> str:
        lines = ["## Mean ranks (1 is best; 95 % intervals over questions)"]
        for who in self._sets():
            means, pairs, tests = (_of(self.tables[n], who) for n in ("mean_ranks", "pairs", "friedman"))
            for trait in dict.fromkeys(means["trait"]):
                own: Any = means[means["trait"] == trait].sort_values("rank")
                order = ", ".join(
                    f"{r['method']} {r['rank']:.2f} [{r['rank_low']:.2f}, {r['rank_high']:.2f}]"
                    for r in own.to_dict("records")
                )
                test: Any = tests[tests["trait"] == trait].iloc[0]
                apart: Any = pairs[(pairs["trait"] == trait) & (pairs["p_holm"] < 0.05)]
                found = "; ".join(
                    f"{r['a']} {'before' if r['difference'] < 0 else 'after'} {r['b']} (p = {r['p_holm']:.2g})"
                    for r in apart.to_dict("records")
                )
                omnibus = "" if math.isnan(test["p"]) else f" Friedman p = {test['p']:.2g}, W = {test['w']:.2f}."
                prefix = "" if len(self._sets()) == 1 else f"{who}, "
                lines.append(
                    f"- {prefix}{trait}: {order}.{omnibus} Apart after Holm (Wilcoxon): {found or 'no two methods'}."
                )
        return "\n".join(lines)

    def _trust(self) -> str:
        lines = ["## Agreement"]
        for row in self.tables["agreement"].to_dict("records"):
            if row["trait"] != self.tables["agreement"]["trait"].iloc[-1]:
                continue
            if not row["items"]:
                lines.append(f"- {row['judges']}: no item was ranked by two judges; agreement cannot be told.")
                continue
            lines.append(
                f"- {row['judges']}: Kendall's W among the judges of an item {row['w']:.2f} (by chance {row['w_chance']:.2f}), "
                f"mean Spearman correlation of two judges {row['spearman']:.2f} [{row['spearman_low']:.2f}, "
                f"{row['spearman_high']:.2f}], Krippendorff's α (ordinal) {row['alpha']:.2f} [{row['alpha_low']:.2f}, "
                f"{row['alpha_high']:.2f}], over {row['items']} items."
            )
        place: Any = self.tables["positions"]
        middle = (len(self.task.methods) + 1) / 2
        off = place[(place["rank_low"] > middle) | (place["rank_high"] < middle)]
        lines.append(
            "- Position on the page: "
            + (
                "no position's mean rank differs from the middle."
                if off.empty
                else ", ".join(
                    f"answers at position {r['position']} got {r['rank']:.2f}" for r in off.to_dict("records")
                )
                + f" (the middle is {middle:g}); the design balances it out between methods."
            )
        )
        return "\n".join(lines)

    def _beside(self) -> str:
        table: Any = self.tables.get("comparison")
        if table is None:
            return ""
        own: Any = table[table["trait"] == ALL]
        lines = [
            "## Beside the published ranks",
            "The paper's judges ranked other answers, of another model: the two columns are to be read side by side, not "
            "tested against each other.",
        ]
        there, here = int(table.groupby("trait")["published"].count().max()), len(self.task.methods)
        if there != here:
            lines.append(
                f"A rank among {here} methods is not a rank among {there}: the numbers cannot be compared as such."
            )
        shown = own if len(own) else table
        both: Any = shown.dropna(subset=["published", "rank"])
        lines.append(
            "; ".join(
                f"{r['method']} {r['rank']:.2f} here, {r['published']:.2f} there" for r in both.to_dict("records")
            )
            + "."
            if len(both)
            else "No method is in both tables."
        )
        theirs: Any = table.dropna(subset=["published"]).groupby("trait")["published"].agg(["sum", "size"])
        if (theirs["sum"] < theirs["size"] * (theirs["size"] + 1) / 2 - 0.05).all():
            lines.append(
                f"The published ranks of a trait sum to {theirs['sum'].min():.2f} to {theirs['sum'].max():.2f}, where "
                f"mid-ranks sum to {theirs['size'].iloc[0] * (theirs['size'].iloc[0] + 1) / 2:g}: ties took better places "
                "there. Compare with the columns competition and dense."
            )
        return "\n".join(lines)

    def table(self) -> pd.DataFrame:
        """Methods × traits: mean rank with its interval over questions; published ranks below, where there are any."""
        means = self.tables["mean_ranks"]
        cells: Any = means.assign(
            cell=[f"{r['rank']:.2f} [{r['rank_low']:.2f}, {r['rank_high']:.2f}]" for r in means.to_dict("records")],
            method=[
                m if j == EVERYBODY else f"{m} ({j})" for m, j in zip(means["method"], means["judges"], strict=True)
            ],
        )
        if (beside := self.tables.get("comparison")) is not None:
            known = beside.dropna(subset=["published"])
            more = known.assign(cell=known["published"].map("{:.2f}".format), method=known["method"] + " (published)")
            cells = pd.concat([cells, more], ignore_index=True)
        wide = cells.set_index(["method", "trait"])["cell"].unstack("trait")  # noqa: PD010 - each is there once
        traits = [t for t in [*(t.value for t in TRAITS), ALL] if t in wide.columns]
        return (
            wide.loc[list(dict.fromkeys(cells["method"])), traits].fillna("–").reset_index().rename_axis(columns=None)
        )

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """Figures by name, each with the data that was plotted."""
        from npti_interp.figures._humans import plot_human_ranks

        beside = self.tables.get("comparison")
        return {"human_ranks": plot_human_ranks(self.tables["mean_ranks"], beside)}

    def save(self, folder: str | Path) -> list[Path]:
        """Write tables (CSV, LaTeX, HTML), rankings (Parquet), words and figures.

        Returns:
            the files.

        Raises:
            RunFolderError: another process is at work in the folder.
        """
        from npti_interp.figures import save_figure

        texts = {"summary.md": self.summary()}
        with at_work_in(folder) as base:
            for name, own in {"table": self.table(), **self.tables}.items():
                texts[f"{name}.csv"] = own.to_csv(index=False, lineterminator="\n")
                texts[f"{name}.tex"] = _styled(own, "latex").to_latex(hrules=True)
                texts[f"{name}.html"] = _styled(own, "html").to_html(table_uuid="npti")
            written: list[Path] = []
            for name, text in texts.items():
                write_atomic(base / name, lambda scratch, text=text: scratch.write_text(text, encoding="utf-8"))
                written.append(base / name)
            for name, own in (("judgements.parquet", self.duties), ("ranks.parquet", self.ranks)):
                write_table(base / name, own)
                written.append(base / name)
            settings = {
                "task": self.task.digest,
                "seed": self.seed,
                "n_resamples": self.n_resamples,
                "pass_share": self.pass_share,
            }
            for stem, (figure, data) in self.figures().items():
                written += save_figure(figure, base / "figures" / stem, data, settings)
            return written

    def _repr_html_(self) -> str:
        return "".join(
            _styled(t, "html").set_caption(n).to_html(table_uuid=f"npti-{n}")
            for n, t in {"table": self.table(), **self.tables}.items()
        )


def _of(table: pd.DataFrame, judges: str) -> Any:
    return table[table["judges"] == judges]


def _styled(table: pd.DataFrame, escape: str) -> Any:
    shown = table.style.hide(axis="index").format(precision=3, na_rep="–", escape=escape)
    return shown.format_index(axis=1, escape=escape)


def human_report(
    task: RankingTask,
    files: Sequence[str | Path],
    *,
    published: pd.DataFrame | None = None,
    pass_share: float = 0.75,
    seed: int = 0,
    n_resamples: int = 2000,
) -> HumanReport:
    """Evaluate the files of any number of judges.

    A file that does not belong to the task or was changed is refused, and the report says so; of several files of one
    judge the newest is used. Nobody is dropped for failed attention checks: results are given with and without them.

    Args:
        task: the task, from `RankingTask.load` of its key.
        files: what the judges sent.
        published: ``trait, method, rank`` to stand beside (see `npti_interp.paper.human_ranks`).
        pass_share: share of the attention checks that a judge must pass. A check is passed if no answer has a worse
            rank than the misfit and some answer a better one.
        seed: of the resampling.
        n_resamples: resamples of each interval.

    Raises:
        ValueError: no files, or a share outside 0 … 1.
        ArtifactError: no file is usable, or none holds a ranking; the message has the reasons.
    """
    if not files:
        raise ValueError("no judges' files were given")
    if not 0 <= pass_share <= 1:
        raise ValueError(f"pass_share must be between 0 and 1, got {pass_share}")
    records, about = _collect(task, files)
    if not records:
        raise ArtifactError("no usable file: " + "; ".join(about["reason"]))
    duties, ranks = _judgements(task, records)
    if ranks.empty:
        raise ArtifactError(f"nothing was ranked yet in the files of {', '.join(records)}")
    judges = _judge_table(duties, ranks, pass_share)
    failed = judges.loc[judges["attention"] == "failed", "judge"]
    sets = {EVERYBODY: ranks}
    if len(failed) and len(rest := ranks[~ranks["judge"].isin(failed)]):
        sets[ATTENTIVE] = cast(pd.DataFrame, rest)

    def over(make: Any, *more: Any) -> pd.DataFrame:
        return pd.concat([make(own, task.methods, who, *more) for who, own in sets.items()], ignore_index=True)

    tables = {
        "mean_ranks": over(_mean_ranks, n_resamples, seed),
        "friedman": over(_friedman, n_resamples, seed),
        "pairs": over(_pairs, seed),
        "agreement": over(_agreement, n_resamples, seed),
        "judges": judges,
        "coverage": _coverage(duties),
        "positions": _positions(ranks, n_resamples, seed),
        "files": about,
    }
    if published is not None:
        tables["comparison"] = _comparison(tables["mean_ranks"], published)
    return HumanReport(task, tables, duties, ranks, pass_share, seed, n_resamples)
