"""`Questionnaire`: items, keys and response options as data, and how they are read.

No item text is part of this project. The IPIP-NEO (public domain) comes from the item key that its author publishes, or
from a package that carries the 120 items; any other instrument (a BFI-2, for those who may use it) from a file in the
layout of `Questionnaire.load`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from npti_interp._files import read_json, write_json
from npti_interp.traits import TRAITS, Trait, as_trait

__all__ = ["ITEM_KEY_VARIABLE", "Item", "Questionnaire", "default_questionnaire"]

ITEM_KEY_VARIABLE = "NPTI_ITEM_KEY"
"""Environment variable with the path of the IPIP-NEO item key, for `default_questionnaire`."""

ACCURACY = (
    "very inaccurate", "moderately inaccurate", "neither accurate nor inaccurate", "moderately accurate",
    "very accurate",
)  # fmt: skip
"""The response options of the IPIP, from low to high."""

CYCLE = "NEOAC"
"""Domains of consecutive IPIP-NEO items; after five the facet's number goes up by one, after thirty it starts again."""

_COLUMNS = ("Full#", "Short#", "Sign", "Key", "Facet", "Item")
_FIELDS = ("id", "text", "domain", "facet", "key")
_FFM_TEXTS = "a065f589802baba252a8c586f49bc715f186720726b0035005e6f7735e9c297e"
"""SHA-256 of the items of the package ffm 0.1.0, in which place is all that links a text to its key."""


@dataclass(frozen=True)
class Item:
    """One statement.

    Attributes:
        id: its name in tables.
        text: the statement, as it follows the questionnaire's stem.
        domain: the trait it measures.
        facet: the facet of that trait; empty if the questionnaire has none.
        key: +1 if agreement means the high pole, −1 if it means the low one.
        position: its number in the questionnaire, from 1.
    """

    id: str
    text: str
    domain: Trait
    facet: str
    key: int
    position: int


