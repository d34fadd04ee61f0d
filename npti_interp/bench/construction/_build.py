"""`build_bench`: from items and topics to a finished set, in stages that can be stopped anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from npti_interp._files import read_json, write_atomic, write_json
from npti_interp.bench._bench import PersonalityBench, _deal  # pyright: ignore[reportPrivateUsage]
from npti_interp.bench._readers import (
    _FORMAT,  # pyright: ignore[reportPrivateUsage]
    MANIFEST,
    _persona_row,  # pyright: ignore[reportPrivateUsage]
    _question_row,  # pyright: ignore[reportPrivateUsage]
)
from npti_interp.bench._schema import Persona, Question, Role, Split, html_table
from npti_interp.bench.construction._card import card_text, make_card
from npti_interp.bench.construction._config import BuildConfig
from npti_interp.bench.construction._filters import (
    RepeatIndex,
    persona_objection,
    question_objection,
    require_datasketch,
    same_text,
)
from npti_interp.bench.construction._items import ItemLike, build_items, items_digest
from npti_interp.bench.construction._plan import ASIDE, Plan, make_plan
from npti_interp.bench.construction._prompts import prompts_digest
from npti_interp.bench.construction._tables import BENCH, BuildFolder, Row, read_rows, shard_name
from npti_interp.bench.construction._writing import (
    Task,
    ask,
    chunks,
    persona_rows,
    persona_tasks,
    question_rows,
    question_tasks,
    refinement_rows,
    refinement_tasks,
)
from npti_interp.chat._base import ChatEstimate
from npti_interp.errors import ArtifactError
from npti_interp.runs import read_manifest
from npti_interp.traits import POLES, Trait

if TYPE_CHECKING:
    from npti_interp.chat import Chat, ChatRequest
    from npti_interp.generation import Progress

__all__ = ["BuildEstimate", "BuildResult", "build_bench", "estimate_bench"]

_VERSION = 1
_CARD = f"{BENCH}/card.json"
_SPLIT_ORDER: dict[str, int] = {"test": 0, "search": 1, ASIDE: 2}
"""Of two questions that repeat each other the test question stays: there are fewer of them."""


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        folder: the build's folder; the set is in ``bench`` inside.
        card: the data card, as JSON.
    """

    folder: Path
    card: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> BuildResult:
        """Read a finished build.

        Raises:
            FileNotFoundError: none is there, or it is not finished.
            ArtifactError: its card is damaged.
        """
        path = Path(folder)
        if not (path / _CARD).is_file():
            raise FileNotFoundError(f"{path} holds no finished build; run build_bench with this folder")
        card: Any = read_json(path / _CARD)
        if not isinstance(card, dict):
            raise ArtifactError(f"{path / _CARD} is no data card")
        return cls(path, card)

    @property
    def path(self) -> Path:
        """The folder of the finished set."""
        return self.folder / BENCH

    def bench(self) -> PersonalityBench:
        """The finished set.

        Raises:
            ValueError: no question came through.
        """
        return PersonalityBench.from_directory(self.path)

    def _rates(self) -> list[list[str]]:
        return [[r["stage"], f"{r['in']:,}", f"{r['out']:,}", _percent(r["out"], r["in"])] for r in self.card["stages"]]

    def summary(self) -> str:
        """What came through each stage, and why the rest did not, in a few lines."""
        lines = [f"{self.card['name']}: digest {self.card['digest'][:8]}, in {self.path}"]
        lines += [f"  {stage}: {out} of {given} ({rate})" for stage, given, out, rate in self._rates()]
        lines += [f"  dropped, {r['reason']}: {r['n']:,} {r['of']}" for r in self.card["dropped_total"]]
        lines += [f"  failed, {r['stage']}, {r['kind']}: {r['n']:,} ({r['example']})" for r in self.card["failures"]]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        dropped = [[r["of"], r["reason"], f"{r['n']:,}"] for r in self.card["dropped_total"]]
        table = html_table(["Stage", "in", "out", "share"], self._rates())
        return f"<p>{self.path}</p>{table}" + html_table(["Of", "Dropped because", "rows"], dropped)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none asked"


