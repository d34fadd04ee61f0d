"""A stand-in for a vLLM server: the same protocol, answered by a `Model`, with the faults that one may have.

What it sends was compared with vLLM 0.32's own replies: the fields of a choice, the end token among ``token_ids``,
``stop_reason`` null for the model's own end token, an answer cut off without a word where it does not fit.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from chat_server import Body, ChatServer, Fault

from npti_interp.generation import Decoding, Row
from npti_interp.models import Model


class VLLMServer(ChatServer):
    """Serves a model under one name.

    Args:
        model: whose answers are given.
        faults: as for `ChatServer`.
        name: of the model.
        max_model_len: prompt and answer are cut to it together, as vLLM does.
        strips_end: leaves the end token out of ``token_ids``.
        names_end: gives the end token as ``stop_reason``.
        no_ids: an older version, without ``return_token_ids``.
        ignores: settings that are not kept to.
        spoils: changes a choice before it is sent.
    """

    path = "/v1/completions"

    def __init__(
        self, model: Model, faults: Any = (), *, name: str = "served", max_model_len: int = 4096, strips_end: bool = False,
        names_end: bool = False, no_ids: bool = False, ignores: tuple[str, ...] = (), spoils: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(self._complete, faults, model=name)
        self._served, self._room, self._spoils = model, max_model_len, spoils
        self._strips, self._names, self._no_ids, self._ignores = strips_end, names_end, no_ids, ignores
        self._one = threading.Lock()
        self.listing = {"object": "list", "data": [{"id": name, "object": "model", "max_model_len": max_model_len}]}

    @property
    def asked(self) -> list[Body]:
        """The calls that were not checks."""
        return [body for body in self.received if "logprobs" not in body and body["repetition_penalty"] != 2.0]

    def _setting(self, body: Body, name: str, default: Any) -> Any:
        return default if name in self._ignores else body.get(name, default)

    def _complete(self, body: Body) -> Body:
        prompt = tuple(body["prompt"])
        limit = min(body["max_tokens"], self._room - len(prompt))
        decoding = Decoding(
            limit, self._setting(body, "temperature", 1.0), body["top_p"], self._setting(body, "repetition_penalty", 1.0),
            body.get("seed", 0),
        )  # fmt: skip
        with self._one:  # a model's hooks are no thread's own
            engine = self._served.backend
            (tokens,) = engine.generate([Row(prompt)], [None], decoding)
            ends = (n + 1 for n, token in enumerate(tokens) if token in body["stop_token_ids"])
            tokens = tokens[: next(ends, len(tokens))]  # it stops at its own end tokens, and at those asked for
            steps = [tokens[: n + 1] for n in range(len(tokens))]
            (sums,) = engine.log_likelihoods([prompt], [steps], None)
        ended = tokens[-1] in {*body["stop_token_ids"], *self._served._stop_tokens()}
        choice: Body = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": np.diff(sums, prepend=0.0).tolist()} if "logprobs" in body else None,
            "finish_reason": "stop" if ended else "length",
            "stop_reason": tokens[-1] if ended and self._names else None,
            "token_ids": tokens[:-1] if ended and self._strips else tokens,
            "prompt_token_ids": list(prompt),
        }
        if ended and self._strips and choice["logprobs"] is not None:
            choice["logprobs"]["token_logprobs"].pop()
        if self._no_ids:
            choice |= {"token_ids": None, "prompt_token_ids": None}
        if self._spoils is not None and body in self.asked:
            choice = self._spoils(choice)
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "model": self.model,
            "choices": [choice],
            "usage": {"completion_tokens": len(tokens)},
        }


def out_of_vocabulary(body: Body, size: int) -> Fault | None:
    """What vLLM says of a prompt with a token that it does not have."""
    strange = [t for t in body["prompt"] if t >= size]
    return Fault(400, f"Token id {strange[0]} is out of vocabulary") if strange else None
