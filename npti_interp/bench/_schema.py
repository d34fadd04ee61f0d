"""What a benchmark consists of: personas, questions, and the report of how they were read."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from npti_interp.traits import TRAITS, Pole, Trait, as_pole, as_trait

__all__ = [
    "Key",
    "LoadReport",
    "Persona",
    "Question",
    "Role",
    "Split",
    "TraitCounts",
    "as_role",
    "as_split",
]

Role = Literal["elicit", "judge"]
Split = Literal["search", "test"]
Key = Literal["+", "-"]


def as_role(role: str) -> Role:
    """The persona role that ``role`` names.

    Raises:
        ValueError: neither ``"elicit"`` nor ``"judge"``.
    """
    for known in get_args(Role):
        if role == known:
            return known
    raise ValueError(f"unknown persona role {role!r}; choose 'elicit' or 'judge'")


def as_split(split: str) -> Split:
    """The question split that ``split`` names.

    Raises:
        ValueError: neither ``"search"`` nor ``"test"``.
    """
    for known in get_args(Split):
        if split == known:
            return known
    raise ValueError(f"unknown split {split!r}; choose 'search' or 'test'")


def _require_text(value: str, what: str) -> None:
    if not value.strip():
        raise ValueError(f"{what} is empty ({value!r}); give it some text or remove the row")


@dataclass(frozen=True)
class Persona:
    """A description that puts a model at one pole of one trait.

    Attributes:
        id: unique within its benchmark.
        trait: the trait described; a name or letter is accepted and turned into a `Trait`.
        pole: the pole described; ``"high"`` and ``"low"`` are accepted.
        facet: the facet that the description leans to, or None where it is unknown.
        role: ``"elicit"`` descriptions prompt the model under study; ``"judge"`` ones are kept back for the
            likelihood judge, so that no judge scores an answer against the very words that elicited it.
        text: the description, in the second person.

    Raises:
        ValueError: an unknown trait, pole or role, or an empty id or text.
    """

    id: str
    trait: Trait
    pole: Pole
    facet: str | None
    role: Role
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "trait", as_trait(self.trait))
        object.__setattr__(self, "pole", as_pole(self.pole))
        as_role(self.role)
        _require_text(self.id, "a persona's id")
        _require_text(self.text, f"the text of persona {self.id}")


@dataclass(frozen=True)
class Question:
    """An open question about a situation, asked to bring out one trait.

    Attributes:
        id: unique within its benchmark.
        trait: the trait probed; a name or letter is accepted and turned into a `Trait`.
        facet: the facet probed, or None where it is unknown.
        item: the behaviour or feeling that the question is about, or None.
        key: the pole to which ``item`` belongs: ``"+"`` the high one, ``"-"`` the low one; None if unknown.
        topic: the area of life in which the situation lies, or None.
        split: ``"search"`` questions locate neurons, ``"test"`` questions evaluate the edit.
        text: the question.
        suspect: whether the question is known to have entered its set in a doubtful way (METHOD.md, section 4,
            item 13: rows kept because a model had scored low on them).

    Raises:
        ValueError: an unknown trait, split or key, or an empty id or text.
    """

    id: str
    trait: Trait
    facet: str | None
    item: str | None
    key: Key | None
    topic: str | None
    split: Split
    text: str
    suspect: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "trait", as_trait(self.trait))
        as_split(self.split)
        if self.key not in ("+", "-", None):
            raise ValueError(f"unknown key {self.key!r}; choose '+' (high pole), '-' (low pole) or None")
        _require_text(self.id, "a question's id")
        _require_text(self.text, f"the text of question {self.id}")


@dataclass(frozen=True)
class TraitCounts:
    """How much there is of one trait.

    Attributes:
        search: questions to locate neurons with.
        test: questions to evaluate with.
        high: descriptions of the high pole, both roles.
        low: descriptions of the low pole, both roles.
    """

    search: int = 0
    test: int = 0
    high: int = 0
    low: int = 0


def count_by_trait(personas: Sequence[Persona], questions: Sequence[Question]) -> dict[Trait, TraitCounts]:
    """`TraitCounts` of every trait that has at least one persona or question, in the order of `TRAITS`."""
    counts: dict[Trait, TraitCounts] = {}
    for trait in TRAITS:
        splits = [q.split for q in questions if q.trait is trait]
        poles = [p.pole for p in personas if p.trait is trait]
        if splits or poles:
            counts[trait] = TraitCounts(
                search=splits.count("search"),
                test=splits.count("test"),
                high=poles.count(Pole.HIGH),
                low=poles.count(Pole.LOW),
            )
    return counts


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain HTML table; every cell is escaped."""
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class LoadReport:
    """What was found while a benchmark was read, so that no irregularity passes in silence.

    Attributes:
        source: where the benchmark came from.
        read: rows read, per trait, before anything was left out.
        kept: rows that the benchmark holds, per trait.
        duplicate_descriptions: for each trait and pole that repeats a description: pairs of (id of the repeat,
            id of the first one). Case and white space do not count.
        duplicate_questions: pairs of (id of the repeat, id of the first one) within a trait; only reported.
        closed_format: (question id, ``"multiple choice"``, ``"yes/no"`` or ``"scale"``) for questions whose text
            prints the answers to choose from (`printed_options`).
        closed_wording: question ids whose wording asks for a yes, a choice or a degree although no answers are
            printed (`answer_format`).
        suspects: ids of questions marked suspect, whether kept or dropped.
        dropped_suspects: ids of those among them that were left out.
        warnings: everything else that the user should know.
    """

    source: str
    read: Mapping[Trait, TraitCounts] = field(default_factory=dict[Trait, TraitCounts])
    kept: Mapping[Trait, TraitCounts] = field(default_factory=dict[Trait, TraitCounts])
    duplicate_descriptions: Mapping[tuple[Trait, Pole], tuple[tuple[str, str], ...]] = field(
        default_factory=dict[tuple[Trait, Pole], tuple[tuple[str, str], ...]]
    )
    duplicate_questions: tuple[tuple[str, str], ...] = ()
    closed_format: tuple[tuple[str, str], ...] = ()
    closed_wording: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    dropped_suspects: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def _count_rows(self) -> list[list[object]]:
        rows: list[list[object]] = []
        for trait, read in self.read.items():
            kept = self.kept.get(trait, TraitCounts())
            pairs = ((read.search, kept.search), (read.test, kept.test), (read.high, kept.high), (read.low, kept.low))
            rows.append([trait.value, *(str(r) if r == k else f"{k} of {r}" for r, k in pairs)])
        return rows

    def _findings(self) -> list[str]:
        found: list[str] = []
        for (trait, pole), pairs in self.duplicate_descriptions.items():
            text = ", ".join(f"{again} repeats {first}" for again, first in pairs)
            found.append(f"duplicate description, {trait.value} {pole.value}: {text}")
        if self.duplicate_questions:
            found.append("duplicate questions: " + _shorten([f"{a} repeats {b}" for a, b in self.duplicate_questions]))
        if self.closed_format:
            text = _shorten([f"{ident} ({kind})" for ident, kind in self.closed_format])
            found.append(f"{len(self.closed_format)} questions print their answer options: {text}")
        if self.closed_wording:
            text = _shorten(self.closed_wording)
            found.append(f"{len(self.closed_wording)} further questions are closed by their wording: {text}")
        if self.suspects:
            done = f"{len(self.dropped_suspects)} dropped" if self.dropped_suspects else "kept"
            found.append(f"{len(self.suspects)} suspect questions ({done}): {_shorten(self.suspects)}")
        return found + [f"warning: {w}" for w in self.warnings]

    def __str__(self) -> str:
        lines = [f"Read from {self.source}"]
        for trait, search, test, high, low in self._count_rows():
            lines.append(f"  {trait}: questions {search} search, {test} test; descriptions {high} high, {low} low")
        return "\n".join(lines + [f"  {finding}" for finding in self._findings()])

    def _repr_html_(self) -> str:
        table = html_table(["Trait", "search", "test", "high", "low"], self._count_rows())
        found = "".join(f"<li>{html.escape(finding)}</li>" for finding in self._findings())
        return f"<p>Read from {html.escape(self.source)}</p>{table}" + (f"<ul>{found}</ul>" if found else "")


def _shorten(items: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown}, and {len(items) - most} more"
