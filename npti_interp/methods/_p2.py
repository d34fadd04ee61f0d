"""P²: the model writes its own persona (MPI, arXiv 2206.07550; METHOD.md section 7).

The chain: trait word → descriptive keywords → a persona paragraph → that paragraph as the prompt. The published baseline
of NPTI broke it twice: it skipped the chain, and it put its descriptions into the *simple* prompt's template
(METHOD.md section 4, item 1). Here the paragraph goes in front of the question as any persona does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from npti_interp.errors import ArtifactError, UnsupportedMethodError
from npti_interp.evaluation._fluency import repetition
from npti_interp.generation import Answer
from npti_interp.methods._base import Method, SearchData
from npti_interp.methods._prompts import FILE, PromptPrepared, described, load_personas, with_article
from npti_interp.models import Model
from npti_interp.traits import POLES, Pole

__all__ = ["P2", "P2Bench", "P2Prepared", "WrittenPersona"]

MOST_KEYWORDS = 10
FEWEST_KEYWORDS = 3
FEWEST_WORDS = 12
MOST_REPETITION = 0.3


@dataclass(frozen=True)
class WrittenPersona:
    """What the model wrote for one pole, step by step.

    Attributes:
        word: the trait word the chain begins with; empty where it begins with the bench's descriptions.
        keyword_request: what the model was asked first; empty where it was not.
        keyword_answer: its answer as it stands.
        keywords: what of it goes on: the items, each once.
        paragraph_request: what the model was asked then.
        paragraph_answer: its answer as it stands.
        paragraph: the prompt: the answer in one line, without a last sentence that the length limit cut.
        warnings: what is wrong with it, in words; empty for a sound one. A flawed paragraph is used all the same: it is
            what this method gives on this model.
    """

    word: str
    keyword_request: str
    keyword_answer: str
    keywords: tuple[str, ...]
    paragraph_request: str
    paragraph_answer: str
    paragraph: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class P2Prepared(PromptPrepared):
    """The paragraphs that the model wrote, with every step that led to them.

    Attributes:
        written: the steps, by pole.
    """

    written: Mapping[Pole, WrittenPersona]

    @property
    def warnings(self) -> dict[Pole, tuple[str, ...]]:
        """What is wrong with each pole's paragraph; empty tuples for sound ones."""
        return {pole: own.warnings for pole, own in self.written.items()}

    def content(self) -> dict[str, Any]:
        """What `save` writes."""
        return {**super().content(), "written": {pole.value: asdict(own) for pole, own in self.written.items()}}


def keyword_request(word: str) -> str:
    """First step: what the model is asked for keywords with."""
    return f"In a few keywords, how does {with_article(word)} person think, feel and behave?"


def paragraph_request(keywords: Sequence[str]) -> str:
    """Second step: what the model is asked for the paragraph with."""
    return (
        f"Keywords of a personality: {', '.join(keywords)}. Write a short paragraph about a person with this "
        'personality. Begin with "You are".'
    )


def bench_request(descriptions: Sequence[str]) -> str:
    """The one step of `P2Bench`."""
    return (
        f"{' '.join(descriptions)}\n\nSum up this person in one short paragraph. Keep to what is said above, and begin "
        'with "You are".'
    )


