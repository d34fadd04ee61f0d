"""What all prompt methods share: descriptions of a person, put in front of every question in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npti_interp.bench import Persona, Question
from npti_interp.errors import ArtifactError
from npti_interp.methods._base import Prepared, SearchData
from npti_interp.methods._records import read_record, write_record
from npti_interp.models import Prompt
from npti_interp.models._fingerprint import ModelFingerprint
from npti_interp.prompts import persona_prompt
from npti_interp.traits import POLES, Pole, Trait

__all__ = ["PromptPrepared", "described", "load_personas", "with_article"]

FILE = "prompts.json"


@dataclass(frozen=True)
class PromptPrepared(Prepared):
    """Descriptions that go in front of the questions.

    Attributes:
        kind: the method's name.
        fingerprint: the model it was prepared on.
        trait: the trait.
        personas: for each pole its descriptions; question *i* gets the one at place *i* modulo their number.
    """

    kind: str
    fingerprint: ModelFingerprint
    trait: Trait
    personas: Mapping[Pole, Sequence[Persona]]

    def prompts(self, questions: Sequence[Question], pole: Pole) -> list[Prompt]:
        """Description and question in one user message, as `persona_prompt` puts them: all methods alike."""
        own = self.personas[pole]
        return [persona_prompt(own[i % len(own)], question) for i, question in enumerate(questions)]

    def content(self) -> dict[str, Any]:
        """What `save` writes."""
        return {"personas": {pole.value: [asdict(p) for p in own] for pole, own in self.personas.items()}}

    def save(self, folder: Path) -> list[Path]:
        """See `Prepared.save`: one JSON file with every text."""
        return [write_record(folder / FILE, self.kind, self.fingerprint, self.trait, self.content())]


def load_personas(folder: Path, kind: str, data: SearchData) -> tuple[dict[Pole, tuple[Persona, ...]], dict[str, Any]]:
    """Descriptions by pole, and all that the file holds.

    Raises:
        ArtifactError: the file is missing or damaged.
        FingerprintMismatchError: it was prepared on another model.
    """
    content = read_record(folder / FILE, kind, data)
    try:
        return {pole: tuple(_persona(p) for p in content["personas"][pole.value]) for pole in POLES}, content
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / FILE} does not hold descriptions of both poles: {error}") from error


def _persona(fields: Any) -> Persona:
    if not isinstance(fields, dict) or any(
        not isinstance(value, str) and (name, value) != ("facet", None) for name, value in fields.items()
    ):
        raise TypeError("a field is no text")
    return Persona(**fields)


def described(kind: str, trait: Trait, pole: Pole, text: str) -> Persona:
    """A method's own description as a `Persona`, so that it goes in front of a question like any other."""
    return Persona(f"{kind}-{trait.letter}{'+' if pole is Pole.HIGH else '-'}", trait, pole, None, "elicit", text)


def with_article(adjective: str) -> str:
    """``"a calm"``, ``"an anxious"``."""
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"