@dataclass(frozen=True)
class BuildEstimate:
    """What a build would still take, before anything is sent.

    Further draws of answers that cannot be used come on top; so does a second, plain call where an endpoint cannot be
    held to a schema.

    Attributes:
        stages: of each stage that asks the writer.
        assumed: refinement calls among them whose questions are not written yet: they are counted as if every cell
            gave all its questions, at the mean of the allowed lengths.
    """

    stages: Mapping[str, ChatEstimate]
    assumed: int

    @property
    def calls(self) -> int:
        """Calls to make."""
        return sum(e.calls for e in self.stages.values())

    @property
    def cached(self) -> int:
        """Calls whose replies are on disk."""
        return sum(e.cached for e in self.stages.values())

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts of the calls to make."""
        return sum(e.prompt_tokens for e in self.stages.values())

    @property
    def completion_tokens(self) -> int:
        """Most tokens of their answers."""
        return sum(e.completion_tokens for e in self.stages.values())

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """Most that the calls can cost, in the currency of the prices of a million tokens.

        Raises:
            ValueError: a price below 0.
        """
        return sum(e.cost(prompt_price, completion_price) for e in self.stages.values())

    def __str__(self) -> str:
        lines = [f"{name}: {estimate}" for name, estimate in self.stages.items()]
        lines.append(
            f"in all: {self.calls:,} calls, {self.cached:,} answered already, {self.prompt_tokens:,} prompt tokens, at "
            f"most {self.completion_tokens:,} completion tokens"
        )
        if self.assumed:
            lines.append(f"({self.assumed:,} refinement calls are assumed: their questions are not written yet)")
        return "\n".join(lines)


def build_bench(
    folder: str | Path,
    items: Iterable[ItemLike],
    chat: Chat,
    config: BuildConfig | None = None,
    *,
    retry_failed: bool = False,
    progress: bool = True,
) -> BuildResult:
    """Build a personality benchmark with a chat model as its writer.

    Stages, each a folder of Parquet shards in ``folder``: descriptions (``1_personas``), situational questions of each
    item × topic (``2_questions``), their refinement (``3_refined``), filters (``4_personas``, ``4_filtered``: a reason
    for every row dropped), splits disjoint by item and by topic (``5_splits``), and the finished set with its data card
    (``bench``), which `PersonalityBench.from_directory` reads.

    Stopped anywhere, the same call goes on where it was, to the same bytes. With a chat that keeps its replies no call
    is made twice. Memory holds one shard of ``config.shard`` calls, and for the search for repeats one trait's kept
    questions (about 6 kB each: 200 MB for a trait of 36,000).

    Args:
        folder: made if it is not there; one made with other settings, items, prompts or chat is refused.
        items: what the questions are about; see `read_items`.
        chat: the writer.
        config: sizes, shares and limits; by default those of `BuildConfig`.
        retry_failed: ask again where an earlier run got no reply. Answers that could not be used are final: they were
            drawn ``config.attempts`` times.
        progress: show bars.

    Raises:
        ValueError: items that cannot be used.
        ImportError: datasketch is not installed.
        RunFolderError: the folder holds another build, or another process is at work in it.
        ArtifactError: a file of the folder is missing or altered.
        RemoteServiceError: the endpoint cannot be used; what was answered is kept.
    """
    settings = config or BuildConfig()
    checked = build_items(items)
    require_datasketch()
    plan = make_plan(checked, settings)
    identity = {
        "build": _VERSION,
        "settings": settings.to_json(),
        "items": items_digest(checked),
        "n_items": len(checked),
        "prompts": prompts_digest(),
        "chat": chat.identity(),
        "versions": {name: version(name) for name in ("npti-interp", "datasketch")},
    }
    with BuildFolder(folder, identity) as own:
        return _Build(own, plan, chat, progress=progress).run(retry_failed=retry_failed)


def estimate_bench(
    items: Iterable[ItemLike], chat: Chat, config: BuildConfig | None = None, *, folder: str | Path | None = None
) -> BuildEstimate:
    """What `build_bench` would ask for: calls, tokens, and those answered already. Nothing is sent or written.

    Args:
        items: as for `build_bench`.
        chat: the writer.
        config: as for `build_bench`.
        folder: the build's folder, if it was begun: what is finished there needs no call.

    Raises:
        ValueError: items that cannot be used.
    """
    plan = make_plan(build_items(items), config or BuildConfig())
    there = _Begun(Path(folder) if folder is not None else None)
    assumed = 0

    def refinements() -> Iterator[ChatRequest]:
        nonlocal assumed
        for trait in plan.traits:
            for number, cells in enumerate(chunks(plan.cells(trait), plan.config.shard)):
                if there.done(shard_name("3_refined", trait, number)):
                    continue
                name = shard_name("2_questions", trait, number)
                written = there.done(name)
                rows = there.read(name) if written else _supposed_rows(plan, cells)
                tasks = refinement_tasks(rows, {i.id: i for i in plan.items}, plan.config)
                assumed += 0 if written else len(tasks)
                yield from (task.request(plan.config) for task in tasks)

    def requests(stage: str) -> Iterator[ChatRequest]:
        for trait in plan.traits:
            for number, tasks in _first_tasks(plan, stage, trait):
                if not there.done(shard_name(stage, trait, number)):
                    yield from (task.request(plan.config) for task in tasks)

    stages = {
        "personas": chat.estimate(requests("1_personas")),
        "questions": chat.estimate(requests("2_questions")),
        "refinement": chat.estimate(refinements()),
    }
    return BuildEstimate(stages, assumed)


class _Begun:
    """What is finished in a folder, without locking it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path()
        begun = folder is not None and (folder / "manifest.json").is_file()
        self._files: Mapping[str, str] = read_manifest(self._folder) if begun else {}

    def done(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> list[Row]:
        return read_rows(self._folder / name)


def _first_tasks(plan: Plan, stage: str, trait: Trait) -> Iterator[tuple[int, list[Task]]]:
    if stage == "1_personas":
        for number, part in enumerate(chunks(iter(plan.personas(trait)), plan.config.shard)):
            yield number, persona_tasks(part, plan.config)
    else:
        for number, cells in enumerate(chunks(plan.cells(trait), plan.config.shard)):
            yield number, question_tasks(cells, plan.config)


def _supposed_rows(plan: Plan, cells: list[Any]) -> list[Row]:
    """Stand-ins for questions that are not written: as many, and of middling length."""
    length = (plan.config.min_words + plan.config.max_words) // 2
    return [
        {
            "id": f"{c.id}-{n:02d}", "cell": c.id, "item_id": c.item.id,
            "question": " ".join([f"{c.id}-{n:02d}", *["word"] * (length - 1)]),
        }
        for c in cells
        for n in range(1, plan.config.questions_per_cell + 1)
    ]  # fmt: skip


class _Build:
    """One run of a build, in its open folder."""

    def __init__(self, folder: BuildFolder, plan: Plan, chat: Chat, *, progress: bool) -> None:
        self._folder, self._plan, self._chat, self._config = folder, plan, chat, plan.config
        self._items = {i.id: i for i in plan.items}
        self._progress = progress

    def run(self, *, retry_failed: bool) -> BuildResult:
        if retry_failed:
            self._forget_failures()
        self._write_personas()
        self._write_questions()
        self._refine()
        self._filter_personas()
        self._filter_questions()
        self._split()
        if not self._folder.done(_CARD):
            self._finish()
        return BuildResult.load(self._folder.path)

    def _bar(self, what: str, total: int) -> tqdm[Any]:
        return tqdm(total=total, desc=what, delay=2, disable=not self._progress)

    # -- the writer -----------------------------------------------------------------------------------------------

    def _forget_failures(self) -> None:
        """Take back the shards in which a call had no reply, and everything that was made from them."""
        gone: list[str] = []
        for trait in self._plan.traits:
            for stage in ("1_personas", "2_questions", "3_refined"):
                for number in self._folder.shards(stage, trait):
                    if any(row["kind"] == "endpoint" for row in self._folder.read(stage, trait, number)):
                        gone.append(shard_name(stage, trait, number))
                        if stage == "2_questions":
                            gone.append(shard_name("3_refined", trait, number))
        if gone:
            self._folder.forget([*self._folder.names("4_", "5_", f"{BENCH}/"), *gone])

    def _write_personas(self) -> None:
        with self._bar("personas", 2 * self._config.n_personas * len(self._plan.traits)) as bar:
            for trait in self._plan.traits:
                for number, part in enumerate(chunks(iter(self._plan.personas(trait)), self._config.shard)):
                    if self._folder.done(shard_name("1_personas", trait, number)):
                        bar.update(len(part))
                        continue
                    outcomes = self._ask(persona_tasks(part, self._config), bar)
                    self._folder.write("1_personas", trait, number, persona_rows(part, outcomes))

    def _write_questions(self) -> None:
        total = sum(1 for trait in self._plan.traits for _ in self._plan.cells(trait))
        with self._bar("questions", total) as bar:
            for trait in self._plan.traits:
                for number, cells in enumerate(chunks(self._plan.cells(trait), self._config.shard)):
                    if self._folder.done(shard_name("2_questions", trait, number)):
                        bar.update(len(cells))
                        continue
                    outcomes = self._ask(question_tasks(cells, self._config), bar)
                    self._folder.write("2_questions", trait, number, question_rows(cells, outcomes))

    def _refine(self) -> None:
        at_once = -(-self._config.questions_per_cell // self._config.refine_at_once)
        total = at_once * sum(1 for trait in self._plan.traits for _ in self._plan.cells(trait))
        with self._bar("refinement", total) as bar:
            for trait in self._plan.traits:
                for number, cells in enumerate(chunks(self._plan.cells(trait), self._config.shard)):
                    end = bar.n + at_once * len(cells)
                    if not self._folder.done(shard_name("3_refined", trait, number)):
                        rows = self._folder.read("2_questions", trait, number)
                        outcomes = self._ask(refinement_tasks(rows, self._items, self._config), bar)
                        refined = refinement_rows(rows, outcomes, self._config)
                        self._folder.write("3_refined", trait, number, refined)
                    bar.update(end - bar.n)  # cells that gave fewer questions need fewer calls

    def _ask(self, tasks: list[Task], bar: tqdm[Any]) -> list[Any]:
        shown: Progress | None = None if bar.disable else bar
        return ask(self._chat, tasks, self._config, shown)

    # -- filters --------------------------------------------------------------------------------------------------

    def _pending(self, source: str, stage: str, trait: Trait) -> list[int]:
        numbers = self._folder.shards(source, trait)
        return [n for n in numbers if not self._folder.done(shard_name(stage, trait, n))]

    def _filter_personas(self) -> None:
        for trait in self._plan.traits:
            pending = self._pending("1_personas", "4_personas", trait)
            if not pending:
                continue
            index = RepeatIndex(self._config.similarity, self._config.seed)
            found: dict[str, tuple[str, str]] = {}
            for row in self._folder.rows("1_personas", trait):
                if row["text"] is None:
                    continue
                objection = persona_objection(row["text"], self._config)
                if objection is None and (twin := index.repeated(row["id"], row["text"])) is not None:
                    objection = "near-duplicate", f"{twin[0]} ({twin[1]:.2f})"
                if objection is not None:
                    found[row["id"]] = objection
            self._write_filtered("1_personas", "4_personas", "text", trait, pending, found)

    def _filter_questions(self) -> None:
        seen: dict[bytes, str] = {}
        with self._bar("filters", sum(len(self._folder.shards("3_refined", t)) for t in self._plan.traits)) as bar:
            for trait in self._plan.traits:
                pending = self._pending("3_refined", "4_filtered", trait)
                if pending:
                    found = self._question_objections(trait, seen)
                    self._write_filtered("3_refined", "4_filtered", "question", trait, pending, found)
                else:  # texts of the traits before count as repeats in those after
                    for row in self._folder.rows("4_filtered", trait):
                        if row["dropped"] is None:
                            seen[same_text(row["question"])] = row["id"]
                bar.update(len(self._folder.shards("4_filtered", trait)))

    def _question_objections(self, trait: Trait, seen: dict[bytes, str]) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        passed: list[tuple[int, str, str]] = []
        for row in self._folder.rows("3_refined", trait):
            if row["question"] is None:
                continue
            objection = question_objection(row["question"], self._items[row["item_id"]], self._config)
            if objection is not None:
                found[row["id"]] = objection
            else:
                passed.append((_SPLIT_ORDER[row["split"]], row["id"], row["question"]))
        index = RepeatIndex(self._config.similarity, self._config.seed)
        for _, ident, text in sorted(passed):
            first = seen.get(same_text(text))
            if first is not None:
                found[ident] = "duplicate", first
            elif (twin := index.repeated(ident, text)) is not None:
                found[ident] = "near-duplicate", f"{twin[0]} ({twin[1]:.2f})"
            else:
                seen[same_text(text)] = ident
        return found

    def _write_filtered(
        self, source: str, stage: str, column: str, trait: Trait, pending: list[int], found: dict[str, tuple[str, str]]
    ) -> None:
        for number in pending:
            rows = [row for row in self._folder.read(source, trait, number) if row[column] is not None]
            for row in rows:
                row["dropped"], row["detail"] = found.get(row["id"], (None, None))
            self._folder.write(stage, trait, number, rows)

    # -- splits ---------------------------------------------------------------------------------------------------

    def _split(self) -> None:
        for trait in self._plan.traits:
            pending = self._pending("4_filtered", "5_splits", trait)
            if not pending:
                continue
            chosen = self._chosen(trait)
            for number in pending:
                rows = [row for row in self._folder.read("4_filtered", trait, number) if row["dropped"] is None]
                for row in rows:
                    row["unused"] = None
                    if row["split"] == ASIDE:
                        row["unused"] = "item and topic in different splits"
                    elif chosen[row["split"]] is not None and row["id"] not in chosen[row["split"]]:
                        row["unused"] = "beyond the size asked for"
                    row["used"] = row["unused"] is None
                self._folder.write("5_splits", trait, number, rows)

    def _chosen(self, trait: Trait) -> dict[str, Any]:
        """Ids that are used of each split; None where all are."""
        limits: dict[Split, int | None] = {
            "search": self._config.search_per_trait, "test": self._config.test_per_trait
        }  # fmt: skip
        chosen: dict[str, Any] = dict.fromkeys(limits)
        for split, limit in limits.items():
            if limit is None:
                continue
            good = [
                _question(row)
                for row in self._folder.rows("4_filtered", trait)
                if row["split"] == split and row["dropped"] is None
            ]
            if len(good) > limit:
                chosen[split] = {q.id for q in _deal(good, limit)}
        return chosen

    # -- the finished set -----------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Write set and card. The digest is that of `PersonalityBench`, taken while the rows pass by."""
        personas = {trait: self._personas(trait) for trait in self._plan.traits}
        every = sorted((p for own in personas.values() for p in own), key=lambda p: p.id)
        digest = hashlib.sha256(f'{{"personas":{_canonical([asdict(p) for p in every])},"questions":['.encode())
        first = True
        files: list[str] = []
        for trait in self._plan.traits:
            file = f"{trait.value.lower()}.jsonl"
            files += [f"{BENCH}/personas/{file}", f"{BENCH}/questions/{file}"]
            lines = [json.dumps(_persona_row(p), ensure_ascii=False) + "\n" for p in personas[trait]]
            write_atomic(
                self._folder.path / files[-2],
                lambda scratch, lines=lines: scratch.write_text("".join(lines), encoding="utf-8", newline="\n"),
            )

            def write(scratch: Path, trait: Trait = trait) -> None:
                nonlocal first
                with scratch.open("w", encoding="utf-8", newline="\n") as out:
                    for row in self._folder.rows("5_splits", trait):
                        if row["used"]:
                            question = _question(row)
                            out.write(json.dumps(_question_row(question), ensure_ascii=False) + "\n")
                            digest.update(f"{'' if first else ','}{_canonical(asdict(question))}".encode())
                            first = False

            write_atomic(self._folder.path / files[-1], write)
        digest.update(b"]}")
        manifest = {"format": _FORMAT, "name": self._config.name, "digest": digest.hexdigest()}
        write_json(self._folder.path / BENCH / MANIFEST, manifest)
        roles: dict[Trait, dict[str, Role]] = {t: {p.id: p.role for p in own} for t, own in personas.items()}
        card = make_card(self._folder, self._plan, self._chat.identity(), digest.hexdigest(), roles)
        write_atomic(
            self._folder.path / BENCH / "README.md",
            lambda scratch: scratch.write_text(card_text(card), encoding="utf-8"),
        )
        write_json(self._folder.path / _CARD, card)
        self._folder.record(*files, f"{BENCH}/{MANIFEST}", f"{BENCH}/README.md", _CARD)

    def _personas(self, trait: Trait) -> list[Persona]:
        rows = [row for row in self._folder.rows("4_personas", trait) if row["dropped"] is None]
        judges = {ident for pole in POLES for ident in judge_ids([r for r in rows if r["pole"] == pole.value])}
        return [
            Persona(
                row["id"], trait, row["pole"], row["facet"], "judge" if row["id"] in judges else "elicit", row["text"]
            )
            for row in rows
        ]


def judge_ids(rows: list[Row]) -> set[str]:
    """Which descriptions of a pole are kept for the judge: a quarter (at least one of two), facets in turn."""
    wanted = len(rows) // 4 if len(rows) >= 4 else len(rows) // 2
    order = sorted(
        (sum(other["facet"] == row["facet"] for other in rows[i + 1 :]), -i, row["id"]) for i, row in enumerate(rows)
    )
    return {ident for _, _, ident in order[:wanted]}


def _question(row: Row) -> Question:
    return Question(
        row["id"], row["trait"], row["facet"] or None, row["item"], row["key"], row["topic"], row["split"],
        row["question"],
    )  # fmt: skip


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
