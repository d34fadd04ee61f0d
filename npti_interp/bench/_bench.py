"""`PersonalityBench`: personas and questions of the five traits, read, checked and handed out."""

from __future__ import annotations

import hashlib
import html
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from npti_interp.bench._checks import answer_format, printed_options
from npti_interp.bench._readers import RawBench, read_any, write_own
from npti_interp.bench._schema import (
    Key,
    LoadReport,
    Persona,
    Question,
    Role,
    Split,
    as_role,
    as_split,
    count_by_trait,
    html_table,
)
from npti_interp.traits import POLES, TRAITS, Pole, Trait, as_pole, as_trait

__all__ = ["PersonalityBench"]

_OPEN_TO_READERS = {"several questions", "no open question"}


class PersonalityBench:
    """Descriptions that put a model at a pole of a trait, and open questions that show where it stands.

    A benchmark never changes once made, so one instance may be shared. Its order is canonical (trait, split,
    id), whatever the order of the rows it was read from.

    Args:
        personas: the descriptions.
        questions: the questions.
        name: a name for tables and file metadata.
        report: what was found while reading; by default one that only counts.

    Raises:
        ValueError: an id occurs twice among the personas or among the questions, or there are no questions.
    """

    def __init__(
        self,
        personas: Iterable[Persona],
        questions: Iterable[Question],
        *,
        name: str = "custom",
        report: LoadReport | None = None,
    ) -> None:
        order = {trait: i for i, trait in enumerate(TRAITS)}
        self._personas = tuple(sorted(personas, key=lambda p: (order[p.trait], POLES.index(p.pole), len(p.id), p.id)))
        self._questions = tuple(sorted(questions, key=lambda q: (order[q.trait], q.split, len(q.id), q.id)))
        if not self._questions:
            raise ValueError("a benchmark needs questions, and 0 were given; pass at least one")
        _refuse_repeats("persona", [p.id for p in self._personas])
        _refuse_repeats("question", [q.id for q in self._questions])
        self._name = name
        counts = count_by_trait(self._personas, self._questions)
        self._report = report if report is not None else LoadReport(source=name, read=counts, kept=counts)
        self._digest = _digest(self._personas, self._questions)

    # ------------------------------------------------------------------------------------------------- reading

    @classmethod
    def embedded(cls) -> PersonalityBench:
        """The original set that ships with the package; read once a process, then shared."""
        return _embedded()

    @classmethod
    def from_directory(
        cls, path: str | os.PathLike[str], *, drop_suspect: bool = False, drop_duplicates: bool = True
    ) -> PersonalityBench:
        """Reads a benchmark from disk, in the layout published with NPTI or in our own.

        The published layout is ``description.json`` (JSON lines of ten keys: each trait, and the trait with
        ``_reversed`` for its low pole), ``test/TRAIT.json`` (JSON lines with ``question``) and, optionally, a search
        set: ``search.jsonl``, ``search/*.json`` or ``.jsonl``, or ``search_sample.jsonl`` (JSON lines with ``BFI``,
        ``tag``, ``facet``, ``topic``, ``sign`` and ``question``, where ``tag`` becomes our facet and ``facet`` our
        item). Every fourth description, rows 3, 7, … counted from 0, gets the role ``"judge"``. Openness test rows
        56–89 are marked suspect where the file has the published 90 rows (METHOD.md, section 4, item 13).

        Our own layout is what `save` writes: ``questions/TRAIT.jsonl`` and ``personas/TRAIT.jsonl``.

        Args:
            path: the folder.
            drop_suspect: leave out the questions marked suspect.
            drop_duplicates: keep only the first of equal descriptions of a pole. They are reported either way.

        Returns:
            The benchmark; its ``report`` says what was irregular and what was left out.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            ValueError: broken JSON, wrong keys, an empty text, an unknown trait, pole, role, split or sign; the
                message names file and line.
        """
        root = Path(path)
        raw = read_any(root, root.resolve().name)
        return cls._from_raw(raw, str(root), drop_suspect=drop_suspect, drop_duplicates=drop_duplicates)

    @classmethod
    def _from_raw(cls, raw: RawBench, source: str, *, drop_suspect: bool, drop_duplicates: bool) -> PersonalityBench:
        duplicates = _duplicate_descriptions(raw.personas)
        repeats = {again for pairs in duplicates.values() for again, _ in pairs} if drop_duplicates else set[str]()
        suspects = tuple(q.id for q in raw.questions if q.suspect)
        dropped = suspects if drop_suspect else ()
        warnings = list(raw.warnings)
        if drop_suspect and not suspects:
            warnings.append("drop_suspect left nothing out, as no question is marked suspect")
        if duplicates and not drop_duplicates:
            warnings.append("equal descriptions were kept; some may serve to elicit and to judge at once")
        _refuse_repeats("persona", [p.id for p in raw.personas])
        _refuse_repeats("question", [q.id for q in raw.questions])
        personas = [p for p in raw.personas if p.id not in repeats]
        questions = [q for q in raw.questions if q.id not in dropped]
        printed = [(q.id, printed_options(q)) for q in questions]
        closed_format = tuple((ident, kind) for ident, kind in printed if kind is not None)
        ids = {ident for ident, _ in closed_format}
        closed_wording = tuple(q.id for q in questions if q.id not in ids and set(answer_format(q)) - _OPEN_TO_READERS)
        report = LoadReport(
            source=source,
            read=count_by_trait(raw.personas, raw.questions),
            kept=count_by_trait(personas, questions),
            duplicate_descriptions=duplicates,
            duplicate_questions=_duplicate_questions(raw.questions),
            closed_format=closed_format,
            closed_wording=closed_wording,
            suspects=suspects,
            dropped_suspects=dropped,
            warnings=tuple(warnings),
        )
        bench = cls(personas, questions, name=raw.name, report=report)
        return bench if raw.digest is None else bench._compare_with(raw)

    def _compare_with(self, raw: RawBench) -> PersonalityBench:
        """Adds a warning where the rows read are not those that were saved."""
        if raw.digest == _digest(raw.personas, raw.questions):
            return self
        said = f"the files were changed after saving: their content no longer has the digest {raw.digest}"
        self._report = replace(self._report, warnings=(*self._report.warnings, said))
        return self

    # ------------------------------------------------------------------------------------------------ contents

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self._name

    @property
    def report(self) -> LoadReport:
        """What was found while the benchmark was read."""
        return self._report

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, over all personas and questions; the order of rows and the name do not count."""
        return self._digest

    @property
    def traits(self) -> tuple[Trait, ...]:
        """The traits of which the benchmark has anything."""
        present = {x.trait for x in (*self._personas, *self._questions)}
        return tuple(t for t in TRAITS if t in present)

    def questions(
        self, trait: Trait | str | None = None, split: Split | str | None = None, n: int | None = None
    ) -> list[Question]:
        """Questions, or a balanced subset of them.

        Args:
            trait: only those of one trait.
            split: only ``"search"`` or only ``"test"``.
            n: how many to take. They are dealt in turns over the facets (and traits), and within a facet over the
                topics and both keys as evenly as these allow. The choice is deterministic, and the first ``m`` of
                ``n`` questions are those that ``n=m`` gives.

        Returns:
            Without ``n`` all of them, in canonical order; with ``n`` that many, in the order in which they are dealt.

        Raises:
            ValueError: an unknown trait or split, ``n`` below 1, or fewer than ``n`` questions to choose from.
        """
        wanted = None if trait is None else as_trait(trait)
        part = None if split is None else as_split(split)
        found = [q for q in self._questions if wanted in (None, q.trait) and part in (None, q.split)]
        if n is None:
            return found
        if n < 1:
            raise ValueError(f"n is {n}; ask for at least 1 question, or leave n out to get all {len(found)}")
        if n > len(found):
            which = " ".join(x for x in (wanted and wanted.value, part) if x)
            raise ValueError(
                f"n is {n}, but {self._name!r} has {len(found)} {which + ' ' if which else ''}questions; "
                f"ask for at most {len(found)}"
            )
        return _deal(found, n)

    def personas(self, trait: Trait | str, pole: Pole | str, role: Role | str | None = None) -> list[Persona]:
        """Descriptions of one pole of one trait, in canonical order.

        Args:
            trait: the trait.
            pole: its ``"high"`` or ``"low"`` pole.
            role: only those to ``"elicit"`` with, or only those to ``"judge"`` with.

        Raises:
            ValueError: an unknown trait, pole or role.
        """
        wanted, end, part = as_trait(trait), as_pole(pole), None if role is None else as_role(role)
        return [p for p in self._personas if p.trait is wanted and p.pole is end and part in (None, p.role)]

    # ------------------------------------------------------------------------------------------------- writing

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the benchmark in our own layout: JSON lines by trait, and its name and digest in ``bench.json``.

        The folder appears complete or not at all: it is written beside ``path`` and then renamed.

        Returns:
            The folder written.

        Raises:
            FileExistsError: ``path`` exists; nothing is overwritten.
        """
        target = Path(path)
        if target.exists() or target.is_symlink():
            raise FileExistsError(f"{target} exists; choose another path or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            folder = Path(scratch) / "bench"
            folder.mkdir()
            write_own(folder, self._name, self._digest, list(self._personas), list(self._questions))
            folder.rename(target)
        return target

    # ------------------------------------------------------------------------------------------------- display

    def _totals(self) -> str:
        search = sum(q.split == "search" for q in self._questions)
        n, test = len(self._questions), len(self._questions) - search
        return f"{n} questions ({search} search, {test} test), {len(self._personas)} personas"

    def __repr__(self) -> str:
        return f"PersonalityBench({self._name!r}: {self._totals()}, digest {self._digest[:8]})"

    def _repr_html_(self) -> str:
        rows: list[list[object]] = []
        for trait in self.traits:
            row: list[object] = [trait.value, *(len(self.questions(trait, s)) for s in ("search", "test"))]
            for pole in POLES:
                row += [len(self.personas(trait, pole, role)) for role in ("elicit", "judge")]
            rows.append(row)
        head = ["Trait", "search", "test", "high: elicit", "high: judge", "low: elicit", "low: judge"]
        caption = f"<b>{html.escape(self._name)}</b>: {self._totals()}; digest <code>{self._digest[:8]}</code>"
        return f"<p>{caption}</p>{html_table(head, rows)}"


@cache
def _embedded() -> PersonalityBench:
    raw = read_any(files("npti_interp.bench") / "data", "embedded")
    return PersonalityBench._from_raw(  # pyright: ignore[reportPrivateUsage]
        raw, "the package", drop_suspect=False, drop_duplicates=True
    )


def _refuse_repeats(what: str, ids: Sequence[str]) -> None:
    repeated = sorted(ident for ident, n in Counter(ids).items() if n > 1)
    if repeated:
        raise ValueError(f"{what} ids occur more than once: {', '.join(repeated)}; give each row its own id")


def _digest(personas: Iterable[Persona], questions: Iterable[Question]) -> str:
    content = {
        "personas": [asdict(p) for p in sorted(personas, key=lambda p: p.id)],
        "questions": [asdict(q) for q in sorted(questions, key=lambda q: q.id)],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _duplicate_descriptions(personas: Sequence[Persona]) -> dict[tuple[Trait, Pole], tuple[tuple[str, str], ...]]:
    first: dict[tuple[Trait, Pole, str], str] = {}
    pairs: defaultdict[tuple[Trait, Pole], list[tuple[str, str]]] = defaultdict(list)
    for p in personas:
        original = first.setdefault((p.trait, p.pole, _plain(p.text)), p.id)
        if original != p.id:
            pairs[p.trait, p.pole].append((p.id, original))
    return {place: tuple(pairs[place]) for t in TRAITS for pole in POLES if (place := (t, pole)) in pairs}


def _duplicate_questions(questions: Sequence[Question]) -> tuple[tuple[str, str], ...]:
    first: dict[tuple[Trait, str], str] = {}
    pairs = [(q.id, first.setdefault((q.trait, _plain(q.text)), q.id)) for q in questions]
    return tuple((again, original) for again, original in pairs if again != original)


class _Pile:
    """Questions of one facet, from which the next one is drawn so that topics and keys stay even."""

    def __init__(self) -> None:
        self._by_topic: defaultdict[str, defaultdict[Key | None, list[Question]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._topics: Counter[str] = Counter()
        self._keys: Counter[Key | None] = Counter()

    def add(self, question: Question) -> None:
        """Puts a question into the pile; the last one added of a topic and key is drawn first."""
        self._by_topic[f"{question.split}/{question.topic or ''}"][question.key].append(question)

    def draw(self, drawn: Counter[str]) -> Question | None:
        """Takes a question of the topic drawn least here and then (``drawn``) anywhere; None from an empty pile."""
        if not self._by_topic:
            return None
        topic = min(self._by_topic, key=lambda t: (self._topics[t], drawn[t], t))
        keyed = self._by_topic[topic]
        key = min(keyed, key=lambda k: (self._keys[k], k or ""))
        question = keyed[key].pop()
        if not keyed[key]:
            del keyed[key]
        if not keyed:
            del self._by_topic[topic]
        self._topics[topic] += 1
        self._keys[key] += 1
        drawn[topic] += 1
        return question


def _deal(questions: Sequence[Question], n: int) -> list[Question]:
    """The first ``n`` of a fixed order that goes round the facets; ties fall by a hash of the id, not by file order."""
    piles: defaultdict[tuple[int, str, int], _Pile] = defaultdict(_Pile)
    for q in sorted(questions, key=lambda q: hashlib.sha256(q.id.encode()).digest(), reverse=True):
        facets = q.trait.info.facets
        rank = facets.index(q.facet) if q.facet in facets else len(facets)
        piles[rank, q.facet or "", TRAITS.index(q.trait)].add(q)
    turns = [piles[place] for place in sorted(piles)]
    drawn: Counter[str] = Counter()
    dealt: list[Question] = []
    while len(dealt) < n:
        for pile in turns:
            question = pile.draw(drawn)
            if question is not None:
                dealt.append(question)
    return dealt[:n]
