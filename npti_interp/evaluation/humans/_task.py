"""Ranking tasks for people: which answers are compared, by whom, in which order; blinded and balanced.

An item shows one question, a description of one trait pole, and one answer of each method in random order. Nothing
that a judge gets names a method: answers carry opaque ids, and what they stand for is in the key alone.

- Items are spread evenly over traits, poles and facets, and a question serves one pole only as long as there are enough.
- Within each judge's items, every method stands in every position equally often (to within one); where all judges see
  all items, every answer also wanders through the positions from judge to judge (random Latin squares).
- Attention checks have one answer replaced by text that has nothing to do with the question; it belongs last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from npti_interp._files import from_fields, read_json, write_atomic, write_json
from npti_interp.errors import ArtifactError
from npti_interp.runs import at_work_in
from npti_interp.traits import POLES, TRAITS, Pole, Trait, as_pole, as_trait

__all__ = ["RANKING_PRESETS", "TARGETS", "RankedAnswer", "RankingConfig", "RankingItem", "RankingTask", "make_task"]

MOST_METHODS = 9
"""A rank is one digit key."""
_KIND, _VERSION = "npti-human-ranking-key", 1

TARGETS: dict[Trait, dict[Pole, str]] = {
    Trait.AGREEABLENESS: {
        Pole.HIGH: "Someone who believes the best of people, plays fair, likes to help, gives way rather than fight, "
        "does not boast, and feels for others.",
        Pole.LOW: "Someone who suspects people's motives, bends the truth for gain, leaves others to their troubles, "
        "would rather win a quarrel than avoid it, thinks highly of themselves, and is unmoved by others' pain.",
    },
    Trait.CONSCIENTIOUSNESS: {
        Pole.HIGH: "Someone who is sure of getting things done, keeps things in order, does what was promised, aims "
        "high, starts at once and sees it through, and thinks before acting.",
        Pole.LOW: "Someone who doubts they can manage, lives in a muddle, takes promises lightly, does only what is "
        "needed, puts things off and gives up, and acts on the spur of the moment.",
    },
    Trait.EXTRAVERSION: {
        Pole.HIGH: "Someone who warms to people quickly, loves company, takes the lead, is always on the go, looks for "
        "thrills, and is full of good cheer.",
        Pole.LOW: "Someone who keeps people at a distance, would rather be alone, leaves the lead to others, takes life "
        "slowly, stays away from thrills, and seldom shows delight.",
    },
    Trait.NEUROTICISM: {
        Pole.HIGH: "Someone who worries a lot, is easily annoyed, often feels low, is embarrassed in front of others, "
        "gives in to cravings, and is overwhelmed when things go wrong.",
        Pole.LOW: "Someone who seldom worries, is slow to anger, is content with life, feels at ease in front of others, "
        "resists temptation without effort, and stays calm when things go wrong.",
    },
    Trait.OPENNESS: {
        Pole.HIGH: "Someone who daydreams vividly, is moved by art and beauty, is in touch with every feeling, loves to "
        "try new things, enjoys difficult ideas, and questions tradition and authority.",
        Pole.LOW: "Someone who sticks to plain facts, cares little for art, pays little heed to feelings, prefers the "
        "familiar, finds abstract ideas tiresome, and holds to tradition and authority.",
    },
}
"""What a judge reads of each pole: six clauses, in the order of the trait's six facets (`TraitInfo.facets`)."""

_OFF_TOPIC = (
    "A printer needs paper of the right size: open the tray, move the blue guide to the mark, close it and press start.",
    "The number 60 can be divided by 2, 3, 4, 5, 6, 10, 12, 15, 20 and 30. The number 61 can only be divided by one.",
    "Platform nine is beside platform eight. Even train numbers go north, odd ones south; the machine takes coins.",
    "Copper conducts electricity better than iron. A wire of twice the length has twice the resistance.",
    "The table has four columns: date, weight, width and colour. Leave the third column empty if the width is unknown.",
)


