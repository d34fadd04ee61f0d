"""The pipeline that builds a benchmark: plan, prompts, filters, stages, and what goes wrong in between."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from chat_server import Body, ChatServer, Fault, broken_json, busy, content, empty_choices, half_body, reset, status
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import npti_interp._files as npti_files
import npti_interp.bench.construction._filters as filters
from npti_interp.bench import PersonalityBench, answer_format, near_duplicates, trait_words
from npti_interp.bench.construction import (
    BuildConfig,
    BuildItem,
    BuildResult,
    Topic,
    build_bench,
    compare_with_key,
    embedded_topics,
    estimate_bench,
    read_items,
)
from npti_interp.bench.construction._build import judge_ids
from npti_interp.bench.construction._cli import build as build_command
from npti_interp.bench.construction._filters import (
    RepeatIndex,
    english_share,
    persona_objection,
    question_objection,
    same_text,
)
from npti_interp.bench.construction._items import build_items
from npti_interp.bench.construction._plan import make_plan
from npti_interp.bench.construction._prompts import (
    TEMPLATES,
    numbered_lines,
    persona_prompt,
    question_prompt,
    refinement_prompt,
)
from npti_interp.chat import ChatClient, ChatEstimate, ChatRequest, ChatResult
from npti_interp.errors import ArtifactError, RemoteServiceError, RunFolderError
from npti_interp.traits import POLES, TRAITS, Trait

UPSTREAM = os.environ.get("NPTI_UPSTREAM")

# ------------------------------------------------------------------------------------------------- a writer to test with

_STATEMENTS = {
    Trait.NEUROTICISM: [
        ("N1", "Picture every way in which a day can go wrong", "Anxiety", 1),
        ("N2", "Sleep well before an important day", "Anxiety", -1),
        ("N3", "Snap at people over spilt coffee", "Anger", 1),
        ("N4", "Let small annoyances go by", "Anger", -1),
    ],
    Trait.CONSCIENTIOUSNESS: [
        ("C1", "Write a list before any trip", "Orderliness", 1),
        ("C2", "Leave dishes for the next morning", "Orderliness", -1),
        ("C3", "Give back what was borrowed on the agreed day", "Dutifulness", 1),
    ],
}
ITEMS = [BuildItem(i, text, t, f, k) for t, own in _STATEMENTS.items() for i, text, f, k in own]
TOPICS = (
    Topic("baking", "bread and cakes"),
    Topic("chess", "clubs and games"),
    Topic("rowing", "boats and races"),
    Topic("choir", "rehearsals and concerts"),
)
CONFIG = BuildConfig(
    name="small", n_personas=5, topics=TOPICS, questions_per_cell=4, refine_at_once=3, test_items=0.3, test_topics=0.25,
    shard=5,
)  # fmt: skip

_NOUNS = """lamp ladder bucket kettle drawer carpet engine bridge tunnel barrel blanket candle hammer helmet jacket lantern
    magnet mirror needle oven paddle pillow pocket ribbon saddle shovel spoon ticket trolley tyre umbrella violin wallet
    whistle window anchor apron basket bench bottle broom cabinet camera cushion feather fence freezer gate glove""".split()  # noqa: SIM905
_BAD = (
    "Your {0} breaks beside the {1} near the {2} on a wet morning. Do you repair the {3} at once?",
    "Your {0} breaks beside the {1}. What do you do: a) call a friend, b) sell the {2}, c) nothing about the {3}?",
    "Your {0} breaks beside the {1} and the {2} falls down. How likely are you to mend the {3} today?",
    "You are anxious because the {0} beside the {1} fell on the {2}. What do you do about the {3} now?",
    "What about the {0}?",
    "Votre {0} tombe dans la rue avant le départ du train vers la {1} et la {2}. Que faites-vous avec {3} ?",
    "Your [name] drops the {0} beside the {1} while the {2} is wet. What do you do with the {3} then?",
)


def _drawn(*parts: object) -> random.Random:
    return random.Random(hashlib.sha256(repr(parts).encode()).hexdigest())


def _situation(topic: str, item: str, n: int) -> str:
    rng = _drawn(topic, item, n)
    nouns = rng.sample(_NOUNS, 8)
    if n < 3 and rng.random() < 0.4:
        return rng.choice(_BAD).format(*nouns)
    if n == 3 and rng.random() < 0.6:
        return "At noon the old clock stops while you carry a heavy box upstairs to the office. What do you do next?"
    return (
        f"During {topic} a {nouns[0]} falls on your {nouns[1]} while the {nouns[2]} and a {nouns[3]} lie by the "
        f"{nouns[4]}. What do you do about the {nouns[5]}, the {nouns[6]} and your {nouns[7]}?"
    )


def write(prompt: str, structured: bool) -> str:
    """A plausible answer to each of the pipeline's prompts; it depends on the prompt alone."""
    if (asked := re.search(r"^Write (\d+) interview questions", prompt)) is not None:
        topic = re.search(r"Area of life: (.*?) \(", prompt)
        item = re.search(r'who answers: "(.*?)"\.', prompt)
        assert topic and item
        texts = [_situation(topic[1], item[1], n) for n in range(int(asked[1]))]
        if structured:
            return json.dumps({"questions": texts})
        return "Sure:\n\n" + "\n".join(f"{n}. {t}" for n, t in enumerate(texts, start=1))
    if prompt.startswith("Revise"):
        given_ = numbered_lines(prompt)
        better = [(n, text.replace("What do you do", "What would you do", 1)) for n, text in given_]
        if structured:
            return json.dumps({"questions": [{"number": n, "question": t} for n, t in reversed(better)]})
        return "\n".join(f"**{n}.** {t}" for n, t in better)
    assert prompt.startswith("Describe a person")
    rng = _drawn(prompt)
    text = "You keep your " + " near the ".join(rng.sample(_NOUNS, 8)) + ", and that is all you talk of."
    return json.dumps({"description": text}) if structured else text


def answer(body: Body) -> str:
    return write(body["messages"][-1]["content"], "response_format" in body)


