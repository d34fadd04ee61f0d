"""A language model with its tokenizer, its neurons and the engine that runs it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from npti_interp._programs import FINE_BINS, SITES, Edits
from npti_interp.activations import DEFAULT_BLOCKS, ActivationCollector, ActivationStatistics
from npti_interp.backends import (
    Backend,
    NNsightBackend,
    RemoteBackend,
    RemoteSettings,
    TaskBackend,
    TransformerLensBackend,
)
from npti_interp.errors import NonFiniteActivationError
from npti_interp.generation import Answer, Decoding, Pass, Progress, Row, hook_sites, hooked, require_room
from npti_interp.interventions import Intervention, edit_plan, stack
from npti_interp.models._fingerprint import SAMPLES_PER_TENSOR, ModelFingerprint, fingerprint_model
from npti_interp.models._memory import ModelShape, make_plan, overcommit_allowed, refuse
from npti_interp.models._sites import FFNSites, find_sites
from npti_interp.models._weights import compute_dtype, execution_device, layer_devices

DEFAULT_CACHE_BYTES = 2**30
"""Memory for keys and values while decoding."""

__all__ = ["Message", "Model", "Prompt", "generate_sweep"]

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
"""A user message, or a list of chat messages (``{"role": …, "content": …}``)."""


class Model:
    """A causal language model, ready to be located, edited and judged. Made by `load_model`.

    Args:
        hf_model: a Hugging Face causal language model; it stays untouched.
        tokenizer: its tokenizer.
        name: what it is called in files and figures.
        backend: name of the engine.
        remote: runs jobs somewhere else (``backend="nnsight"`` only); the model is then a skeleton without weights,
            except with ``remote.here``.

    Attributes:
        hf_model: the plain Hugging Face model.
        tokenizer: its tokenizer.
        name: its name.
        sites: where its FFN neurons are.
        fingerprint: its identity.
        backend: the engine that runs it.
        cache_bytes: memory for keys and values while decoding; decides, with the memory that is left, how many rows are
            decoded at once (which changes no result).
        allow_overcommit: work even where memory will not do by the plan (`npti_interp.plan_memory`).

    Raises:
        UnsupportedModelError: mixture-of-experts or unknown architecture.
        ValueError: unknown backend.
    """

    def __init__(
        self,
        hf_model: nn.Module,
        tokenizer: Any,
        name: str = "model",
        *,
        backend: str = "transformer_lens",
        remote: RemoteSettings | None = None,
    ) -> None:
        from npti_interp.backends import BACKENDS

        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        if remote is not None and backend != "nnsight":
            raise ValueError(f"backend {backend!r} runs in memory only; remote jobs need backend='nnsight'")
        self.sites: FFNSites = find_sites(hf_model)
        self.hf_model: Any = hf_model.eval()
        self.tokenizer: Any = tokenizer
        self.name = name
        self.cache_bytes = DEFAULT_CACHE_BYTES
        self.allow_overcommit = False
        self.remote_settings = remote
        self._active: list[Intervention] = []
        stop = self._stop_tokens()
        rows = int(self.hf_model.get_input_embeddings().weight.shape[0])
        # A pad token may have been added to the tokenizer without a row for it.
        pad = next((t for t in (tokenizer.pad_token_id, *stop) if t is not None and t < rows), 0)
        self.backend: Backend
        if remote is not None:
            self.backend = engine = RemoteBackend(hf_model, tokenizer, self.sites, pad, stop, remote)
            bits = engine.probe(sorted(name for name, _ in hf_model.named_parameters()), SAMPLES_PER_TENSOR)
            known_as = engine.known_as if bits is None else ""
            self.fingerprint: ModelFingerprint = fingerprint_model(hf_model, tokenizer, self.sites, bits, known_as)
            engine.identity = self.fingerprint.digest
        else:
            local = NNsightBackend if backend == "nnsight" else TransformerLensBackend
            self.backend = local(hf_model, tokenizer, self.sites, pad, stop)
            self.fingerprint = fingerprint_model(hf_model, tokenizer, self.sites)

    @property
    def has_weights(self) -> bool:
        """Whether the weights are at hand (offloaded ones are fetched when needed); of a remote model they are not."""
        return execution_device(self.hf_model).type != "meta"

    def require_weights(self, what: str) -> None:
        """Raise unless the weights are in this process.

        Raises:
            ValueError: they are on a server.
        """
        if not self.has_weights:
            raise ValueError(
                f"{what} needs the model's weights here, and those of {self.name} are on a server; load it in memory "
                "with backend='transformer_lens'"
            )

    @functools.cached_property
    def shape(self) -> ModelShape:
        """What plans of memory need to know of the model."""
        return ModelShape.of_model(self.hf_model, self.sites, self.name)

    def _rows_at_once(
        self, rows: Sequence[Row], interventions: Sequence[Intervention | None], decoding: Decoding,
        batch_size: int | None, what: str, n_blocks: int = 0,
    ) -> int:  # fmt: skip
        """Rows to decode at once: as many as asked for (or as `cache_bytes` allows), fewer where memory is short.

        Args:
            rows: all of them.
            interventions: of the call.
            decoding: how tokens are chosen.
            batch_size: most rows at once; None is what `cache_bytes` allows.
            what: what is about to be done, for the message.
            n_blocks: blocks of the statistics that are collected meanwhile; 0 is none.

        Raises:
            NotEnoughMemoryError: not even one row will fit.
        """
        most = batch_size or self.backend.rows_within(self.cache_bytes, rows, decoding)
        if self.remote_settings is not None or overcommit_allowed(self.allow_overcommit):
            return most
        touched: set[int] = set()
        for own in interventions:
            touched |= set(own.layer_edits(self.sites.n_layers, self.sites.d_mlp)) if own is not None else set()
        asked: dict[str, Any] = {
            "prompt_tokens": max(len(row.prompt) for row in rows), "max_new_tokens": decoding.max_new_tokens,
            "conditions": len(interventions), "layers": len(touched), "traits": 1 if n_blocks else 0,
            "n_blocks": n_blocks or DEFAULT_BLOCKS, "loaded": True,
        }  # fmt: skip
        n = min(most, len(rows))
        if make_plan(self.shape, rows=n, more_rows=n < len(rows), **asked).fits:
            return most
        fewer = min(n, int(make_plan(self.shape, rows=None, **asked).settings["rows"]))
        advice = (
            "shorten prompts or answers, try fewer interventions at once, or load the model smaller (dtype=, "
            "quantization=)",
        )  # fmt: skip
        refuse(
            make_plan(self.shape, rows=fewer, **asked), f"{what} even {fewer} row{'s' * (fewer > 1)} at once", advice
        )
        return fewer

    def _stop_tokens(self) -> list[int]:
        found: list[int] = []
        for source in (self.hf_model.generation_config, self.hf_model.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            found += [value] if isinstance(value, int) else list(value or [])
        return list(dict.fromkeys(found))

    @property
    def dtype(self) -> str:
        """Precision of weights and activations, such as ``torch.float32``; of a remote model the server's.

        Of a quantised model that of the activations, with how the weights are stored.
        """
        if isinstance(self.backend, RemoteBackend):
            return self.backend.dtype
        dtype = str(compute_dtype(self.hf_model))
        return f"{dtype}, {self.fingerprint.quantisation} weights" if self.fingerprint.quantisation else dtype

    @property
    def device(self) -> str:
        """Kind of device the model computes on: ``cpu``, ``cuda`` and so on; where it enters, if there are several."""
        return execution_device(self.hf_model).type if self.has_weights else "server"

    @property
    def bridge(self) -> Any:
        """The TransformerLens `TransformerBridge` of this model, on a twin that shares its parameters.

        For caches, weights, logit attribution and hook-point analyses. ``blocks.{l}.mlp.hook_pre`` is ĥW1 before σ,
        ``mlp.hook_post`` the product on gated FFNs.

        Raises:
            AttributeError: the backend is not ``transformer_lens``.
        """
        self.require_weights("the TransformerLens bridge")
        if not isinstance(self.backend, TransformerLensBackend):
            raise AttributeError(f"backend {self.backend.name!r} has no bridge; load with backend='transformer_lens'")
        return self.backend.bridge

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are wrapped in a chat template."""
        return bool(self.tokenizer.chat_template)

    # -- prompts -------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, in the model's own chat template (plain text for a model without one).

        A system message goes where the template puts it; a template that refuses system messages (Gemma) gets it in
        front of the first user message.

        Raises:
            ValueError: empty prompt, or one in which the tokenizer finds no token; chat messages for a model without a
                chat template.
        """
        tokens = self._encode(prompt)
        if not tokens:
            raise ValueError(f"the tokenizer finds no token in {prompt!r}")
        return tokens

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError("empty prompt")
            messages: list[dict[str, str]] = [{"role": "user", "content": prompt}]
        else:
            messages = [dict(m) for m in prompt]
            if not messages or any(not m.get("content", "").strip() or "role" not in m for m in messages):
                raise ValueError(f"empty prompt, or a message without role and content: {messages!r}")
        if not self.has_chat_template:
            if not isinstance(prompt, str) and (len(messages) > 1 or messages[0]["role"] != "user"):
                raise ValueError(
                    f"{self.name} has no chat template, so it cannot take system messages or a conversation; "
                    "give one plain string, or set tokenizer.chat_template"
                )
            return tuple(self.tokenizer(messages[0]["content"])["input_ids"])
        try:
            text = self._template(messages)
        except Exception as error:  # templates raise jinja2's TemplateError when they refuse a role
            if type(error).__name__ != "TemplateError" or messages[0]["role"] != "system" or len(messages) < 2:
                raise self._bad_template(error) from error
            merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            try:
                text = self._template([merged, *messages[2:]])
            except Exception as again:
                raise self._bad_template(again) from again
        # The template writes the special tokens itself; adding them again would double the first one.
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _bad_template(self, error: Exception) -> ValueError:
        return ValueError(f"the chat template of {self.name} fails ({type(error).__name__}: {error})")

    def _template(self, messages: Sequence[Message]) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer as it would follow a prompt."""
        return tuple(self.tokenizer(str(answer), add_special_tokens=False)["input_ids"])

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of prompts; put the string in a list")
        if not prompts:
            raise ValueError("no prompts were given")
        encoded: list[tuple[int, ...]] = []
        for index, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        return encoded

    def _decode(self, tokens: Sequence[int]) -> Answer:
        stop = set(self._stop_tokens())
        finished = bool(tokens) and tokens[-1] in stop
        text = self.tokenizer.decode([t for t in tokens if t not in stop], skip_special_tokens=True)
        return Answer(text, tokens, finished=finished)

    # -- interventions -------------------------------------------------------------------------------------------

    def _checked(self, intervention: Intervention | None) -> Intervention | None:
        parts = [*self._active, *([intervention] if intervention is not None else [])]
        if not parts:
            return None
        whole = stack(parts)
        if whole.fingerprint is not None:
            whole.fingerprint.require_same(self.fingerprint, "the intervention and the model")
        whole.layer_edits(self.sites.n_layers, self.sites.d_mlp)
        whole.additions(self.sites)
        whole.front_additions(self.sites)
        return whole

    def require_unedited(self, what: str) -> None:
        """Raise if an `editing` block is open.

        Raises:
            ValueError: one is.
        """
        if self._active:
            raise ValueError(f"{what} needs the unedited model; leave the `editing` block first")

    @staticmethod
    def _require_batch_size(batch_size: int | None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    @contextlib.contextmanager
    def editing(self, intervention: Intervention) -> Generator[Model]:
        """Inside the block every generation is edited: by this object, and by ``hf_model.generate`` as well.

        Edits of nested blocks and of the ``intervention`` argument come on top, in order. ``hf_model`` is edited on
        passes that continue a cached sequence (a prompt pass never is); a call without a cache cannot be told apart,
        so it raises.

        Raises:
            FingerprintMismatchError: the neurons belong to another model.
        """
        self.require_weights("editing the plain Hugging Face model (pass intervention= to generate instead)")
        self._checked(intervention)
        outer = self._active
        with _hooked_plain_model(self.hf_model, self.sites, intervention):
            try:
                self._active = [*outer, intervention]
                yield self
            finally:
                self._active = outer

    # -- work ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _damage_named(self) -> Generator[None]:
        """Where damaged weights are behind an error about NaN, say so, and which they are."""
        try:
            yield
        except NonFiniteActivationError as error:
            damaged = [
                name
                for name, own in self.hf_model.named_parameters()
                if own.device.type != "meta" and not torch.isfinite(own).all()
            ]
            if not damaged:
                raise
            layer = re.search(r"\.(\d+)\.", damaged[0])
            where = f"layer {layer[1]}: " if layer else ""
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise NonFiniteActivationError(
                f"{where}NaN or infinity in the weights {damaged[0]}{more}: they are damaged; load the model anew"
            ) from error

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
        batch_size: int | None = None,
        progress: bool = False,
    ) -> list[Answer]:
        """Answer each prompt.

        Args:
            prompts: user messages, or lists of chat messages.
            intervention: edits the generation (generated tokens only).
            max_new_tokens: most tokens of an answer.
            temperature: 0 is greedy.
            top_p: nucleus, for temperatures above 0.
            repetition_penalty: 1 is none.
            seed: of the drawing; each prompt has its own stream, so the batch does not matter.
            batch_size: most rows decoded at once; by default as many as `cache_bytes` allows. Changes no result.
            progress: show a progress bar.

        Returns:
            one `Answer` (a string with its tokens) a prompt.

        Raises:
            ValueError: no prompts, an empty one, or a setting out of range.
            FingerprintMismatchError: the intervention belongs to another model.
        """
        return self.generate_sweep(
            prompts,
            [intervention],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )[0]

    def generate_sweep(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Intervention | None],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        progress: bool | Progress = False,
    ) -> list[list[Answer]]:
        """Answer each prompt under each intervention, with one pass over each prompt.

        Args:
            prompts: as for `generate`.
            interventions: None is the unedited model.
            max_new_tokens: as for `generate`.
            temperature: as for `generate`.
            top_p: as for `generate`.
            repetition_penalty: as for `generate`.
            seed: as for `generate`; a prompt draws alike under every intervention.
            batch_size: most rows (prompt × intervention) decoded at once; by default as many as `cache_bytes` allows.
            progress: show a bar, or advance the one given by one a row.

        Returns:
            for each intervention, one answer a prompt; the same as generating them one by one.
        """
        n = len(prompts)
        answers = self.generate_pairs(
            prompts,
            interventions,
            [(k, c) for c in range(len(interventions)) for k in range(n)],
            decoding=Decoding(max_new_tokens, temperature, top_p, repetition_penalty, seed),
            batch_size=batch_size,
            progress=progress,
        )
        return [answers[c * n : (c + 1) * n] for c in range(len(interventions))]

    def generate_pairs(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Intervention | None],
        pairs: Sequence[tuple[int, int]],
        *,
        decoding: Decoding,
        batch_size: int | None = None,
        progress: bool | Progress = False,
    ) -> list[Answer]:
        """Answer chosen combinations of prompt and intervention; the general form of `generate_sweep`.

        Args:
            prompts: as for `generate`.
            interventions: None is the unedited model.
            pairs: ``(prompt, intervention)`` by index, one an answer.
            decoding: how tokens are chosen.
            batch_size: most rows decoded at once; by default as many as `cache_bytes` allows. Changes no result.
            progress: show a bar, or advance the one given by one a row.

        Returns:
            one answer a pair.

        Raises:
            ValueError: nothing to do, an empty prompt, or an index out of range.
            FingerprintMismatchError: an intervention belongs to another model.
            NotEnoughMemoryError: not even one row will fit into memory.
        """
        if not interventions:
            raise ValueError("no interventions were given; use [None] for the unedited model")
        self._require_batch_size(batch_size)
        encoded = self._encode_all(prompts)
        checked = [self._checked(intervention) for intervention in interventions]
        for k, c in pairs:
            if not (0 <= k < len(encoded) and 0 <= c < len(checked)):
                raise ValueError(f"pair ({k}, {c}) is outside {len(encoded)} prompts × {len(checked)} interventions")
        rows = [Row(encoded[k], c, key=k) for k, c in pairs]
        with _bar(progress, len(rows), "generate") as bar:
            most = self._rows_at_once(rows, checked, decoding, batch_size, "generating")
            with self._damage_named():
                tokens = self.backend.generate(rows, checked, decoding, max_rows=most, progress=bar)
        return [self._decode(t) for t in tokens]

    def collect(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str] | None = None,
        *,
        intervention: Intervention | None = None,
        max_new_tokens: int = 100,
        repetition_penalty: float = 1.0,
        blocks: Sequence[int] | None = None,
        n_blocks: int = DEFAULT_BLOCKS,
        batch_size: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        progress: bool | Progress = False,
    ) -> tuple[ActivationStatistics, list[Answer]]:
        """Statistics and answers; see `npti_interp.collect_activations`, which gives the former."""
        if n_blocks < 2:
            raise ValueError(f"n_blocks must be at least 2, got {n_blocks}")
        collector = ActivationCollector(self.fingerprint, n_blocks)
        made = self.collect_into(
            collector, prompts, answers, intervention=intervention, max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty, blocks=blocks, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        how: Any = "replay"
        if answers is None:
            how = Decoding(max_new_tokens, repetition_penalty=repetition_penalty).to_dict()
        return collector.result({"decoding": how, "n_prompts": len(prompts), **dict(metadata or {})}), made

    def collect_into(
        self,
        collector: ActivationCollector,
        prompts: Sequence[Prompt],
        answers: Sequence[str] | None = None,
        *,
        intervention: Intervention | None = None,
        max_new_tokens: int = 100,
        repetition_penalty: float = 1.0,
        blocks: Sequence[int] | None = None,
        batch_size: int | None = None,
        progress: bool | Progress = False,
    ) -> list[Answer]:
        """Count into a collector, which may have counted other prompts before; the form of `collect` for many prompts.

        Args:
            collector: of this model.
            prompts: as for `npti_interp.collect_activations`, like all that follow.
            answers: those to replay; None decodes.
            intervention: acts on the model meanwhile.
            max_new_tokens: length of an answer while decoding.
            repetition_penalty: of the decoding.
            blocks: block of each prompt.
            batch_size: rows decoded at once.
            progress: show a bar, or advance the one given by one a prompt.

        Returns:
            the answers.
        """
        n_blocks = collector.n_blocks
        self._require_batch_size(batch_size)
        encoded = self._encode_all(prompts)
        chosen = [k % n_blocks for k in range(len(encoded))] if blocks is None else [int(b) for b in blocks]
        if len(chosen) != len(encoded):
            raise ValueError(f"{len(encoded)} prompts but {len(chosen)} blocks")
        if any(not 0 <= b < n_blocks for b in chosen):
            raise ValueError(f"blocks must lie in 0 … {n_blocks - 1}, got {min(chosen)} … {max(chosen)}")
        rows = [Row(p, 0, b, key=k) for k, (p, b) in enumerate(zip(encoded, chosen, strict=True))]
        edits = [self._checked(intervention)]
        with _bar(progress, len(rows), "collect") as bar, self._damage_named():
            if answers is None:
                decoding = Decoding(max_new_tokens, repetition_penalty=repetition_penalty)
                most = self._rows_at_once(rows, edits, decoding, batch_size, "collecting on", n_blocks)
                tokens = self.backend.generate(rows, edits, decoding, collector=collector, max_rows=most, progress=bar)
                return [self._decode(t) for t in tokens]
            if len(answers) != len(rows):
                raise ValueError(f"{len(rows)} prompts but {len(answers)} answers")
            fed = [self._fed(a) for a in answers]
            self.backend.replay(rows, fed, edits, collector, progress=bar)
            return [a if isinstance(a, Answer) else Answer(a, f) for a, f in zip(answers, fed, strict=True)]

    def fill_percentiles(
        self,
        statistics: ActivationStatistics,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        where: npt.NDArray[np.bool_],
        *,
        intervention: Intervention | None = None,
        progress: bool | Progress = False,
    ) -> ActivationStatistics:
        """Make the 95th percentile of chosen neurons known, where statistics were reduced on a server.

        A second pass over the same answers. Statistics that know all percentiles are given back as they are.

        Args:
            statistics: from `collect`, over just these prompts and answers.
            prompts: as for `collect`.
            answers: those that `collect` gave.
            where: ``bool [layer, neuron]``, the neurons.
            intervention: the one the statistics were collected under.
            progress: show a bar, or advance the one given by one a prompt.

        Raises:
            ValueError: the answers are not those of the statistics.
        """
        if statistics.complete or not where.any():
            return statistics
        statistics.fingerprint.require_same(self.fingerprint, "the statistics and the model")
        chosen, windows = statistics.percentile_windows(where)
        fine = self.count_windows(prompts, answers, windows, intervention=intervention, progress=progress)
        return statistics.with_percentiles(chosen, fine)

    def count_windows(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        windows: Mapping[int, tuple[Tensor, Tensor]],
        *,
        intervention: Intervention | None = None,
        progress: bool | Progress = False,
    ) -> npt.NDArray[np.int32]:
        """The second pass of `fill_percentiles` over some of the answers; counts of several passes add up.

        Args:
            prompts: as for `collect`.
            answers: those that `collect` gave.
            windows: from `ActivationStatistics.percentile_windows`.
            intervention: the one the statistics were collected under.
            progress: show a bar, or advance the one given by one a prompt.

        Returns:
            ``int32 [chosen, 2, bin]``, for `ActivationStatistics.with_percentiles`.
        """
        assert isinstance(self.backend, TaskBackend)
        rows = [Row(p, 0, 0) for p in self._encode_all(prompts)]
        fed = [self._fed(a) for a in answers]
        with _bar(progress, len(rows), "percentiles") as bar:
            fine = self.backend.fine_counts(rows, fed, [self._checked(intervention)], dict(windows), progress=bar)
        none = {layer: torch.zeros(len(own), 2, FINE_BINS, dtype=torch.int32) for layer, (own, _) in windows.items()}
        return torch.cat([fine.get(layer, none[layer]) for layer in sorted(windows)]).numpy()

    def _fed(self, answer: str) -> tuple[int, ...]:
        """The tokens of an answer that are fed back: of a decoded one all but the last."""
        return answer.tokens[:-1] if isinstance(answer, Answer) and answer.tokens else self.encode_answer(answer)

    def log_likelihoods(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        *,
        intervention: Intervention | None = None,
        progress: bool | Progress = False,
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Log-probability of each continuation of each prompt.

        Args:
            prompts: as for `generate`; each is passed once for all its continuations.
            continuations: for each prompt, texts to score.
            intervention: acts as if the continuation had been generated: its first token's probability comes from the
                unedited prompt end (``edit_prompt_end`` excepted), those of the others from edited tokens.
            progress: show a bar, or advance the one given by one a prompt.

        Returns:
            summed natural logarithms and numbers of tokens, in the shape of ``continuations``.

        Raises:
            ValueError: unequal lengths, an intervention that cannot be replayed, or a prompt too short for it.
            FingerprintMismatchError: the intervention belongs to another model.
            NonFiniteActivationError: NaN or infinity in the model.
        """
        encoded = self._encode_all(prompts)
        if len(encoded) != len(continuations):
            raise ValueError(f"{len(encoded)} prompts but {len(continuations)} lists of continuations")
        tokens = [[self.encode_answer(text) for text in texts] for texts in continuations]
        with _bar(progress, len(encoded), "score") as bar, self._damage_named():
            sums: list[list[float]] = [[] for _ in encoded]
            checked = self._checked(intervention)
            for group in self._scored_at_once(encoded, tokens):
                own = self.backend.log_likelihoods(
                    [encoded[k] for k in group], [tokens[k] for k in group], checked, progress=bar
                )  # fmt: skip
                for k, values in zip(group, own, strict=True):
                    sums[k] = values
            for index, own in enumerate(sums):
                if not np.isfinite(own).all():
                    raise NonFiniteActivationError(
                        f"prompt {index}: NaN or infinite log-likelihood: {_CAUSES}; `Model.read` with "
                        "at='prompt_end' names the layer in which they begin"
                    )
        return sums, [[len(t) for t in own] for own in tokens]

    def _scored_at_once(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[int]]:
        """Prompts that are scored in one call: as many as keeps the continuations' keys and values within `cache_bytes`.

        A backend bounds the continuations' tokens, and each of them holds its whole prompt's keys and values.
        """
        if self.remote_settings is not None:
            return [list(range(len(prompts)))]
        budget = self.cache_bytes // max(1, sum(self.shape.per_place().values()))
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))  # as the engine does
        groups: list[list[int]] = [[]]
        rows = longest = 0
        for k in order:
            place = len(prompts[k]) + max((len(c) for c in continuations[k]), default=0)
            more = rows + len(continuations[k])
            if groups[-1] and more * max(longest, place) > budget:
                groups.append([])
                rows, longest, more = 0, 0, len(continuations[k])
            groups[-1].append(k)
            rows, longest = more, max(longest, place)
        return groups

    def next_token_logits(
        self, prompts: Sequence[Prompt], intervention: Intervention | None = None
    ) -> Float[Tensor, "prompt vocab"]:
        """Logits of the first token of an answer to each prompt; float32 on the CPU.

        Args:
            prompts: as for `generate`.
            intervention: only what acts on prompts shows here: `FrontSteering`, or ``edit_prompt_end``.

        Raises:
            ValueError: as for `log_likelihoods`.
            FingerprintMismatchError: the intervention belongs to another model.
            NonFiniteActivationError: NaN or infinity among them.
        """
        return self.logits_after(self._encode_all(prompts), intervention)

    def logits_after(
        self, tokens: Sequence[Sequence[int]], intervention: Intervention | None = None
    ) -> Float[Tensor, "row vocab"]:
        """`next_token_logits` of token ids, which may hold the begin of an answer.

        Raises:
            ValueError: as for `log_likelihoods`.
            FingerprintMismatchError: the intervention belongs to another model.
            NonFiniteActivationError: NaN or infinity in the model.
        """
        with self._damage_named():
            logits = self.backend.next_token_logits(tokens, self._checked(intervention))
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise NonFiniteActivationError(
                    f"NaN or infinite logits: {_CAUSES}; `Model.read` with at='prompt_end' names the layer in which they "
                    "begin"
                )
            return logits

    def read(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str] | None = None,
        *,
        site: Literal["residual", "heads", "product", "value"] = "residual",
        at: Literal["answer", "answer_end", "prompt_end"] = "answer",
        intervention: Intervention | None = None,
        progress: bool | Progress = False,
    ) -> Float[Tensor, "prompt layer width"]:
        """What every layer holds at a site, by one teacher-forced pass.

        Args:
            prompts: as for `generate`.
            answers: one a prompt; an `Answer` enters as the tokens it was decoded as, all of them. None with
                ``at="prompt_end"``.
            site: ``"residual"``, the stream after each layer, ``d_model`` wide. ``"heads"``, the attention heads'
                outputs side by side (the input of the output projection), ``n_heads · d_head`` wide:
                ``.unflatten(-1, (model.sites.n_heads, model.sites.d_head))`` takes them apart. ``"product"``, the input
                of the down projection, and ``"value"``, the neurons' value σ(ĥW1), ``d_mlp`` wide.
            at: ``"answer"``, the mean over the answer's tokens; ``"answer_end"``, the answer's last token;
                ``"prompt_end"``, the prompt's last token.
            intervention: edits what it would edit while the answer is generated; what is read is edited already.
            progress: show a bar, or advance the one given by one a prompt.

        Returns:
            float32 on the CPU. Persona vectors are differences of means of it (arXiv 2507.21509).

        Raises:
            ValueError: unknown site or place, unequal numbers, answers missing or too many, an empty answer, an
                intervention that cannot be replayed, or a prompt too short for it.
            FingerprintMismatchError: the intervention belongs to another model.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        if site not in SITES[1:]:
            raise ValueError(f"unknown site {site!r}; choose one of {', '.join(SITES[1:])}")
        if at not in ("answer", "answer_end", "prompt_end"):
            raise ValueError(f"unknown place {at!r}; choose one of answer, answer_end, prompt_end")
        encoded = self._encode_all(prompts)
        if (answers is None) is not (at == "prompt_end"):
            raise ValueError(f"at={at!r} {'takes no' if answers is not None else 'needs'} answers")
        fed: list[tuple[int, ...]] = [()] * len(encoded)
        if answers is not None:
            if len(answers) != len(encoded):
                raise ValueError(f"{len(encoded)} prompts but {len(answers)} answers")
            fed = [a.tokens if isinstance(a, Answer) and a.tokens else self.encode_answer(a) for a in answers]
        rows, edits = [Row(p) for p in encoded], [self._checked(intervention)]
        with _bar(progress, len(rows), "read") as bar, self._damage_named():
            return _finite(self.backend.read(rows, fed, edits, site=site, at=at, progress=bar))[:, 0]

    def read_positions(
        self, texts: Sequence[str | Sequence[int]], *, pad: str | int = " "
    ) -> Float[Tensor, "text pos layer d_model"]:
        """The unedited residual stream before every layer, at every position of short texts.

        For contrast pairs (ActAdd, arXiv 2308.10248): texts get no chat template, and all are continued on the right
        to one length with an ordinary token that the model sees. ``model.read_positions(["Love", "Hate"])`` gives two
        ``[pos, layer, d_model]``, whose difference ``[:, layer]`` is what `FrontSteering` adds before a layer.

        Args:
            texts: strings, encoded as the tokenizer encodes text (so with its first token, if it adds one), or token
                ids.
            pad: the token they are continued with: a string that is one token, or its id.

        Returns:
            float32 on the CPU; ``[:, :, 0]`` are the embeddings.

        Raises:
            ValueError: no texts, an empty one, or a padding string that is not one token; or an `editing` block is open.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        self.require_unedited("reading positions")
        if isinstance(texts, str) or not len(texts):
            raise ValueError("texts must be a list of strings or token ids, and hold at least one")
        tokens = [self.tokenizer(t)["input_ids"] if isinstance(t, str) else [int(i) for i in t] for t in texts]
        if empty := [k for k, own in enumerate(tokens) if not len(own)]:
            raise ValueError(f"text {empty[0]} has no tokens")
        padding = list(self.encode_answer(pad)) if isinstance(pad, str) else [pad]
        if len(padding) != 1:
            raise ValueError(
                f"pad must be one token, but {pad!r} is {len(padding)}; give another string, or a token id"
            )
        width = max(map(len, tokens))
        rows = [Row((*own, *padding * (width - len(own)))) for own in tokens]
        with self._damage_named():
            return _finite(self.backend.read(rows, [()] * len(rows), [None], site="before", at="every"))

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.fingerprint}, backend={self.backend.name!r})"

    def _repr_html_(self) -> str:
        f = self.fingerprint
        return (
            f"<b>{self.name}</b>: {f.architecture}, {f.n_layers} layers × {f.d_mlp:,} FFN neurons, σ = {f.activation}, "
            f"backend {self.backend.name}, fingerprint <code>{f.digest}</code>"
        )


_CAUSES = "half precision overflowing, damaged weights, or an edit that is too large do this"


def generate_sweep(
    model: Model, prompts: Sequence[Prompt], interventions: Sequence[Intervention | None], **settings: Any
) -> list[list[Answer]]:
    """Answer each prompt under each intervention; see `Model.generate_sweep`, whose settings it takes."""
    return model.generate_sweep(prompts, interventions, **settings)


@contextlib.contextmanager
def _bar(progress: bool | Progress, total: int, what: str) -> Generator[Progress | None]:
    if not isinstance(progress, bool):
        yield progress
    elif progress:
        with tqdm(total=total, desc=what, delay=2) as bar:
            yield bar
    else:
        yield None


def _finite(read: Float[Tensor, "row place layer width"]) -> Float[Tensor, "row place layer width"]:
    """What was read.

    Raises:
        NonFiniteActivationError: NaN or infinity in it; names the first layer.
    """
    bad = (~torch.isfinite(read).all(dim=3)).flatten(0, 1).any(dim=0).nonzero()
    if len(bad):
        raise NonFiniteActivationError(f"layer {int(bad[0])}: NaN or infinite values: {_CAUSES}")
    return read


@contextlib.contextmanager
def _hooked_plain_model(hf_model: nn.Module, sites: FFNSites, intervention: Intervention) -> Generator[None]:
    """Edit a plain Hugging Face model: the front on passes over prompts, the rest on those that continue one."""
    if any(edit.drop > 0 for edit in intervention.layer_edits(sites.n_layers, sites.d_mlp).values()):
        raise ValueError("an edit with a random mask needs the step's number; pass it to Model.generate instead")
    if intervention.edit_prompt_end:
        raise ValueError("edit_prompt_end is only known to Model.generate; pass the edit as its argument")
    state = Pass(Edits(edit_plan([intervention], sites), layer_devices(hf_model, sites)), SITES)

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise ValueError(
                "an edit is active, but this forward pass has no key-value cache, so prompt and generated tokens "
                "cannot be told apart and nothing could be edited; use generate(), or pass past_key_values"
            )
        continues = cache.get_seq_length() > 0
        state.sites = SITES[1:] if continues else SITES[:1]
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds", *args[:1])
        state.which, state.steps = torch.zeros(len(ids), dtype=torch.long), [0] * len(ids)
        if not continues and state.edits and state.edits.tables["before"]:
            state.start = _first_places(ids, kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
            rows = [Row((0,) * int(n)) for n in ids.shape[1] - state.start]
            require_room(rows, [intervention], sites)

    def hooks() -> Generator[Any]:
        yield hf_model.register_forward_pre_hook(before, with_kwargs=True)
        yield from hook_sites(sites.modules(hf_model), state)

    with hooked(hooks()):
        yield


def _first_places(ids: Tensor, mask: Any) -> Tensor:
    """Each row's first place that is not padding.

    Raises:
        ValueError: the mask does not say which those are.
    """
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.long)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "the prompt's front is edited, but the attention mask does not say where each row begins; pass a mask "
            "[row, pos] of zeros and ones, or use Model.generate"
        )
    return mask.long().argmax(dim=1)
