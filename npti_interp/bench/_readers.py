"""Readers of the two layouts in which a benchmark may lie on disk. They check every row and drop none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, cast

from npti_interp._files import parse_json
from npti_interp.bench._schema import Key, Persona, Question, Role, Split, as_role, as_split
from npti_interp.traits import POLES, TRAITS, Pole, Trait, as_pole, as_trait

__all__ = ["MANIFEST", "RawBench", "read_any"]

MANIFEST = "bench.json"
"""File of our own layout that holds the benchmark's name and digest."""

_FORMAT = "npti_interp.bench/1"
_QUESTION_KEYS = ("id", "trait", "facet", "item", "key", "topic", "split", "question")
_PERSONA_KEYS = ("id", "trait", "pole", "facet", "role", "text")
_SEARCH_KEYS = ("BFI", "tag", "facet", "topic", "sign", "question")
_PUBLISHED_OPENNESS_ROWS = 90
_SUSPECT_OPENNESS_ROWS = range(56, 90)

_T = TypeVar("_T")

Row = tuple[str, dict[str, Any]]
"""Where a row stands (``file:line``) and what it says."""


@dataclass
class RawBench:
    """Rows as read, before duplicates or suspects are dealt with.

    Attributes:
        name: the benchmark's name.
        personas: all descriptions, in file order.
        questions: all questions, in file order.
        digest: the digest that the files claim, if they do.
        warnings: remarks for the report.
    """

    name: str
    personas: list[Persona] = field(default_factory=list[Persona])
    questions: list[Question] = field(default_factory=list[Question])
    digest: str | None = None
    warnings: list[str] = field(default_factory=list[str])


