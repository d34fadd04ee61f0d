"""How personas and questions become prompts."""

from __future__ import annotations

from collections.abc import Sequence

from npti_interp.bench import Persona, PersonalityBench, Question
from npti_interp.models import Prompt
from npti_interp.traits import Pole, Trait, as_pole, as_trait

__all__ = ["eliciting_personas", "persona_prompt", "persona_prompts"]

_STAY = "Answer in the first person, as this person."


def persona_prompt(persona: Persona, question: Question | str) -> Prompt:
    """Persona and question in one user message; the template's own system prompt stays.

    A persona in the system message is followed less: on the embedded model it separates the poles with a judge's AUC
    of 0.60 to 0.68 where this form reaches 0.71 to 0.81. It also serves templates without system messages (Gemma) and
    models without a template.
    """
    text = question if isinstance(question, str) else question.text
    return f"{persona.text} {text} {_STAY}"


def persona_prompts(
    bench: PersonalityBench, trait: Trait | str, pole: Pole | str, questions: Sequence[Question], start: int = 0
) -> list[Prompt]:
    """One prompt a question; question *i* gets the pole's *i*-th eliciting persona, over and over.

    Questions that are part of a longer list keep the personas they have there: ``start`` is the first one's place in
    it.

    Both poles give a question personas of the same place in the list (the same facet), so that they differ in the
    pole alone. (The published code draws at random, each pole for itself: METHOD.md section 4, item 10.)

    Raises:
        ValueError: the bench has no eliciting persona for this pole.
    """
    personas = eliciting_personas(bench, trait, pole, len(questions), start)
    return [persona_prompt(persona, question) for persona, question in zip(personas, questions, strict=True)]


def eliciting_personas(
    bench: PersonalityBench, trait: Trait | str, pole: Pole | str, n: int, start: int = 0
) -> list[Persona]:
    """The personas that answer ``n`` questions from place ``start`` on, in `persona_prompts`' order.

    Raises:
        ValueError: the bench has no eliciting persona for this pole.
    """
    wanted, end = as_trait(trait), as_pole(pole)
    own = bench.personas(wanted, end, "elicit")
    if not own:
        raise ValueError(f"the bench {bench.name!r} has no eliciting persona for {wanted}, {end}")
    return [own[i % len(own)] for i in range(start, start + n)]