@dataclass(frozen=True)
class RankingConfig:
    """Design of a ranking task.

    Attributes:
        n_items: items (question × pole), attention checks not counted.
        judges: people.
        judges_per_item: judges that an item gets; None lets all judge all.
        methods: conditions of the answers table to compare; empty takes all of them.
        attention_rate: attention checks a judge gets per item, rounded up.
        seed: of the choice of questions and of every order.

    Raises:
        ValueError: a value that makes no task; the message says which.
    """

    n_items: int = 60
    judges: int = 3
    judges_per_item: int | None = None
    methods: tuple[str, ...] = ()
    attention_rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        if self.n_items < 1 or self.judges < 1:
            raise ValueError(f"n_items and judges must be at least 1, got {self.n_items} and {self.judges}")
        if self.judges_per_item is not None and not 1 <= self.judges_per_item <= self.judges:
            raise ValueError(
                f"judges_per_item must be between 1 and judges = {self.judges}, got {self.judges_per_item}"
            )
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods must differ, got {', '.join(self.methods)}")
        if self.methods:
            _check_number(self.methods)
        if not 0 <= self.attention_rate <= 1:
            raise ValueError(f"attention_rate must be between 0 and 1, got {self.attention_rate}")


def _check_number(methods: Sequence[str]) -> None:
    if not 2 <= len(methods) <= MOST_METHODS:
        raise ValueError(
            f"2 to {MOST_METHODS} methods can be ranked, got {len(methods)}: {', '.join(methods)}; name those to compare"
        )


RANKING_PRESETS: dict[str, RankingConfig] = {
    "quick": RankingConfig(),
    "published": RankingConfig(n_items=200, judges=5, methods=("npti", "simple", "p2", "pas", "sft")),
}
"""``published`` is the paper's design (METHOD.md section 5): 200 questions, five judges, five methods."""


@dataclass(frozen=True)
class RankedAnswer:
    """One answer of an item.

    Attributes:
        id: what the judge's page calls it.
        condition: the method it comes from; None for the misfit of an attention check.
        text: the answer.
    """

    id: str
    condition: str | None
    text: str


@dataclass(frozen=True)
class RankingItem:
    """A question with one answer of each method.

    Attributes:
        id: what the judge's page calls it.
        trait: the trait that the answers were to show.
        pole: its pole.
        question_id: of the bench.
        question: its text.
        answers: the answers, in the order of the task's methods.
    """

    id: str
    trait: Trait
    pole: Pole
    question_id: str
    question: str
    answers: tuple[RankedAnswer, ...]

    @property
    def misfit(self) -> str | None:
        """Id of the answer that belongs last; None where the item is no attention check."""
        return next((a.id for a in self.answers if a.condition is None), None)


Layout = tuple[tuple[str, tuple[str, ...]], ...]
"""What a judge sees: item ids in order, each with its answer ids in order."""


@dataclass(frozen=True)
class RankingTask:
    """A blinded ranking task, with its key.

    Attributes:
        config: its design.
        methods: the conditions compared.
        items: items by id: those that count first, then the attention checks.
        layouts: what each judge sees, by judge.
        dropped: question × pole pairs left out because an answer was missing.
        identical: items in which at least two methods gave the very same answer.
    """

    config: RankingConfig
    methods: tuple[str, ...]
    items: Mapping[str, RankingItem]
    layouts: Mapping[str, Layout]
    dropped: int = 0
    identical: int = 0
    digest: str = field(init=False)
    """SHA-256 over items, key and orders: what a page and a judge's file name the task by."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _sha(self._content()))

    def _content(self) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "version": _VERSION,
            "config": asdict(self.config),
            "methods": self.methods,
            "items": [asdict(item) for item in self.items.values()],
            "layouts": self.layouts,
            "dropped": self.dropped,
            "identical": self.identical,
        }

    @property
    def checks(self) -> tuple[RankingItem, ...]:
        """The attention checks."""
        return tuple(i for i in self.items.values() if i.misfit)

    @property
    def counted(self) -> tuple[RankingItem, ...]:
        """The items that are no attention checks."""
        return tuple(i for i in self.items.values() if not i.misfit)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``pages/JUDGE.html``, one page a judge, and ``key.json``, which no judge may see.

        Returns:
            the files.

        Raises:
            ArtifactError: the folder holds another task, whose judges may be at work.
            RunFolderError: another process is at work in the folder.
        """
        from npti_interp.evaluation.humans._page import render_page

        with at_work_in(folder) as base:
            key = base / "key.json"
            if key.is_file() and (there := RankingTask.load(key)).digest != self.digest:
                raise ArtifactError(
                    f"{base} holds another ranking task ({there.digest[:12]}), and its judges' files would no longer be "
                    "readable; choose another folder"
                )
            write_json(key, {**self._content(), "digest": self.digest})
            written = [key]
            for judge in self.layouts:
                text = render_page(self, judge)
                path = base / "pages" / f"{judge}.html"
                write_atomic(path, lambda scratch, text=text: scratch.write_text(text, encoding="utf-8", newline="\n"))
                written.append(path)
            return written

    @classmethod
    def load(cls, path: str | Path) -> RankingTask:
        """Read a key that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: not a key, altered, or of a newer version.
        """
        path = Path(path)
        raw: Any = read_json(path)
        if not isinstance(raw, dict) or raw.get("kind") != _KIND:
            raise ArtifactError(f"{path} is not the key of a ranking task (key.json, written by `npti humans export`)")
        if raw.get("version") != _VERSION:
            raise ArtifactError(f"{path} has version {raw.get('version')!r}; this npti_interp reads {_VERSION}")
        try:
            methods = {"methods": tuple(map(_text, raw["config"].pop("methods")))}
            task = cls(
                config=replace(from_fields(RankingConfig, raw["config"], "its config"), **methods),
                methods=tuple(map(_text, raw["methods"])),
                items={_text(i["id"]): _item(i) for i in raw["items"]},
                layouts={
                    j: tuple((_text(i), tuple(map(_text, order))) for i, order in own)
                    for j, own in raw["layouts"].items()
                },
                dropped=_count(raw["dropped"]),
                identical=_count(raw["identical"]),
            )
            for own in task.layouts.values():
                for item, order in own:
                    if sorted(order) != sorted(a.id for a in task.items[item].answers):
                        raise ValueError(f"a layout of {item} that is not its answers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is a damaged key: {error!r}") from error
        if task.digest != raw.get("digest"):
            raise ArtifactError(f"{path} was altered: its content does not match the digest stored with it")
        return task


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:40]!r} is no number of items")
    return value


