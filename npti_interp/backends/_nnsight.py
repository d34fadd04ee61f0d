"""nnsight as an engine: the same work as `LocalEngine`, written as traces of `npti_interp._programs`.

Every piece of work is a task: plain data that goes to where the model is, and plain data that comes back. In memory a
task runs at once; `RemoteBackend` sends it to a server. Decoding is Hugging Face's own ``generate`` inside nnsight, so a
prompt is passed anew for each intervention, and rows that have ended stay in their batch: the TransformerLens backend
is the faster one in memory.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from npti_interp import _programs
from npti_interp.activations import ActivationCollector
from npti_interp.backends._sharing import sharing_twin
from npti_interp.errors import NonFiniteActivationError, UnsupportedModelError
from npti_interp.generation import (
    DEFAULT_ROWS,
    Decoding,
    Progress,
    Row,
    by_tokens,
    cache_rows,
    require_readable,
    require_replayable,
    require_room,
)
from npti_interp.interventions import Intervention, edit_plan
from npti_interp.models._sites import FFNSites
from npti_interp.models._weights import execution_device

__all__ = ["NNsightBackend", "TaskBackend"]

REPLAY_TOKENS = 2048
"""Tokens replayed or scored at once."""

Task = dict[str, Any]


class _Feed:
    """Hands values to a collector that is in this process."""

    def __init__(self, collector: ActivationCollector) -> None:
        self._collector = collector

    def take(self, layer: int, values: Tensor, blocks: Tensor) -> None:
        own = blocks.numpy()
        counted = np.flatnonzero(own >= 0)
        if len(counted) == 0:
            return
        if layer == 0:
            self._collector.begin(own[counted])
        self._collector.add(layer, values, counted, own[counted])


class TaskBackend:
    """The work of a backend, cut into tasks. Who inherits says how tasks are run.

    Args:
        sites: the model's FFN neurons.
        config: the Hugging Face configuration of the model.
        pad_token_id: any valid id; what stands in padded places is masked.
        stop_token_ids: tokens that end an answer.
    """

    name = "nnsight"
    sandboxed = False
    """Whether code runs apart from the model, so that nothing of ours can take part in choosing tokens."""
    rows_per_task: int | None = None
    """Most rows replayed or scored at once, beside the limit on tokens."""
    reduces = False
    """Whether collections come back reduced (from a server) instead of being fed to the collector."""

    def __init__(self, sites: FFNSites, config: Any, pad_token_id: int, stop_token_ids: Sequence[int]) -> None:
        self._sites, self._config = sites, config
        self._pad, self._stop = pad_token_id, list(stop_token_ids)

    def _run(
        self, name: str, tasks: Sequence[Task], collector: ActivationCollector | None, done: Callable[[int, Task], None]
    ) -> None:
        """Run tasks; call ``done`` with each one's number and result, in any order."""
        raise NotImplementedError

    def rows_within(self, budget: int, rows: Sequence[Row], decoding: Decoding) -> int:
        """How many rows' keys and values fit into ``budget`` bytes; see `LocalEngine.rows_within`."""
        return cache_rows(self._config, self._sites.n_layers, 4, budget, rows, decoding)

    def _common(self, rows: Sequence[Row], chunk: Sequence[int], plan: Callable[[list[int]], Any]) -> Task:
        used = sorted({rows[r].intervention for r in chunk})
        return {
            "prompts": [list(rows[r].prompt) for r in chunk],
            "which": [used.index(rows[r].intervention) for r in chunk],
            "blocks": [rows[r].block for r in chunk],
            "plan": plan(used),
            "pad": self._pad,
            "sites": self._sites.paths(),
        }

    def _planner(self, interventions: Sequence[Intervention | None]) -> Callable[[list[int]], Any]:
        return lambda used: edit_plan([interventions[c] for c in used], self._sites)

    def generate(
        self,
        rows: Sequence[Row],
        interventions: Sequence[Intervention | None],
        decoding: Decoding,
        *,
        collector: ActivationCollector | None = None,
        max_rows: int = DEFAULT_ROWS,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """See `LocalEngine.generate`."""
        from transformers import GenerationConfig

        require_room(rows, interventions, self._sites)
        early = [i is not None and i.edit_prompt_end for i in interventions]
        if self.sandboxed and (decoding.temperature > 0 or decoding.repetition_penalty != 1.0):
            raise ValueError(
                "a server's sandbox decodes greedily and without a repetition penalty; use trusted jobs, or the model in "
                "memory with backend='transformer_lens'"
            )
        if self.sandboxed and any(i is not None and i.front_additions(self._sites) for i in interventions):
            # Tried on a server: there what goes into a block cannot be replaced while it generates.
            raise ValueError(
                "a server's sandbox cannot edit the prompt's front while it generates; use trusted jobs, or the model in "
                "memory with backend='transformer_lens'"
            )
        if self.sandboxed and collector is not None:
            require_replayable(interventions, self._sites)
        plan, out = self._planner(interventions), list[list[int]]([[] for _ in rows])
        settings = {
            # All that a checkpoint's own settings could bend is said here.
            "generation_config": GenerationConfig(
                max_new_tokens=decoding.max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
                no_repeat_ngram_size=0, min_length=0, eos_token_id=self._stop or [-1], pad_token_id=self._pad,
                use_cache=True,
            ),
        }  # fmt: skip
        order = sorted(range(len(rows)), key=lambda r: (len(rows[r].prompt), rows[r].intervention, r))
        chunks = [
            group[start : start + max_rows]
            for group in ([r for r in order if not early[rows[r].intervention]], [r for r in order if early[rows[r].intervention]])
            for start in range(0, len(group), max_rows)
        ]  # fmt: skip
        tasks = [
            {
                **self._common(rows, chunk, plan),
                "keys": [rows[r].key for r in chunk],
                "decoding": decoding.to_dict(),
                "settings": settings,
                "sandbox": self.sandboxed,
                "n_blocks": collector.n_blocks if collector is not None and self.reduces else 0,
            }
            for chunk in chunks
        ]

        def done(number: int, result: Task) -> None:
            for r, tokens in zip(chunks[number], result["tokens"], strict=True):
                out[r] = [int(t) for t in tokens]
            if collector is not None and self.reduces:
                collector.absorb(result["counted"])
            if progress is not None:
                progress.update(len(chunks[number]))

        self._run("decode", tasks, collector, done)
        return out

    def _replay_tasks(
        self, rows: Sequence[Row], answers: Sequence[Sequence[int]], interventions: Sequence[Intervention | None],
        fed: Sequence[int], want: str, **more: Any,
    ) -> tuple[list[list[int]], list[Task]]:  # fmt: skip
        require_replayable(interventions, self._sites)
        require_room(rows, interventions, self._sites)
        plan = self._planner(interventions)
        lengths = [len(row.prompt) + len(answer) for row, answer in zip(rows, answers, strict=True)]
        chunks = list(by_tokens(sorted(fed, key=lambda r: lengths[r]), lengths, REPLAY_TOKENS, self.rows_per_task))
        tasks = [
            {**self._common(rows, chunk, plan), "answers": [list(answers[r]) for r in chunk], "want": want, **more}
            for chunk in chunks
        ]
        return chunks, tasks

    def replay(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        interventions: Sequence[Intervention | None],
        collector: ActivationCollector,
        *,
        progress: Progress | None = None,
    ) -> None:
        """See `LocalEngine.replay`."""
        fed = [r for r, row in enumerate(rows) if row.block >= 0 and len(answers[r])]
        want = "counts" if self.reduces else "values"
        chunks, tasks = self._replay_tasks(rows, answers, interventions, fed, want, n_blocks=collector.n_blocks)

        def done(number: int, result: Task) -> None:
            if self.reduces:
                collector.absorb(result["counted"])
            if progress is not None:
                progress.update(len(chunks[number]))

        self._run("replay", tasks, collector, done)

    def fine_counts(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        interventions: Sequence[Intervention | None],
        chosen: dict[int, tuple[Tensor, Tensor]],
        *,
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """Second pass: counts of chosen neurons' values in windows of the sketch's grid.

        Args:
            rows: as for `replay`.
            answers: as for `replay`.
            interventions: as for `replay`.
            chosen: for each layer, neurons and the first bins of their windows ``Int[Tensor, "neuron window"]``.
            progress: advanced by one a row.

        Returns:
            for each layer ``Int[Tensor, "neuron window bin"]``.
        """
        fed = [r for r in range(len(rows)) if len(answers[r])]
        chunks, tasks = self._replay_tasks(rows, answers, interventions, fed, "windows", chosen=chosen)
        total: dict[int, Tensor] = {}

        def done(number: int, result: Task) -> None:
            for layer, counts in result["counted"].items():
                total[layer] = total[layer] + counts.to(torch.int32) if layer in total else counts.to(torch.int32)
            if progress is not None:
                progress.update(len(chunks[number]))

        self._run("replay", tasks, None, done)
        return total

    def read(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        interventions: Sequence[Intervention | None],
        *,
        site: str,
        at: str,
        progress: Progress | None = None,
    ) -> Float[Tensor, "row place layer width"]:
        """See `LocalEngine.read`."""
        require_readable(answers, at)
        chunks, tasks = self._replay_tasks(
            rows, answers, interventions, range(len(rows)), "read", site=site, at=at
        )  # fmt: skip
        out: list[Tensor] = [torch.empty(0)] * len(rows)

        def done(number: int, result: Task) -> None:
            for r, part in zip(chunks[number], result["read"], strict=True):
                out[r] = part
            if progress is not None:
                progress.update(len(chunks[number]))

        self._run("replay", tasks, None, done)
        return torch.stack(out)

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        intervention: Intervention | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """See `LocalEngine.log_likelihoods`; here a prompt is passed once for each continuation."""
        out = [[0.0] * len(c) for c in continuations]
        jobs = [(p, c) for p, own in enumerate(continuations) for c in range(len(own)) if len(own[c])]
        rows = [Row(tuple(prompts[p])) for p, _ in jobs]
        chunks, tasks = self._replay_tasks(
            rows, [continuations[p][c] for p, c in jobs], [intervention], range(len(jobs)), ""
        )

        def done(number: int, result: Task) -> None:
            for j, value in zip(chunks[number], result["sums"].tolist(), strict=True):
                out[jobs[j][0]][jobs[j][1]] = value
            if progress is not None:
                progress.update(len(prompts) * len(chunks[number]) / max(1, len(jobs)))

        self._run("score", tasks, None, done)
        return out

    def next_token_logits(
        self, prompts: Sequence[Sequence[int]], intervention: Intervention | None = None
    ) -> Float[Tensor, "prompt vocab"]:
        """See `LocalEngine.next_token_logits`."""
        rows = [Row(tuple(p)) for p in prompts]
        chunks, tasks = self._replay_tasks(rows, [()] * len(rows), [intervention], range(len(rows)), "")
        out: dict[int, Tensor] = {}

        def done(number: int, result: Task) -> None:
            out.update(zip(chunks[number], result["logits"], strict=True))

        self._run("logits", tasks, None, done)
        return torch.stack([out[p] for p in range(len(prompts))])


class NNsightBackend(TaskBackend):
    """nnsight round a model in memory; the user's model stays untouched.

    Args:
        hf_model: the user's model.
        tokenizer: its tokenizer.
        sites: its FFN neurons.
        pad_token_id: see `TaskBackend`.
        stop_token_ids: see `TaskBackend`.
    """

    def __init__(
        self, hf_model: nn.Module, tokenizer: Any, sites: FFNSites, pad_token_id: int, stop_token_ids: Sequence[int]
    ) -> None:
        from nnsight import TransformersModel

        twin = sharing_twin(hf_model)
        super().__init__(sites, twin.config, pad_token_id, stop_token_ids)
        sites.activation_modules(twin)  # raises where layers share one
        if (
            twin.device.type == "meta" and execution_device(twin).type != "meta"
        ):  # tried: generate() then sends ids there
            raise UnsupportedModelError(
                "nnsight cannot run a model whose embedding is offloaded: keep it on a device (device_map), or use "
                "backend='transformer_lens'"
            )
        # The device is said, as nnsight's pipeline would take the first GPU, or of a spread model the first place in its
        # map, which may be the disk.
        where: dict[str, Any] = {"device": execution_device(twin)}
        if getattr(twin, "hf_device_map", None) is not None:
            changeable: Any = twin
            changeable.hf_device_map = {"": str(where.pop("device"))}
        # nnsight changes the tokenizer it is given (padding side, padding token): that is not the user's.
        self.nnsight_model: Any = TransformersModel(twin, tokenizer=copy.deepcopy(tokenizer), **where)

    def _run(
        self, name: str, tasks: Sequence[Task], collector: ActivationCollector | None, done: Callable[[int, Task], None]
    ) -> None:
        sink = _Feed(collector) if collector is not None else None
        for number, task in enumerate(tasks):
            with quiet():
                try:
                    result = _programs.run_task(self.nnsight_model, name, task, sink)
                except Exception as error:
                    raise _translated(error) from error
            done(number, result)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the warning that a generation ended before max_new_tokens: as meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
        yield


_NON_FINITE = "NaN or infinite"


def _translated(error: Exception) -> Exception:
    """The library's own error for what happened inside a trace, which nnsight wraps."""
    for cause in _chain(error):
        if isinstance(cause, NonFiniteActivationError):
            return cause
        if _NON_FINITE in str(cause):
            return NonFiniteActivationError(str(cause).strip().splitlines()[-1])
    return error


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    seen: set[int] = set()  # an exception that is raised a second time makes the chain a ring
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