@dataclass(frozen=True)
class Questionnaire:
    """An instrument: data, no code.

    Attributes:
        name: its name.
        items: the items, by position.
        stem: what stands before each text to make a sentence: ``I``, ``I am someone who``; empty if texts are sentences.
        options: response options from disagreement to agreement.
        source: where the items come from.
        licence: under which terms.

    Raises:
        ValueError: no items; two items of one id or text; an empty text; a key other than ±1; fewer than two options.
    """

    name: str
    items: tuple[Item, ...]
    stem: str = "I"
    options: tuple[str, ...] = ACCURACY
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(sorted(self.items, key=lambda i: i.position)))
        object.__setattr__(self, "options", tuple(self.options))
        if not self.items:
            raise ValueError(f"questionnaire {self.name!r} has no items")
        for what, values in (
            ("id", [i.id for i in self.items]),
            ("text", [normalised(i.text) for i in self.items]),
            ("position", [i.position for i in self.items]),
        ):
            if twice := [v for v, n in Counter(values).items() if n > 1]:
                raise ValueError(f"questionnaire {self.name!r}: two items have the {what} {twice[0]!r}")
        for item in self.items:
            if not normalised(item.text):
                raise ValueError(f"item {item.id!r} has no text")
            if item.key not in (1, -1):
                raise ValueError(f"item {item.id!r}: key must be 1 or -1, got {item.key!r}")
        if len(self.options) < 2 or len(set(self.options)) != len(self.options):
            raise ValueError(f"options must be at least two, and differ; got {self.options}")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def domains(self) -> list[Trait]:
        """The traits it measures, in the order of `TRAITS`."""
        own = {i.domain for i in self.items}
        return [t for t in TRAITS if t in own]

    @property
    def digest(self) -> str:
        """SHA-256 of all that an answer depends on, shortened."""
        told = [self.stem, list(self.options), [asdict(i) for i in self.items]]
        return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()[:16]

    def statement(self, item: Item) -> str:
        """The sentence of an item in the first person, without its full stop."""
        text = item.text.strip().rstrip(".")
        return f"{self.stem} {text[0].lower()}{text[1:]}" if self.stem else text

    def select(self, domains: Iterable[Trait | str] | None = None, per_facet: int | None = None) -> Questionnaire:
        """A part of it.

        Args:
            domains: traits to keep; by default all.
            per_facet: most items of a facet: its keys in turn so far as it has both, by position. A domain's facets begin
                with + and − in turn, so that one item a facet leaves the domain balanced.

        Raises:
            ValueError: nothing would be left.
        """
        wanted = set(TRAITS) if domains is None else {as_trait(d) for d in domains}
        facets: dict[tuple[Trait, str], list[Item]] = {}
        for item in self.items:
            if item.domain in wanted:
                facets.setdefault((item.domain, item.facet), []).append(item)
        begun: Counter[Trait] = Counter()
        kept: list[Item] = []
        for (domain, _), own in facets.items():
            kept += _in_turn(own, (1, -1) if begun[domain] % 2 == 0 else (-1, 1))[:per_facet]
            begun[domain] += 1
        if not kept:
            raise ValueError(
                f"{self.name} has no items of {', '.join(sorted(wanted))}; it measures {', '.join(self.domains)}"
            )
        return replace(self, items=tuple(kept))

    def table(self) -> pd.DataFrame:
        """``item``, ``domain``, ``facet``, ``key`` and ``position``, a row an item, without the texts."""
        rows = [
            {"item": i.id, "domain": i.domain.value, "facet": i.facet, "key": i.key, "position": i.position}
            for i in self.items
        ]
        return pd.DataFrame(rows)

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_item_key(cls, path: str | Path, n_items: int = 120) -> Questionnaire:
        """The IPIP-NEO-120 or -300 from Johnson's item key.

        Texts, numbers and keys stand in one row there, so that none is matched by place.

        Args:
            path: ``IPIP-NEO-ItemKey.xls``, or its sheet exported as .csv or .tsv, with the columns Full#, Short#, Sign,
                Key, Facet and Item.
            n_items: 120 or 300.

        Raises:
            FileNotFoundError: no such file.
            ImportError: an .xls, but python-calamine is not installed.
            ValueError: another number of items; a column or number is missing, or sign, key and facet contradict each
                other; the message names the row.
        """
        if n_items not in (120, 300):
            raise ValueError(f"the IPIP-NEO has 120 or 300 items, got {n_items}")
        file = Path(path)
        sheet = _read_sheet(file)
        if missing := [c for c in _COLUMNS if c not in sheet.columns]:
            raise ValueError(f"{file} is no IPIP-NEO item key: columns {', '.join(missing)} are missing")
        number = "Short#" if n_items == 120 else "Full#"
        items = [_from_row(row, number, file) for row in sheet.to_dict("records") if _number(row[number]) is not None]
        if sorted(i.position for i in items) != list(range(1, n_items + 1)):
            raise ValueError(f"{file}: the numbers in {number} are not 1 … {n_items}, each once")
        return cls(_ipip_name(n_items), tuple(items), source=f"item key {file.name}", licence="public domain (IPIP)")

    @classmethod
    def from_ffm(cls) -> Questionnaire:
        """The IPIP-NEO-120 with the texts that the package ``ffm`` carries and the keys of five-factor-e.

        The package lists texts without numbers, so the list as a whole must be the one that was compared with the
        published item key text by text (one conjunction differs).

        Raises:
            ImportError: ffm or five-factor-e is not installed.
            ValueError: an ffm with another list.
        """
        try:
            from FFM.core import Qs  # pyright: ignore[reportMissingImports]
            from ipipneo.reverse import IPIP_NEO_ITEMS_REVERSED_120
        except ImportError as error:
            raise ImportError(f"{_WAYS} ({error})") from error
        texts = [str(t) for t in Qs]
        if hashlib.sha256("\n".join(texts).encode()).hexdigest() != _FFM_TEXTS:
            raise ValueError(
                f"the {len(texts)} items of the installed ffm are not those of version 0.1.0, which were compared with "
                "the published key; install ffm==0.1.0, or give the item key"
            )
        reverse = set(IPIP_NEO_ITEMS_REVERSED_120)
        items = [
            Item(f"{code}.{n}", text.removeprefix("I "), domain, facet, -1 if n in reverse else 1, n)
            for n, text in enumerate(texts, start=1)
            for code, domain, facet in [ipip_facet(n)]
        ]
        return cls(_ipip_name(120), tuple(items), source="package ffm 0.1.0", licence="public domain (IPIP)")

    @classmethod
    def load(cls, path: str | Path) -> Questionnaire:
        """Any questionnaire, from a JSON file.

        An object with ``name``, ``items`` (objects with ``id``, ``text``, ``domain``: a trait's name or letter,
        ``facet``: may be empty, ``key``: 1 or −1) and, if they are not the IPIP's, ``stem`` and ``options``; ``source``
        and ``licence`` if known. Items stand in the questionnaire's order.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a field is missing or wrong; the message says which.
        """
        about: Any = read_json(Path(path))
        if not isinstance(about, dict) or "name" not in about or not isinstance(about.get("items"), list):
            raise ValueError(f"{path} is no questionnaire: it must be an object with 'name' and a list of 'items'")
        if unknown := sorted(set(about) - {"name", "items", "stem", "options", "source", "licence"}):
            raise ValueError(f"{path}: unknown fields {', '.join(unknown)}")
        more = {k: v for k, v in about.items() if k not in ("name", "items")}
        for field_name, value in more.items():
            texts = value if isinstance(value, list) and field_name == "options" else [value]
            if not all(isinstance(text, str) for text in texts) or (field_name == "options") != isinstance(value, list):
                kind = "a list of texts" if field_name == "options" else "text"
                raise ValueError(f"{path}: {field_name} must be {kind}, got {str(value)[:80]!r}")
        return cls(str(about["name"]), _items(about["items"], str(path)), **more)

    @classmethod
    def from_csv(cls, path: str | Path, *, name: str | None = None, **about: Any) -> Questionnaire:
        """Any questionnaire, from a table (.csv, .tsv, .xls, .xlsx) with the columns of `load`'s items.

        Args:
            path: the file.
            name: by default that of the file.
            about: ``stem``, ``options``, ``source``, ``licence``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as for `load`.
        """
        file = Path(path)
        rows = _read_sheet(file).to_dict("records")
        return cls(name or file.stem, _items(rows, str(file)), **about)

    def save(self, path: str | Path) -> Path:
        """Write the JSON that `load` reads."""
        items = [{k: v for k, v in asdict(i).items() if k != "position"} for i in self.items]
        target = Path(path)
        write_json(
            target,
            {
                "name": self.name, "stem": self.stem, "options": list(self.options), "source": self.source,
                "licence": self.licence, "items": items,
            },
        )  # fmt: skip
        return target

    def __repr__(self) -> str:
        return f"Questionnaire({self.name!r}, {len(self)} items of {', '.join(t.letter for t in self.domains)})"


