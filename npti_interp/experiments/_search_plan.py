"""What locating asks of a model: a trait's search questions, cut into chunks, and which of them are one shard's.

The list of questions is always the whole one: a question's block and persona follow from its place in it, so every way
of dividing the work counts the same tokens in the same blocks. Work is done chunk by chunk, and a shard is a run of
whole chunks. That is what makes shards add up exactly: a forward pass rounds a little differently in another batch, so
the rows that share batches must be the same however many machines there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from npti_interp.activations import ActivationCollector
from npti_interp.bench import PersonalityBench, Question
from npti_interp.generation import Answer, Decoding, Progress
from npti_interp.models import Model
from npti_interp.prompts import persona_prompts
from npti_interp.serving import Generator
from npti_interp.traits import Pole, Trait

__all__ = ["DEFAULT_CHUNK", "SearchPlan", "Shard", "as_shard", "question_blocks"]

DEFAULT_CHUNK = 512
"""Questions a chunk: many batches' worth, and few enough that little is lost when a run is stopped."""

PILOT = 64
"""Questions, the first of the whole list, on which every shard lays the windows of its sketch."""

Shard = tuple[int, int]
"""Part *k* of *n*, counted from 1."""


def as_shard(value: str | Sequence[int]) -> Shard:
    """``(k, n)`` of ``"k/n"`` or of the pair itself.

    Raises:
        ValueError: neither, or not 1 ≤ k ≤ n.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value)
        parts = [int(n) for n in found.groups()] if found else []
    else:
        parts = [int(n) for n in value]
    if len(parts) != 2 or not 1 <= parts[0] <= parts[1]:
        raise ValueError(f"a shard is K/N with K from 1 to N, such as 3/40; got {value!r}")
    return parts[0], parts[1]


def question_blocks(n_questions: int, n_blocks: int, start: int = 0) -> list[int]:
    """The block that each of ``n_questions`` questions from place ``start`` on is counted in.

    Shifted from round to round: questions come facet by facet and persona by persona in turn, and every block, and so
    either half of them, shall hear them all.
    """
    return [(i + i // 12) % n_blocks for i in range(start, start + n_questions)]


@dataclass(frozen=True)
class SearchPlan:
    """Questions, how they are answered and counted, and which of them are meant.

    Attributes:
        bench: gives the personas.
        trait: the trait.
        questions: all search questions, in order.
        chunk: questions a chunk.
        n_blocks: question blocks counted apart.
        max_new_tokens: length of each answer.
        repetition_penalty: of the decoding.
        batch_size: rows decoded at once.
        shard: the part that is meant; None means all.
        generator: makes the answers, which the model then replays; None lets the model decode.

    Raises:
        ValueError: a chunk below 1, fewer chunks than shards, or no such decoding.
    """

    bench: PersonalityBench
    trait: Trait
    questions: Sequence[Question]
    chunk: int
    n_blocks: int
    max_new_tokens: int
    repetition_penalty: float = 1.0
    batch_size: int | None = None
    shard: Shard | None = None
    generator: Generator | None = None

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 question, got {self.chunk}")
        _ = self.spans, self.decoding  # they raise

    @property
    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(self.max_new_tokens, repetition_penalty=self.repetition_penalty)

    @property
    def spans(self) -> list[range]:
        """The chunks that are meant, as places in the list of questions.

        Raises:
            ValueError: fewer chunks than shards.
        """
        return chunk_spans(len(self.questions), self.chunk, self.shard)

    @property
    def places(self) -> range:
        """The questions that are meant, as places in the list."""
        spans = self.spans
        return range(spans[0].start, spans[-1].stop)

    def metadata(self, model: Model, pole: Pole, n_prompts: int) -> dict[str, Any]:
        """What statistics over ``n_prompts`` of the questions say of themselves."""
        shard = {"shard": f"{self.shard[0]}/{self.shard[1]}"} if self.shard else {}
        engine = {} if self.generator is None else {"generator": self.generator.identity()}
        return {
            "decoding": self.decoding.to_dict(), "n_prompts": n_prompts, "trait": self.trait.value,
            "pole": pole.value, "bench": self.bench.digest, "model": model.name, **shard, **engine,
        }  # fmt: skip

    def blocks(self, span: range) -> list[int]:
        """The blocks of some of the questions."""
        return question_blocks(len(span), self.n_blocks, span.start)

    def collector(self, model: Model, pole: Pole) -> ActivationCollector:
        """A collector that has counted nothing.

        A shard's has windows for the percentiles laid already, on answers to the first questions of the whole list,
        which count for nothing else: windows that each shard had laid for itself would differ, and a sum knows only the
        percentiles inside all of them.
        """
        fresh = ActivationCollector(model.fingerprint, self.n_blocks)
        if self.shard is None or getattr(model.backend, "reduces", False):  # a server's bins are the same everywhere
            return fresh
        pilot = range(min(PILOT, self.chunk, len(self.questions)))
        self.answer(model, pole, pilot, fresh, False)
        return fresh.emptied()

    def answer(
        self, model: Model, pole: Pole, span: range, collector: ActivationCollector, progress: bool | Progress
    ) -> list[Answer]:
        """Answer a chunk as one pole, and count which neurons fire."""
        own = self.questions[span.start : span.stop]
        prompts, answers = persona_prompts(self.bench, self.trait, pole, own, span.start), None
        if self.generator is not None:
            answers = self.generator.generate(
                prompts, max_new_tokens=self.max_new_tokens, repetition_penalty=self.repetition_penalty,
                progress=progress,
            )  # fmt: skip
            progress = progress is True  # a bar that was given counts an answer once
        return model.collect_into(
            collector,
            prompts,
            answers,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            blocks=self.blocks(span),
            batch_size=self.batch_size,
            progress=progress,
        )

    def count_windows(
        self, model: Model, pole: Pole, span: range, answers: Sequence[str],
        windows: Mapping[int, tuple[Tensor, Tensor]], progress: bool | Progress,
    ) -> npt.NDArray[np.int32]:  # fmt: skip
        """The second pass over a chunk's answers; see `Model.count_windows`."""
        own = self.questions[span.start : span.stop]
        prompts = persona_prompts(self.bench, self.trait, pole, own, span.start)
        return model.count_windows(prompts, answers, windows, progress=progress)


def chunk_spans(n_questions: int, chunk: int, shard: Shard | None) -> list[range]:
    """The chunks of a list of questions, or those of one shard of it.

    Raises:
        ValueError: fewer chunks than shards.
    """
    spans = [range(at, min(at + chunk, n_questions)) for at in range(0, n_questions, chunk)]
    if shard is None:
        return spans
    k, n = shard
    if len(spans) < n:
        most = max((c for c in range(1, chunk + 1) if -(-n_questions // c) >= n), default=0)
        mend = f"use a chunk of at most {most}, the same for all shards, or fewer shards" if most else "use fewer"
        raise ValueError(
            f"{n_questions} questions in chunks of {chunk} are {len(spans)} chunks, too few for {n} shards; {mend}"
        )
    return spans[len(spans) * (k - 1) // n : len(spans) * k // n]