class Writer:
    """A chat in this process: no server, no cache, everything counted."""

    def __init__(self, spoil: Callable[[ChatRequest, int], ChatResult | None] = lambda request, n: None) -> None:
        self._spoil = spoil
        self.asked: Counter[str] = Counter()

    def complete(self, requests: Iterable[ChatRequest], *, progress: Any = False) -> Iterator[ChatResult]:
        for request in requests:
            prompt = request.messages[-1]["content"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
            self.asked[f"{prompt}{request.seed}"] += 1
            spoilt = self._spoil(request, self.asked.total())
            if spoilt is not None:
                yield spoilt
            else:
                text = write(prompt, structured=True)
                yield ChatResult(text, json.loads(text), model="writer")

    def stream(self, requests: Iterable[ChatRequest], *, progress: Any = False) -> Iterator[tuple[int, ChatResult]]:
        return enumerate(self.complete(requests))

    def estimate(self, requests: Iterable[ChatRequest]) -> ChatEstimate:
        made = list(requests)
        tokens = sum(r.max_tokens for r in made)
        return ChatEstimate(len(made), 0, 0, len(made), len(made), tokens, "not counted")

    def identity(self) -> dict[str, Any]:
        return {"chat": "test", "model": "writer"}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a build but its lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def client(server: ChatServer, cache: Path, **settings_: Any) -> ChatClient:
    given_: dict[str, Any] = {"concurrency": 4, "pause": 0.01, "timeout": 5.0, "retries": 6, **settings_}
    return ChatClient(server.url, "writer", cache=cache, **given_)


def built(folder: Path, chat: Any = None, config: BuildConfig = CONFIG, **more: Any) -> BuildResult:
    return build_bench(folder, more.pop("items", ITEMS), chat or Writer(), config, progress=False, **more)


def table(result: BuildResult, stage: str) -> pd.DataFrame:
    return pd.read_parquet(result.folder / stage)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """A build over HTTP in which nothing goes wrong."""
    place = tmp_path_factory.mktemp("reference")
    with ChatServer(answer, model="writer") as server:
        return built(place / "build", client(server, place / "cache"))


# ------------------------------------------------------------------------------------------------------------- topics


def test_sixty_topics_of_different_names_that_name_no_trait():
    topics = embedded_topics()
    assert len(topics) == 60 == len({t.name.casefold() for t in topics})
    assert [w for t in topics for trait in TRAITS for w in trait_words(f"{t.name} {t.scope}", trait)] == []
    assert 300 * len(topics) * BuildConfig().questions_per_cell == 180_000


# -------------------------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "0 were given"),
        ([ITEMS[0]], "Neuroticism: one item only"),
        ([ITEMS[0], replace(ITEMS[1], id="N1")], "two items have the id 'N1'"),
        ([ITEMS[0], replace(ITEMS[1], text=ITEMS[0].text.upper() + ".")], "two items have the text"),
        ([ITEMS[0], replace(ITEMS[1], key=0)], "item 'N2': key must be 1 or -1, got 0"),
        ([ITEMS[0], replace(ITEMS[1], text=" . ")], "item 'N2' has no text"),
    ],
)
def test_items_that_cannot_be_used_are_refused(tmp_path: Path, wrong: list[BuildItem], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        built(tmp_path / "build", items=wrong)
    assert not (tmp_path / "build").exists()


def test_items_are_sorted_by_trait_and_facets_spelt_as_here():
    items = build_items([replace(ITEMS[0], facet=" anxiety "), replace(ITEMS[1], facet="My own"), *ITEMS[4:]])
    assert [i.id for i in items] == ["C1", "C2", "C3", "N1", "N2"]
    assert [i.facet for i in items[3:]] == ["Anxiety", "My own"]


def test_items_are_compared_with_a_key_by_text_never_by_place():
    compare_with_key(ITEMS, reversed([replace(i, id=f"k{i.id}", text=f" {i.text.lower()}.") for i in ITEMS]))
    key = [replace(ITEMS[0], key=-1), replace(ITEMS[1], facet="Anger"), *ITEMS[3:]]
    with pytest.raises(ValueError, match=r"3 items contradict the key: N1 .*'anxiety', 1.*'anxiety', -1") as caught:
        compare_with_key(ITEMS, key)
    assert "N2" in str(caught.value) and "N3 ('Snap at people over spilt coffee') is not in the key" in str(
        caught.value
    )


def test_items_are_read_from_json_and_csv(tmp_path: Path):
    rows = [{"id": i.id, "text": i.text, "domain": i.domain.letter, "facet": i.facet, "key": i.key} for i in ITEMS]
    (tmp_path / "own.json").write_text(json.dumps({"name": "own", "items": rows}))
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    assert read_items(tmp_path / "own.json") == read_items(tmp_path / "own.csv") == build_items(ITEMS)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_items(tmp_path / "none.json")


@pytest.mark.skipif(UPSTREAM is None, reason="NPTI_UPSTREAM is not set")
@pytest.mark.parametrize("n_items", [120, 300])
def test_the_ipip_neo_has_thirty_facets_and_the_signs_of_its_published_key(n_items: int, tmp_path: Path):
    pytest.importorskip("python_calamine")
    key = Path(UPSTREAM or "") / "ipip" / "IPIP-NEO-ItemKey.xls"
    items = read_items(key, n_items)
    per_facet = Counter((i.domain, i.facet) for i in items)
    assert len(items) == n_items and len(per_facet) == 30 and set(per_facet.values()) == {n_items // 30}
    assert all(facet in domain.info.facets for domain, facet in per_facet)
    sheet = pd.read_excel(key, engine="calamine")
    sign = {str(row["Item"]).strip(): str(row["Sign"]).strip()[0] for row in sheet.to_dict("records")}
    assert [i.sign for i in items] == [sign[i.text] for i in items]
    compare_with_key(items, read_items(key, 300))
    turned = [replace(items[7], key=-items[7].key)]
    with pytest.raises(ValueError, match="1 items contradict the key"):
        compare_with_key(turned, items)
    sheet.to_csv(tmp_path / "key.csv", index=False)
    assert read_items(tmp_path / "key.csv", n_items, key=key) == items


# --------------------------------------------------------------------------------------------------------------- plan


@st.composite
def _item_sets(draw: st.DrawFn) -> list[BuildItem]:
    made: list[BuildItem] = []
    for trait in draw(st.lists(st.sampled_from(TRAITS), min_size=1, unique=True)):
        for n in range(draw(st.integers(2, 14))):
            facet = trait.info.facets[draw(st.integers(0, 5))]
            made.append(
                BuildItem(f"{trait.letter}{n}", f"{trait} statement {n}", trait, facet, draw(st.sampled_from([1, -1])))
            )
    return made


@given(_item_sets(), st.integers(2, 20), st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.integers(0, 5), st.booleans())
def test_splits_share_neither_items_nor_topics(
    items: list[BuildItem], n_topics: int, item_share: float, topic_share: float, seed: int, write_aside: bool
):
    topics = embedded_topics()[:n_topics]
    config = BuildConfig(
        topics=topics, test_items=item_share, test_topics=topic_share, seed=seed, write_aside=write_aside
    )
    plan = make_plan(build_items(items), config)
    cells = [cell for trait in plan.traits for cell in plan.cells(trait)]
    assert [c.id for c in cells] == sorted({c.id for c in cells})
    by_split = {s: [c for c in cells if c.split == s] for s in ("search", "test", "aside")}
    for part in (lambda c: c.item.id, lambda c: c.topic.name):
        assert not {part(c) for c in by_split["search"]} & {part(c) for c in by_split["test"]}
    for trait in plan.traits:
        own = [i for i in items if i.domain is trait]
        late = {c.item.id for c in by_split["test"] if c.item.domain is trait}
        assert len(late) == min(len(own) - 1, max(1, round(len(own) * item_share)))
        assert {c.item.id for c in by_split["search"] if c.item.domain is trait} == {i.id for i in own} - late
    counts = plan.cell_counts()
    assert counts.total() == len(items) * n_topics
    for split in ("search", "test") + (("aside",) if write_aside else ()):
        assert sum(n for (*_, s), n in counts.items() if s == split) == len(by_split[split])
    assert write_aside or not by_split["aside"]


def test_splits_do_not_depend_on_the_order_of_files_and_follow_the_seed():
    plan, turned = make_plan(build_items(ITEMS), CONFIG), make_plan(build_items(ITEMS[::-1]), CONFIG)
    assert plan.item_split == turned.item_split and plan.topic_split == turned.topic_split
    seeds = [make_plan(build_items(ITEMS), replace(CONFIG, seed=s)) for s in range(12)]
    assert len({tuple(p.topic_split.items()) for p in seeds}) > 1
    assert len({tuple(p.item_split.items()) for p in seeds}) > 1


def test_test_items_are_balanced_over_facets_and_keys():
    items = [
        BuildItem(f"{t.letter}{f}{k}{n}", f"{t} {f} {k} {n}", t, t.info.facets[f], k)
        for t in TRAITS for f in range(6) for k in (1, -1) for n in range(5)
    ]  # fmt: skip
    plan = make_plan(build_items(items), BuildConfig())
    late = Counter((i.domain, i.facet, i.key) for i in items if plan.item_split[i.id] == "test")
    assert len(late) == 5 * 6 * 2 and set(late.values()) == {1}


def test_descriptions_mix_each_facet_with_the_others_in_turn():
    plan = make_plan(build_items(ITEMS), replace(CONFIG, n_personas=80))
    for trait in plan.traits:
        own = plan.personas(trait)
        assert Counter(p.pole for p in own) == dict.fromkeys(POLES, 80)
        assert all(p.facet != p.second for p in own)
        high = [(p.facet, p.second, p.circumstance) for p in own if p.pole == "high"]
        assert len(set(high)) == 80 and len({(a, b) for a, b, _ in high}) == 30
        assert max(Counter(a for a, *_ in high).values()) - min(Counter(a for a, *_ in high).values()) <= 1


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 9, 80])
def test_a_quarter_of_the_descriptions_is_kept_for_the_judge_over_all_facets(n: int):
    rows = [{"id": f"p{i}", "facet": f"f{i % 6}"} for i in range(n)]
    chosen = judge_ids(rows)
    assert len(chosen) == {0: 0, 1: 0, 2: 1, 3: 1}.get(n, n // 4)
    counts = Counter(r["facet"] for r in rows if r["id"] in chosen)
    assert not counts or max(counts.values()) - (min(counts.values()) if len(counts) == 6 else 0) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_personas": 0}, "n_personas must be at least 1, got 0"),
        ({"test_items": 1.0}, "test_items must lie between 0 and 1, got 1.0"),
        ({"test_per_trait": 0}, "test_per_trait must be at least 1, or None for all; got 0"),
        ({"min_words": 99}, "min_words is 99, above max_words, which is 90"),
        ({"similarity": 1.0}, "similarity"),
        ({"temperature": 0.0}, "further draws would give the same answer"),
        ({"questions_per_cell": 100}, "at most 99"),
        ({"topics": TOPICS[:1]}, "at least two topics"),
        ({"licence": " "}, "licence"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(CONFIG, **changes)


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_carry_the_rules_and_answers_are_read_by_number(monkeypatch: pytest.MonkeyPatch):
    item, read = ITEMS[0], dict[int, str]()
    prompt = question_prompt(item, TOPICS[0], CONFIG)
    for form in (prompt.messages, prompt.plain):
        rules, example, text = form[0]["content"], form[2]["content"], form[-1]["content"]
        assert item.text in text and "baking (bread and cakes)" in text
        assert "yes or no" in rules and "neurotic" in rules and "12 to 90 words" in rules and "{" not in text
        read = prompt.read_plain(example) if form is prompt.plain else prompt.read_structured(json.loads(example))
        assert len(read) == 2
    assert prompt.read_structured({"questions": ["a?", " ", "b?", "c?", "d?", "e?"]}) == {
        1: "a?",
        2: "b?",
        3: "c?",
    }  # 4 asked
    assert prompt.read_plain("Here:\n1. a?\n2) “b?”\n\nBye") == {1: "a?", 2: "b?"}
    assert prompt.read_plain("a?\nb?") == {}
    refine = refinement_prompt(item, ["One here?", "Two here?", "Three?"], CONFIG)
    assert "1. One here?\n2. Two here?\n3. Three?" in refine.messages[-1]["content"]
    pairs = [{"number": n, "question": q} for n, q in ((3, "c"), (1, "a"), (3, "C"), (7, "x"), (2, " "))]
    assert refine.read_structured({"questions": pairs}) == {1: "a"}
    assert refine.read_plain("2. b\n**1.** a") == {1: "a", 2: "b"}
    persona = persona_prompt(Trait.OPENNESS, POLES[1], "Intellect", "Liberalism", "at work", CONFIG)
    shown = refine.read_plain(refine.plain[2]["content"])
    assert shown == refine.read_structured(json.loads(refine.messages[2]["content"]))
    # The examples keep every rule, but handing them back is no answer.
    assert {o and o[0] for q in (*shown.values(), *read.values()) if (o := question_objection(q, item, CONFIG))} == {
        "copies the prompt's example"
    }
    monkeypatch.setattr(filters, "QUESTION_EXAMPLES", {})
    assert [question_objection(q, item, CONFIG) for q in (*shown.values(), *read.values())] == [None] * 4
    assert "low in intellect, and also low in liberalism" in persona.messages[-1]["content"]
    spoken = persona.read_plain(persona.plain[2]["content"])
    assert spoken == persona.read_structured(json.loads(persona.messages[2]["content"]))
    assert persona_objection(spoken[1], CONFIG) == ("copies the prompt's example", "1.00 of persona_example")
    monkeypatch.setattr(filters, "PERSONA_EXAMPLES", {})
    assert persona_objection(spoken[1], CONFIG) is None
    assert persona.read_plain('"You like\n old things."') == {1: "You like old things."}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("No list at all.", []),
        ("1. a\n2. b", [(1, "a"), (2, "b")]),
        ("Sure!\n\n 1) a goes\non here\n\nnot here\n3: c", [(1, "a goes on here"), (3, "c")]),
        ("**2.** b\n* 4. d", [(2, "b"), (4, "d")]),
        ("1. \n2. b", [(2, "b")]),
        ("In 1999. It rained.\n1999. no", []),
        ("1.5 litres", []),
    ],
)
def test_numbered_lists_are_read_line_by_line(text: str, expected: list[tuple[int, str]]):
    assert numbered_lines(text) == expected


