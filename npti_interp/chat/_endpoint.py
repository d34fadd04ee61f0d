"""`Endpoint`: a connection to an OpenAI-compatible server, whatever is asked over it.

What this adds to the ``openai`` package: limits that hold for retries too, a window of calls under way, and an end to
the job when nothing answers any more. The package's own retries are off, because they know nothing of a reply that
arrived broken, and would pass the rate limit by. `Ledger` keeps replies on disk and makes equal calls one.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from npti_interp._secrets import SECRET_LENGTH, without_key
from npti_interp.chat._base import progress_bar
from npti_interp.chat._cache import Call, ReplyCache
from npti_interp.chat._limits import AbandonedError, RateLimiter, back_off, retry_after
from npti_interp.errors import RemoteServiceError

if TYPE_CHECKING:
    from npti_interp.generation import Progress

__all__ = ["KEY_VARIABLE", "Endpoint", "EndpointError", "Ledger"]

KEY_VARIABLE = "OPENAI_API_KEY"
_PLACEHOLDER = "none-needed"
_LONGEST_PAUSE = 900.0
_AHEAD = 4
"""Requests under way or waiting to be given back, for each call at once: one slow call shall not stop the others."""
_PASSING = (408, 409, 425, 429)

AskedT = TypeVar("AskedT")
ResultT = TypeVar("ResultT")
ReplyT = TypeVar("ReplyT")


class EndpointError(Exception):
    """No reply, for good. The message is fit to be shown.

    Attributes:
        status: of the answer that said so; None where there was none.
    """

    def __init__(self, reason: str, *, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Endpoint:
    """Sends calls to an OpenAI-compatible server until each is answered, or given up.

    Time-outs, lost connections, broken replies and the statuses 408, 409, 425, 429 and 5xx are tried again after a
    growing, partly random pause, or after the one the endpoint asks for. Everything else fails at once.

    Args:
        base_url: the address up to ``/v1``, without user, password or query.
        key_variable: environment variable with the key; the key is read from nowhere else, and kept out of messages,
            logs and files. An endpoint on this machine may do without.
        concurrency: calls at once.
        requests_per_minute: of this process, retries included; None is unlimited.
        tokens_per_minute: the same for tokens.
        timeout: seconds that one attempt may wait for the endpoint.
        retries: further attempts after a failed one.
        pause: seconds of the first pause between attempts; it doubles up to a minute.
        give_up_after: requests in a row that may fail before the job is ended; None never ends it.

    Attributes:
        where: the address, for messages and files; ``loopback`` for one on this machine.
        concurrency: calls at once.
        calls: attempts sent so far, retries included.

    Raises:
        ValueError: a setting out of range, an address that is none or holds credentials, or no key in the environment.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 1.0,
        give_up_after: int | None = 50,
    ) -> None:
        import openai

        parts = urlsplit(base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url must hold no user, password, query or fragment; put the key in the environment")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be like https://host/v1, got {base_url!r}")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, value in (("timeout", timeout), ("pause", pause)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        if give_up_after is not None and give_up_after < 1:
            raise ValueError(f"give_up_after must be at least 1, or None for never; got {give_up_after}")
        here = _is_loopback(parts.hostname)
        # Held by no local name: a traceback that shows its frames' locals must not show the key.
        self._secret = os.environ.get(key_variable, "").strip()
        if not self._secret and not here:
            raise ValueError(f"no key for {parts.hostname}: set the environment variable {key_variable}")
        # The port of a server on this machine differs from run to run, and says nothing of who answers.
        self.where = "loopback" if here else f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.concurrency = concurrency
        self.calls = 0
        self._key_variable = key_variable
        self._retries, self._pause, self._give_up_after = retries, pause, give_up_after
        self._limiter = RateLimiter(requests_per_minute, tokens_per_minute)
        # A proxy set for this machine's web traffic cannot reach this machine's own ports.
        http = openai.DefaultHttpxClient(trust_env=False) if here else None
        self._openai: Any = openai.OpenAI(
            base_url=base_url, api_key=self._secret or _PLACEHOLDER, timeout=timeout, max_retries=0, http_client=http
        )
        self._lock = threading.Lock()
        self._failed_in_row = 0

    # -- the stream ----------------------------------------------------------------------------------------------

    def run(
        self, asked: Iterable[AskedT], answer: Callable[[AskedT, threading.Event], ResultT],
        progress: bool | Progress = False, *, ordered: bool = True,
    ) -> Iterator[tuple[int, ResultT]]:  # fmt: skip
        """Each result with its request's place; made while the iterator is read, a bounded number ahead.

        Args:
            asked: any number; taken as they are needed.
            answer: makes one result, in a thread of its own; the event says that it is no longer wanted.
            progress: show a bar, or advance the one given by one a request.
            ordered: in the order of the requests, not as they come.
        """
        stop = threading.Event()
        source = enumerate(asked)
        window: deque[tuple[int, Future[ResultT]]] = deque()
        self._failed_in_row = 0
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="npti-chat")
        try:
            with progress_bar(progress, asked) as bar:
                while True:
                    while len(window) < _AHEAD * self.concurrency and (item := next(source, None)) is not None:
                        window.append((item[0], pool.submit(answer, item[1], stop)))
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

    def failed(self, failure: str) -> None:
        """A request has no reply. To be called outside of the ``except`` block, whose error would else go on in this one.

        Args:
            failure: why, fit to be shown.

        Raises:
            RemoteServiceError: as many in a row as end the job.
        """
        with self._lock:
            self._failed_in_row += 1
            lost = self._give_up_after is not None and self._failed_in_row >= self._give_up_after
        if lost:
            raise RemoteServiceError(
                f"{self._failed_in_row} requests in a row had no reply from {self.where}; the last: {failure}. "
                "What was answered is kept: run again to continue"
            )

    # -- one call ------------------------------------------------------------------------------------------------

    def send(
        self, call: Callable[[Any], Any], read: Callable[[Any], ReplyT], tokens: int, stop: threading.Event
    ) -> ReplyT:
        """Make one call until it is answered.

        Args:
            call: makes it on the ``openai`` client given, through ``with_raw_response``.
            read: a reply from the JSON; `ValueError`, `KeyError`, `TypeError` and the like say that it is broken. It
                raises nothing else, as the JSON, which may quote the key, is among its locals: what is whole but no use
                is given back as such.
            tokens: what the call may take, for the limit.
            stop: ends the waiting.

        Raises:
            EndpointError: all attempts failed, or trying again is no use.
            AbandonedError: ``stop`` was set.
        """
        for attempt in range(self._retries + 1):
            self._limiter.wait(tokens, stop)
            with self._lock:
                self.calls += 1
            reply, reason, pause = self._attempt(call, read)
            if reply is not None:
                with self._lock:
                    self._failed_in_row = 0
                return reply
            if attempt == self._retries:
                raise EndpointError(f"{reason} (after {attempt + 1} attempts)")
            if pause is not None:
                if pause > _LONGEST_PAUSE:
                    raise EndpointError(f"{reason}; the endpoint asks to wait {pause:.0f} s")
                self._limiter.hold(pause)
            if stop.wait(max(pause or 0.0, back_off(attempt, self._pause))):
                raise AbandonedError
        raise AssertionError

    def _attempt(
        self, call: Callable[[Any], Any], read: Callable[[Any], ReplyT]
    ) -> tuple[ReplyT | None, str, float | None]:
        """A reply; or why there is none, and how long the endpoint asks to wait.

        Raises:
            EndpointError: trying again is no use.
        """
        import openai

        hopeless: int | None = None
        try:
            body: str = call(self._openai).http_response.text
        except openai.APITimeoutError:
            return None, "timed out", None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return None, self.shown(f"no connection: {type(cause).__name__}: {cause}"), None
        except openai.APIStatusError as error:
            reason, passing = self._status(error)
            if passing:
                return None, reason, retry_after(error.response.headers)
            hopeless, body = error.status_code, reason
        # Not raised where it is caught: the library's error, which holds the request with its key and a body that may
        # quote it, would go on as this one's context.
        if hopeless is not None:
            raise EndpointError(body, status=hopeless)
        try:
            return read(json.loads(body)), "", None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            return None, self.shown(f"a reply that cannot be read ({type(error).__name__}: {error})"), None

    def _status(self, error: Any) -> tuple[str, bool]:
        """What a status says, and whether it may pass."""
        status: int = error.status_code
        if status in (401, 403):  # what the endpoint says of a key may quote it
            held = f"in {self._key_variable}" if self._secret else f"({self._key_variable} is not set)"
            return f"status {status}: the endpoint does not accept the key {held}", False
        passing = (status in _PASSING or status >= 500) and status != 501 and error.code != "insufficient_quota"
        return self.shown(f"status {status}: {error.message}"), passing

    def shown(self, text: str) -> str:
        """Text from outside for a message: without the key, and short."""
        return without_key(" ".join(text.split()), self._secret)[:300]

    def kept(self, text: str) -> str:
        """An answer without the key; of a word that is no secret an answer may well hold the letters."""
        return without_key(text, self._secret, SECRET_LENGTH) if len(self._secret) >= SECRET_LENGTH else text