def _item(raw: Mapping[str, Any]) -> RankingItem:
    answers = tuple(from_fields(RankedAnswer, a, "an answer") for a in raw["answers"])
    trait, pole = as_trait(_text(raw["trait"])), as_pole(_text(raw["pole"]))
    return RankingItem(_text(raw["id"]), trait, pole, _text(raw["question_id"]), _text(raw["question"]), answers)


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def make_task(answers: pd.DataFrame, config: RankingConfig | None = None) -> RankingTask:
    """Choose questions and lay out every judge's page.

    Args:
        answers: columns ``trait, condition, pole, question_id, question, answer``, as the experiments write them; of a
            column ``split`` only ``test`` is used, and ``facet``, where there is one, spreads the questions. A
            condition without a pole (the unedited model, say) is compared under both poles.
        config: the design; by default the preset ``quick``.

    Raises:
        ValueError: a column or method is missing, a question is answered twice under one condition, or there are too
            few questions with an answer of every method.
    """
    config = config or RankingConfig()
    table = _usable(answers)
    methods = config.methods or tuple(dict.fromkeys(table["condition"]))
    if unknown := [m for m in methods if m not in set(table["condition"])]:
        known = ", ".join(dict.fromkeys(table["condition"]))
        raise ValueError(f"no answers of {', '.join(unknown)}; the table has {known}: name the methods to compare")
    _check_number(methods)
    strata, dropped = _strata(table, methods)
    rng = np.random.default_rng(config.seed)
    chosen, spare = _choose(strata, config.n_items, rng)
    salt = _sha([config.seed, [[s.trait, s.pole, s.question_id, s.texts] for s in chosen]])

    items = [_make_item(source, methods, salt, place) for place, source in enumerate(chosen)]
    names = [f"judge-{k + 1}" for k in range(config.judges)]
    duties = _assign(len(items), config.judges, config.judges_per_item or config.judges, rng)
    n_checks = math.ceil(config.attention_rate * max(map(len, duties)))
    checks = _make_checks(spare, n_checks, methods, salt, len(items), rng)
    layouts = {
        name: _layout([items[k] for k in duties[j]], checks, j, config.seed, np.random.default_rng([config.seed, j]))
        for j, name in enumerate(names)
    }
    return RankingTask(
        config=config,
        methods=methods,
        items={i.id: i for i in (*items, *checks)},
        layouts=layouts,
        dropped=dropped,
        identical=sum(len({a.text.strip() for a in i.answers}) < len(methods) for i in items),
    )


_COLUMNS = ("trait", "condition", "pole", "question_id", "question", "answer")