@given(st.lists(st.from_regex(r"[A-Za-z][a-z ,]{0,30}[a-z]\?", fullmatch=True), min_size=1, max_size=12))
def test_a_numbered_list_is_read_as_it_was_written(texts: list[str]):
    listed = "\n".join(f"{n}. {t}" for n, t in enumerate(texts, start=1))
    assert [t.split() for _, t in numbered_lines(listed)] == [t.split() for t in texts]


# ------------------------------------------------------------------------------------------------------------ filters

_OPEN = "The oven stops working while your guests sit down and the bread is still pale. What do you do now?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_OPEN, None),
        (_OPEN.replace("What do you do now?", "Do you call for help?"), "yes/no"),
        (_OPEN.replace("What do you do now?", "Is this your own fault, yes or no?"), "multiple choice"),
        (_OPEN.replace("What do you do now?", "How likely are you to apologise?"), "scale"),
        (_OPEN.replace("What do you do now?", "On a scale from 1 to 5, how do you feel about it?"), "scale"),
        (_OPEN.replace("What do you do now?", "Which is it: a) leave it b) order pizza c) laugh?"), "multiple choice"),
        (_OPEN.replace("What do you do now?", "What do you prefer, to order in or to go out?"), "multiple choice"),
        (_OPEN.replace("now?", "now? How do you feel about that?"), "several questions"),
        (_OPEN.replace("What do you do now?", "You do something about it."), "not an open question"),
        (_OPEN.replace("your guests", "your anxious guests"), "trait word"),
        (_OPEN.replace("your guests", "in your anger guests"), "trait word"),
        ("You picture every way in which a day can go wrong while the bread rises. What do you do?", "quotes the item"),
        ("What would you do now?", "too short"),
        (_OPEN + " " + _OPEN.replace("?", ".") * 6, "too long"),
        ("You decide and you decide and you decide and you decide and you decide. What do you decide now?",
         "repeats itself"),
        ("Your friend rings to say that they will be at your door in ten minutes, while the cat lies in the hall. How do "
         "you spend the time?", "copies the prompt's example"),
        (_OPEN.replace("bread", "[food]"), "placeholder or markup"),
        (_OPEN.replace("bread", "**bread**"), "placeholder or markup"),
        ("Here is a revised question: " + _OPEN, "speaks of the task"),
        (_OPEN.replace("while", "while, as this statement says,"), "speaks of the task"),
        ("The oven stops while the guests sit at the table and all the bread is pale. What is to be done?",
         "does not address the reader"),
        ("Der Ofen fällt aus, während deine Gäste schon am Tisch sitzen und warten. Was machst du jetzt damit?",
         "not English"),
        ("L'horno se apaga mientras los invitados esperan en la mesa de tu casa. Que haces tu en ese momento?",
         "not English"),
        ("烤箱坏了，客人已经坐下，面包还是白的。你现在怎么办？", "not English"),
        ("", "too short"),
    ],
)  # fmt: skip
def test_questions_are_dropped_for_the_right_reason(text: str, reason: str | None):
    found = question_objection(text, ITEMS[0], CONFIG)
    assert (found and found[0]) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("You talk to everyone on the train, and you are the last to leave whatever you were asked to.", None),
        ("A person who talks to everyone on the train, and you would be the last to leave with them.",
         "does not begin with “You”"),
        ("You talk.", "too short"),
        ("You talk to [name] on the train, and you are the last to leave whatever you were asked to.",
         "placeholder or markup"),
        ("You, as an AI, talk to everyone on the train, and you are the last to leave any of them.",
         "speaks of the task"),
        ("You " + "talk to all of them and " * 60, "too long"),
    ],
)  # fmt: skip
def test_descriptions_are_dropped_for_the_right_reason(text: str, reason: str | None):
    found = persona_objection(text, CONFIG)
    assert (found and found[0]) == reason