class Ledger(Generic[ReplyT]):
    """Every call once: what was answered is on disk, and equal calls under way are one.

    Args:
        cache: the replies on disk.
        answerer: what a reply depends on beside the call; part of its key.
    """

    def __init__(self, cache: ReplyCache[ReplyT], answerer: Mapping[str, Any]) -> None:
        self._cache, self._answerer = cache, dict(answerer)
        self._lock = threading.Lock()
        self._flying: dict[str, Future[tuple[ReplyT, bool]]] = {}

    def known(self, call: Call) -> ReplyT | None:
        """The reply on disk; None if a call is still to be made."""
        return self._cache.get(call.key(self._answerer))

    def reply(self, call: Call, send: Callable[[], ReplyT], stop: threading.Event) -> tuple[ReplyT, bool]:
        """The reply to a call: from disk, from an equal call under way, or from ``send``; and whether it was there.

        Raises:
            OSError: it cannot be written to disk.
        """
        key = call.key(self._answerer)
        while True:
            with self._lock:
                other = self._flying.get(key)
                if other is None:
                    own: Future[tuple[ReplyT, bool]] = Future()
                    self._flying[key] = own
                    break
            try:
                return other.result()[0], True
            except AbandonedError:
                if stop.is_set():
                    raise
        try:
            kept = self._cache.get(key)
            reply = kept or send()
            if kept is None:
                self._cache.keep(key, call, self._answerer, reply)
            own.set_result((reply, kept is not None))
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flying[key]
        return own.result()