def _usable(answers: Any) -> Any:
    if missing := [c for c in _COLUMNS if c not in answers.columns]:
        raise ValueError(f"the table of answers has no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")
    table = answers[answers["split"] == "test"] if "split" in answers.columns else answers
    if table.empty:
        raise ValueError("the table has no answers to test questions")
    return table.assign(trait=[as_trait(t).value for t in table["trait"]])


@dataclass(frozen=True)
class _Source:
    """A question answered by every method under one pole."""

    trait: Trait
    pole: Pole
    question_id: str
    question: str
    facet: str
    texts: tuple[str, ...]


def _strata(table: Any, methods: Sequence[str]) -> tuple[dict[Trait, dict[Pole, list[_Source]]], int]:
    """By trait and pole, the questions that every method answered; and how many some did not."""
    poles = [p for p in POLES if p.value in set(table["pole"].dropna())]
    if not poles:
        raise ValueError("no answer induces a pole (column pole is empty throughout); there is no target to rank by")
    strata: dict[Trait, dict[Pole, list[_Source]]] = {}
    dropped = 0
    table = table[table["condition"].isin(methods)]
    twice = table[table.duplicated(["trait", "condition", "pole", "question_id"], keep=False)]
    if len(twice):
        first: Any = twice.iloc[0]
        raise ValueError(
            f"{len(twice)} rows answer a question twice under one condition (first: {first['condition']}, pole "
            f"{first['pole']}, {first['question_id']}); filter the table to one setting a condition"
        )
    facets = "facet" in table.columns
    for trait in (t for t in TRAITS if t.value in set(table["trait"])):
        own: Any = table[table["trait"] == trait.value]
        strata[trait] = {}
        for pole in poles:
            found: list[_Source] = []
            part = own[(own["pole"] == pole.value) | own["pole"].isna()]
            for question_id, rows in part.groupby("question_id", sort=False):
                texts = {r["condition"]: r["answer"] for r in rows.to_dict("records")}
                if len(rows) != len(texts):
                    raise ValueError(
                        f"{question_id}: a condition has answers with and without a pole; filter the table"
                    )
                if len(set(rows["question"])) != 1:
                    raise ValueError(f"{question_id} has several wordings; the answers are not to the same question")
                if any(not isinstance(texts.get(m), str) for m in methods):
                    dropped += 1
                    continue
                first = rows.iloc[0]
                found.append(
                    _Source(
                        trait, pole, str(question_id), str(first["question"]),
                        str(first["facet"]) if facets else "", tuple(texts[m] for m in methods),
                    )
                )  # fmt: skip
            strata[trait][pole] = found
    return strata, dropped