_WAYS = (
    "no questionnaire: item texts are no part of this project. Give Questionnaire.from_item_key(path of "
    f"IPIP-NEO-ItemKey.xls), or put that path into {ITEM_KEY_VARIABLE}; or pip install 'npti-interp[questionnaires]', "
    "whose package ffm carries the IPIP-NEO-120; or Questionnaire.load(a JSON file of your own)"
)


def default_questionnaire() -> Questionnaire:
    """The IPIP-NEO-120: from the item key that the environment names (`ITEM_KEY_VARIABLE`), else from the package ffm.

    Raises:
        ImportError: neither is there; the message says what to do.
        FileNotFoundError: the environment names a file that is not there.
    """
    path = os.environ.get(ITEM_KEY_VARIABLE)
    return Questionnaire.from_item_key(path) if path else Questionnaire.from_ffm()


def ipip_facet(number: int) -> tuple[str, Trait, str]:
    """Code (``N1``), domain and facet of an IPIP-NEO item by its number; the same cycle in both lengths."""
    place = (number - 1) % 30
    domain = as_trait(CYCLE[place % 5])
    return f"{domain.letter}{place // 5 + 1}", domain, domain.info.facets[place // 5]


def normalised(text: str) -> str:
    """A text without what exports change: case, space, quotes and the full stop."""
    return re.sub(r"\s+", " ", text.replace("’", "'")).strip().rstrip(".").casefold()


def _ipip_name(n_items: int) -> str:
    return f"IPIP-NEO-{n_items}"


def _in_turn(items: Sequence[Item], keys: Sequence[int]) -> list[Item]:
    by_key = {key: [i for i in items if i.key == key] for key in keys}
    mixed: list[Item] = []
    for k in range(len(items)):
        mixed += [own[k] for own in by_key.values() if k < len(own)]
    return mixed


def _read_sheet(file: Path) -> pd.DataFrame:
    """The first sheet, all cells as they are."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    kind = file.suffix.casefold()
    if kind in (".csv", ".tsv", ".txt"):
        try:
            return pd.read_csv(file, sep="," if kind == ".csv" else "\t", dtype=str, keep_default_na=False)
        except ValueError as error:
            raise ValueError(f"cannot read {file}: {error}") from error
    if kind not in (".xls", ".xlsx"):
        raise ValueError(f"cannot read {file}: .xls, .xlsx, .csv or .tsv is wanted")
    if importlib.util.find_spec("python_calamine") is None:
        raise ImportError(
            f"reading {file.name} needs the package python-calamine: pip install 'npti-interp[questionnaires]'; or "
            "export its sheet as CSV"
        )
    rows = _cells(file)
    if not rows:
        raise ValueError(f"cannot read {file}: its first sheet is empty")
    return pd.DataFrame(rows[1:], columns=pd.Index(rows[0]), dtype=object)


_SHEET_BYTES, _SHEET_SECONDS = 1 << 30, 60.0
_READER = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from python_calamine import CalamineWorkbook
plain = lambda c: int(c) if isinstance(c, float) and c.is_integer() else c if isinstance(c, (str, int, float)) else str(c)
rows = CalamineWorkbook.from_path(sys.argv[1]).get_sheet_by_index(0).to_python()
json.dump([[plain(cell) for cell in row] for row in rows], sys.stdout)
"""


def _cells(file: Path) -> list[list[Any]]:
    """The cells of a workbook's first sheet.

    Read in a process of its own, within 1 GiB and a minute: one cell at the far end of a sheet makes a file of a
    kilobyte a table of 17 billion cells, and the library that reads it can only abort.

    Raises:
        ValueError: it cannot be read.
    """
    command = [sys.executable, "-P", "-c", _READER, str(file.resolve()), str(_SHEET_BYTES)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SHEET_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"cannot read {file}: not done within {_SHEET_SECONDS:g} s; export its sheet as CSV") from None
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        said = words[-1][:200] if words else f"the reader ended with {done.returncode}"
        raise ValueError(f"cannot read {file}: {said}; export its sheet as CSV")
    return json.loads(done.stdout)


def _number(cell: Any) -> int | None:
    text = str(cell).strip()
    if text in ("", "nan", "None"):
        return None
    value = float(text)
    if not 1 <= value < 10_000:
        raise ValueError(f"{text[:40]!r} is no item's number")
    return int(value)


def _from_row(row: Any, number: str, file: Path) -> Item:
    text, sign, code = (str(row[c]).strip() for c in ("Item", "Sign", "Key"))
    n = _number(row[number])
    assert n is not None
    expected, domain, facet = ipip_facet(n)
    where = f"{file}, {number} {n} ({text!r})"
    if code != expected:
        raise ValueError(f"{where}: Key is {code}, but number {n} of the IPIP-NEO is an item of {expected}")
    if sign not in (f"+{code}", f"-{code}"):
        raise ValueError(f"{where}: Sign is {sign!r}, it must be +{code} or -{code}")
    if normalised(str(row["Facet"])) != normalised(facet):
        raise ValueError(f"{where}: Facet is {row['Facet']!r}, {code} is {facet}")
    return Item(f"{code}.{n}", text, domain, facet, 1 if sign[0] == "+" else -1, n)


_KEYS = {"1": 1, "+1": 1, "+": 1, "1.0": 1, "-1": -1, "-": -1, "-1.0": -1, "−1": -1, "−": -1}


def _items(rows: Sequence[Any], where: str) -> tuple[Item, ...]:
    made: list[Item] = []
    for k, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{where}, item {k}: an object is expected, got {str(row)[:80]!r}")
        if missing := [f for f in _FIELDS if f not in row]:
            raise ValueError(f"{where}, item {k}: {', '.join(missing)} missing; an item has {', '.join(_FIELDS)}")
        key = _KEYS.get(str(row["key"]).strip())
        if key is None:
            raise ValueError(f"{where}, item {k}: key must be 1 or -1, got {row['key']!r}")
        made.append(
            Item(
                str(row["id"]).strip(),
                str(row["text"]).strip(),
                as_trait(str(row["domain"])),
                str(row["facet"]),
                key,
                k,
            )
        )
    return tuple(made)