def test_the_embedded_set_passes_all_rules():
    bench = PersonalityBench.embedded()
    stand_in = BuildItem("x", "none of these words", Trait.OPENNESS, "", 1)
    found = {
        q.id: objection
        for q in bench.questions()
        if (objection := question_objection(q.text, replace(stand_in, domain=q.trait), BuildConfig()))
    }
    # One of the 660 speaks to nobody; all others pass every rule.
    assert found == {"C-058": ("does not address the reader", "")}
    spoken = [persona_objection(p.text, BuildConfig()) for t in TRAITS for o in POLES for p in bench.personas(t, o)]
    assert spoken == [None] * 180


def test_english_is_told_from_other_languages_with_room_to_spare():
    english = [english_share(q.text) for q in PersonalityBench.embedded().questions()]
    others = [
        "Ta voiture tombe en panne au milieu de la nuit sur une petite route de campagne. Que fais-tu à ce moment?",
        "Su coche se para de noche en una carretera pequena lejos de la ciudad. Que hace usted en ese momento?",
        "Dein Auto bleibt nachts auf einer kleinen Strasse stehen und so war es schon oft. Was machst du in dem Moment?",
        "Je auto staat midden in de nacht stil op een kleine weg en er is daar niemand. Wat doe je dan in het donker?",
        "La tua auto si ferma di notte in una piccola strada di campagna e non passa nessuno. Che cosa fai a quel punto?",
        "Bilen stannar mitt i natten och det finns ingen i den lilla byn som kan hjelpe deg. Hva gjor du i det?",
    ]
    assert min(english) > 0.3 and max(map(english_share, others)) < 0.2


