"""What every generator is: calls of tokens, what of a completion is an answer, and whether it is the same model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from npti_interp.chat._request import canonical
from npti_interp.errors import FingerprintMismatchError, RemoteServiceError, UnsupportedMethodError
from npti_interp.generation import Answer, Decoding, Progress
from npti_interp.interventions import Intervention
from npti_interp.models import Model, ModelFingerprint, Prompt
from npti_interp.models._model import _bar

__all__ = ["Agreement", "Completion", "Generator", "TokenCall", "TokenGenerator", "checked_tokens"]

_LEAST_TEMPERATURE = 0.01
"""vLLM silently raises what is below, and above 0."""
_PROBES = (
    "What did you do last weekend?",
    "Describe a person whom you admire, and say why.",
    "A friend cancels dinner an hour before. How do you feel, and what do you write back?",
    "Liste drei Dinge auf, die man in 17 Minuten erledigen kann: 1)",
)
_PROBE_TOKENS = 12
_PROBE_PENALTY = 2.0


@runtime_checkable
class Generator(Protocol):
    """Anything that gives a model's answers with their tokens."""

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the model whose answers they are."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        progress: bool | Progress = False,
    ) -> list[Answer]:
        """Answer each prompt; as `Model.generate`."""
        ...

    def identity(self) -> dict[str, Any]:
        """Who answers, as JSON: for files. Never holds a key."""
        ...


@dataclass(frozen=True)
class TokenCall:
    """One answer to decode.

    Attributes:
        prompt: token ids.
        stop: token ids that end the answer.
        max_tokens: most tokens of it, the one that ends it included.
        temperature: 0 is greedy.
        top_p: nucleus.
        repetition_penalty: 1 is none.
        seed: of the drawing; None where nothing is drawn.
        scored: wants the log-probability of each token, too.
    """

    prompt: tuple[int, ...]
    stop: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    scored: bool = False

    def key(self, answerer: Mapping[str, Any]) -> str:
        """SHA-256 of who is asked, the tokens and the settings."""
        return hashlib.sha256(canonical({"answerer": dict(answerer), **asdict(self)}).encode()).hexdigest()


@dataclass(frozen=True)
class Completion:
    """What came back, as it came.

    Attributes:
        tokens: the decoded token ids, with or without the one that ended the answer.
        finish_reason: ``stop`` or ``length``.
        stop_reason: the token that ended it, where the engine names one.
        log_probabilities: of the tokens, before any penalty; None unless asked for.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    log_probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check types: this is read from replies and from files.

        Raises:
            ValueError: no completion.
        """
        given: Any = self.tokens
        if not all(isinstance(t, int) and not isinstance(t, bool) for t in given):
            raise ValueError(f"token ids expected, got {given!r:.80}")
        if self.finish_reason not in ("stop", "length"):
            raise ValueError(f"not a whole answer: finish_reason {self.finish_reason!r:.80}")
        ended: Any = self.stop_reason
        if not isinstance(ended, int | str | None) or isinstance(ended, bool):
            raise ValueError(f"a token or a text as stop_reason expected, got {ended!r:.80}")
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if self.log_probabilities is not None:
            try:
                values = tuple(float(v) for v in self.log_probabilities)
            except OverflowError:
                raise ValueError("a log-probability is too large") from None
            if len(values) != len(self.tokens):
                raise ValueError(f"{len(self.tokens)} tokens but {len(values)} log-probabilities")
            object.__setattr__(self, "log_probabilities", values)


def checked_tokens(call: TokenCall, reply: Completion, vocabulary: int) -> tuple[int, ...]:
    """The answer's tokens as `Model.generate` would give them: with the end token, if one ended it.

    Args:
        call: what was asked.
        reply: what came back.
        vocabulary: token ids lie below.

    Raises:
        FingerprintMismatchError: tokens that this model does not have, or that do not end its answers.
        RemoteServiceError: an answer cut off or continued against what was asked.
    """
    tokens = list(reply.tokens)
    if strange := [t for t in tokens if not 0 <= t < vocabulary]:
        raise FingerprintMismatchError(
            f"the engine decoded token {strange[0]}, and this model's are 0 … {vocabulary - 1}: it serves another model"
        )
    if reply.finish_reason == "stop" and not (tokens and tokens[-1] in call.stop):
        ends = reply.stop_reason
        if ends is None and len(call.stop) == 1:
            ends = call.stop[0]
        if ends is None:
            raise RemoteServiceError(
                f"the engine does not say which of the tokens {list(call.stop)} ended an answer; let it return the end "
                "token (of vLLM, that is what return_token_ids does), or name it as stop_reason"
            )
        if ends not in call.stop:
            raise FingerprintMismatchError(
                f"the engine ends answers at {ends!r}, and this model's end tokens are {list(call.stop)}: it serves "
                "another model, or its generation config was changed (vLLM: --generation-config)"
            )
        tokens.append(int(ends))
    if within := [t for t in tokens[:-1] if t in call.stop]:
        raise RemoteServiceError(
            f"the engine went on after the end token {within[0]}; turn off ignore_eos and min_tokens there"
        )
    if len(tokens) > call.max_tokens:
        raise RemoteServiceError(f"the engine gave {len(tokens)} tokens where {call.max_tokens} were asked for at most")
    if len(tokens) < call.max_tokens and not (tokens and tokens[-1] in call.stop):
        raise RemoteServiceError(
            f"the engine cut an answer off at {len(tokens)} of {call.max_tokens} tokens: prompt ({len(call.prompt)} "
            "tokens) and answer do not fit its limit; raise that (vLLM: --max-model-len), or lower max_new_tokens"
        )
    return tuple(tokens)


