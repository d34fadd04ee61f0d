"""`ServedGenerator`: answers from a vLLM server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from npti_interp.chat._cache import ReplyCache, reply_folder
from npti_interp.chat._endpoint import KEY_VARIABLE, Endpoint, EndpointError, Ledger
from npti_interp.errors import RemoteServiceError
from npti_interp.generation import Progress
from npti_interp.models import Model
from npti_interp.serving._base import Completion, TokenCall, TokenGenerator, checked_tokens

__all__ = ["ServedGenerator"]


class ServedGenerator(TokenGenerator):
    """Asks a vLLM server (its OpenAI-compatible ``/v1/completions``) for a model's answers, token by token.

    Prompts are sent as the token ids that ``model.encode`` gives, and come back with the answer's ids
    (``return_token_ids``; vLLM 0.10.2 and newer). Before the first call the server is compared with ``model``:
    `TokenGenerator.verify`.

    An answer is kept on disk as soon as it is there, under the SHA-256 of the model's fingerprint, its name there, the
    tokens and the settings; a job that was stopped asks for what is missing, and one that is complete needs no server.
    Lost connections, time-outs and overload are tried again, as by `ChatClient`.

    Args:
        model: the model whose answers they shall be, in memory or remote.
        base_url: the address up to ``/v1``, without user, password or query.
        served_as: the model's name there (``--served-model-name``); may be left out where the server has only one.
        key_variable: environment variable with the key; the key is read from nowhere else, and kept out of messages,
            logs and files. A server on this machine may do without.
        concurrency: calls at once; the server makes its batches of them.
        timeout: seconds that one attempt may take, waiting in the server's queue included.
        retries: further attempts after a failed one.
        pause: seconds of the first pause between attempts; it doubles up to a minute.
        give_up_after: prompts in a row that may fail before the job is ended; None never ends it.
        cache: folder of the answers; ``"cache"`` is the user's cache folder, None keeps nothing.
        tolerance: most that the server's log-probabilities may be off on average, in nats.

    Attributes:
        agreement: what `verify` found; None before.

    Raises:
        ValueError: a setting out of range, an address that is none or holds credentials, or no key in the environment.
    """

    def __init__(
        self,
        model: Model,
        base_url: str,
        served_as: str | None = None,
        *,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 6,
        pause: float = 1.0,
        give_up_after: int | None = 50,
        cache: str | Path | None = "cache",
        tolerance: float = 0.05,
    ) -> None:
        if served_as is not None and not served_as.strip():
            raise ValueError("served_as is empty; give the name that the server knows the model by, or None")
        super().__init__(model, tolerance)
        self._endpoint = Endpoint(
            base_url, key_variable=key_variable, concurrency=concurrency, timeout=timeout, retries=retries, pause=pause,
            give_up_after=give_up_after,
        )  # fmt: skip
        self._served_as, self._limit, self._listed = served_as, None, False
        answerer = {"fingerprint": model.fingerprint.digest, "served_as": served_as}
        self._ledger = Ledger(ReplyCache(reply_folder(cache), "TokenCompletion", Completion), answerer)
        # What checks the server must come from the server.
        self._unkept = Ledger(ReplyCache(None, "TokenCompletion", Completion), answerer)

    def __repr__(self) -> str:
        own: Endpoint | None = getattr(self, "_endpoint", None)  # a traceback may show one that could not be made
        return f"ServedGenerator({self._model.name!r}, {own and own.where!r})"

    @property
    def calls(self) -> int:
        """Attempts sent so far, retries included."""
        return self._endpoint.calls

    def identity(self) -> dict[str, Any]:
        """Endpoint (``loopback`` for one on this machine) and the model's name there, as JSON; never the key."""
        return {"generator": "served", "endpoint": self._endpoint.where, "served_as": self._served_as}

    # -- what the server has -------------------------------------------------------------------------------------

    def _list(self) -> None:
        """Find the model among those that the server lists.

        Raises:
            RemoteServiceError: the server does not answer, or does not have it.
        """
        # Raised here, where no local holds the names as they came: one may quote the key.
        if not self._listed and (lacking := self._find()):
            raise RemoteServiceError(lacking)

    def _find(self) -> str:
        """`_list`, giving back what is wrong."""
        try:
            found = self._endpoint.send(lambda api: api.models.with_raw_response.list(), _models, 0, threading.Event())
        except EndpointError as failure:
            return f"no vLLM server answers at {self._endpoint.where}: {failure}. Start one with: vllm serve MODEL"
        names = [self._endpoint.shown(name) for name in found]
        if self._served_as is None and len(found) != 1:
            return f"the server has {len(found)} models: say which with served_as=… ({names})"
        name = self._served_as or next(iter(found))
        if name not in found:
            return f"the server has no model {name!r}; it has {', '.join(names) or 'none'}"
        self._name, self._limit, self._listed = name, found[name], True
        return ""

    def _max_length(self) -> int | None:
        self._list()
        return self._limit

    # -- calls ---------------------------------------------------------------------------------------------------

    def _known(self, call: TokenCall) -> bool:
        return self._ledger.known(call) is not None

    def _complete(
        self, calls: Sequence[TokenCall], bar: Progress | None, *, fresh: bool = False
    ) -> Iterator[Completion]:
        ledger = self._unkept if fresh else self._ledger

        def answer(call: TokenCall, stop: threading.Event) -> Completion | str:
            return self._answer(ledger, call, stop)

        lost: list[tuple[int, str]] = []
        for k, own in self._endpoint.run(calls, answer, False if bar is None else bar):
            if isinstance(own, Completion):
                yield own
            else:
                lost.append((k, own))
        if lost:
            raise RemoteServiceError(
                f"{len(lost)} of {len(calls)} prompts have no answer; prompt {lost[0][0]}: {lost[0][1]}. What was answered "
                "is kept: run again to continue"
            )

    def _answer(self, ledger: Ledger[Completion], call: TokenCall, stop: threading.Event) -> Completion | str:
        """The answer, or why there is none."""
        try:
            return ledger.reply(call, lambda: self._asked(call, stop), stop)[0]
        except EndpointError as error:
            failure = str(error)
        self._endpoint.failed(failure)
        return failure

    def _asked(self, call: TokenCall, stop: threading.Event) -> Completion:
        self._list()
        made = self._endpoint.send(
            lambda api: self._send(api, call), lambda body: self._read(body, call), len(call.prompt) + call.max_tokens,
            stop,
        )  # fmt: skip
        if isinstance(made, str):
            raise RemoteServiceError(made)
        checked_tokens(call, made, self._vocabulary)  # what is no answer shall not be kept
        return made

    def _send(self, api: Any, call: TokenCall) -> Any:
        # All that a server would otherwise take from the model's generation_config.json.
        given: dict[str, Any] = {
            "model": self._name, "prompt": list(call.prompt), "max_tokens": call.max_tokens, "n": 1, "echo": False,
            "temperature": call.temperature, "top_p": call.top_p, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        extra: dict[str, Any] = {
            "repetition_penalty": call.repetition_penalty, "top_k": -1, "min_p": 0.0, "min_tokens": 0,
            "stop_token_ids": list(call.stop), "ignore_eos": False, "add_special_tokens": False,
            "skip_special_tokens": False, "return_token_ids": True,
        }  # fmt: skip
        if call.seed is not None:
            given["seed"] = call.seed
        if call.scored:
            given["logprobs"] = 1
        return api.completions.with_raw_response.create(**given, extra_body=extra)

    def _read(self, body: Any, call: TokenCall) -> Completion | str:
        """A completion from a reply; or how it shows that the server cannot do what is needed, or changed the prompt.

        Raises:
            ValueError: a broken reply; also `KeyError` and `TypeError`.
        """
        (choice,) = body["choices"]
        if choice.get("token_ids") is None:
            return (
                "the server returns no token ids, and text alone does not say which tokens were decoded; use vLLM 0.10.2 or "
                "newer, or a server that knows return_token_ids"
            )
        read: Any = choice.get("prompt_token_ids")
        if read is not None and tuple(read) != call.prompt:
            return (
                f"the server read another prompt than was sent: {len(read)} tokens for {len(call.prompt)}; it shall neither "
                "cut prompts off nor add tokens to them"
            )
        scores: Any = (
            choice["logprobs"]["token_logprobs"] if call.scored and choice.get("logprobs") is not None else None
        )
        if not isinstance(choice["token_ids"], list) or not (scores is None or isinstance(scores, list)):
            raise TypeError("lists expected")
        ended: Any = choice.get("stop_reason")
        if isinstance(ended, str):
            ended = self._endpoint.shown(ended)[:80]
        counted: Any = (body.get("usage") or {}).get("completion_tokens")
        if (
            ended is None
            and choice["finish_reason"] == "stop"
            and choice["token_ids"]
            and counted == len(choice["token_ids"])
        ):
            ended = choice["token_ids"][-1]  # no token was left out, so it is the last that ended the answer
        return Completion(
            tuple(choice["token_ids"]), choice["finish_reason"], ended,
            None if scores is None else tuple(scores),
        )  # fmt: skip


def _models(body: Any) -> dict[str, int | None]:
    """Names of the models that a server lists, and most tokens that each takes."""
    found: dict[str, int | None] = {}
    for entry in body["data"]:
        limit = entry.get("max_model_len")
        if not isinstance(entry["id"], str):
            raise TypeError("a model without a name")
        found[entry["id"]] = limit if isinstance(limit, int) and not isinstance(limit, bool) else None
    return found
