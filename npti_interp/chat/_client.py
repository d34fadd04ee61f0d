"""`ChatClient`: any OpenAI-compatible endpoint, through the ``openai`` package.

What this adds to the package: replies on disk, a window of calls under way, limits that hold for retries too, and the
rule that only a whole answer is one. The package's own retries are off, because they know nothing of a reply that
arrived broken, and would pass the rate limit by.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from npti_interp._secrets import SECRET_LENGTH, without_key
from npti_interp.chat._base import CachedChat, progress_bar
from npti_interp.chat._limits import AbandonedError, RateLimiter, back_off, retry_after
from npti_interp.chat._request import ChatRequest, ChatResult, Form, Reply, canonical, read_reply
from npti_interp.errors import RemoteServiceError

if TYPE_CHECKING:
    from npti_interp.generation import Progress

__all__ = ["ChatClient"]

_KEY_VARIABLE = "OPENAI_API_KEY"
_PLACEHOLDER = "none-needed"
_LONGEST_PAUSE = 900.0
_AHEAD = 4
"""Requests under way or waiting to be given back, for each call at once: one slow call shall not stop the others."""
_PASSING = (408, 409, 425, 429)
_CALL_REFUSED = (400, 422)
_FORMAT_REFUSED = (400, 404, 415, 422, 501)
_FORMAT_WORDS = ("response_format", "json_schema", "structured", "schema", "guided", "grammar")


class _EndpointError(Exception):
    """No reply, for good. The message is fit to be shown."""

    def __init__(self, reason: str, *, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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
        key_variable: str = _KEY_VARIABLE,
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
        import openai

        parts = urlsplit(base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url must hold no user, password, query or fragment; put the key in the environment")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be like https://host/v1, got {base_url!r}")
        if not model.strip():
            raise ValueError("model is empty; give the name that the endpoint knows the model by")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, value in (("timeout", timeout), ("pause", pause)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        if give_up_after is not None and give_up_after < 1:
            raise ValueError(f"give_up_after must be at least 1, or None for never; got {give_up_after}")
        if max_tokens_name not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(
                f"max_tokens_name must be 'max_tokens' or 'max_completion_tokens', got {max_tokens_name!r}"
            )
        here = _is_loopback(parts.hostname)
        # Held by no local name: a traceback that shows its frames' locals must not show the key.
        self._secret = os.environ.get(key_variable, "").strip()
        if not self._secret and not here:
            raise ValueError(f"no key for {parts.hostname}: set the environment variable {key_variable}")
        extra = json.loads(canonical(dict(extra_body or {})))
        answerer: dict[str, Any] = {"model": model, **({"extra_body": extra} if extra else {})}
        super().__init__(answerer, cache)
        self._model, self._extra, self._limit_name = model, extra, max_tokens_name
        # The port of a server on this machine differs from run to run, and says nothing of who answers.
        self._where = "loopback" if here else f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._key_variable = key_variable
        self._concurrency, self._retries, self._pause, self._give_up_after = concurrency, retries, pause, give_up_after
        self._limiter = RateLimiter(requests_per_minute, tokens_per_minute)
        # A proxy set for this machine's web traffic cannot reach this machine's own ports.
        http = openai.DefaultHttpxClient(trust_env=False) if here else None
        self._openai: Any = openai.OpenAI(
            base_url=base_url, api_key=self._secret or _PLACEHOLDER, timeout=timeout, max_retries=0, http_client=http
        )
        self._lock = threading.Lock()
        self._flying: dict[str, Future[tuple[Reply, bool]]] = {}
        self._failed_in_row = 0
        self._no_schemas = False
        self.calls = 0
        """Attempts sent so far, retries included."""

    def __repr__(self) -> str:
        return f"ChatClient({self._where!r}, {self._model!r})"

    def identity(self) -> dict[str, Any]:
        """Endpoint (``loopback`` for one on this machine) and model, as JSON; never the key."""
        return {"chat": "openai", "endpoint": self._where, **self._answerer}

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
        for _, result in self._run(requests, progress, ordered=True):
            yield result

    def stream(
        self, requests: Iterable[ChatRequest], *, progress: bool | Progress = False
    ) -> Iterator[tuple[int, ChatResult]]:
        """`complete` without its order: each result as it comes, with its request's place."""
        return self._run(requests, progress, ordered=False)

    def _run(
        self, requests: Iterable[ChatRequest], progress: bool | Progress, *, ordered: bool
    ) -> Iterator[tuple[int, ChatResult]]:
        stop = threading.Event()
        source = enumerate(requests)
        window: deque[tuple[int, Future[ChatResult]]] = deque()
        self._failed_in_row = 0
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="npti-chat")
        try:
            with progress_bar(progress, requests) as bar:
                while True:
                    while len(window) < _AHEAD * self._concurrency and (item := next(source, None)) is not None:
                        window.append((item[0], pool.submit(self._answer, item[1], stop)))
                    if not window:
                        return
                    if ordered:
                        ready = [window.popleft()]
                    else:
                        wait([future for _, future in window], return_when=FIRST_COMPLETED)
                        ready = [entry for entry in window if entry[1].done()]
                        window = deque(entry for entry in window if not entry[1].done())
                    for place, future in ready:
                        result = future.result()
                        if bar is not None:
                            bar.update(1)
                        yield place, result
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: ChatRequest, stop: threading.Event) -> ChatResult:
        known = self._known(request)
        if known is not None:
            return known
        try:
            return self._ask(request, stop)
        except _EndpointError as error:
            failure = str(error)
        with self._lock:
            self._failed_in_row += 1
            lost = self._give_up_after is not None and self._failed_in_row >= self._give_up_after
        if lost:
            raise RemoteServiceError(
                f"{self._failed_in_row} requests in a row had no reply from {self._where}; the last: {failure}. "
                "What was answered is kept: run again to continue"
            )
        return ChatResult(failure=failure, kind="endpoint")

    def _ask(self, request: ChatRequest, stop: threading.Event) -> ChatResult:
        first = self._first_form(request)
        if first.schema is not None:
            try:
                result = self._result(request, first, stop)
            except _EndpointError as failure:
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
        """The reply to a call: from disk, from an equal call under way, or from the endpoint."""
        key = self._key(form)
        while True:
            with self._lock:
                other = self._flying.get(key)
                if other is None:
                    own: Future[tuple[Reply, bool]] = Future()
                    self._flying[key] = own
                    break
            try:
                return other.result()[0], True
            except AbandonedError:
                if stop.is_set():
                    raise
        try:
            kept = self._cache.get(key)
            reply = kept or self._send(form, stop)
            if kept is None:
                self._cache.keep(key, form, self._answerer, reply)
            own.set_result((reply, kept is not None))
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flying[key]
        return own.result()

    # -- one call ------------------------------------------------------------------------------------------------

    def _send(self, form: Form, stop: threading.Event) -> Reply:
        for attempt in range(self._retries + 1):
            self._limiter.wait(self._count(form) + form.max_tokens, stop)
            with self._lock:
                self.calls += 1
            reply, reason, pause = self._attempt(form)
            if reply is not None:
                with self._lock:
                    self._failed_in_row = 0
                return reply
            if attempt == self._retries:
                raise _EndpointError(f"{reason} (after {attempt + 1} attempts)")
            if pause is not None:
                if pause > _LONGEST_PAUSE:
                    raise _EndpointError(f"{reason}; the endpoint asks to wait {pause:.0f} s")
                self._limiter.hold(pause)
            if stop.wait(max(pause or 0.0, back_off(attempt, self._pause))):
                raise AbandonedError
        raise AssertionError

    def _attempt(self, form: Form) -> tuple[Reply | None, str, float | None]:
        """A reply; or why there is none, and how long the endpoint asks to wait.

        Raises:
            _EndpointError: trying again is no use.
        """
        import openai

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
        hopeless: int | None = None
        try:
            raw = self._openai.chat.completions.with_raw_response.create(**given, extra_body=self._extra or None)
            body: str = raw.http_response.text
        except openai.APITimeoutError:
            return None, "timed out", None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return None, self._shown(f"no connection: {type(cause).__name__}: {cause}"), None
        except openai.APIStatusError as error:
            reason, passing = self._status(error)
            if passing:
                return None, reason, retry_after(error.response.headers)
            hopeless, body = error.status_code, reason
        # Not raised where it is caught: the library's error, which holds the request with its key and a body that may
        # quote it, would go on as this one's context.
        if hopeless is not None:
            raise _EndpointError(body, status=hopeless)
        try:
            return self._read(json.loads(body)), "", None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            return None, self._shown(f"a reply that is no chat completion ({type(error).__name__}: {error})"), None

    def _status(self, error: Any) -> tuple[str, bool]:
        """What a status says, and whether it may pass."""
        status: int = error.status_code
        if status in (401, 403):  # what the endpoint says of a key may quote it
            held = f"in {self._key_variable}" if self._secret else f"({self._key_variable} is not set)"
            return f"status {status}: the endpoint does not accept the key {held}", False
        passing = (status in _PASSING or status >= 500) and status != 501 and error.code != "insufficient_quota"
        return self._shown(f"status {status}: {error.message}"), passing

    def _shown(self, text: str) -> str:
        """Text from outside, without the key, and short."""
        return without_key(" ".join(text.split()), self._secret)[:300]

    def _kept(self, text: str) -> str:
        """An answer without the key; of a word that is no secret an answer may well hold the letters."""
        return without_key(text, self._secret, SECRET_LENGTH) if len(self._secret) >= SECRET_LENGTH else text

    def _read(self, body: Any) -> Reply:
        (choice,) = body["choices"]
        message, usage = choice["message"], body.get("usage") or {}

        def text(value: Any) -> str | None:
            if value is not None and not isinstance(value, str):
                raise TypeError(f"text expected, got {type(value).__name__}")
            # Half of a surrogate pair is valid JSON, but no text that can be written.
            return None if value is None else self._kept(value).encode("utf-8", "replace").decode()

        def count(name: str) -> int | None:
            value = usage.get(name)
            return value if isinstance(value, int) and not isinstance(value, bool) else None

        return Reply(
            text(message.get("content")), text(choice.get("finish_reason")), text(message.get("refusal")),
            text(body.get("model")), count("prompt_tokens"), count("completion_tokens"),
        )  # fmt: skip
