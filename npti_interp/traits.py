"""The Big Five: traits, their two poles, their facets and the adjectives that mark each pole.

Domains and facets follow the five-factor model (Costa & McCrae's thirty facets, as the public-domain
IPIP-NEO names them). The adjectives are common markers of the poles; they serve the *simple* prompt and
the check that no question names the trait it probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["POLES", "TRAITS", "Pole", "Trait", "TraitInfo", "as_pole", "as_trait", "trait_info"]


class Trait(StrEnum):
    """A Big Five domain. Members equal their own names, so plain strings work wherever a trait is asked for."""

    AGREEABLENESS = "Agreeableness"
    CONSCIENTIOUSNESS = "Conscientiousness"
    EXTRAVERSION = "Extraversion"
    NEUROTICISM = "Neuroticism"
    OPENNESS = "Openness"

    @property
    def letter(self) -> str:
        """The one-letter label (A, C, E, N, O) used in tables and figures."""
        return self.value[0]

    @property
    def info(self) -> TraitInfo:
        """Facets and pole adjectives of this trait."""
        return _INFO[self]


class Pole(StrEnum):
    """An end of a trait: ``high`` (neurotic) or ``low`` (emotionally stable)."""

    HIGH = "high"
    LOW = "low"

    @property
    def opposite(self) -> Pole:
        """The other pole."""
        return Pole.LOW if self is Pole.HIGH else Pole.HIGH

    @property
    def sign(self) -> int:
        """+1 for the high pole, −1 for the low one."""
        return 1 if self is Pole.HIGH else -1


TRAITS: tuple[Trait, ...] = tuple(Trait)
POLES: tuple[Pole, ...] = (Pole.HIGH, Pole.LOW)


@dataclass(frozen=True)
class TraitInfo:
    """What the five-factor model says of one trait.

    Attributes:
        facets: the six facets, in the questionnaire's order.
        high: adjectives that mark the high pole.
        low: adjectives that mark the low pole.
    """

    facets: tuple[str, ...]
    high: tuple[str, ...]
    low: tuple[str, ...]

    def adjectives(self, pole: Pole | str) -> tuple[str, ...]:
        """Adjectives that mark ``pole``."""
        return self.high if as_pole(pole) is Pole.HIGH else self.low


_INFO: dict[Trait, TraitInfo] = {
    Trait.AGREEABLENESS: TraitInfo(
        facets=("Trust", "Morality", "Altruism", "Cooperation", "Modesty", "Sympathy"),
        high=(
            "agreeable", "trusting", "generous", "cooperative", "compassionate", "sympathetic", "considerate",
            "modest", "altruistic", "forgiving", "kind-hearted", "warm-hearted",
        ),
        low=(
            "disagreeable", "selfish", "rude", "suspicious", "uncooperative", "harsh", "arrogant", "callous",
            "manipulative", "hostile", "quarrelsome", "boastful",
        ),
    ),
    Trait.CONSCIENTIOUSNESS: TraitInfo(
        facets=(
            "Self-Efficacy", "Orderliness", "Dutifulness", "Achievement-Striving", "Self-Discipline", "Cautiousness",
        ),
        high=(
            "conscientious", "organized", "organised", "responsible", "disciplined", "self-disciplined", "thorough",
            "hardworking", "reliable", "dutiful", "diligent", "punctual",
        ),
        low=(
            "unconscientious", "disorganized", "disorganised", "irresponsible", "undisciplined", "careless", "lazy",
            "unreliable", "sloppy", "negligent", "aimless", "rash",
        ),
    ),
    Trait.EXTRAVERSION: TraitInfo(
        facets=(
            "Friendliness", "Gregariousness", "Assertiveness", "Activity Level", "Excitement-Seeking", "Cheerfulness",
        ),
        high=(
            "extraverted", "extroverted", "outgoing", "sociable", "talkative", "assertive", "energetic",
            "enthusiastic", "lively", "cheerful", "gregarious", "thrill-seeking",
        ),
        low=(
            "introverted", "shy", "reserved", "quiet", "withdrawn", "timid", "unsociable", "reticent", "solitary",
            "passive", "unenthusiastic", "subdued",
        ),
    ),
    Trait.NEUROTICISM: TraitInfo(
        facets=("Anxiety", "Anger", "Depression", "Self-Consciousness", "Immoderation", "Vulnerability"),
        high=(
            "neurotic", "anxious", "nervous", "moody", "irritable", "tense", "worried", "insecure", "depressed",
            "self-conscious", "vulnerable", "emotionally unstable",
        ),
        low=(
            "emotionally stable", "calm", "relaxed", "even-tempered", "confident", "secure", "unworried",
            "self-assured", "composed", "resilient", "easygoing", "patient",
        ),
    ),
    Trait.OPENNESS: TraitInfo(
        facets=(
            "Imagination", "Artistic Interests", "Emotionality", "Adventurousness", "Intellect", "Liberalism",
        ),
        high=(
            "open-minded", "imaginative", "creative", "curious", "artistic", "inventive", "unconventional",
            "intellectual", "adventurous", "insightful", "reflective", "progressive",
        ),
        low=(
            "closed-minded", "unimaginative", "uncreative", "incurious", "unartistic", "conventional",
            "narrow-minded", "traditional", "unadventurous", "down-to-earth", "unreflective", "dogmatic",
        ),
    ),
}  # fmt: skip


def as_trait(trait: Trait | str) -> Trait:
    """The `Trait` that ``trait`` names (its full name or its letter, any case).

    Raises:
        ValueError: no trait of that name; the message lists those that exist.
    """
    if isinstance(trait, Trait):
        return trait
    text = str(trait).strip().casefold()
    for member in Trait:
        if text in (member.value.casefold(), member.letter.casefold()):
            return member
    raise ValueError(f"unknown trait {trait!r}; choose one of {', '.join(t.value for t in Trait)}")


def as_pole(pole: Pole | str) -> Pole:
    """The `Pole` that ``pole`` names (``"high"`` or ``"low"``).

    Raises:
        ValueError: any other word.
    """
    try:
        return Pole(str(pole).strip().casefold())
    except ValueError:
        raise ValueError(f"unknown pole {pole!r}; choose 'high' or 'low'") from None


def trait_info(trait: Trait | str) -> TraitInfo:
    """`TraitInfo` of a trait given by member, name or letter."""
    return _INFO[as_trait(trait)]
