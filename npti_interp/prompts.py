"""How personas and questions become prompts."""

from __future__ import annotations

from collections.abc import Sequence

from npti_interp.bench import Persona, PersonalityBench, Question
from npti_interp.models import Prompt
from npti_interp.traits import Pole, Trait, as_pole, as_trait

__all__ = ["persona_prompt", "persona_prompts"]

_STAY = "Answer in the first person, as this person."


def persona_prompt(persona: Persona, question: Question | str) -> Prompt:
    """The persona as system message, the question as user message."""
    text = question if isinstance(question, str) else question.text
    return [{"role": "system", "content": f"{persona.text} {_STAY}"}, {"role": "user", "content": text}]


def persona_prompts(
    bench: PersonalityBench, trait: Trait | str, pole: Pole | str, questions: Sequence[Question]
) -> list[Prompt]:
    """One prompt a question; question *i* gets the pole's *i*-th eliciting persona, over and over.

    Both poles give a question personas of the same place in the list (the same facet), so that they differ in the
    pole alone. (The published code draws at random, each pole for itself: METHOD.md section 4, item 10.)

    Raises:
        ValueError: the bench has no eliciting persona for this pole.
    """
    wanted, end = as_trait(trait), as_pole(pole)
    own = bench.personas(wanted, end, "elicit")
    if not own:
        raise ValueError(f"the bench {bench.name!r} has no eliciting persona for {wanted}, {end}")
    return [persona_prompt(own[i % len(own)], question) for i, question in enumerate(questions)]