@dataclass(frozen=True)
class P2(Method):
    """Trait word → keywords → the model's own persona paragraph → answers. Greedy, so the same every time.

    Attributes:
        keyword_tokens: most tokens of the keywords.
        paragraph_tokens: most tokens of the paragraph.
        repetition_penalty: while both are written. One above 1 also punishes the words of the request, so that a small
            model strays from its own keywords.

    Raises:
        ValueError: a setting below 1.
    """

    keyword_tokens: int = 48
    paragraph_tokens: int = 100
    repetition_penalty: float = 1.0

    name: ClassVar[str] = "p2"
    label: ClassVar[str] = "P²"
    source: ClassVar[str] = "arXiv 2206.07550"

    def __post_init__(self) -> None:
        for setting in ("keyword_tokens", "paragraph_tokens", "repetition_penalty"):
            if not getattr(self, setting) >= 1:
                raise ValueError(f"{setting} must be at least 1, got {getattr(self, setting)}")

    def check(self, model: Model) -> None:
        """See `Method.check`: a model that follows no requests writes no persona."""
        if not model.has_chat_template:
            raise UnsupportedMethodError(
                f"{model.name} has no chat template: it continues texts and follows no requests, so it cannot write "
                "its own persona for P²; use the persona prompt instead"
            )

    def prepare(self, data: SearchData) -> P2Prepared:
        """Have the model write both poles' paragraphs.

        Raises:
            UnsupportedMethodError: see `check`; or the model wrote nothing that could be a prompt.
        """
        self.check(data.model)
        written = dict(zip(POLES, self._write(data), strict=True))
        for pole, own in written.items():
            if not own.paragraph:
                raise UnsupportedMethodError(
                    f"P²: asked for a persona of {data.trait}, {pole}, {data.model.name} wrote "
                    f"{own.paragraph_answer!r}, which cannot be a prompt; use the persona prompt instead"
                )
            for flaw in own.warnings:
                warnings.warn(f"P², {data.trait}, {pole}: {flaw}", stacklevel=2)
        personas = {p: (described(self.name, data.trait, p, own.paragraph),) for p, own in written.items()}
        return P2Prepared(self.name, data.model.fingerprint, data.trait, personas, written)

    def load(self, folder: Path, data: SearchData) -> P2Prepared:
        """See `Method.load`."""
        personas, content = load_personas(folder, self.name, data)
        try:
            written = {pole: _read(content["written"][pole.value]) for pole in POLES}
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder / FILE} lacks a step of P²: {error}") from error
        return P2Prepared(self.name, data.model.fingerprint, data.trait, personas, written)

    def _ask(self, data: SearchData, requests: Sequence[str], tokens: int) -> list[Answer]:
        return data.model.generate(requests, max_new_tokens=tokens, repetition_penalty=self.repetition_penalty)

    def _write(self, data: SearchData) -> list[WrittenPersona]:
        """Each pole's steps."""
        words = [data.trait.info.adjectives(pole)[0] for pole in POLES]
        first = [keyword_request(word) for word in words]
        answers = self._ask(data, first, self.keyword_tokens)
        keywords = [_items(answer) for answer in answers]
        # Without a single keyword the trait word is all there is to go on; the warning says so.
        second = [paragraph_request(own or (word,)) for own, word in zip(keywords, words, strict=True)]
        paragraphs = self._ask(data, second, self.paragraph_tokens)
        return [
            _written(*steps)
            for steps in zip(words, first, answers, keywords, second, paragraphs, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True)
class P2Bench(P2):
    """P² cut short: the bench's own descriptions stand for the keywords, and the model sums them up in one step.

    The published baseline has no step at all: it takes a ready description as its prompt, which is `PersonaPrompt`.

    Attributes:
        n_descriptions: how many of the pole's eliciting personas the model reads, one a facet first.
    """

    n_descriptions: int = 6

    name: ClassVar[str] = "p2_bench"
    label: ClassVar[str] = "P², one step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_descriptions < 1:
            raise ValueError(f"n_descriptions must be at least 1, got {self.n_descriptions}")

    def _write(self, data: SearchData) -> list[WrittenPersona]:
        requests = [bench_request(self._descriptions(data, pole)) for pole in POLES]
        paragraphs = self._ask(data, requests, self.paragraph_tokens)
        return [
            _written("", "", "", (), request, paragraph)
            for request, paragraph in zip(requests, paragraphs, strict=True)
        ]

    def _descriptions(self, data: SearchData, pole: Pole) -> list[str]:
        own = data.bench.personas(data.trait, pole, "elicit")
        if not own:
            raise ValueError(f"the bench {data.bench.name!r} has no eliciting persona for {data.trait}, {pole}")
        turn: dict[str | None, int] = {}
        order: list[int] = []  # how many of its facet came before it
        for persona in own:
            order.append(turn.get(persona.facet, 0))
            turn[persona.facet] = order[-1] + 1
        dealt = sorted(range(len(own)), key=lambda k: order[k])
        return [own[k].text for k in dealt[: self.n_descriptions]]


def _read(steps: Mapping[str, Any]) -> WrittenPersona:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in steps.items()}
    return WrittenPersona(**values)


def _items(answer: str) -> tuple[str, ...]:
    """The items of a list, whatever its layout: each once, without numbers and marks."""
    found: dict[str, str] = {}
    for part in re.split(r"[,;\n]+", answer):
        item = re.sub(r"^[\s\W]*(\d+[.):]\s*)?", "", part).strip(" .:*-–\"'")
        if item:
            found.setdefault(item.casefold(), item)
    return tuple(found.values())[:MOST_KEYWORDS]


def _written(
    word: str, first: str, answer: str, keywords: tuple[str, ...], second: str, paragraph: Answer
) -> WrittenPersona:
    flaws: list[str] = []
    if word and len(keywords) < FEWEST_KEYWORDS:
        flaws.append(f"only {len(keywords)} keywords in {str(answer)!r}")
    text = " ".join(paragraph.split())
    if not paragraph.finished and (end := max(text.rfind(mark) for mark in ".!?")) > 0:
        text = text[: end + 1]
    if not re.search(r"\w", text):
        text = ""
    words = text.split()
    if len(words) < FEWEST_WORDS:
        flaws.append(f"the paragraph has {len(words)} words only: {text!r}")
    elif repetition(text) > MOST_REPETITION:
        flaws.append(f"the paragraph repeats itself: {text!r}")
    if re.search(r"\b(AI|assistant|language model)\b|I'm sorry|I am sorry", text):
        flaws.append(f"the paragraph speaks as an assistant: {text!r}")
    return WrittenPersona(word, first, str(answer), keywords, second, str(paragraph), text, tuple(flaws))
