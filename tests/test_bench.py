"""The embedded benchmark keeps its rules, the checks catch what breaks them, and the readers refuse bad files."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from npti_interp.bench import (
    LoadReport,
    Persona,
    PersonalityBench,
    Question,
    answer_format,
    final_sentence,
    near_duplicates,
    printed_options,
    shared_endings,
    topic_overlap,
    trait_words,
)
from npti_interp.traits import POLES, TRAITS, Pole, Trait

BENCH = PersonalityBench.embedded()

OPEN = "Your tram stops between two stations for a while. What goes through your mind?"


def question(text: str = OPEN, ident: str = "N-001", **fields: Any) -> Question:
    """A made-up question."""
    given: dict[str, Any] = {
        "trait": Trait.NEUROTICISM,
        "facet": None,
        "item": None,
        "key": None,
        "topic": None,
        "split": "test",
    }
    return Question(id=ident, text=text, **(given | fields))


# ------------------------------------------------------------------------------------------------- embedded set


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("pole", POLES)
def test_embedded_personas(trait: Trait, pole: Pole) -> None:
    elicit, judge = BENCH.personas(trait, pole, "elicit"), BENCH.personas(trait, pole, "judge")
    assert len(elicit) >= 12
    assert len(judge) >= 6
    for group in (elicit, judge):
        assert {p.facet for p in group} == set(trait.info.facets)
        assert len({n for n in Counter(p.facet for p in group).values()}) == 1
    assert not {p.text for p in elicit} & {p.text for p in judge}
    for p in elicit + judge:
        assert p.text.startswith(("You ", "Your ")), p
        assert 15 <= len(p.text.split()) <= 40, p
    assert BENCH.personas(trait, pole) == sorted(elicit + judge, key=lambda p: p.id)


@pytest.mark.parametrize("trait", TRAITS)
def test_embedded_personas_are_distinct(trait: Trait) -> None:
    personas = [p for pole in POLES for p in BENCH.personas(trait, pole)]
    close = near_duplicates([p.text for p in personas], 0.3)
    assert not [(personas[i].id, personas[j].id) for i, j, _ in close]


@pytest.mark.parametrize("trait", TRAITS)
def test_embedded_question_counts(trait: Trait) -> None:
    search, test = BENCH.questions(trait, "search"), BENCH.questions(trait, "test")
    assert len(search) >= 80
    assert len(test) >= 40
    for facet in trait.info.facets:
        assert sum(q.facet == facet for q in search) == 14
        assert sum(q.facet == facet for q in test) == 8
        assert 8 <= sum(q.facet == facet and q.key == "+" for q in search + test) <= 14
    assert all(3 <= n <= 6 for n in Counter(q.topic for q in search).values())
    assert all(2 <= n <= 5 for n in Counter(q.topic for q in test).values())
    assert len({q.topic for q in search}) == 20
    assert len({q.topic for q in test}) == 14


@pytest.mark.parametrize("q", BENCH.questions(), ids=lambda q: q.id)
def test_embedded_question(q: Question) -> None:
    assert answer_format(q) == []
    assert printed_options(q) is None
    assert trait_words(q) == []
    assert 15 <= len(q.text.split()) <= 45
    assert q.item is not None
    assert q.key is not None
    assert not q.suspect
    assert " or " not in final_sentence(q)  # stricter than `answer_format`: a house rule of this set


def test_embedded_topics_are_disjoint() -> None:
    assert topic_overlap(BENCH) == {}


def test_embedded_has_no_near_duplicates() -> None:
    questions = BENCH.questions()
    close = near_duplicates([q.text for q in questions])
    assert not [(questions[i].id, questions[j].id, s) for i, j, s in close]


def test_embedded_endings_vary() -> None:
    for trait in TRAITS:
        assert shared_endings(BENCH.questions(trait), most=8) == {}


def test_embedded_ids_and_report() -> None:
    ids = [q.id for q in BENCH.questions()] + [p.id for t in TRAITS for pole in POLES for p in BENCH.personas(t, pole)]
    assert len(ids) == len(set(ids)) == 660 + 180
    assert BENCH.traits == TRAITS
    assert BENCH.name == "embedded"
    report = BENCH.report
    assert not (report.warnings or report.closed_format or report.closed_wording or report.suspects)
    assert not (report.duplicate_descriptions or report.duplicate_questions)


def test_embedded_is_shared_and_stable() -> None:
    assert PersonalityBench.embedded() is BENCH
    BENCH.questions().clear()
    assert len(BENCH.questions()) == 660
    assert len(BENCH.digest) == 64
    assert pickle.loads(pickle.dumps(BENCH)).digest == BENCH.digest


# -------------------------------------------------------------------------------------- checks catch what is planted


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("A path is closed. What is your choice?\na) You go on.\nb) You turn back.", "multiple choice"),
        ("A path is closed. How do you proceed? 1) x\n1. You go on.\n2. You turn back.", "multiple choice"),
        ("It rains. Which would you take, the bus or the train?", "multiple choice"),
        ("It rains. How do you decide whether to stay or to leave?", "multiple choice"),
        ("It rains. Do you go out or stay in?", "multiple choice"),
        ("A path is closed. Do you walk on?", "yes/no"),
        ("When a path is closed, would you walk on?", "yes/no"),
        ("A path is closed. And don't you turn back?", "yes/no"),
        ("A path is closed. What do you say to that, yes/no?", "yes/no"),
        ("You have found a coin. Would you keep it? Explain your reasons.", "yes/no"),
        ("A path is closed. How likely are you to turn back?", "scale"),
        ("On a scale from 1 to 5, how do you feel about rain?", "scale"),
        ("How do you feel about rain (1 = awful, 5 = lovely)?", "scale"),
        ("How do you see it: very unlikely, unlikely, neutral, likely, very likely?", "scale"),
        ("A path is closed. What do you think? How do you go on?", "several questions"),
        ("A path is closed. What do you think? Describe the way back.", "several questions"),
        ("A path is closed. You go on?", "no open question"),
        ("A path is closed, and you go on.", "no open question"),
    ],
)
def test_answer_format_catches(text: str, violation: str) -> None:
    assert violation in answer_format(text)
    assert violation in answer_format(question(text))


@pytest.mark.parametrize(
    "text",
    [
        OPEN,
        "A friend asks “Do you like it?” as you enter. Describe your answer.",
        'A sign says "Stop? Or go?" in red. How do you read it?',
        "You notice a headache or a cough. What do you do, and why?",
        "On platform 1 to Leeds you wait. How do you pass the time?",
        "Tell me what a rainy day is like for you.",
    ],
)
def test_answer_format_passes_open_questions(text: str) -> None:
    assert answer_format(text) == []


def test_printed_options_needs_print() -> None:
    assert printed_options("How likely are you to go? (Very Unlikely, Unlikely, Neutral, Likely)") == "scale"
    assert printed_options("Do you go? (Yes/No)") == "yes/no"
    assert printed_options("What do you do?\nA) Go.\nB) Stay.") == "multiple choice"
    assert printed_options("How likely are you to go?") is None
    assert printed_options("Do you go?") is None
    assert printed_options("You meet Ms B. Ito (a) friend of yours. What do you say?") is None


def test_trait_words_catches() -> None:
    assert trait_words("You feel NERVOUS and calm, then nervous. What now?") == ["nervous", "calm"]
    assert trait_words("How does your neuroticism show?") == ["neuroticism"]
    assert trait_words("You put trust in him. What now?", "A") == ["trust"]
    assert trait_words("You put trust in him. What now?", "N") == []
    assert trait_words(question("A wave of anger comes. What now?")) == ["anger"]
    assert trait_words("The self-disciplined one speaks. What now?") == ["self-disciplined"]
    assert trait_words("A kindly, impatient man. What now?") == []
    with pytest.raises(ValueError, match="unknown trait 'X'"):
        trait_words("What?", "X")


def test_near_duplicates_catches() -> None:
    texts = [
        "Your neighbour plays the drums at noon. What do you do about it?",
        "You find a purse in the park. How do you go on?",
        "your neighbour plays the drums, at NOON! What do you do?",
        "Rain.",
        "rain",
        "",
    ]
    found = near_duplicates(texts)
    assert [(i, j) for i, j, _ in found] == [(0, 2), (3, 4)]
    assert found[0][2] == pytest.approx(9 / 11)
    assert near_duplicates(texts, 1.0) == [(3, 4, 1.0)]
    for bad in (0.0, -1.0, 1.01):
        with pytest.raises(ValueError, match="threshold"):
            near_duplicates(texts, bad)


def test_near_duplicates_equals_brute_force() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(0, 14))) for _ in range(120)]
    sets: list[set[tuple[str, ...]]] = []
    for text in texts:
        w = text.split()
        sets.append({tuple(w)} if 0 < len(w) < 3 else {tuple(w[i : i + 3]) for i in range(len(w) - 2)})
    for threshold in (0.1, 0.3, 0.4, 0.5, 2 / 3, 1.0):
        expected = [
            (i, j, len(a & b) / len(a | b))
            for i, a in enumerate(sets)
            for j, b in enumerate(sets)
            if i < j and a | b and len(a & b) / len(a | b) >= threshold
        ]
        assert near_duplicates(texts, threshold) == expected


def test_near_duplicates_is_quick_on_thousands() -> None:
    rng = random.Random(1)
    vocabulary = [f"word{i}" for i in range(2000)]
    texts = [" ".join(rng.choices(vocabulary, k=25)) + " what do you do and why" for _ in range(5000)]
    start = time.process_time()
    assert near_duplicates(texts) == []
    assert time.process_time() - start < 10


def test_shared_endings_and_topic_overlap_catch() -> None:
    questions = [question(f"Thing {i} happens. What now?", f"N-{i}", topic="Rain") for i in range(9)]
    assert shared_endings(questions) == {"what now?": 9}
    assert shared_endings(questions, most=9) == {}
    search = question("Another. What now?", "N-s", topic="rain", split="search")
    bare = question("Topicless. What now?", "N-t", split="search")
    assert topic_overlap(PersonalityBench([], [*questions, search, bare])) == {"rain": (1, 9)}
    assert topic_overlap(PersonalityBench([], [*questions, bare])) == {}


# -------------------------------------------------------------------------------------------------------- schema


def test_schema_accepts_names_and_refuses_nonsense() -> None:
    persona = Persona("N+1", "n", "HIGH", None, "elicit", "You fret.")  # pyright: ignore[reportArgumentType]
    assert persona.trait is Trait.NEUROTICISM
    assert persona.pole is Pole.HIGH
    for field, value, said in (
        ("trait", "Moodiness", "unknown trait 'Moodiness'"),
        ("pole", "left", "unknown pole 'left'"),
        ("role", "boss", "unknown persona role 'boss'"),
        ("text", "  ", "text of persona N.1 is empty"),
        ("id", "", "id is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(persona, **{field: value})
    for field, value, said in (
        ("trait", "Q", "unknown trait 'Q'"),
        ("split", "train", "unknown split 'train'"),
        ("key", "=", "unknown key '='"),
        ("text", "", "text of question N-001 is empty"),
        ("id", " ", "id is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(question(), **{field: value})


def test_bench_refuses_repeated_ids_and_emptiness() -> None:
    with pytest.raises(ValueError, match="question ids occur more than once: N-001"):
        PersonalityBench([], [question(), question("Other. What now?")])
    persona = BENCH.personas("N", "high")[0]
    with pytest.raises(ValueError, match=r"persona ids occur more than once: N\+01"):
        PersonalityBench([persona, persona], [question()])
    with pytest.raises(ValueError, match="needs questions"):
        PersonalityBench([persona], [])


# -------------------------------------------------------------------------------------------------------- subsets


@pytest.mark.parametrize("trait", [None, *TRAITS])
@pytest.mark.parametrize("split", [None, "search", "test"])
def test_subset_is_a_prefix_without_repeats(trait: Trait | None, split: str | None) -> None:
    everything = BENCH.questions(trait, split)
    order = BENCH.questions(trait, split, n=len(everything))
    assert sorted(q.id for q in order) == sorted(q.id for q in everything)
    for n in (1, 2, 5, 12, 31, len(everything) - 1):
        assert BENCH.questions(trait, split, n) == order[:n]


def test_subset_is_balanced() -> None:
    for trait in TRAITS:
        for n in (6, 12, 30):
            few = BENCH.questions(trait, "search", n)
            assert set(Counter(q.facet for q in few).values()) == {n // 6}
            assert len({q.topic for q in few}) >= min(n, 12)
        for facet in trait.info.facets:
            own = [q for q in BENCH.questions(trait, "search", 48) if q.facet == facet]
            assert len({q.topic for q in own}) == len(own) == 8
            assert 2 <= sum(q.key == "+" for q in own) <= 6
    assert Counter(q.trait for q in BENCH.questions(split="test", n=10)) == dict.fromkeys(TRAITS, 2)


def test_subset_does_not_depend_on_row_order() -> None:
    questions, personas = BENCH.questions(), [p for t in TRAITS for e in POLES for p in BENCH.personas(t, e)]
    random.Random(3).shuffle(questions)
    random.Random(4).shuffle(personas)
    other = PersonalityBench(personas, questions)
    assert other.digest == BENCH.digest
    assert other.questions() == BENCH.questions()
    assert other.questions("O", n=50) == BENCH.questions("O", n=50)
    changed = [dataclasses.replace(questions[0], text="What else?"), *questions[1:]]
    assert PersonalityBench(personas, changed).digest != BENCH.digest


def test_selection_errors() -> None:
    with pytest.raises(ValueError, match="n is 85, but 'embedded' has 84 Neuroticism search questions"):
        BENCH.questions("N", "search", 85)
    with pytest.raises(ValueError, match="n is 661, but 'embedded' has 660 questions"):
        BENCH.questions(n=661)
    for n in (0, -3):
        with pytest.raises(ValueError, match=f"n is {n}"):
            BENCH.questions(n=n)
    with pytest.raises(ValueError, match="unknown trait 'Grit'"):
        BENCH.questions("Grit")
    with pytest.raises(ValueError, match="unknown split 'train'"):
        BENCH.questions(split="train")
    with pytest.raises(ValueError, match="unknown pole 'up'"):
        BENCH.personas("O", "up")
    with pytest.raises(ValueError, match="unknown persona role 'chef'"):
        BENCH.personas("O", "low", "chef")


# ------------------------------------------------------------------------------------------------ published layout

KEYS = [t.value for t in TRAITS] + [f"{t.value}_reversed" for t in TRAITS]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def published(root: Path, *, descriptions: int = 8, openness: int = 3) -> Path:
    """A made-up folder of the published layout: descriptions 2 and 5 (counted from 0) of low Openness are equal."""
    rows = [{k: f"You are made-up {k} number {i}." for k in KEYS} for i in range(descriptions)]
    if descriptions > 5:
        rows[5]["Openness_reversed"] = "  " + rows[2]["Openness_reversed"].upper().replace(" ", "  ")
    write_lines(root / "description.json", rows)
    for t in TRAITS:
        n = openness if t is Trait.OPENNESS else 2
        write_lines(root / "test" / f"{t.value}.json", [{"question": f"{t} thing {i}. What now?"} for i in range(n)])
    return root


SEARCH = {
    "BFI": "Neuroticism",
    "tag": "anxiety",
    "facet": "Frets.",
    "topic": "Rain",
    "sign": "-",
    "question": "It rains. What now?",
}


def test_published_layout(tmp_path: Path) -> None:
    bench = PersonalityBench.from_directory(published(tmp_path))
    assert bench.name == tmp_path.name
    assert len(bench.questions()) == 11
    first = bench.questions("Openness")[0]
    assert first == question("Openness thing 0. What now?", "O-test-000", trait=Trait.OPENNESS)
    assert [p.role for p in bench.personas("A", "high")] == ["elicit"] * 3 + ["judge"] + ["elicit"] * 3 + ["judge"]
    assert bench.personas("A", "low")[1].text == "You are made-up Agreeableness_reversed number 1."
    assert all(p.facet is None for p in bench.personas("A", "low"))
    assert "no search questions" in str(bench.report)
    assert bench.questions(split="search") == []


def test_duplicates_are_reported_and_the_first_is_kept(tmp_path: Path) -> None:
    folder = published(tmp_path)
    bench = PersonalityBench.from_directory(folder)
    place = (Trait.OPENNESS, Pole.LOW)
    assert bench.report.duplicate_descriptions == {place: (("O-005", "O-002"),)}
    assert [p.id for p in bench.personas("O", "low")] == [f"O-00{i}" for i in (0, 1, 2, 3, 4, 6, 7)]
    assert bench.report.read[Trait.OPENNESS].low == 8
    assert bench.report.kept[Trait.OPENNESS].low == 7
    assert "7 of 8 low" in str(bench.report)
    assert "O-005 repeats O-002" in bench.report._repr_html_()  # pyright: ignore[reportPrivateUsage]
    both = PersonalityBench.from_directory(folder, drop_duplicates=False)
    assert len(both.personas("O", "low")) == 8
    assert both.report.duplicate_descriptions == bench.report.duplicate_descriptions
    assert "equal descriptions were kept" in str(both.report)


def test_duplicate_questions_are_only_reported(tmp_path: Path) -> None:
    folder = published(tmp_path)
    write_lines(folder / "test" / "Neuroticism.json", [{"question": "What now?"}, {"question": " what  NOW?"}])
    bench = PersonalityBench.from_directory(folder)
    assert bench.report.duplicate_questions == (("N-test-001", "N-test-000"),)
    assert len(bench.questions("N")) == 2


def test_suspect_rows(tmp_path: Path) -> None:
    folder = published(tmp_path, openness=90)
    bench = PersonalityBench.from_directory(folder)
    assert [q.id for q in bench.questions() if q.suspect] == [f"O-test-{i:03d}" for i in range(56, 90)]
    assert len(bench.questions("O")) == 90
    assert bench.report.dropped_suspects == ()
    dropped = PersonalityBench.from_directory(folder, drop_suspect=True)
    assert [q.id for q in dropped.questions("O")] == [f"O-test-{i:03d}" for i in range(56)]
    assert dropped.report.dropped_suspects == dropped.report.suspects == bench.report.suspects
    assert dropped.digest != bench.digest


def test_no_suspects_in_a_file_of_another_length(tmp_path: Path) -> None:
    bench = PersonalityBench.from_directory(published(tmp_path, openness=89), drop_suspect=True)
    assert len(bench.questions("O")) == 89
    assert bench.report.suspects == ()
    assert "drop_suspect left nothing out" in str(bench.report)


@pytest.mark.parametrize("file", ["search.jsonl", "search/all.json", "search/part.jsonl", "search_sample.jsonl"])
def test_search_set(tmp_path: Path, file: str) -> None:
    folder = published(tmp_path)
    bare = {"BFI": "openness", "question": "Snow falls. Do you go out?"}
    odd = {**SEARCH, "tag": "Fear", "question": "Pick a letter: a) this b) that. What is it?"}
    write_lines(folder / file, [SEARCH, bare, odd])
    bench = PersonalityBench.from_directory(folder)
    own = {"facet": "Anxiety", "item": "Frets.", "key": "-", "topic": "Rain", "split": "search"}
    read = question("It rains. What now?", "N-search-00000", **own)
    assert bench.questions("N", "search")[0] == read
    other = bench.questions("O", "search")[0]
    assert (other.facet, other.item, other.key, other.topic) == (None, None, None, None)
    assert bench.questions("N", "search")[1].facet == "Fear"
    assert any("'Fear' is none of the six facets" in w for w in bench.report.warnings)
    assert bench.report.closed_format == (("N-search-00001", "multiple choice"),)
    assert bench.report.closed_wording == ("O-search-00000",)


def test_search_folder_by_trait_and_ignored_sample(tmp_path: Path) -> None:
    folder = published(tmp_path)
    write_lines(folder / "search" / "Extraversion.json", [{"question": "A band plays. What now?"}])
    write_lines(folder / "search_sample.jsonl", [SEARCH])
    bench = PersonalityBench.from_directory(folder)
    assert [q.id for q in bench.questions(split="search")] == ["E-search-00000"]
    assert any("search_sample.jsonl was not read" in w for w in bench.report.warnings)
    write_lines(folder / "search" / "Extraversion.json", [SEARCH])
    with pytest.raises(ValueError, match=r"Extraversion.json:1: 'BFI' is Neuroticism, in the file of Extraversion"):
        PersonalityBench.from_directory(folder)
    write_lines(folder / "search.jsonl", [SEARCH])
    with pytest.raises(ValueError, match=r"both search.jsonl and search/"):
        PersonalityBench.from_directory(folder)


def test_line_ends_blank_lines_and_odd_characters(tmp_path: Path) -> None:
    folder = published(tmp_path)
    line = json.dumps({"question": "One\u2028line. What now?"}, ensure_ascii=False)
    (folder / "test" / "Openness.json").write_bytes(b"\xef\xbb\xbf\r\n" + line.encode() + b"\r\n\r\n")
    assert [q.text for q in PersonalityBench.from_directory(folder).questions("O")] == ["One\u2028line. What now?"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("test/Openness.json", '{"question": "What?"}\n\n{"question": \n', r"Openness.json:3: broken JSON"),
        ("test/Openness.json", '["What?"]\n', r"Openness.json:1: a JSON list where an object was expected"),
        ("test/Openness.json", '{"questions": "What?"}\n', r"Openness.json:1: wrong keys \(missing question; unexp"),
        ("test/Openness.json", '{"question": " "}\n', r"Openness.json:1: 'question' is empty"),
        ("test/Openness.json", '{"question": 7}\n', r"Openness.json:1: 'question' is 7; expected text"),
        ("test/Openness.json", "\n", r"Openness.json: no questions"),
        ("description.json", "", r"description.json: no descriptions"),
        ("description.json", '{"Openness": "You are."}\n', r"description.json:1: wrong keys \(missing Agreeableness, "),
        ("description.json", json.dumps(dict.fromkeys([*KEYS, "Grit"], "x")), r":1: wrong keys \(unexpected Grit\)"),
        ("description.json", json.dumps(dict.fromkeys(KEYS, "x") | {"Openness": ""}), r":1: 'Openness' is empty"),
        ("search.jsonl", json.dumps(SEARCH | {"BFI": "Grit"}), r"search.jsonl:1: unknown trait 'Grit'"),
        ("search.jsonl", json.dumps(SEARCH | {"sign": "?"}), r"search.jsonl:1: 'sign' is '\?'"),
        ("search.jsonl", '{"question": "What?"}', r"search.jsonl:1: wrong keys \(missing BFI\)"),
        ("search.jsonl", json.dumps(SEARCH | {"more": 1}), r"search.jsonl:1: wrong keys \(unexpected more\)"),
        ("search.jsonl", "", r"search.jsonl: no questions"),
    ],
)
def test_published_errors(tmp_path: Path, file: str, content: str, said: str) -> None:
    folder = published(tmp_path)
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        PersonalityBench.from_directory(folder)


def test_not_utf8(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "test" / "Openness.json").write_bytes(b'{"question": "Caf\xe9?"}\n')
    with pytest.raises(ValueError, match=r"Openness.json: not UTF-8 at byte 17"):
        PersonalityBench.from_directory(folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        PersonalityBench.from_directory(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither description.json"):
        PersonalityBench.from_directory(tmp_path / "empty")
    folder = published(tmp_path / "repository" / "dataset")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*dataset\?"):
        PersonalityBench.from_directory(folder.parent)
    (folder / "description.json").write_text("broken", encoding="utf-8")
    for name in ("Openness", "Extraversion"):
        (folder / "test" / f"{name}.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: .*Extraversion.json, .*Openness.json"):
        PersonalityBench.from_directory(folder)  # said before the broken file is parsed
    (tmp_path / "bare" / "search").mkdir(parents=True)
    published(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"holds no .json or .jsonl file"):
        PersonalityBench.from_directory(tmp_path / "bare")


# ------------------------------------------------------------------------------------------- own layout, round trip


def test_round_trip(tmp_path: Path) -> None:
    target = BENCH.save(tmp_path / "deep" / "saved")
    again = PersonalityBench.from_directory(target)
    assert again.digest == BENCH.digest
    assert again.name == "embedded"
    assert again.questions() == BENCH.questions()
    assert again.report.warnings == ()
    assert [p.name for p in target.parent.iterdir()] == ["saved"]
    assert target.stat().st_mode & 0o055 == (tmp_path / "deep").stat().st_mode & 0o055
    with pytest.raises(FileExistsError, match="choose another path"):
        BENCH.save(target)
    path = target / "questions" / "openness.jsonl"
    path.write_text("\n".join(reversed(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    shuffled = PersonalityBench.from_directory(target)
    assert shuffled.digest == BENCH.digest
    assert shuffled.report.warnings == ()
    path.write_text(path.read_text(encoding="utf-8").replace("What", "Whatever", 1), encoding="utf-8")
    assert "files were changed after saving" in str(PersonalityBench.from_directory(target).report)


def test_round_trip_of_the_published_layout(tmp_path: Path) -> None:
    folder = published(tmp_path / "in", openness=90)
    write_lines(folder / "search.jsonl", [SEARCH, SEARCH | {"tag": "Fear"}])
    bench = PersonalityBench.from_directory(folder)
    again = PersonalityBench.from_directory(bench.save(tmp_path / "out"))
    assert again.digest == bench.digest
    assert again.report.suspects == bench.report.suspects
    fewer = PersonalityBench.from_directory(tmp_path / "out", drop_suspect=True)
    assert len(fewer.questions("O", "test")) == 56
    assert not any("changed after saving" in w for w in fewer.report.warnings)


def test_save_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        BENCH.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def own_rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """A question row and a persona row of our own layout."""
    asked = {"id": "N-1", "trait": "Neuroticism", "facet": None, "item": None, "key": None, "topic": None}
    persona = {"id": "N+1", "trait": "N", "pole": "high", "facet": "Anger", "role": "elicit", "text": "You fume."}
    return {**asked, "split": "test", "question": "What now?"}, persona


def test_own_layout_of_one_trait(tmp_path: Path) -> None:
    asked, persona = own_rows()
    write_lines(tmp_path / "questions" / "neuroticism.jsonl", [asked])
    write_lines(tmp_path / "personas" / "neuroticism.jsonl", [persona])
    bench = PersonalityBench.from_directory(tmp_path)
    assert bench.traits == (Trait.NEUROTICISM,)
    assert bench.personas("N", "high")[0].facet == "Anger"
    write_lines(tmp_path / "personas" / "neuroticism.jsonl", [])
    assert "has no rows" in str(PersonalityBench.from_directory(tmp_path).report)


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("questions", {"trait": "Grit"}, r"neuroticism.jsonl:1: unknown trait 'Grit'"),
        ("questions", {"trait": "Openness"}, r":1: trait Openness in the file of Neuroticism"),
        ("questions", {"split": "train"}, r":1: unknown split 'train'"),
        ("questions", {"key": "x"}, r":1: 'key' is 'x'"),
        ("questions", {"question": ""}, r":1: 'question' is empty"),
        ("questions", {"suspect": "no"}, r":1: 'suspect' is 'no'"),
        ("questions", {"note": "x"}, r":1: wrong keys \(unexpected note\)"),
        ("personas", {"pole": "up"}, r":1: unknown pole 'up'"),
        ("personas", {"role": "chef"}, r":1: unknown persona role 'chef'"),
        ("personas", {"text": 3}, r":1: 'text' is 3"),
    ],
)
def test_own_layout_errors(tmp_path: Path, where: str, change: dict[str, Any], said: str) -> None:
    asked, persona = own_rows()
    write_lines(tmp_path / "questions" / "neuroticism.jsonl", [asked | (change if where == "questions" else {})])
    write_lines(tmp_path / "personas" / "neuroticism.jsonl", [persona | (change if where == "personas" else {})])
    with pytest.raises(ValueError, match=said):
        PersonalityBench.from_directory(tmp_path)


def test_own_layout_file_errors(tmp_path: Path) -> None:
    asked, persona = own_rows()
    (tmp_path / "questions").mkdir()
    with pytest.raises(FileNotFoundError, match=r"questions holds no .jsonl file"):
        PersonalityBench.from_directory(tmp_path)
    write_lines(tmp_path / "questions" / "neuroticism.jsonl", [asked, asked])
    with pytest.raises(FileNotFoundError, match=r"missing: .*personas/neuroticism.jsonl"):
        PersonalityBench.from_directory(tmp_path)
    write_lines(tmp_path / "personas" / "neuroticism.jsonl", [persona])
    with pytest.raises(ValueError, match="question ids occur more than once: N-1"):
        PersonalityBench.from_directory(tmp_path)
    write_lines(tmp_path / "questions" / "neuroticism.jsonl", [asked])
    (tmp_path / "bench.json").write_text('{"format": "other/9", "name": "x", "digest": "y"}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 'other/9' is not known here"):
        PersonalityBench.from_directory(tmp_path)
    write_lines(tmp_path / "questions" / "N.jsonl", [asked])
    (tmp_path / "bench.json").unlink()
    with pytest.raises(ValueError, match="a second file of Neuroticism"):
        PersonalityBench.from_directory(tmp_path)
    (tmp_path / "questions" / "N.jsonl").rename(tmp_path / "questions" / "grit.jsonl")
    with pytest.raises(ValueError, match="unknown trait 'grit'"):
        PersonalityBench.from_directory(tmp_path)
    write_lines(tmp_path / "description.json", [asked])
    with pytest.raises(ValueError, match="keep one of the two layouts"):
        PersonalityBench.from_directory(tmp_path)


# -------------------------------------------------------------------------------------------------------- display


def test_display() -> None:
    assert "660 questions (420 search, 240 test), 180 personas" in repr(BENCH)
    assert BENCH.digest[:8] in repr(BENCH)
    shown = BENCH._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert shown.count("<tr>") == 6
    assert "<td>Openness</td><td>84</td><td>48</td><td>12</td><td>6</td>" in shown
    named = PersonalityBench([], [question()], name="<b>&")._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert "&lt;b&gt;&amp;" in named
    report = LoadReport(source="<x>", warnings=("<y>",))
    assert "&lt;y&gt;" in report._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert "warning: <y>" in str(report)


# ------------------------------------------------------------------------------------------------- published data

UPSTREAM = os.environ.get("NPTI_UPSTREAM")


@pytest.fixture(scope="module")
def upstream() -> PersonalityBench:
    """The set published with NPTI."""
    if not UPSTREAM:
        pytest.skip("NPTI_UPSTREAM is not set to a folder that contains NPTI/")
    return PersonalityBench.from_directory(Path(UPSTREAM) / "NPTI" / "dataset")


def test_upstream_counts(upstream: PersonalityBench) -> None:
    assert [len(upstream.questions(t, "test")) for t in "ACENO"] == [90, 89, 90, 100, 90]
    assert {n for c in upstream.report.read.values() for n in (c.high, c.low)} == {80}
    assert len(upstream.report.duplicate_descriptions) == 7
    assert sum(len(upstream.personas(t, e)) for t in TRAITS for e in POLES) == 793
    assert upstream.report.duplicate_questions == ()


def test_upstream_suspects(upstream: PersonalityBench) -> None:
    assert len(upstream.report.suspects) == 34
    dropped = PersonalityBench.from_directory(Path(str(UPSTREAM)) / "NPTI" / "dataset", drop_suspect=True)
    assert len(dropped.questions("O", "test")) == 56


def test_upstream_search_sample(upstream: PersonalityBench) -> None:
    search = upstream.questions(split="search")
    assert len(search) == 25
    assert {(q.facet, q.key) for q in search} == {("Dutifulness", "-")}
    kinds = Counter(kind for q in search if (kind := printed_options(q)) is not None)
    assert kinds == {"multiple choice": 4, "scale": 3, "yes/no": 1}  # METHOD.md, section 4, item 13: 8 of 25
    worded = {q.id for q in search} & set(upstream.report.closed_wording)
    assert len(worded) == 12  # "how likely", "would you … or …", "would you …?" without printed answers


def test_nothing_embedded_comes_from_upstream(upstream: PersonalityBench) -> None:
    def texts(bench: PersonalityBench) -> list[str]:
        personas = [p.text for t in TRAITS for e in POLES for p in bench.personas(t, e)]
        return [q.text for q in bench.questions()] + personas

    ours, theirs = texts(BENCH), texts(upstream)
    close = near_duplicates(ours + theirs, 0.3)
    assert not [(i, j) for i, j, _ in close if i < len(ours) <= j]
