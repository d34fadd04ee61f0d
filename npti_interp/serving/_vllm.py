"""`VLLMGenerator`: answers from vLLM in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from npti_interp.errors import FingerprintMismatchError, UnsupportedMethodError
from npti_interp.generation import Progress
from npti_interp.models import Model
from npti_interp.models._embedded import EMBEDDED_MODELS, embedded_checkpoint
from npti_interp.serving._base import Completion, TokenCall, TokenGenerator, checked_tokens

__all__ = ["VLLMGenerator"]

_AT_ONCE = 2048
"""Prompts handed over together: the engine makes its own batches, but tells nothing before all are done."""


class VLLMGenerator(TokenGenerator):
    """Runs vLLM in this process for a model's answers, with the tokens that `Model.generate` would be given.

    The weights are then twice in memory; leave the engine its share (``gpu_memory_utilization``). Before the first call
    the engine is compared with ``model``: `TokenGenerator.verify`.

    Args:
        model: the model whose answers they shall be.
        checkpoint: hub id or folder of its weights; by default where ``model`` was loaded from.
        engine: a ``vllm.LLM`` that is there already, instead of ``checkpoint`` and settings.
        tolerance: most that the engine's log-probabilities may be off on average, in nats.
        **settings: of ``vllm.LLM``, such as ``max_model_len`` or ``tensor_parallel_size``; ``dtype`` is the model's.

    Attributes:
        agreement: what `verify` found; None before.

    Raises:
        UnsupportedMethodError: vLLM is not installed.
        ValueError: no checkpoint is known, or settings for an engine that is there.
        FingerprintMismatchError: a vocabulary of another size.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: str | Path | None = None,
        *,
        engine: Any = None,
        tolerance: float = 0.05,
        **settings: Any,
    ) -> None:
        super().__init__(model, tolerance)
        if engine is not None and (checkpoint is not None or settings):
            raise ValueError("give an engine, or a checkpoint and settings to make one; not both")
        if importlib.util.find_spec("vllm") is None:
            raise UnsupportedMethodError(
                "vLLM is not installed here: pip install 'npti-interp[vllm]', or run `vllm serve` anywhere and use "
                "ServedGenerator"
            )
        import vllm  # pyright: ignore[reportMissingImports]

        self._vllm: Any = vllm
        if engine is None:
            chosen = {"dtype": model.dtype.removeprefix("torch."), "seed": 0, **settings}
            engine = self._vllm.LLM(model=str(checkpoint or _checkpoint_of(model)), **chosen)
        self._engine: Any = engine
        config: Any = engine.llm_engine.model_config
        if (size := int(config.get_vocab_size())) != self._vocabulary:
            raise FingerprintMismatchError(
                f"the engine's vocabulary has {size} tokens and that of {model.name} {self._vocabulary}: it runs another "
                "model"
            )
        self._limit = int(config.max_model_len)

    def __repr__(self) -> str:
        return f"VLLMGenerator({self._model.name!r})"

    def identity(self) -> dict[str, Any]:
        """Engine and version, as JSON."""
        return {"generator": "vllm", "version": str(self._vllm.__version__)}

    def _max_length(self) -> int | None:
        return self._limit

    def _known(self, call: TokenCall) -> bool:
        return False

    def _complete(
        self, calls: Sequence[TokenCall], bar: Progress | None, *, fresh: bool = False
    ) -> Iterator[Completion]:
        for first in range(0, len(calls), _AT_ONCE):
            chunk = calls[first : first + _AT_ONCE]
            made: Any = self._engine.generate(
                [{"prompt_token_ids": list(call.prompt)} for call in chunk],
                [self._sampling(call) for call in chunk],
                use_tqdm=False,
            )
            for call, own in zip(chunk, made, strict=True):
                (output,) = own.outputs
                scores = None
                if call.scored and output.logprobs is not None:
                    scores = tuple(p[t].logprob for p, t in zip(output.logprobs, output.token_ids, strict=True))
                tokens, ended = tuple(output.token_ids), output.stop_reason
                if ended is None and output.finish_reason == "stop":
                    ended = tokens[-1]  # the model's own end token is not named, but it is always there
                completion = Completion(tokens, output.finish_reason, ended, scores)
                checked_tokens(call, completion, self._vocabulary)
                yield completion
            if bar is not None:
                bar.update(len(chunk))

    def _sampling(self, call: TokenCall) -> Any:
        return self._vllm.SamplingParams(
            n=1, max_tokens=call.max_tokens, temperature=call.temperature, top_p=call.top_p,
            repetition_penalty=call.repetition_penalty, seed=call.seed, stop_token_ids=list(call.stop),
            ignore_eos=False, detokenize=False, logprobs=1 if call.scored else None,
        )  # fmt: skip


def _checkpoint_of(model: Model) -> str:
    """Where a model's weights came from.

    Raises:
        ValueError: it does not say.
    """
    if model.name in EMBEDDED_MODELS:
        return str(embedded_checkpoint(model.name))
    known = str(getattr(model.hf_model.config, "_name_or_path", "") or "")
    if not known:
        raise ValueError(f"{model.name} does not say where its weights came from; give checkpoint=…")
    return known