@dataclass(frozen=True)
class Agreement:
    """How far the engine and this model agree on a few prompts.

    Attributes:
        tokens: number of greedy tokens whose log-probabilities were compared.
        difference: mean absolute difference of these, in nats.
        largest: the largest difference.
        choices: number of tokens that were held against this model's own choice after the same tokens.
        same: how many of them are that choice.
        regret: how much likelier that choice is than the engine's, mean over `choices`, in nats after the penalty.
    """

    tokens: int
    difference: float
    largest: float
    choices: int
    same: int
    regret: float


class TokenGenerator(ABC):
    """Makes `Answer`s of a model through an engine that takes and gives token ids.

    Args:
        model: the model whose answers they shall be; it encodes the prompts.
        tolerance: most that the engine's log-probabilities may be off on average, in nats.

    Attributes:
        agreement: what `verify` found; None before.

    Raises:
        ValueError: a tolerance that is not above 0.
    """

    def __init__(self, model: Model, tolerance: float) -> None:
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {tolerance}")
        self._model, self._tolerance = model, tolerance
        self._stop = tuple(model._stop_tokens())
        # Some tokenizers know tokens that the embedding has no row for; others have rows to spare.
        self._vocabulary = int(model.hf_model.get_input_embeddings().weight.shape[0])
        self.agreement: Agreement | None = None

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the model whose answers they are."""
        return self._model.fingerprint

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Who answers, as JSON: for files. Never holds a key."""

    @abstractmethod
    def _max_length(self) -> int | None:
        """Most tokens of prompt and answer together; None if the engine does not say."""

    @abstractmethod
    def _known(self, call: TokenCall) -> bool:
        """Whether the call need not be made."""

    @abstractmethod
    def _complete(
        self, calls: Sequence[TokenCall], bar: Progress | None, *, fresh: bool = False
    ) -> Iterator[Completion]:
        """One completion a call, in order, each of which `checked_tokens` accepts; ``fresh`` ones from the engine."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        intervention: Intervention | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        progress: bool | Progress = False,
    ) -> list[Answer]:
        """Answer each prompt.

        Args:
            prompts: as for `Model.generate`.
            intervention: must be None.
            max_new_tokens: most tokens of an answer.
            temperature: 0 is greedy; above it, answers are drawn by the engine's own generator, not by that of
                `Model.generate`.
            top_p: nucleus, for temperatures above 0.
            repetition_penalty: 1 is none; as in `Model.generate`, tokens of the prompt count as seen.
            seed: of the drawing; each prompt has its own.
            progress: show a bar, or advance the one given by one a prompt.

        Returns:
            one `Answer` a prompt, with its tokens, the one that ended it included.

        Raises:
            UnsupportedMethodError: an intervention.
            ValueError: no prompts, an empty one, a setting out of range, or more tokens than the engine takes.
            FingerprintMismatchError: the engine runs another model.
            RemoteServiceError: prompts without an answer.
        """
        if intervention is not None:
            raise UnsupportedMethodError(
                "this engine runs the unedited model and cannot edit neurons; use model.generate(prompts, "
                "intervention=…) for edited answers"
            )
        self._model.require_unedited("an engine elsewhere")
        if 0 < temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {_LEAST_TEMPERATURE} here, got {temperature}")
        decoding = Decoding(max_new_tokens, temperature, top_p, repetition_penalty, seed)
        calls = [self._call(prompt, decoding, k) for k, prompt in enumerate(self._model._encode_all(prompts))]
        if not all(self._known(call) for call in calls):
            self._require_room(calls)
            if self.agreement is None:
                self.verify()
        with _bar(progress, len(calls), "generate") as bar:
            made = list(self._complete(calls, bar))
        return [
            self._model._decode(checked_tokens(call, own, self._vocabulary))
            for call, own in zip(calls, made, strict=True)
        ]

    def _call(self, prompt: tuple[int, ...], decoding: Decoding, k: int) -> TokenCall:
        drawn = decoding.temperature > 0
        return TokenCall(
            prompt, self._stop, decoding.max_new_tokens, decoding.temperature, decoding.top_p if drawn else 1.0,
            decoding.repetition_penalty, (decoding.seed * 1_000_003 + k) % 2**63 if drawn else None,
        )  # fmt: skip

    def _require_room(self, calls: Sequence[TokenCall]) -> None:
        most = self._max_length()
        k = max(range(len(calls)), key=lambda c: len(calls[c].prompt))
        n = len(calls[k].prompt)
        if most is not None and n + calls[k].max_tokens > most:
            raise ValueError(
                f"prompt {k} has {n} tokens, and with max_new_tokens={calls[k].max_tokens} they exceed the engine's "
                f"{most}; start it with room for {n + calls[k].max_tokens} (vLLM: --max-model-len)"
            )

    # -- the same model? -----------------------------------------------------------------------------------------

    def verify(self) -> Agreement:
        """Compare the engine with this model on a few prompts.

        Compared are its greedy tokens, with and without a repetition penalty, and their log-probabilities. `generate`
        does it by itself before the first call.

        Raises:
            FingerprintMismatchError: they differ by more than the tolerance.
            RemoteServiceError: the engine does not answer.
        """
        prompts = [self._model.encode(text) for text in _PROBES]
        # The last token of the vocabulary: an engine with a smaller one refuses it.
        most = min(self._vocabulary, len(self._model.tokenizer))
        prompts.append((*prompts[0], most - 1))
        length = min(_PROBE_TOKENS, (self._max_length() or 2**31) - max(map(len, prompts)))
        if length < 1:
            raise ValueError(f"the engine's limit of {self._max_length()} tokens is too short for the first checks")
        calls = [
            TokenCall(prompt, self._stop, length, repetition_penalty=penalty, scored=penalty == 1.0)
            for penalty in (1.0, _PROBE_PENALTY)
            for prompt in prompts
        ]
        try:
            made = list(self._complete(calls, None, fresh=True))
        except RemoteServiceError as failure:
            if "vocab" not in str(failure).casefold():
                raise
            raise FingerprintMismatchError(
                f"the engine has fewer tokens than {self._model.name} ({most}), so it runs another model: {failure}"
            ) from None
        found = self._compared(calls, made)
        if not found.difference <= self._tolerance:
            raise FingerprintMismatchError(
                f"the engine runs another model than {self._model.name}: over {found.tokens} tokens its log-probabilities "
                f"are off by {found.difference:.3g} nats on average, {found.largest:.3g} at most, and "
                f"{self._tolerance:g} are allowed. Serve this model's weights, in its precision ({self._model.dtype}); a "
                "quantised copy needs a larger tolerance"
            )
        if not found.regret <= self._tolerance:
            raise FingerprintMismatchError(
                f"the engine has the model's probabilities, but does not choose by them: its tokens are "
                f"{found.regret:.3g} nats below the greedy choice on average. It does not keep to temperature or "
                "repetition_penalty as sent (vLLM does)"
            )
        self.agreement = found
        return found

    def _compared(self, calls: Sequence[TokenCall], made: Sequence[Completion]) -> Agreement:
        engine, scored = self._model.backend, [k for k, call in enumerate(calls) if call.scored]
        if any(made[k].log_probabilities is None for k in scored):
            raise RemoteServiceError("the engine returns no log-probabilities, so it cannot be checked; allow logprobs")
        prefixes = [[made[k].tokens[: n + 1] for n in range(len(made[k].tokens))] for k in scored]
        sums = engine.log_likelihoods([calls[k].prompt for k in scored], prefixes, None)
        off: list[float] = []
        for k, own in zip(scored, sums, strict=True):
            ours = np.diff(own, prepend=0.0)
            off += np.abs(ours - np.array(made[k].log_probabilities)).tolist()
        if not off:
            raise FingerprintMismatchError(
                f"the engine gives empty answers to plain questions, which {self._model.name} does not: another model"
            )
        # A whole row of logits a choice: so only two choices a call, with much seen before them.
        lengths = [len(own.tokens) for own in made]
        places = [(k, n) for k, length in enumerate(lengths) if length for n in sorted({length // 2, length - 1})]
        seen = [(*calls[k].prompt, *made[k].tokens[:n]) for k, n in places]
        logits = engine.next_token_logits(seen, None).float()
        after = torch.log_softmax(_penalised(logits, seen, [calls[k].repetition_penalty for k, _ in places]), dim=-1)
        tokens = torch.tensor([made[k].tokens[n] for k, n in places])
        regret = after.amax(dim=-1) - after.gather(1, tokens[:, None])[:, 0]
        return Agreement(
            len(off), float(np.mean(off)), float(np.max(off)),
            len(places), int((after.argmax(dim=-1) == tokens).sum()), float(regret.mean()),
        )  # fmt: skip


def _penalised(logits: torch.Tensor, seen: Sequence[Sequence[int]], penalties: Sequence[float]) -> torch.Tensor:
    changed = logits.clone()
    for n, (own, penalty) in enumerate(zip(seen, penalties, strict=True)):
        known = torch.tensor(sorted(set(own)))
        value = changed[n, known]
        changed[n, known] = torch.where(value < 0, value * penalty, value / penalty)
    return changed