@given(st.lists(st.sampled_from(_NOUNS), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_case_punctuation_and_space_make_no_other_text(words: list[str], rng: random.Random):
    text = " ".join(words)
    other = "".join(rng.choice([w.upper(), w.title()]) + rng.choice([" ", ",  ", ". ", "\n"]) for w in words)
    assert same_text(text) == same_text(other)
    assert same_text(text) != same_text(text + " more")


def test_repeats_are_real_ones_and_hardly_any_is_missed():
    texts = [q.text for q in PersonalityBench.embedded().questions()][:200]
    rng = random.Random(0)
    changed: list[str] = []
    for text in texts:
        words = text.split()
        for _ in range(rng.randrange(5)):
            words[rng.randrange(len(words))] = rng.choice(_NOUNS)
        changed.append(" ".join(words))
    index = RepeatIndex(0.5, seed=0)
    own = {n: index.repeated(str(n), text) for n, text in enumerate(texts)}
    assert set(own.values()) == {None} and len(index) == 200
    true = {(i, j - 200): s for i, j, s in near_duplicates([*texts, *changed], 0.5) if i < 200 <= j}
    found = {
        (int(twin[0]), j): twin[1] for j, t in enumerate(changed) if (twin := index.repeated(f"c{j}", t)) is not None
    }
    assert all(true[pair] == pytest.approx(s) for pair, s in found.items())
    assert len(true) > 120 and len(found) / len(true) > 0.95
    close = {pair for pair, s in true.items() if s > 0.7}
    assert len(close) > 60 and close <= set(found)


# ------------------------------------------------------------------------------------------------------ whole builds


def test_the_finished_set_is_read_back_as_it_was_written(reference: BuildResult):
    bench = reference.bench()
    assert bench.name == "small" and bench.digest == reference.card["digest"]
    assert bench.report.warnings == () and bench.report.closed_format == () and bench.report.duplicate_questions == ()
    assert bench.traits == (Trait.CONSCIENTIOUSNESS, Trait.NEUROTICISM)
    used = table(reference, "5_splits").query("used")
    assert {q.id: (q.text, q.split, q.item, q.key, q.facet, q.topic) for q in bench.questions()} == {
        r.id: (r.question, r.split, r.item, r.key, r.facet, r.topic) for r in used.itertuples()
    }
    for q in bench.questions():
        assert answer_format(q) == [] and trait_words(q) == []
    for trait, pole in itertools.product(bench.traits, POLES):
        assert len(bench.personas(trait, pole, "judge")) == 1 and len(bench.personas(trait, pole, "elicit")) >= 3
    search, test = bench.questions(split="search"), bench.questions(split="test")
    assert search and test
    assert not {q.topic for q in search} & {q.topic for q in test}
    assert not {q.item for q in search} & {q.item for q in test}


def test_no_row_is_lost_between_stages_and_every_dropped_one_has_its_reason(reference: BuildResult):
    written, refined = table(reference, "2_questions"), table(reference, "3_refined")
    kept, split = table(reference, "4_filtered"), table(reference, "5_splits")
    plan = make_plan(build_items(ITEMS), CONFIG)
    cells = [c.id for t in plan.traits for c in plan.cells(t)]
    assert list(written["cell"].unique()) == cells and set(written.groupby("cell").size()) == {4}
    assert list(refined["id"]) == list(written["id"]) and list(refined["written"]) == list(written["question"])
    assert any(refined["written"] != refined["question"])
    assert list(kept["id"]) == list(refined["id"])
    assert list(split["id"]) == list(kept.loc[kept["dropped"].isna(), "id"])
    dropped = kept.dropna(subset="dropped")
    assert {"yes/no", "multiple choice", "scale", "trait word", "too short", "not English", "placeholder or markup",
            "duplicate"} <= set(dropped["dropped"])  # fmt: skip
    assert dropped["detail"].notna().all()
    again = dropped[dropped["dropped"] == "duplicate"]
    assert set(again["detail"]) <= set(split["id"])
    # Of equal texts in both splits the one of the test split stays, and it does so once in all traits.
    first = kept.set_index("id").loc[again["detail"].iloc[0]]
    assert len(set(again["detail"])) == 1 and first["split"] == "test" and "search" in set(again["split"])
    assert len(set(again["trait"])) == 2


def test_the_card_tells_what_is_in_the_files(reference: BuildResult):
    card, bench = reference.card, reference.bench()
    for row in card["questions"]:
        own = {"trait": row["trait"], "facet": row["facet"], "key": row["key"]}
        for stage, column, where in (
            ("2_questions", "written", lambda d: d["question"].notna()),
            ("3_refined", "refined", lambda d: d["question"].notna()),
            ("4_filtered", "kept", lambda d: d["dropped"].isna()),
            ("5_splits", "search", lambda d: d["used"] & (d["split"] == "search")),
            ("5_splits", "test", lambda d: d["used"] & (d["split"] == "test")),
        ):
            found = table(reference, stage)
            for name, value in own.items():
                found = found[found[name] == value]
            assert row[column] == where(found).sum(), (stage, own)
        assert row["kept"] == row["search"] + row["test"] + row["aside"] + row["surplus"]
    assert sum(r["planned"] + r["aside_cells"] for r in card["questions"]) == len(ITEMS) * len(TOPICS)
    dropped = table(reference, "4_filtered").dropna(subset="dropped").groupby(["trait", "dropped"]).size()
    told = {(r["trait"], r["reason"]): r["n"] for r in card["dropped"] if r["of"] == "questions"}
    assert told == dropped.to_dict()
    assert sum(r["search"] + r["test"] for r in card["questions"]) == len(bench.questions())
    assert sum(r["elicit"] + r["judge"] for r in card["personas"]) == sum(
        len(bench.personas(t, p)) for t in bench.traits for p in POLES
    )
    text = (reference.path / "README.md").read_text()
    for expected in (
        *TEMPLATES.values(),
        card["prompts"]["digest"],
        "CC-BY-4.0",
        "writer",
        "datasketch",
        card["digest"],
    ):
        assert expected in text
    assert all(t.name in text for t in TOPICS) and "trait word" in text
    assert card["failures"] == [] and card["answers"]["refinement"] == {
        "structured": sum(r["refined"] for r in card["questions"]), "plain": 0, "drawn again": 0
    }  # fmt: skip
    assert f"questions kept: {sum(r['kept'] for r in card['questions'])} of" in reference.summary()
    assert "trait word" in reference._repr_html_()


def test_the_same_build_gives_the_same_bytes_and_is_not_made_again(tmp_path: Path, reference: BuildResult):
    with ChatServer(answer, model="writer") as server:
        again = built(tmp_path / "build", client(server, tmp_path / "cache", concurrency=1))
        assert files_of(again.folder) == files_of(reference.folder)
        asked = len(server.received)
        before = {p: p.stat().st_mtime_ns for p in again.folder.rglob("*.parquet")}
        assert built(tmp_path / "build", client(server, tmp_path / "nothing")).card == again.card
        assert len(server.received) == asked
        assert {p: p.stat().st_mtime_ns for p in again.folder.rglob("*.parquet")} == before


def test_an_endpoint_without_schemas_writes_the_same_set(tmp_path: Path, reference: BuildResult):
    with ChatServer(answer, model="writer", refuses_format=True) as server:
        plain = built(tmp_path / "build", client(server, tmp_path / "cache"))
    assert {k: v for k, v in files_of(plain.path).items() if k[-5:] == "jsonl"} == {
        k: v for k, v in files_of(reference.path).items() if k[-5:] == "jsonl"
    }
    assert {a["structured"] for a in plain.card["answers"].values()} == {0}


@pytest.mark.parametrize(
    "other",
    [
        {"config": replace(CONFIG, seed=1)},
        {"config": replace(CONFIG, topics=(*TOPICS[:3], Topic("choir", "other songs")))},
        {"items": [replace(ITEMS[0], key=-1), *ITEMS[1:]]},
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path: Path, other: dict[str, Any]):
    built(tmp_path / "build")
    before = files_of(tmp_path / "build")
    with pytest.raises(RunFolderError, match="made with other settings"):
        built(tmp_path / "build", **other)
    writer = Writer()
    writer.identity = lambda: {"chat": "test", "model": "another"}
    with pytest.raises(RunFolderError, match="model: 'writer' there, 'another' now"):
        built(tmp_path / "build", writer)
    assert files_of(tmp_path / "build") == before


def test_other_prompts_are_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built(tmp_path / "build")
    monkeypatch.setitem(TEMPLATES, "system", "Write well.")
    with pytest.raises(RunFolderError, match="prompts: "):
        built(tmp_path / "build")


def test_an_altered_shard_is_noticed(tmp_path: Path):
    result = built(tmp_path / "build")
    shard = next((result.folder / "2_questions").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="altered"):
        built(tmp_path / "build")
    with pytest.raises(FileNotFoundError, match="no finished build"):
        BuildResult.load(tmp_path / "other")


def test_cells_of_both_splits_are_written_if_asked_and_set_aside(tmp_path: Path, reference: BuildResult):
    result = built(tmp_path / "build", config=replace(CONFIG, write_aside=True))
    split = table(result, "5_splits")
    aside = split[split["split"] == "aside"]
    plan = make_plan(build_items(ITEMS), CONFIG)
    assert len(aside) and not aside["used"].any() and set(aside["unused"]) == {"item and topic in different splits"}
    assert all(plan.item_split[r.item_id] != plan.topic_split[r.topic] for r in aside.itertuples())
    assert sum(r["aside"] for r in result.card["questions"]) == len(aside)
    # What is set aside is looked at last, so that it changes nothing of the splits.
    assert [q.text for q in result.bench().questions()] == [q.text for q in reference.bench().questions()]


def test_sizes_are_kept_and_balanced(tmp_path: Path):
    result = built(tmp_path / "build", config=replace(CONFIG, search_per_trait=6, test_per_trait=1))
    bench = result.bench()
    for trait in bench.traits:
        own = bench.questions(trait, "search")
        assert len(own) == 6 and len(bench.questions(trait, "test")) == 1
        facets = Counter(q.facet for q in own)
        assert len(facets) == 1 or max(facets.values()) - min(facets.values()) <= 1
        assert len({q.topic for q in own}) == 3
    surplus = table(result, "5_splits").query("not used")
    assert len(surplus) and set(surplus["unused"]) == {"beyond the size asked for"}
    assert sum(r["surplus"] for r in result.card["questions"]) == len(surplus)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_faults_on_the_way_change_no_byte_and_cost_no_second_answer(tmp_path: Path, reference: BuildResult):
    late, hollow = Fault(delay=1.5), empty_choices()
    kinds = [late, hollow, busy(0.01), status(500), status(503), reset(), half_body(), broken_json(), *[None] * 8]
    rng, slow, unread = random.Random(1), 2, 0

    def faults(body: Body, number: int) -> Fault | None:
        nonlocal slow, unread
        fault = rng.choice(kinds)
        if fault is late:
            slow -= 1
            fault = fault if slow >= 0 else None
        unread += fault in (late, hollow)
        return fault

    with ChatServer(answer, faults, model="writer") as server:
        result = built(tmp_path / "build", client(server, tmp_path / "cache", timeout=1.0, retries=40, pause=0.001))
        assert len(server.received) > 1.3 * len(server.answered)
        assert files_of(result.folder) == files_of(reference.folder)
        # What the server counts as answered although nobody could use it: too late, or without a choice in it.
        assert sum(n - 1 for n in server.answered.values()) <= unread


def test_answers_that_cannot_be_used_are_drawn_again(tmp_path: Path, reference: BuildResult):
    seen: set[str] = set()
    spoilt: Counter[str] = Counter()
    kinds = [content("{}"), content('{"questions": "one"}'), content("no list"), content('["half'), content("")]

    def faults(body: Body, number: int) -> Fault | None:
        prompt = body["messages"][-1]["content"]
        own = hashlib.sha256(prompt.encode()).hexdigest()
        if int(own, 16) % 3 or own in seen or prompt.startswith("Describe"):
            return None
        kind = kinds[int(own, 16) % len(kinds)]
        if "response_format" not in body or kind is kinds[-1]:  # both forms are spoilt, then the draw is lost
            seen.add(own)
        spoilt[own] += 1
        return kind

    with ChatServer(answer, faults, model="writer") as server:
        result = built(tmp_path / "build", client(server, tmp_path / "cache", concurrency=1))
    ours, theirs = files_of(result.path), files_of(reference.path)
    assert {k: v for k, v in ours.items() if k.endswith("jsonl")} == {
        k: v for k, v in theirs.items() if k.endswith("jsonl")
    }
    assert spoilt and sum(a["drawn again"] for a in result.card["answers"].values()) > 0
    assert result.card["failures"] == []


def test_failures_are_rows_with_a_reason_and_are_counted(tmp_path: Path):
    def spoil(request: ChatRequest, n: int) -> ChatResult | None:
        prompt = request.messages[-1]["content"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
        if prompt.startswith("Describe") and "in the evening" in prompt:
            return ChatResult(failure="the model refused: no", kind="content")
        if "Area of life: baking" in prompt:
            return ChatResult(failure="cut off at 480 tokens; raise max_tokens", kind="unfinished")
        if prompt.startswith("Revise 3"):
            made = json.loads(write(prompt, structured=True))
            return ChatResult("…", {"questions": [q for q in made["questions"] if q["number"] != 2]})
        return None

    writer, config = Writer(spoil), replace(CONFIG, questions_per_cell=3)
    result = built(tmp_path / "build", writer, config)
    personas, written, refined = (table(result, s) for s in ("1_personas", "2_questions", "3_refined"))
    lost = personas[personas["text"].isna()]
    assert len(lost) == 4 and set(lost["failure"]) == {"the model refused: no"} and set(lost["kind"]) == {"content"}
    cells = written[written["question"].isna()]
    assert set(cells["topic"]) == {"baking"} and set(cells["kind"]) == {"unfinished"}
    assert written[written["topic"] == "baking"]["question"].isna().all()
    missing = refined[refined["question"].isna()]
    assert set(missing["id"].str[-2:]) == {"02"} and set(missing["failure"]) == {
        "the answer has no question 2, or several"
    }
    assert len(missing) == written["question"].notna().sum() / 3
    told = {(r["stage"], r["kind"]): r["n"] for r in result.card["failures"]}
    assert told == {
        ("personas", "content"): 4,
        ("questions", "unfinished"): len(cells),
        ("refinement", "schema"): len(missing),
    }
    assert sum(r["failed_cells"] for r in result.card["questions"]) == len(cells)
    assert "failed, questions, unfinished" in result.summary() and "raise max_tokens" in result.summary()
    # Three draws each, with seeds of their own; then it is final, and another run does not ask again.
    by_prompt = Counter(re.sub(r"\d+$", "", p) for p in writer.asked)
    assert set(writer.asked.values()) == {1} and max(by_prompt.values()) == 3
    again = Writer()
    assert built(tmp_path / "build", again, config, retry_failed=True).card == result.card
    assert not again.asked


def test_calls_without_a_reply_are_asked_again_only_on_request(tmp_path: Path, reference: BuildResult):
    broken = ("Area of life: chess", "Revise 3", "with close friends")

    def down(body: Body, number: int) -> Fault | None:
        prompt = body["messages"][-1]["content"]
        few = broken[1] not in prompt or hashlib.sha256(prompt.encode()).digest()[0] % 3 == 0
        return status(500) if few and any(part in prompt for part in broken) else None

    with ChatServer(answer, down, model="writer") as server:
        chat = client(server, tmp_path / "cache", retries=0, give_up_after=None)
        first = built(tmp_path / "build", chat)
        assert {r["kind"] for r in first.card["failures"]} == {"endpoint"} and len(first.card["failures"]) == 3
        failed = sum(table(first, s)["failure"].notna().sum() for s in ("1_personas", "2_questions", "3_refined"))
        assert failed == sum(r["n"] for r in first.card["failures"])
        assert files_of(first.folder) != files_of(reference.folder)
    with ChatServer(answer, model="writer") as server:
        chat = client(server, tmp_path / "cache")
        assert built(tmp_path / "build", chat).card == first.card and not server.received
        mended = built(tmp_path / "build", chat, retry_failed=True)
        assert files_of(mended.folder) == files_of(reference.folder)
        assert 0 < len(server.received) < 0.5 * sum(1 for _ in (tmp_path / "cache").rglob("*.json"))
        assert max(server.answered.values()) == 1


def test_an_endpoint_that_is_down_ends_the_build_and_what_was_answered_counts(tmp_path: Path, reference: BuildResult):
    def down(body: Body, number: int) -> Fault | None:
        return status(500) if number > 30 else None

    with ChatServer(answer, down, model="writer") as server:
        with pytest.raises(RemoteServiceError, match="in a row"):
            built(tmp_path / "build", client(server, tmp_path / "cache", retries=0, give_up_after=3))
        answered = set(server.answered)
    with ChatServer(answer, model="writer") as server:
        # The calls that failed before it was given up may stand in a finished shard.
        result = built(tmp_path / "build", client(server, tmp_path / "cache"), retry_failed=True)
        assert not answered & set(server.answered)
    assert files_of(result.folder) == files_of(reference.folder)


_JOB = textwrap.dedent("""
    import json, sys
    from npti_interp.bench.construction import BuildConfig, BuildItem, Topic, build_bench
    from npti_interp.chat import ChatClient
    given = json.loads(sys.stdin.read())
    settings = given["config"] | {"topics": tuple(Topic(**t) for t in given["config"]["topics"])}
    items = [BuildItem(**i) for i in given["items"]]
    chat = ChatClient(given["url"], "writer", cache=given["cache"], concurrency=4, pause=0.01)
    build_bench(given["folder"], items, chat, BuildConfig(**settings), progress=False)
    print("done")
""")


def job(server: ChatServer, place: Path) -> subprocess.Popen[str]:
    from dataclasses import asdict

    given_ = {
        "url": server.url, "cache": str(place / "cache"), "folder": str(place / "build"),
        "items": [asdict(i) for i in ITEMS], "config": asdict(CONFIG),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", _JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(given_))
    process.stdin.close()
    process.stdin = None
    return process


def test_killed_at_any_point_it_goes_on_to_the_same_bytes_with_no_call_made_twice(
    tmp_path: Path, reference: BuildResult
):
    rng = random.Random(3)
    in_all = sum(1 for _ in (reference.folder.parent / "cache").rglob("*.json"))
    points = sorted(rng.sample(range(5, in_all - 5), 3))
    with ChatServer(answer, lambda body, n: Fault(delay=0.01), model="writer") as server:
        lost = 0
        for point in points:
            process = job(server, tmp_path)
            end = time.monotonic() + 90
            while len(server.received) < point + lost and time.monotonic() < end and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, "it ended before it was killed"
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            time.sleep(0.1)  # what is still in the server's hands
            kept = sum(1 for p in (tmp_path / "cache").rglob("*.json") if not p.name.startswith("."))
            # Only what was under way at the kill, four calls at once, can have been sent for nothing.
            assert len(server.received) - kept - lost <= 4
            lost = len(server.received) - kept
        last = job(server, tmp_path)
        assert last.communicate(timeout=90)[0].strip() == "done"
        assert len(server.received) == in_all + lost
        assert sum(n - 1 for n in server.answered.values()) <= lost
    assert files_of(tmp_path / "build") == files_of(reference.folder)


class _Stop(BaseException):
    pass


_BRIEF = replace(CONFIG, n_personas=2, topics=TOPICS[:2], questions_per_cell=2, shard=1)


def _files_written(folder: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None, after: bool = False) -> int:
    """Build until file number ``stop_at`` is about to be renamed into place (or was); how many there were."""
    written = 0
    rename = os.replace

    def counting(source: Any, target: Any) -> None:
        nonlocal written
        written += 1
        if written == stop_at and not after:
            # A killed process tidies nothing up: the temporary file stays.
            Path(source).with_name(f".left.part-{'x' * 8}{Path(source).suffix}").write_bytes(b"half")
            raise _Stop
        rename(source, target)
        if written == stop_at:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(npti_files.os, "replace", counting)
        with contextlib.suppress(_Stop):
            built(folder, config=_BRIEF, items=ITEMS[:2])
    return written


def test_stopped_before_or_after_any_file_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    n = _files_written(tmp_path / "whole", monkeypatch, None)
    expected = files_of(tmp_path / "whole")
    assert n > 30
    for after, point in [(False, k) for k in range(1, n + 1)] + [(True, k) for k in range(2, n + 1, 4)]:
        folder = tmp_path / f"{point}-{after}"
        assert _files_written(folder, monkeypatch, point, after) == point
        writer = Writer()
        built(folder, writer, config=_BRIEF, items=ITEMS[:2])
        assert files_of(folder) == expected, (point, after)


def test_stopped_while_failures_are_asked_again_it_still_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def down(request: ChatRequest, n: int) -> ChatResult | None:
        prompt = request.messages[-1]["content"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
        return ChatResult(failure="status 500", kind="endpoint") if "Area of life: baking" in prompt else None

    whole = files_of(built(tmp_path / "whole", config=_BRIEF, items=ITEMS[:2]).folder)
    rename = os.replace
    for point in (1, 2, 3, 7, 12):
        folder = tmp_path / str(point)
        built(folder, Writer(down), _BRIEF, items=ITEMS[:2])
        written = 0

        def counting(source: Any, target: Any, point: int = point) -> None:
            nonlocal written
            written += 1
            if written == point:
                raise _Stop
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(npti_files.os, "replace", counting)
            with pytest.raises(_Stop):
                built(folder, config=_BRIEF, items=ITEMS[:2], retry_failed=True)
        assert files_of(built(folder, config=_BRIEF, items=ITEMS[:2], retry_failed=True).folder) == whole


def test_without_datasketch_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'npti-interp[bench]'")):
        built(tmp_path / "build")
    assert not (tmp_path / "build").exists()


# ------------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_sends_nothing_and_says_what_the_build_will_ask(tmp_path: Path):
    config = replace(CONFIG, questions_per_cell=3)
    with ChatServer(answer, model="writer") as server:
        chat = client(server, tmp_path / "cache")
        before = estimate_bench(ITEMS, chat, config, folder=tmp_path / "build")
        assert not server.received and not (tmp_path / "build").exists() and not (tmp_path / "cache").exists()
        assert before.assumed == before.stages["refinement"].calls > 0 and before.cached == 0
        assert before.cost(2, 0) == pytest.approx(before.prompt_tokens * 2 / 1e6)
        assert f"in all: {before.calls} calls" in str(before) and "assumed" in str(before)
        built(tmp_path / "build", chat, config)
        assert len(server.received) == before.calls
        sent = sum(len(json.dumps(b["messages"])) / 4 for b in server.received)
        assert 0.6 < before.prompt_tokens / sent < 1.6
        after = estimate_bench(ITEMS, chat, config, folder=tmp_path / "build")
        assert (after.calls, after.cached, after.assumed) == (0, 0, 0)
        elsewhere = estimate_bench(ITEMS, chat, config)
        assert elsewhere.cached == before.calls - before.assumed and elsewhere.calls == before.assumed
        assert len(server.received) == before.calls


def test_a_dry_run_of_a_begun_build_knows_the_questions_there(tmp_path: Path):
    with ChatServer(
        answer, lambda body, n: status(500) if "Revise" in body["messages"][-1]["content"] else None, model="writer"
    ) as server:
        chat = client(server, tmp_path / "cache", retries=0, give_up_after=1)
        with pytest.raises(RemoteServiceError):
            built(tmp_path / "build", chat)
        left = estimate_bench(ITEMS, chat, CONFIG, folder=tmp_path / "build")
    assert left.assumed == 0 and left.stages["questions"].requests == 0
    with ChatServer(answer, model="writer") as server:
        built(tmp_path / "build", client(server, tmp_path / "cache"))
        assert len(server.received) == left.calls


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def items_file(tmp_path: Path) -> Path:
    rows = [{"id": i.id, "text": i.text, "domain": i.domain.value, "facet": i.facet, "key": i.key} for i in ITEMS]
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"name": "own", "items": rows}))
    return path


def command(*args: object) -> Any:
    app = typer.Typer()
    app.command()(build_command)
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_builds_and_its_dry_run_does_not(tmp_path: Path, items_file: Path):
    out = tmp_path / "out"
    with ChatServer(answer, model="writer") as server:
        given_ = ["--items", items_file, "--out", out, "--base-url", server.url, "--model", "writer", "--cache",
                  tmp_path / "cache", "--topics", 3, "--questions", 2, "--personas", 2, "--trait", "n",
                  "--items-per-trait", 2]  # fmt: skip
        dry = command(*given_, "--dry-run", "--prompt-price", 1, "--completion-price", 2)
        assert dry.exit_code == 0 and "in all: " in dry.output and "in the currency of the prices" in dry.output
        assert not server.received and not out.exists()
        done = command(*given_)
        assert done.exit_code == 0 and "questions kept: " in done.output, done.output
    bench = PersonalityBench.from_directory(out / "bench")
    assert bench.traits == (Trait.NEUROTICISM,) and {q.facet for q in bench.questions()} <= {"Anxiety", "Anger"}
    assert {r["facet"] for r in BuildResult.load(out).card["questions"]} == {"Anxiety", "Anger"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "either --local MODEL or --base-url"),
        (["--local", "m", "--base-url", "http://localhost/v1", "--model", "m"], "either --local"),
        (["--base-url", "http://localhost/v1"], "either --local"),
        (["--local", "m", "--topics", "1"], "between 2 and 60, got 1"),
        (["--local", "m", "--prompt-price", "1"], "both --prompt-price and --completion-price"),
        (["--local", "m", "--items-per-trait", "1"], "at least 2"),
        (["--local", "m", "--trait", "O"], "none of Openness"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(tmp_path: Path, items_file: Path, args: list[str], message: str):
    result = command("--items", items_file, "--out", tmp_path / "out", *args)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


# --------------------------------------------------------------------------------------------------- large, and real


_LARGE = textwrap.dedent("""
    import hashlib, json, random, resource, sys, time
    from npti_interp.bench.construction import BuildConfig, BuildItem, build_bench, embedded_topics
    from npti_interp.chat import ChatResult
    from npti_interp.traits import TRAITS

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    words = ["w" + "aeiou"[i % 5] + "bdfgklmnprstvz"[i // 5 % 14] + "aeiou"[i // 70 % 5] + "nrst"[i // 350] for i in range(1400)]

    class Fast:
        def complete(self, requests, *, progress=False):
            for request in requests:
                text = request.messages[-1]["content"]
                rng = random.Random(hashlib.sha256(text.encode()).digest())
                def made():
                    return "You see the " + " and the ".join(rng.choices(words, k=14)) + ". What do you do with it now?"
                if text.startswith("Describe"):
                    data = {"description": made()}
                elif text.startswith("Write"):
                    data = {"questions": [made() for _ in range(10)]}
                else:
                    listed = [line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit()]
                    data = {"questions": [{"number": int(n), "question": q} for n, q in listed]}
                yield ChatResult("", data)

        def identity(self):
            return {"chat": "fast"}

    n_items, n_topics = int(sys.argv[2]), int(sys.argv[3])
    items = [
        BuildItem(f"{t.letter}{n}", f"{t} statement number {n}", t, t.info.facets[n % 6], (1, -1)[n // 6 % 2])
        for t in TRAITS for n in range(n_items)
    ]
    config = BuildConfig(n_personas=8, topics=embedded_topics()[:n_topics], write_aside=True, shard=100)
    import datasketch, numpy, pandas, pyarrow.parquet
    build_bench(sys.argv[1] + "-small", items[:2], Fast(), config, progress=False)
    before, start = peak(), time.time()
    card = build_bench(sys.argv[1], items, Fast(), config, progress=False).card
    rows = {r["stage"]: r["out"] for r in card["stages"]}
    print(json.dumps({"rows": rows, "before": before, "peak": peak(), "seconds": time.time() - start}))
""")


def large(folder: Path, n_items: int, n_topics: int) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, "-c", _LARGE, str(folder), str(n_items), str(n_topics)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(told.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path):
    small, big = large(tmp_path / "small", 20, 5), large(tmp_path / "big", 20, 20)
    assert small["rows"]["questions kept"] == 5_000 and big["rows"]["questions kept"] == 20_000
    # What grows is the search for repeats, within one trait: 1,000 and 4,000 questions of at most 7 kB.
    grown = big["peak"] - small["peak"]
    assert grown < 3_000 * 7 / 1024 + 15, (small, big)
    assert big["peak"] - big["before"] < 80, big


@pytest.mark.slow
def test_the_embedded_model_writes_and_everything_is_accounted_for(tmp_path: Path, smollm: Any):
    from npti_interp.chat import LocalChat

    config = BuildConfig(
        n_personas=2, topics=TOPICS[:2], questions_per_cell=2, refine_at_once=2, attempts=2, tokens_per_question=60,
        persona_tokens=90,
    )  # fmt: skip
    items = [ITEMS[0], ITEMS[1]]
    chat = LocalChat(smollm, batch_size=8, cache=tmp_path / "cache")
    result = built(tmp_path / "build", chat, config, items=items)
    steps = {r["stage"]: r for r in result.card["stages"]}
    personas, written = table(result, "1_personas"), table(result, "2_questions")
    assert len(personas) == 4 and (personas["text"].notna() ^ personas["failure"].notna()).all()
    assert (written["question"].notna() ^ written["failure"].notna()).all()
    assert (
        steps["questions written"]["in"] == 4 and steps["questions written"]["out"] == written["question"].notna().sum()
    )
    refined = table(result, "3_refined")
    assert len(refined) == steps["questions refined"]["in"]
    assert len(table(result, "4_filtered")) == steps["questions kept"]["in"] == refined["question"].notna().sum()
    assert built(tmp_path / "build", LocalChat(smollm, cache=None), config, items=items).card == result.card
