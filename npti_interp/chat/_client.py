"""`ChatClient`: any OpenAI-compatible endpoint, asked for chat completions.

What this adds to `npti_interp.chat._endpoint`: replies on disk, answers held to a schema, and the rule that only a whole
answer is one.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npti_interp.chat._base import CachedChat
from npti_interp.chat._endpoint import KEY_VARIABLE, Endpoint, EndpointError, Ledger
from npti_interp.chat._request import ChatRequest, ChatResult, Form, Reply, canonical, read_reply

if TYPE_CHECKING:
    from npti_interp.generation import Progress

__all__ = ["ChatClient"]

_CALL_REFUSED = (400, 422)
_FORMAT_REFUSED = (400, 404, 415, 422, 501)
_FORMAT_WORDS = ("response_format", "json_schema", "structured", "schema", "guided", "grammar")


class ChatClient(CachedChat):
    """Asks an OpenAI-compatible endpoint: many calls at once, none of them twice.

    A reply is kept on disk as soon as it is there, under the SHA-256 of model, messages, parameters and schema. A
    process that was killed and started again asks only for what is missing. The address is no part of it: an endpoint
    that has moved is the same, and two that call different models by one name must not share a cache.

    Time-outs, lost connections, broken replies and the statuses 408, 409, 425, 429 and 5xx are tried again after a
    growing, partly random pause, or after the one the endpoint asks for. Everything else fails at once. Both end as a
    `ChatResult` with its reason; only an endpoint that fails ``give_up_after`` times in a row ends the job.

    Args:
        base_url: the address up to ``/v1``, without user, password or query.
        model: name of the model there.
        key_variable: environment variable with the key; the key is read from nowhere else, and kept out of messages,
            logs and files. An endpoint on this machine may do without.
        concurrency: calls at once.
        requests_per_minute: of this process, retries included; None is unlimited.
        tokens_per_minute: the same for tokens, counting a call as its estimated prompt and its ``max_tokens``.
        timeout: seconds that one attempt may wait for the endpoint.
        retries: further attempts after a failed one.
        pause: seconds of the first pause between attempts; it doubles up to a minute.
        give_up_after: requests in a row that may fail before the job is ended; None never ends it.
        cache: folder of the replies; ``"cache"`` is the user's cache folder, None keeps nothing.
        max_tokens_name: the endpoint's name for the token limit.
        extra_body: further fields of every call (``{"reasoning_effort": "low"}``); they are part of the key of a reply
            and are written to disk: nothing secret belongs here.

    Raises:
        ValueError: a setting out of range, an address that is none or holds credentials, or no key in the environment.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 1.0,
        give_up_after: int | None = 50,
        cache: str | Path | None = "cache",
        max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not model.strip():
            raise ValueError("model is empty; give the name that the endpoint knows the model by")
        if max_tokens_name not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(
                f"max_tokens_name must be 'max_tokens' or 'max_completion_tokens', got {max_tokens_name!r}"
            )
        self._model, self._limit_name = model, max_tokens_name
        self._endpoint = Endpoint(
            base_url, key_variable=key_variable, concurrency=concurrency, requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute, timeout=timeout, retries=retries, pause=pause,
            give_up_after=give_up_after,
        )  # fmt: skip
        extra = json.loads(canonical(dict(extra_body or {})))
        answerer: dict[str, Any] = {"model": model, **({"extra_body": extra} if extra else {})}
        super().__init__(answerer, cache)
        self._ledger = Ledger(self._cache, self._answerer)
        self._extra = extra
        self._no_schemas = False

    @property
    def calls(self) -> int:
        """Attempts sent so far, retries included."""
        return self._endpoint.calls

    def __repr__(self) -> str:
        own: Endpoint | None = getattr(self, "_endpoint", None)  # a traceback may show a client that could not be made
        return f"ChatClient({own and own.where!r}, {self._model!r})"

    def identity(self) -> dict[str, Any]:
        """Endpoint (``loopback`` for one on this machine) and model, as JSON; never the key."""
        return {"chat": "openai", "endpoint": self._endpoint.where, **self._answerer}

    @property
    def _counted(self) -> str:
        return "estimated: a token for 4 bytes of text, 4 more a message"

    def _count(self, form: Form) -> int:
        text = sum(math.ceil(len(m["content"].encode()) / 4) + 4 for m in form.messages)
        return text + (0 if form.schema is None else math.ceil(len(canonical(form.schema)) / 4))

    def _first_form(self, request: ChatRequest) -> Form:
        structured = request.structured_form
        return request.plain_form if structured is None or self._no_schemas else structured

    # -- the stream ----------------------------------------------------------------------------------------------

    def complete(self, requests: Iterable[ChatRequest], *, progress: bool | Progress = False) -> Iterator[ChatResult]:
        """One result a request, in order.

        Nothing is sent before the iterator is read; requests are taken as they are needed, a bounded number ahead.
        Leaving the iterator ends the job: calls under way are still kept, none is begun.

        Args:
            requests: any number.
            progress: show a bar, or advance the one given by one a request.

        Raises:
            RemoteServiceError: ``give_up_after`` requests in a row had no reply. What was answered is on disk.
            OSError: a reply cannot be written to disk.
        """
        for _, result in self._endpoint.run(requests, self._answer, progress):
            yield result

    def stream(
        self, requests: Iterable[ChatRequest], *, progress: bool | Progress = False
    ) -> Iterator[tuple[int, ChatResult]]:
        """`complete` without its order: each result as it comes, with its request's place."""
        return self._endpoint.run(requests, self._answer, progress, ordered=False)

    def _answer(self, request: ChatRequest, stop: threading.Event) -> ChatResult:
        known = self._known(request)
        if known is not None:
            return known
        try:
            return self._ask(request, stop)
        except EndpointError as error:
            failure = str(error)
        self._endpoint.failed(failure)
        return ChatResult(failure=failure, kind="endpoint")

    def _ask(self, request: ChatRequest, stop: threading.Event) -> ChatResult:
        first = self._first_form(request)
        if first.schema is not None:
            try:
                result = self._result(request, first, stop)
            except EndpointError as failure:
                named = any(word in str(failure).casefold() for word in _FORMAT_WORDS)
                if failure.status not in (_FORMAT_REFUSED if named else _CALL_REFUSED):
                    raise
                # Was it the schema? Then the same call without one is answered.
                result = self._result(request, request.plain_form, stop)
                self._no_schemas |= named
                return result
            if not (result.kind == "schema" and request.plain is not None):
                return result
        return self._result(request, request.plain_form, stop)

    def _result(self, request: ChatRequest, form: Form, stop: threading.Event) -> ChatResult:
        reply, cached = self._reply(form, stop)
        return read_reply(reply, request, structured=form.schema is not None, cached=cached)

    def _reply(self, form: Form, stop: threading.Event) -> tuple[Reply, bool]:
        tokens = self._count(form) + form.max_tokens
        return self._ledger.reply(
            form, lambda: self._endpoint.send(lambda api: self._call(api, form), self._read, tokens, stop), stop
        )

    # -- one call ------------------------------------------------------------------------------------------------

    def _call(self, api: Any, form: Form) -> Any:
        given: dict[str, Any] = {
            "model": self._model,
            "messages": [dict(m) for m in form.messages],
            "temperature": form.temperature,
            self._limit_name: form.max_tokens,
        }
        if form.top_p != 1.0:
            given["top_p"] = form.top_p
        if form.seed is not None:
            given["seed"] = form.seed
        if form.schema is not None:
            held = {"name": "answer", "schema": form.schema, "strict": True}
            given["response_format"] = {"type": "json_schema", "json_schema": held}
        return api.chat.completions.with_raw_response.create(**given, extra_body=self._extra or None)

    def _read(self, body: Any) -> Reply:
        (choice,) = body["choices"]
        message, usage = choice["message"], body.get("usage") or {}

        def text(value: Any) -> str | None:
            if value is not None and not isinstance(value, str):
                raise TypeError(f"text expected, got {type(value).__name__}")
            # Half of a surrogate pair is valid JSON, but no text that can be written.
            return None if value is None else self._endpoint.kept(value).encode("utf-8", "replace").decode()

        def count(name: str) -> int | None:
            value = usage.get(name)
            return value if isinstance(value, int) and not isinstance(value, bool) else None

        return Reply(
            text(message.get("content")), text(choice.get("finish_reason")), text(message.get("refusal")),
            text(body.get("model")), count("prompt_tokens"), count("completion_tokens"),
        )  # fmt: skip