def read_any(root: Traversable, name: str) -> RawBench:
    """Reads either layout.

    Raises:
        FileNotFoundError: ``root`` is no folder, or a file of the layout is missing.
        ValueError: a file holds something other than what the layout says; the message names file and line.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the folder that holds description.json or questions/")
    published, own = (root / "description.json").is_file(), (root / "questions").is_dir()
    if published and own:
        raise ValueError(f"{root} holds both description.json and questions/; keep one of the two layouts in a folder")
    if own:
        return _read_own(root, name)
    if published:
        return _read_published(root, name)
    nested = root / "dataset"
    hint = f"; did you mean {nested}?" if (nested / "description.json").is_file() else ""
    raise FileNotFoundError(
        f"{root} holds neither description.json and test/ (the published layout) nor questions/ and personas/{hint}"
    )


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value: object = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: broken JSON, {error.msg} at column {error.colno}; each line is one object"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; each line is one object") from None
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    raise ValueError(f"{where}: a JSON {type(value).__name__} where an object was expected; each line is one object")


def _decode(path: Traversable) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _rows(path: Traversable) -> list[Row]:
    lines = _decode(path).split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
    numbered = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, start=1)]
    return [(where, _parse(line, where)) for where, line in numbered if line]


def _check_keys(row: Row, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    where, data = row
    missing = [k for k in required if k not in data]
    extra = [k for k in data if k not in required and k not in optional]
    if missing or extra:
        said = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
        raise ValueError(f"{where}: wrong keys ({'; '.join(said)}); expected {', '.join(required + optional)}")


def _text(row: Row, key: str) -> str:
    where, data = row
    value: object = data[key]
    if not isinstance(value, str):
        problem = f"is {value!r}; expected text"
    elif not value.strip():
        problem = "is empty; give it some text or remove the row"
    else:
        return value.strip()
    raise ValueError(f"{where}: {key!r} {problem}")


def _optional_text(row: Row, key: str) -> str | None:
    value: object = row[1].get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(row, key)


def _named(row: Row, key: str, parse: Callable[[str], _T]) -> _T:
    try:
        return parse(_text(row, key))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(row[0]) else f"{row[0]}: {message}") from None


def _key(row: Row, name: str) -> Key | None:
    value = _optional_text(row, name)
    if value in ("+", "-", None):
        return value
    raise ValueError(f"{row[0]}: {name!r} is {value!r}; expected '+' (high pole) or '-' (low pole)")


def _facet(raw: RawBench, row: Row, key: str, trait: Trait) -> str | None:
    """The facet as `TraitInfo` spells it; one that is unknown there stays as it is, with a warning."""
    value = _optional_text(row, key)
    if value is None:
        return None
    for facet in trait.info.facets:
        if value.casefold() == facet.casefold():
            return facet
    warning = f"{value!r} is none of the six facets of {trait.value}; kept as it is"
    if warning not in raw.warnings:
        raw.warnings.append(warning)
    return value


def _require_files(paths: list[Traversable]) -> None:
    missing = [str(p) for p in paths if not p.is_file()]
    if missing:
        raise FileNotFoundError(f"missing: {', '.join(missing)}; restore these files or give another folder")


# ---------------------------------------------------------------------------------------------- published layout


def _read_published(root: Traversable, name: str) -> RawBench:
    tests = {trait: root / "test" / f"{trait.value}.json" for trait in TRAITS}
    _require_files(list(tests.values()))
    raw = RawBench(name)
    raw.personas = _published_personas(root / "description.json")
    sources = _search_sources(root, raw)
    if not sources:
        raw.warnings.append("no search questions: this set can evaluate an edit but not locate neurons")
    for source in sources:
        _add_search(raw, source)
    for trait, path in tests.items():
        rows = _rows(path)
        if not rows:
            raise ValueError(f"{path}: no questions; expected one {{'question': …}} object a line")
        as_published = trait is Trait.OPENNESS and len(rows) == _PUBLISHED_OPENNESS_ROWS
        for number, row in enumerate(rows):
            _check_keys(row, ("question",))
            raw.questions.append(
                Question(
                    id=f"{trait.letter}-test-{number:03d}",
                    trait=trait,
                    facet=None,
                    item=None,
                    key=None,
                    topic=None,
                    split="test",
                    text=_text(row, "question"),
                    suspect=as_published and number in _SUSPECT_OPENNESS_ROWS,
                )
            )
    return raw


def _published_personas(path: Traversable) -> list[Persona]:
    keys = {
        (trait, pole): trait.value + ("_reversed" if pole is Pole.LOW else "") for trait in TRAITS for pole in POLES
    }
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path}: no descriptions; expected one object of ten keys a line")
    personas: list[Persona] = []
    for number, row in enumerate(rows):
        _check_keys(row, tuple(keys.values()))
        for (trait, pole), key in keys.items():
            personas.append(
                Persona(
                    id=f"{trait.letter}{'+' if pole is Pole.HIGH else '-'}{number:03d}",
                    trait=trait,
                    pole=pole,
                    facet=None,
                    role="judge" if number % 4 == 3 else "elicit",
                    text=_text(row, key),
                )
            )
    return personas


def _search_sources(root: Traversable, raw: RawBench) -> list[Traversable]:
    single, sample, folder = root / "search.jsonl", root / "search_sample.jsonl", root / "search"
    if single.is_file() and folder.is_dir():
        raise ValueError(f"{root} holds both search.jsonl and search/; keep one of them")
    sources: list[Traversable] = []
    if folder.is_dir():
        sources = sorted(
            (p for p in folder.iterdir() if p.name.endswith((".json", ".jsonl")) and p.is_file()), key=lambda p: p.name
        )
        if not sources:
            raise FileNotFoundError(f"{folder} holds no .json or .jsonl file; put the search questions there")
    elif single.is_file():
        sources = [single]
    if sample.is_file():
        if sources:
            raw.warnings.append(f"{sample.name} was not read, as there is a full search set")
        else:
            sources = [sample]
    return sources


def _add_search(raw: RawBench, path: Traversable) -> None:
    stem = path.name.rsplit(".", 1)[0]
    of_file = next((t for t in TRAITS if stem.casefold() == t.value.casefold()), None)
    numbers = {t: sum(q.trait is t and q.split == "search" for q in raw.questions) for t in TRAITS}
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path}: no questions; remove the file or fill it")
    for row in rows:
        required = ("question",) if of_file else ("BFI", "question")
        _check_keys(row, required, tuple(k for k in _SEARCH_KEYS if k not in required))
        trait = _named(row, "BFI", as_trait) if "BFI" in row[1] else of_file
        assert trait is not None  # BFI is required where the file's name is no trait
        if of_file is not None and trait is not of_file:
            raise ValueError(
                f"{row[0]}: 'BFI' is {trait.value}, in the file of {of_file.value}; move or correct the row"
            )
        raw.questions.append(
            Question(
                id=f"{trait.letter}-search-{numbers[trait]:05d}",
                trait=trait,
                facet=_facet(raw, row, "tag", trait),
                item=_optional_text(row, "facet"),
                key=_key(row, "sign"),
                topic=_optional_text(row, "topic"),
                split="search",
                text=_text(row, "question"),
            )
        )
        numbers[trait] += 1


# ---------------------------------------------------------------------------------------------------- own layout


def _files_by_trait(folder: Traversable) -> dict[Trait, Traversable]:
    found: dict[Trait, Traversable] = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.endswith(".jsonl"):
                if not path.is_file():
                    raise ValueError(f"{path} is no file; take it out of the folder")
                try:
                    trait = as_trait(path.name.removesuffix(".jsonl"))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
                if trait in found:
                    raise ValueError(f"{path}: a second file of {trait.value}, beside {found[trait].name}; keep one")
                found[trait] = path
    return found


def _read_own(root: Traversable, name: str) -> RawBench:
    raw = RawBench(name)
    _read_manifest(root / MANIFEST, raw)
    questions, personas = _files_by_trait(root / "questions"), _files_by_trait(root / "personas")
    if not questions:
        raise FileNotFoundError(f"{root / 'questions'} holds no .jsonl file; expected one a trait")
    lonely = [
        str(root / "personas" / f"{t.value.lower()}.jsonl") for t in TRAITS if t in questions and t not in personas
    ]
    lonely += [
        str(root / "questions" / f"{t.value.lower()}.jsonl") for t in TRAITS if t in personas and t not in questions
    ]
    if lonely:
        raise FileNotFoundError(f"missing: {', '.join(lonely)}; each trait has a file in questions/ and in personas/")
    for trait in TRAITS:
        if trait not in questions:
            continue
        question_rows, persona_rows = _rows(questions[trait]), _rows(personas[trait])
        for path, rows in ((questions[trait], question_rows), (personas[trait], persona_rows)):
            if not rows:
                raw.warnings.append(f"{path} has no rows")
        raw.questions += [_own_question(raw, row, trait) for row in question_rows]
        raw.personas += [_own_persona(raw, row, trait) for row in persona_rows]
    return raw


def _read_manifest(path: Traversable, raw: RawBench) -> None:
    if not path.is_file():
        return
    row: Row = (str(path), _parse(_decode(path), str(path)))
    _check_keys(row, ("format", "name", "digest"))
    if _text(row, "format") != _FORMAT:
        raise ValueError(f"{path}: format {row[1]['format']!r} is not known here; expected {_FORMAT!r}")
    raw.name, raw.digest = _text(row, "name"), _text(row, "digest")


def _own_trait(row: Row, trait: Trait) -> None:
    said = _named(row, "trait", as_trait)
    if said is not trait:
        raise ValueError(f"{row[0]}: trait {said.value} in the file of {trait.value}; move or correct the row")


def _own_question(raw: RawBench, row: Row, trait: Trait) -> Question:
    _check_keys(row, _QUESTION_KEYS, ("suspect",))
    _own_trait(row, trait)
    split: Split = _named(row, "split", as_split)
    suspect: object = row[1].get("suspect", False)
    if suspect is not True and suspect is not False:
        raise ValueError(f"{row[0]}: 'suspect' is {suspect!r}; expected true or false")
    return Question(
        id=_text(row, "id"),
        trait=trait,
        facet=_facet(raw, row, "facet", trait),
        item=_optional_text(row, "item"),
        key=_key(row, "key"),
        topic=_optional_text(row, "topic"),
        split=split,
        text=_text(row, "question"),
        suspect=suspect,
    )


def _own_persona(raw: RawBench, row: Row, trait: Trait) -> Persona:
    _check_keys(row, _PERSONA_KEYS)
    _own_trait(row, trait)
    role: Role = _named(row, "role", as_role)
    return Persona(
        id=_text(row, "id"),
        trait=trait,
        pole=_named(row, "pole", as_pole),
        facet=_facet(raw, row, "facet", trait),
        role=role,
        text=_text(row, "text"),
    )


def write_own(root: Path, name: str, digest: str, personas: list[Persona], questions: list[Question]) -> None:
    """Writes our own layout into the existing, empty folder ``root``."""
    traits = [t for t in TRAITS if any(x.trait is t for x in (*personas, *questions))]
    (root / "questions").mkdir()
    (root / "personas").mkdir()
    for trait in traits:
        file = f"{trait.value.lower()}.jsonl"
        _write_rows(root / "questions" / file, [_question_row(q) for q in questions if q.trait is trait])
        _write_rows(root / "personas" / file, [_persona_row(p) for p in personas if p.trait is trait])
    manifest = {"format": _FORMAT, "name": name, "digest": digest}
    (root / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8", newline="\n")


def _question_row(q: Question) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": q.id,
        "trait": q.trait.value,
        "facet": q.facet,
        "item": q.item,
        "key": q.key,
        "topic": q.topic,
        "split": q.split,
        "question": q.text,
    }
    return row | ({"suspect": True} if q.suspect else {})


def _persona_row(p: Persona) -> dict[str, Any]:
    return {
        "id": p.id,
        "trait": p.trait.value,
        "pole": p.pole.value,
        "facet": p.facet,
        "role": p.role,
        "text": p.text,
    }
