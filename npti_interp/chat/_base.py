"""What every chat is, and what those of this package share: the cache, its use, and the estimate."""

from __future__ import annotations

import contextlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from npti_interp.chat._cache import ReplyCache, reply_folder
from npti_interp.chat._request import ChatRequest, ChatResult, Form, Reply, read_reply

if TYPE_CHECKING:
    from npti_interp.generation import Progress

__all__ = ["CachedChat", "Chat", "ChatEstimate", "progress_bar"]


@runtime_checkable
class Chat(Protocol):
    """Anything that answers `ChatRequest`s."""

    def complete(self, requests: Iterable[ChatRequest], *, progress: bool | Progress = False) -> Iterator[ChatResult]:
        """One result a request, in order; made while the iterator is read, and no further ahead than a window.

        Args:
            requests: read as they are needed, so any number of them takes bounded memory.
            progress: show a bar, or advance the one given by one a request.
        """
        ...

    def stream(
        self, requests: Iterable[ChatRequest], *, progress: bool | Progress = False
    ) -> Iterator[tuple[int, ChatResult]]:
        """The results as they come, each with its request's place."""
        ...

    def estimate(self, requests: Iterable[ChatRequest]) -> ChatEstimate:
        """What `complete` would ask for; nothing is sent."""
        ...

    def identity(self) -> dict[str, Any]:
        """Who answers and what its answers depend on, as JSON: for files. Never holds a key."""
        ...


@dataclass(frozen=True)
class ChatEstimate:
    """What a job would take, before anything is sent.

    Attributes:
        requests: all of them.
        cached: those whose reply is on disk.
        duplicates: those equal to an earlier one.
        calls: what is left: calls to make. A request with a schema makes a second one if the endpoint cannot be held
            to the schema, and calls that fail for a while are tried again.
        prompt_tokens: tokens of the calls' prompts.
        completion_tokens: most tokens that the answers can have: the sum of ``max_tokens``.
        counted: how prompt tokens were counted.
    """

    requests: int
    cached: int
    duplicates: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    counted: str

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """Most that the calls can cost, in the currency of the prices.

        Args:
            prompt_price: of a million prompt tokens.
            completion_price: of a million completion tokens.

        Raises:
            ValueError: a price below 0.
        """
        if not (0 <= prompt_price < math.inf and 0 <= completion_price < math.inf):
            raise ValueError(f"prices must be 0 or above, got {prompt_price} and {completion_price}")
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests: {self.cached:,} answered already, {self.duplicates:,} asked twice, "
            f"{self.calls:,} calls with {self.prompt_tokens:,} prompt tokens ({self.counted}) and at most "
            f"{self.completion_tokens:,} completion tokens"
        )


class CachedChat(ABC):
    """A chat whose replies are kept on disk.

    Args:
        answerer: what a reply depends on beside the call; part of its key.
        cache: folder of the replies; ``"cache"`` is the user's cache folder, None keeps nothing.
    """

    def __init__(self, answerer: Mapping[str, Any], cache: str | Path | None) -> None:
        self._answerer = dict(answerer)
        self._cache = ReplyCache(reply_folder(cache), "ChatReply", Reply)

    @property
    @abstractmethod
    def _counted(self) -> str:
        """How `_count` counts."""

    @abstractmethod
    def _count(self, form: Form) -> int:
        """Tokens of a call's prompt."""

    @abstractmethod
    def _first_form(self, request: ChatRequest) -> Form:
        """The call that a request starts with."""

    def _key(self, form: Form) -> str:
        return form.key(self._answerer)

    def _known(self, request: ChatRequest) -> ChatResult | None:
        """What the replies on disk make of a request; None if a call is still to be made."""
        structured = request.structured_form
        if structured is not None and self._first_form(request).schema is not None:
            reply = self._cache.get(self._key(structured))
            if reply is not None:
                result = read_reply(reply, request, structured=True, cached=True)
                if not (result.kind == "schema" and request.plain is not None):
                    return result
        # The structured call has no reply on disk where the endpoint refused it, but then the plain one may have.
        reply = self._cache.get(self._key(request.plain_form))
        return None if reply is None else read_reply(reply, request, structured=False, cached=True)

    def estimate(self, requests: Iterable[ChatRequest]) -> ChatEstimate:
        """What `complete` would ask for; nothing is sent.

        Args:
            requests: read one by one; 32 bytes and some are held of each.
        """
        seen: set[bytes] = set()
        total = cached = duplicates = prompt = completion = 0
        for request in requests:
            total += 1
            form = self._first_form(request)
            key = bytes.fromhex(self._key(form))
            if key in seen:
                duplicates += 1
            elif self._known(request) is not None:
                cached += 1
            else:
                seen.add(key)
                prompt += self._count(form)
                completion += request.max_tokens
        return ChatEstimate(total, cached, duplicates, len(seen), prompt, completion, self._counted)


@contextlib.contextmanager
def progress_bar(progress: bool | Progress, requests: Iterable[Any]) -> Generator[Progress | None]:
    """The bar that a job advances; that of `Model` would load the engines."""
    if not isinstance(progress, bool):
        yield progress
    elif progress:
        with tqdm(total=operator.length_hint(requests) or None, desc="ask", delay=2) as bar:
            yield bar
    else:
        yield None