def _choose(
    strata: Mapping[Trait, Mapping[Pole, Sequence[_Source]]], n_items: int, rng: np.random.Generator
) -> tuple[list[_Source], list[_Source]]:
    """Items, spread over traits, then poles, then facets; and the rest, best suited for checks first."""
    traits = list(strata)
    poles = list(strata[traits[0]])
    base, more = divmod(n_items, len(traits))
    lucky = set(rng.permutation(len(traits))[:more].tolist())
    chosen: list[_Source] = []
    unused: list[list[_Source]] = []
    used: list[list[_Source]] = []
    turn = int(rng.integers(len(poles)))
    for place, trait in enumerate(traits):
        wanted = base + (place in lucky)
        share = [wanted // len(poles)] * len(poles)
        if wanted % len(poles):  # two poles at most: one is left over
            share[turn % len(poles)] += 1
            turn += 1
        order = _spread({s.question_id: s.facet for own in strata[trait].values() for s in own}, rng)
        taken: set[str] = set()
        for pole, n in zip(poles, share, strict=True):
            by_id = {s.question_id: s for s in strata[trait][pole]}
            if n > len(by_id):
                raise ValueError(
                    f"{n_items} items need {n} questions of {trait}, {pole} pole, that every method answered, but there "
                    f"are {len(by_id)}; ask for fewer items, or give more answers"
                )
            own = sorted((by_id[q] for q in order if q in by_id), key=lambda s: s.question_id in taken)
            chosen += own[:n]
            taken |= {s.question_id for s in own[:n]}
        for pole in poles:
            unused.append([s for s in strata[trait][pole] if s.question_id not in taken])
            used.append([s for s in strata[trait][pole] if s.question_id in taken])
    # Checks go round traits and poles, with questions that are not items where there are any left.
    spare = [s for pools in (unused, used) for s in _round_robin([pools[k] for k in rng.permutation(len(pools))])]
    return chosen, spare


def _spread(facets: Mapping[str, str], rng: np.random.Generator) -> list[str]:
    """Question ids in random order, going round the facets."""
    groups: dict[str, list[str]] = {}
    ids = sorted(facets)
    for k in rng.permutation(len(ids)):
        groups.setdefault(facets[ids[k]], []).append(ids[k])
    return _round_robin(list(groups.values()))


def _round_robin(pools: Sequence[Sequence[Any]]) -> list[Any]:
    return [pool[k] for k in range(max(map(len, pools), default=0)) for pool in pools if k < len(pool)]


def _id(salt: str, *parts: object) -> str:
    # Made from the texts as well as from the seed, so that nobody reads a method out of it who has not the answers.
    return hashlib.sha256("|".join(map(str, (salt, *parts))).encode()).hexdigest()[:12]


def _make_item(source: _Source, methods: Sequence[str], salt: str, place: int) -> RankingItem:
    answers = tuple(RankedAnswer(_id(salt, place, k), m, source.texts[k]) for k, m in enumerate(methods))
    return RankingItem(_id(salt, place), source.trait, source.pole, source.question_id, source.question, answers)


def _make_checks(
    spare: Sequence[_Source], n: int, methods: Sequence[str], salt: str, start: int, rng: np.random.Generator
) -> list[RankingItem]:
    """Items in which one method's answer gave way to text that has nothing to do with the question."""
    words = " ".join(_OFF_TOPIC).split()
    gone = rng.permutation(len(methods))
    checks: list[RankingItem] = []
    for k in range(n):
        plain = _make_item(spare[k % len(spare)], methods, salt, start + k)
        salad = " ".join(words[i] for i in rng.permutation(len(words))[:24])
        text = _OFF_TOPIC[(k // 2) % len(_OFF_TOPIC)] if k % 2 == 0 else salad
        place = int(gone[k % len(methods)])
        answers = list(plain.answers)
        answers[place] = RankedAnswer(answers[place].id, None, text)
        checks.append(RankingItem(plain.id, plain.trait, plain.pole, plain.question_id, plain.question, tuple(answers)))
    return checks


def _assign(n_items: int, judges: int, each: int, rng: np.random.Generator) -> list[list[int]]:
    """Items of each judge: equal loads all along the list, and pairs of judges meeting about equally often."""
    duties: list[list[int]] = [[] for _ in range(judges)]
    met = np.zeros((judges, judges))
    for item in range(n_items):
        picked: list[int] = []
        for _ in range(each):
            left = [j for j in range(judges) if j not in picked]
            cost = [(len(duties[j]), met[j, picked].sum(), rng.random()) for j in left]
            picked.append(left[min(range(len(left)), key=cost.__getitem__)])
        for j in picked:
            duties[j].append(item)
            met[j, [p for p in picked if p != j]] += 1
    return duties


def _latin(m: int, seed: Sequence[int]) -> list[list[int]]:
    """A random Latin square: the cyclic one with rows, columns and symbols permuted."""
    rng = np.random.default_rng(seed)
    rows, columns, symbols = (rng.permutation(m) for _ in range(3))
    return symbols[(rows[:, None] + columns[None, :]) % m].tolist()


def _layout(
    items: Sequence[RankingItem], checks: Sequence[RankingItem], judge: int, seed: int, rng: np.random.Generator
) -> Layout:
    """A judge's items in random order with the checks among them, each with its answers in a Latin square's order."""

    def arranged(own: Sequence[RankingItem], kind: int) -> list[tuple[str, tuple[str, ...]]]:
        out: list[tuple[str, tuple[str, ...]]] = []
        for place, item in enumerate(own):
            m = len(item.answers)
            # The next judge reads the same square from the next row: each answer visits every position.
            row = _latin(m, [seed, kind, place // m])[(place + judge) % m]
            out.append((item.id, tuple(item.answers[k].id for k in row)))
        return out

    main, extra = arranged(items, 0), arranged(checks, 1)
    order = [main[k] for k in rng.permutation(len(main))]
    extra = [extra[k] for k in rng.permutation(len(extra))]
    for k in reversed(range(len(extra))):  # one in each stretch of equal length
        low, high = (math.ceil(len(main) * end / len(extra)) for end in (k, k + 1))
        order.insert(int(rng.integers(low, high)) + 1 if high > low else low, extra[k])
    return tuple(order)
