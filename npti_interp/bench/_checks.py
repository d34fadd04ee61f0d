"""Rules that a benchmark's text should keep, as pure functions.

A question is meant to be *open* (METHOD.md, section 3): it describes a situation and asks one thing that can be
answered freely. A question that offers its answers, asks for a yes, or names the trait measures something else.
Every function here judges wording by patterns. They are made for English and for the kinds of question that such
sets contain; a clean result is evidence, not proof.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from npti_interp.bench._schema import Question
from npti_interp.traits import TRAITS, Trait, as_trait

if TYPE_CHECKING:
    from npti_interp.bench._bench import PersonalityBench

__all__ = [
    "answer_format",
    "final_sentence",
    "near_duplicates",
    "printed_options",
    "shared_endings",
    "topic_overlap",
    "trait_words",
]

_AUXILIARY = r"(?:do|does|did|are|is|am|was|were|would|will|can|could|should|shall|have|has|had|may|might|must)(?:n't)?"
_OPEN_WORD = re.compile(r"\b(?:what|how|which|where|who|whom|whose|why|when)\b", re.IGNORECASE)
_REQUEST = re.compile(
    r"(?:please )?(?:describe|tell|explain|talk|walk|take|share|say|detail|discuss|reflect)\b", re.IGNORECASE
)
_YES_NO_START = re.compile(rf"(?:(?:and|so|but|then|or),? )?{_AUXILIARY}\b", re.IGNORECASE)
_YES_NO_CLAUSE = re.compile(
    rf"[,;:–—]\s*(?:(?:and|so|but|then|or) )?{_AUXILIARY} (?:you|your|i|we|they|he|she|it|this|that|there)\b",
    re.IGNORECASE,
)
_YES_NO_PRINTED = re.compile(r"\byes\s*(?:/|or)\s*no\b", re.IGNORECASE)
_SCALE_PRINTED = re.compile(
    r"\bon a scale\b|\b(?:from )?[01]\s*(?:-|–|to|through)\s*(?:5|7|10|100)\b(?=.*(?:scale|likel|agree|where|rat))"
    r"|\b[01]\s*=\s*['\"“]?\w|\brate (?:your|how|the|yourself)\b",
    re.IGNORECASE | re.DOTALL,
)
_LIKERT_LABEL = re.compile(
    r"\b(?:very|extremely|somewhat|highly|strongly|slightly|not at all)\s+"
    r"(?:un)?(?:likely|agree|disagree|satisfied|comfortable|true|accurate|often)\b"
    r"|\b(?:unlikely|neutral|neither agree nor disagree)\b",
    re.IGNORECASE,
)
_DEGREE = re.compile(
    r"\bhow (?:un)?(?:likely|probable|sure|certain|confident|comfortable|willing|inclined|capable|strongly)\b",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(
    r"\b(?:which|whether|either|prefer|rather)\b.*\bor\b"
    r"|\bor (?:do|does|would|will|are|is|should|can|could|you|instead|rather|not)\b",
    re.IGNORECASE,
)
_CHOOSE_ONE = re.compile(
    r"\b(?:choose|select|pick|circle|tick) one\b(?!\s+(?:of your|and (?:describe|explain)))", re.IGNORECASE
)
_LETTER_OPTION = re.compile(r"(?:(?:^|[\s(])([a-e])\)|^\s*([a-e])[.:])(?=\s)", re.IGNORECASE | re.MULTILINE)
_NUMBER_OPTION = re.compile(r"^\s*\(?([1-5])[).:]\s", re.MULTILINE)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def _text(question: Question | str) -> str:
    text = question if isinstance(question, str) else question.text
    return text.replace("’", "'").replace("‘", "'").strip()


def _sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])[\"'”)]*\s+", text) if s]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.replace("’", "'").casefold())


def final_sentence(question: Question | str) -> str:
    """The sentence that ends the question: what is actually asked."""
    sentences = _sentences(_text(question))
    return sentences[-1] if sentences else ""


def printed_options(question: Question | str) -> str | None:
    """The closed answer format that a question prints in its own text, if any.

    Only answers that can be read in the text count: lettered or numbered options (and "choose one"), a rating
    scale or Likert labels, "yes/no". A question such as "How likely are you to …?" offers none; `answer_format`
    objects to it all the same.

    Returns:
        ``"multiple choice"``, ``"scale"``, ``"yes/no"``, or None.
    """
    text = _text(question)
    letters = "".join(inline or opening for inline, opening in _LETTER_OPTION.findall(text)).lower()
    numbers = set(_NUMBER_OPTION.findall(text))
    if "ab" in letters or {"1", "2"} <= numbers:
        return "multiple choice"
    if _SCALE_PRINTED.search(text) or len({m.lower() for m in _LIKERT_LABEL.findall(text)}) >= 3:
        return "scale"
    if _YES_NO_PRINTED.search(text):
        return "yes/no"
    return "multiple choice" if _CHOOSE_ONE.search(text) else None


def _offers_alternatives(sentence: str, *, closed: bool) -> bool:
    """Whether reactions to choose from stand in the sentence; "or" between mere examples does not count."""
    sentence = re.sub(r"\bwhy or why not\b", "why", sentence, flags=re.IGNORECASE)
    return _ALTERNATIVE.search(sentence) is not None or (closed and re.search(r"\bor\b", sentence) is not None)


def answer_format(question: Question | str) -> list[str]:
    """The ways in which a question fails to be one open question; an empty list if it is one.

    Args:
        question: a `Question` or its text. Quoted speech is not taken for the question itself.

    Returns:
        Any of these, in this order: ``"multiple choice"`` (options, or reactions joined by "or"), ``"yes/no"``
        (a yes would answer it), ``"scale"`` (a rating or "how likely"), ``"several questions"`` (more than one
        thing is asked), ``"no open question"`` (neither an open question word nor a request such as "describe").
    """
    printed = printed_options(question)
    sentences = _sentences(_QUOTED.sub("…", _text(question)).replace(", if any,", ""))
    asked = [s for s in sentences if s.endswith("?")]
    last = sentences[-1] if sentences else ""
    is_request = not last.endswith("?") and _REQUEST.match(last) is not None
    asking = asked + ([last] if is_request else [])
    closed = [s for s in asked if _YES_NO_START.match(s) or _YES_NO_CLAUSE.search(s)]
    found: list[str] = []
    if printed == "multiple choice" or any(_offers_alternatives(s, closed=s in closed) for s in asking):
        found.append("multiple choice")
    if printed == "yes/no" or closed:
        found.append("yes/no")
    if printed == "scale" or any(_DEGREE.search(s) for s in asking):
        found.append("scale")
    if len(asking) > 1:
        found.append("several questions")
    if not is_request and not (last.endswith("?") and _OPEN_WORD.search(last)):
        found.append("no open question")
    return found


def trait_words(question: Question | str, trait: Trait | str | None = None) -> list[str]:
    """Words in a question that give away what it probes.

    Args:
        question: a `Question` or its text.
        trait: the trait whose facet names are forbidden as well; by default the question's own. Trait names and
            pole adjectives are forbidden for all five traits, since a word for one pole colours the others.

    Returns:
        The words found (whole words, lower case), in order of appearance, each once.

    Raises:
        ValueError: an unknown trait.
    """
    if trait is None and isinstance(question, Question):
        trait = question.trait
    forbidden: list[str] = []
    for member in TRAITS:
        forbidden += [member.value, *member.info.high, *member.info.low]
    if trait is not None:
        forbidden += as_trait(trait).info.facets
    longest_first = sorted(forbidden, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", re.IGNORECASE)
    return list(dict.fromkeys(m.lower() for m in pattern.findall(_text(question))))


def _grams(text: str) -> frozenset[tuple[str, ...]]:
    words = _words(text)
    if 0 < len(words) < 3:
        return frozenset([tuple(words)])
    return frozenset(tuple(words[i : i + 3]) for i in range(len(words) - 2))


def near_duplicates(texts: Sequence[str], threshold: float = 0.4) -> list[tuple[int, int, float]]:
    """Pairs of texts that share much of their wording.

    The similarity is the Jaccard index of the sets of word 3-grams (case, punctuation and white space do not
    count; a text of one or two words is a single gram). The search is exact: two sets with an index of at least
    ``threshold`` must share one of the rarest ``n - ceil(threshold n) + 1`` of their ``n`` grams, so only pairs
    that meet there in an inverted index are compared.

    Args:
        texts: the texts.
        threshold: smallest similarity to report, above 0 and at most 1.

    Returns:
        ``(i, j, similarity)`` with ``i < j``, sorted by ``i`` and then ``j``.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; give a similarity above 0 and at most 1, such as 0.4")
    grams = [_grams(text) for text in texts]
    frequency = Counter(gram for own in grams for gram in own)
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    pairs: list[tuple[int, int, float]] = []
    for j, own in enumerate(grams):
        ordered = sorted(own, key=lambda gram: (frequency[gram], gram))
        prefix = ordered[: len(own) - math.ceil(threshold * len(own) - 1e-9) + 1]
        for i in {i for gram in prefix for i in index[gram]}:
            shared = len(own & grams[i])
            similarity = shared / (len(own) + len(grams[i]) - shared)
            if similarity >= threshold:
                pairs.append((i, j, similarity))
        for gram in prefix:
            index[gram].append(j)
    return sorted(pairs)


def shared_endings(questions: Iterable[Question | str], most: int = 8) -> dict[str, int]:
    """Final sentences that more than ``most`` of the questions share, with their counts (case does not count)."""
    endings = Counter(final_sentence(q).casefold() for q in questions)
    return {ending: n for ending, n in endings.items() if n > most}


def topic_overlap(bench: PersonalityBench) -> dict[str, tuple[int, int]]:
    """Topics that occur in both splits, over all traits.

    Returns:
        For each such topic (lower case) the number of search and of test questions on it; empty if neurons are
        located and evaluated on different topics. Questions without a topic do not count.
    """
    splits = {
        split: Counter(q.topic.casefold() for q in bench.questions(split=split) if q.topic is not None)
        for split in ("search", "test")
    }
    shared = splits["search"].keys() & splits["test"].keys()
    return {topic: (splits["search"][topic], splits["test"][topic]) for topic in sorted(shared)}
