"""Locating: answer search questions as one pole and as the other, and compare which neurons fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npti_interp.activations import DEFAULT_BLOCKS, ActivationStatistics
from npti_interp.bench import PersonalityBench, Question
from npti_interp.generation import Answer, Progress
from npti_interp.models import Model
from npti_interp.neurons import NeuronSet, beyond, select_neurons
from npti_interp.prompts import persona_prompts
from npti_interp.traits import POLES, Pole, Trait, as_trait

__all__ = ["THRESHOLDS", "Location", "choose_threshold", "collect_pole", "locate", "question_blocks"]

THRESHOLDS: tuple[float, ...] = (0.10, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03)
MIN_SHARE = 0.04


@dataclass(frozen=True)
class Location:
    """What `locate` found.

    Attributes:
        trait: the trait.
        questions: the search questions.
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        answers: the answers behind them, by pole.
        neurons: the neurons chosen.
    """

    trait: Trait
    questions: Sequence[Question]
    high: ActivationStatistics
    low: ActivationStatistics
    answers: dict[Pole, list[Answer]]
    neurons: NeuronSet

    def select(self, rule: str = "npti", **settings: Any) -> NeuronSet:
        """Choose anew from the same statistics; see `select_neurons`."""
        return select_neurons(self.high, self.low, rule, **settings)

    def _repr_html_(self) -> str:
        return self.neurons._repr_html_() + self.high._repr_html_() + self.low._repr_html_()


def question_blocks(n_questions: int, n_blocks: int) -> list[int]:
    """The block that each question is counted in.

    Shifted from round to round: questions come facet by facet and persona by persona in turn, and every block, and so
    either half of them, shall hear them all.
    """
    return [(i + i // 12) % n_blocks for i in range(n_questions)]


def collect_pole(
    model: Model,
    bench: PersonalityBench,
    trait: Trait,
    pole: Pole,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    n_blocks: int = DEFAULT_BLOCKS,
    batch_size: int | None = None,
    progress: bool | Progress = False,
) -> tuple[ActivationStatistics, list[Answer]]:
    """Answer ``questions`` as one pole and count which neurons fire; the half of `locate`."""
    return model.collect(
        persona_prompts(bench, trait, pole, questions),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        blocks=question_blocks(len(questions), n_blocks),
        n_blocks=n_blocks,
        batch_size=batch_size,
        metadata={"trait": trait.value, "pole": pole.value, "bench": bench.digest, "model": model.name},
        progress=progress,
    )


def know_percentiles(
    model: Model, bench: PersonalityBench, trait: Trait, pole: Pole, questions: Sequence[Question],
    statistics: ActivationStatistics, answers: Sequence[str], high: ActivationStatistics, low: ActivationStatistics,
    threshold: float,
) -> ActivationStatistics:  # fmt: skip
    """One pole's statistics with a95 of every neuron of that pole beyond ``threshold``.

    In memory all are known anyway; a server makes a second pass over the answers for these neurons.
    """
    where = pole.sign * (high.probability - low.probability) > threshold
    return model.fill_percentiles(statistics, persona_prompts(bench, trait, pole, questions), answers, where)


def choose_threshold(high: ActivationStatistics, low: ActivationStatistics, *, min_share: float = MIN_SHARE) -> float:
    """The largest threshold of 0.10, 0.09 … 0.03 that gives each pole at least ``min_share`` of the FFN's neurons.

    The published 0.10 gives LLaMA-3-8B 4.3 % of its neurons a pole on average (METHOD.md section 6) but a small model
    far fewer. The rule looks at counts on search questions only, never at an outcome.

    Args:
        high: statistics under the high pole's personas.
        low: statistics under the low pole's.
        min_share: share of all FFN neurons.

    Returns:
        the threshold; the smallest one if even that leaves too few.
    """
    high.require_comparable(low)
    delta = high.probability - low.probability
    for threshold in THRESHOLDS:
        if min(beyond(delta, threshold).mean(), beyond(-delta, threshold).mean()) >= min_share:
            return threshold
    return THRESHOLDS[-1]


def locate(
    model: Model,
    bench: PersonalityBench,
    trait: Trait | str,
    *,
    n_questions: int | None = None,
    max_new_tokens: int = 100,
    threshold: float | str = 0.10,
    repetition_penalty: float = 1.0,
    n_blocks: int = DEFAULT_BLOCKS,
    batch_size: int | None = None,
    progress: bool | Progress = True,
) -> Location:
    """Find the neurons of a trait: METHOD.md section 1.

    Args:
        model: from `load_model`.
        bench: gives personas and search questions.
        trait: the trait.
        n_questions: search questions, spread over facets and topics; all by default.
        max_new_tokens: length of each answer.
        threshold: for |δ|; ``"auto"`` is `choose_threshold`.
        repetition_penalty: of the decoding (the published search uses 1.1).
        n_blocks: question blocks for standard errors.
        batch_size: rows decoded at once; changes no result.
        progress: show a bar.

    Returns:
        statistics of both poles, the answers, and the neurons.

    Raises:
        ValueError: unknown trait, threshold outside (0, 1], more questions than there are, fewer than blocks.
        NonFiniteActivationError: NaN or infinity in a layer.
    """
    wanted = as_trait(trait)
    if threshold != "auto" and not (isinstance(threshold, int | float) and 0 < threshold <= 1):
        raise ValueError(f"threshold must lie in (0, 1] or be 'auto', got {threshold!r}")
    # Asked for by number even when all are wanted: that deals them out over facets and topics.
    wished = len(bench.questions(wanted, "search")) if n_questions is None else n_questions
    questions = bench.questions(wanted, "search", wished)
    if len(questions) < n_blocks:
        raise ValueError(
            f"{len(questions)} questions cannot fill {n_blocks} blocks; use more questions or fewer blocks"
        )
    found = {
        pole: collect_pole(
            model, bench, wanted, pole, questions, max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty, n_blocks=n_blocks, batch_size=batch_size, progress=progress,
        )
        for pole in POLES
    }  # fmt: skip
    (high, high_answers), (low, low_answers) = found[Pole.HIGH], found[Pole.LOW]
    chosen = choose_threshold(high, low) if isinstance(threshold, str) else float(threshold)
    high, low = (
        know_percentiles(model, bench, wanted, pole, questions, stats, own, high, low, chosen)
        for pole, stats, own in ((Pole.HIGH, high, high_answers), (Pole.LOW, low, low_answers))
    )
    return Location(
        wanted, questions, high, low, {Pole.HIGH: high_answers, Pole.LOW: low_answers},
        select_neurons(high, low, threshold=chosen),
    )  # fmt: skip
