"""A planted key goes to the endpoint and nowhere else: not into logs, files, errors, representations or notebooks."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from chat_server import ChatServer, Fault, broken_json, content, finish, reset, status
from helpers import spelling_model
from hypothesis import given
from hypothesis import strategies as st
from vllm_server import VLLMServer

import npti_interp as npti
from npti_interp._secrets import without_key
from npti_interp.backends import RemoteSettings, Service
from npti_interp.backends._ndif import RemoteBackend, _Job
from npti_interp.chat import ChatClient, ChatRequest
from npti_interp.errors import FingerprintMismatchError, NptiError, RemoteServiceError
from npti_interp.evaluation import LLMJudge
from npti_interp.serving import ServedGenerator

KEY = "sk-planted+0123/456789=the-secret-word"
ENCODED = base64.b64encode(KEY.encode()).decode()
FORMS = (KEY, KEY[:12], KEY[-12:], ENCODED, ENCODED[:16], quote(KEY, safe=""), KEY[::-1], KEY[::-1][:12])
LOGGERS = ("", "openai", "httpx", "httpx2", "httpcore", "httpcore2", "nnsight", "websocket", "urllib3", "npti_interp")


def leaks(text: str) -> list[str]:
    return [form for form in FORMS if form in text]


def everything_said(error: BaseException) -> str:
    """An error as any reporter might show it: words, arguments, whole chain, and the locals of all frames but a test's."""
    said: list[str] = []
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        own = waiting.pop()
        if own is None or id(own) in seen:
            continue
        seen.add(id(own))
        said += [str(own), repr(own), repr(own.args), repr(vars(own))]
        said += traceback.format_exception(own)
        frames = [frame for frame, _ in traceback.walk_tb(own.__traceback__) if frame.f_code.co_filename != __file__]
        said += [repr(value) for frame in frames for value in frame.f_locals.values()]
        waiting += [own.__cause__, own.__context__]  # the context even where it is not shown
    return "\n".join(said)


@contextlib.contextmanager
def all_logs() -> Iterator[io.StringIO]:
    """What every library involved logs, at DEBUG, as one text."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    logging.getLogger().addHandler(handler)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        yield out
    finally:
        logging.getLogger().removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def files_in(folder: Path) -> str:
    return "\n".join(f"{p}\n{p.read_bytes().decode('latin-1')}" for p in sorted(folder.rglob("*")) if p.is_file())


def hide_badly() -> None:
    """Raises an error without the key, behind which the library's own, with the key in its frames, is still there."""
    try:
        json.loads(f"{{{KEY}")
    except ValueError:
        raise ValueError("no word of it") from None


def test_the_search_finds_a_key_that_is_there() -> None:
    """Otherwise the tests below would prove nothing."""
    assert all(leaks(f"words {form} words") for form in FORMS)
    with pytest.raises(ValueError, match="no word of it") as caught:
        hide_badly()
    assert leaks(everything_said(caught.value)), "locals and hidden contexts are searched"
    with all_logs() as log:
        logging.getLogger("httpcore.http11").debug("sent %s", KEY)
    assert leaks(log.getvalue())


# -- the chat --------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Fault] = {
    "a 401 that quotes the key": status(401, f"Incorrect API key provided: {KEY}"),
    "a 401 with half of it": status(401, f"Incorrect API key provided: {KEY[:12]}***{KEY[-12:]}"),
    "a 403": status(403, f"{ENCODED} may not"),
    "a 400 that quotes it": status(400, f"the header was 'Bearer {KEY}'", KEY),
    "a 400 with half of it": status(400, f"bad key {KEY[:14]}***"),
    "a 422": status(422, f"see https://x.example/?key={quote(KEY, safe='')}"),
    "a 500": status(500, f"crashed with {KEY}"),
    "a 429": status(429, f"{KEY} asks too often"),
    "a page": Fault(body=f"<html>{KEY}</html>"),
    "broken JSON": broken_json(),
    "JSON of another kind": Fault(body=json.dumps({"choices": KEY})),
    "an answer of another kind": Fault(reply=lambda reply: reply | {"choices": [{"message": {"content": [KEY]}}]}),
    "a cut connection": reset(),
    "a time-out": Fault(delay=3.0),
    "an odd end": finish(KEY, KEY),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_an_endpoint_says_of_the_key_is_not_repeated(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    said: list[str] = []
    with all_logs() as log, ChatServer(faults=lambda _body, _n: fault) as server:
        chat = ChatClient(
            server.url, "m", key_variable="MY_KEY", cache=tmp_path, timeout=0.5, retries=1, pause=0.01, give_up_after=2
        )
        said += [repr(chat), str(chat), json.dumps(chat.identity())]
        try:
            results = list(chat.complete([ChatRequest(f"question {k}") for k in range(3)]))
            said += [repr(results), str(results)]
        except RemoteServiceError as error:
            said.append(everything_said(error))
        assert server.headers[0]["authorization"] == f"Bearer {KEY}", "the key was not even sent"
        with contextlib.suppress(RemoteServiceError):
            said.append(repr([r for _, r in chat.stream([ChatRequest("another")])]))
    assert "Sending HTTP Request" in log.getvalue(), "nothing was logged, so nothing was tested"
    assert "no key" not in "".join(said)
    for name, text in {"log": log.getvalue(), "said": "\n".join(said), "files": files_in(tmp_path)}.items():
        assert not leaks(text), name


def test_an_answer_that_holds_the_key_is_kept_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with ChatServer(faults=[content(f"your key is {KEY}, in short {KEY[:12]}")]) as server:
        chat = ChatClient(server.url, "m", key_variable="MY_KEY", cache=tmp_path)
        (result,) = chat.complete([ChatRequest("what is my key?")])
    assert result.text == "your key is [key], in short [key]"
    assert files_in(tmp_path) and not leaks(files_in(tmp_path))


@pytest.mark.parametrize("word", ["EMPTY", "none", "key", "e"])
def test_a_word_that_is_no_secret_does_not_change_answers(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers that need no key are given a word; it may stand in any answer."""
    monkeypatch.setenv("MY_KEY", word)
    text = f"The glass is EMPTY, none of the keys opens it; {word}."
    with ChatServer(lambda _: text) as server:
        chat = ChatClient(server.url, "m", key_variable="MY_KEY", cache=tmp_path)
        (result,) = chat.complete([ChatRequest("what is it?")])
    assert result.text == text


@pytest.mark.parametrize(
    "make",
    [
        lambda url: ChatClient(url, "m", key_variable="MY_KEY", cache=None),
        lambda url: ServedGenerator(spelling_model(), url, key_variable="MY_KEY", cache=None),
    ],
    ids=["chat", "generator"],
)
def test_a_client_that_cannot_be_made_says_nothing_of_the_key(
    make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    def fail(**_: Any) -> Any:
        raise RuntimeError("no such transport")

    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr(openai, "OpenAI", lambda **settings: fail())
    with pytest.raises(RuntimeError) as caught:
        make("https://api.example.org/v1")
    frames = [f for f in traceback.walk_tb(caught.value.__traceback__) if "npti_interp" in f[0].f_code.co_filename]
    assert frames and not any(leaks(repr(value)) for frame, _ in frames for value in frame.f_locals.values())


def test_a_judges_tables_and_their_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    questions = list(npti.PersonalityBench.embedded().questions("Neuroticism", "test", 3))
    faults = [status(400, f"no {KEY}"), content(f'{{"reason": "{KEY}", "rating": 3}}'), status(401, KEY)]
    with all_logs() as log, ChatServer(faults=lambda _body, n: faults[n % 3]) as server:
        judge = LLMJudge(base_url=server.url, model="m", cache=tmp_path, pause=0.01, retries=0, concurrency=1)
        table = judge.score(questions, ["I panic.", "I rest.", "I go."], "Neuroticism")
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    table.to_parquet(tmp_path / "scores.parquet")
    for text in (repr(judge), repr(vars(judge)), table.to_html(), table.to_csv(), log.getvalue(), files_in(tmp_path)):
        assert not leaks(text)


# -- vLLM ------------------------------------------------------------------------------------------------------------


def choice(**changed: Any) -> Fault:
    """A completion with fields of its choice changed, and the key as its text."""
    return Fault(reply=lambda reply: reply | {"choices": [reply["choices"][0] | {"text": KEY, **changed}]})


COMPLETIONS: dict[str, Fault] = {
    **{name: fault for name, fault in FAULTS.items() if name != "an odd end"},  # that one is of chats
    "no token ids": choice(token_ids=None),
    "another prompt": choice(prompt_token_ids=[1, 2]),
    "another prompt of words": choice(prompt_token_ids=[KEY]),
    "an odd end": choice(finish_reason=KEY),
    "an end that is the key": choice(token_ids=[5], finish_reason="stop", stop_reason=KEY),
    "an end that holds the key": choice(token_ids=[5], finish_reason="stop", stop_reason=[KEY]),
    "tokens that are words": choice(token_ids=[KEY]),
    "log-probabilities that are words": choice(logprobs={"token_logprobs": [KEY]}),
    "too many tokens": choice(token_ids=[5] * 99, finish_reason="length"),
    "a token of another model": choice(token_ids=[5, 10**9], finish_reason="length"),
    "cut off": choice(token_ids=[], finish_reason="length"),
}


@pytest.mark.parametrize("checked", [False, True], ids=["in the first checks", "after them"])
@pytest.mark.parametrize("fault", COMPLETIONS.values(), ids=COMPLETIONS)
def test_what_a_vllm_server_says_of_the_key_is_not_repeated(
    fault: Fault, checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    said: list[str] = []

    def faults(body: dict[str, Any], _n: int) -> Fault | None:
        return fault if not checked or ("logprobs" not in body and body["repetition_penalty"] == 1.0) else None

    with all_logs() as log, VLLMServer(spelling_model(), faults) as server:
        generator = ServedGenerator(
            spelling_model(), server.url, key_variable="MY_KEY", cache=tmp_path, timeout=20.0 if not fault.delay else 0.5,
            retries=1, pause=0.01, give_up_after=2, concurrency=2,
        )  # fmt: skip
        said += [repr(generator), str(generator), json.dumps(generator.identity())]
        for prompts in (["first"], ["second", "third", "fourth"]):
            try:
                said.append(repr(generator.generate(prompts, max_new_tokens=6)))
            except (RemoteServiceError, FingerprintMismatchError) as error:
                said.append(everything_said(error))
        assert server.headers[0]["authorization"] == f"Bearer {KEY}", "the key was not even sent"
        assert (generator.agreement is not None) is checked
    assert "Sending HTTP Request" in log.getvalue(), "nothing was logged, so nothing was tested"
    assert "no key" not in "".join(said)
    for name, text in {"log": log.getvalue(), "said": "\n".join(said), "files": files_in(tmp_path)}.items():
        assert not leaks(text), name


@pytest.mark.parametrize("served_as", [None, "other"])
def test_names_of_models_that_hold_the_key_are_not_repeated(
    served_as: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with all_logs() as log, VLLMServer(spelling_model()) as server:
        server.listing = {"data": [{"id": f"mine-{form}"} for form in (KEY, KEY[:12], KEY[-12:], ENCODED, KEY[::-1])]}
        generator = ServedGenerator(
            spelling_model(), server.url, served_as, key_variable="MY_KEY", cache=tmp_path, retries=0
        )
        with pytest.raises(RemoteServiceError, match="models: say which|no model 'other'") as caught:
            generator.generate(["hello"])
    assert "mine-[key]" in str(caught.value)
    assert not leaks(everything_said(caught.value)) and not leaks(log.getvalue())


def test_nobody_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    generator = ServedGenerator(
        spelling_model(), "http://127.0.0.1:9/v1", key_variable="MY_KEY", cache=tmp_path, retries=1, pause=0.01
    )
    with all_logs() as log, pytest.raises(RemoteServiceError, match="no vLLM server answers") as caught:
        generator.generate(["hello"])
    assert not leaks(everything_said(caught.value)) and not leaks(log.getvalue())


def test_a_run_with_served_answers_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    model = spelling_model()
    with all_logs() as log, VLLMServer(model, lambda _body, n: FAULTS["a 500"] if n % 5 == 0 else None) as server:
        generator = ServedGenerator(model, server.url, key_variable="MY_KEY", cache=tmp_path / "cache", pause=0.01)
        found = npti.locate(
            model, npti.PersonalityBench.embedded(), "Neuroticism", n_questions=8, max_new_tokens=5, chunk=4,
            run=tmp_path / "run", progress=False, generator=generator,
        )  # fmt: skip
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert len(list((tmp_path / "cache").rglob("*.json"))) > 8 and (tmp_path / "run/manifest.json").is_file()
    for text in (repr(found), found._repr_html_(), files_in(tmp_path), log.getvalue()):
        assert not leaks(text)


def test_a_served_name_may_hold_a_word_that_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "EMPTY")
    model = spelling_model()
    with VLLMServer(model, name="EMPTY-7b") as server:
        generator = ServedGenerator(model, server.url, key_variable="MY_KEY", cache=tmp_path)
        made = generator.generate(["what is it?"], max_new_tokens=6)
        assert {body["model"] for body in server.received} == {"EMPTY-7b"}
    assert made[0].tokens == model.generate(["what is it?"], max_new_tokens=6)[0].tokens


# -- NDIF ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def desk(answer: Callable[[str, str], tuple[int, str]]) -> Iterator[tuple[str, list[str]]]:
    """A front desk: ``answer(path, key)`` gives status and body; the keys it was shown are listed."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("ndif-api-key", ""))
            code, text = answer(self.path, keys[-1])
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", keys
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


NDIF_ANSWERS: dict[str, Callable[[str, str], tuple[int, str]]] = {
    "a 401 that quotes the key": lambda path, key: (401, f"unknown key {key}"),
    "a 403 with half of it": lambda path, key: (403, f"unknown key {key[:12]}***{key[-12:]}"),
    "a 500": lambda path, key: (500, f"crashed at {path} for {key}" + "x" * 1000),
    "a key cut by the message's end": lambda path, key: (500, "x" * 290 + key),
    "a page": lambda path, key: (200, f"<html>{key}</html>"),
    "no deployments": lambda path, key: (200, "{}"),
}


@pytest.mark.parametrize("answer", NDIF_ANSWERS.values(), ids=NDIF_ANSWERS)
def test_what_the_service_says_of_the_key_is_not_repeated(
    answer: Callable[[str, str], tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("NPTI_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    with all_logs() as log, desk(answer) as (host, keys):
        service = Service(host)
        said += [repr(service), str(service)]
        with pytest.raises(RemoteServiceError) as caught:
            service.require_model("npti/none")
        said.append(everything_said(caught.value))
        remote = RemoteSettings(host=host, jobs=tmp_path / "jobs", show=False)
        said.append(repr(remote))
        with pytest.raises(NptiError) as caught:
            npti.load_model("npti/none", backend="nnsight", remote=remote)
        said.append(everything_said(caught.value))
    assert KEY in keys, "the key was not even sent"
    assert "HTTP" in log.getvalue(), "nothing was logged, so nothing was tested"
    for name, text in {"said": "\n".join(said), "log": log.getvalue(), "files": files_in(tmp_path)}.items():
        assert not leaks(text), name


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    with all_logs() as log, pytest.raises(RemoteServiceError) as caught:
        Service("http://127.0.0.1:9").require_versions()
    assert not leaks(everything_said(caught.value)) and not leaks(log.getvalue())


@pytest.mark.parametrize("where", ["send", "poll"])
def test_a_job_that_fails_for_good_says_nothing_of_the_key(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop over jobs, with a client that fails in the library's way: its errors hold the request and the key."""
    import httpx
    from tqdm.auto import tqdm

    monkeypatch.setenv("NDIF_API_KEY", KEY)

    def fail() -> Any:
        request = httpx.Request("GET", f"http://127.0.0.1:9/?key={KEY}", headers={"ndif-api-key": KEY})
        raise httpx.HTTPStatusError(
            f"no {KEY}", request=request, response=httpx.Response(403, request=request, text=KEY)
        )

    class Client:
        job_id, state, unknown = "0", "queued", False

        def poll(self) -> Any:
            fail()

    own: Any = object.__new__(RemoteBackend)
    own.settings = RemoteSettings(tries=2, backoff=0.0, poll=0.01, show=False)
    own._service = Service("http://127.0.0.1:9")
    own._store = npti.backends._jobs.JobStore(tmp_path)

    def send(_name: str, _task: Any, job: _Job) -> None:
        job.tries, job.backend = job.tries + 1, Client()
        if where == "send":
            fail()

    own._send = send
    job = _Job(0, "d")
    with all_logs() as log, pytest.raises(NptiError, match="failed 2 times") as caught:
        own._loop("decode", [{}], [job], [], lambda *a, **k: None, tqdm(disable=True))
    assert "it is sent again" in log.getvalue()
    assert not leaks(everything_said(caught.value)) and not leaks(log.getvalue()) and not leaks(files_in(tmp_path))


# -- the scrubbing ---------------------------------------------------------------------------------------------------


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=60),
    st.text(max_size=40), st.text(max_size=40), st.integers(8, 60),
)  # fmt: skip
def test_no_part_of_a_key_of_eight_letters_is_left(key: str, before: str, after: str, n: int) -> None:
    for part in (key, key[:n], key[-n:], base64.b64encode(key.encode()).decode(), quote(key, safe=""), key[::-1]):
        left = without_key(f"{before} {part} {after}", key)
        assert key not in left and key[:8] not in left and key[-8:] not in left


@given(st.text(max_size=80))
def test_a_text_without_the_key_is_left_alone(text: str) -> None:
    assert without_key(text, "") == text
    if not any(KEY[k : k + 8] in text or KEY[::-1][k : k + 8] in text for k in range(len(KEY))):
        assert without_key(text, KEY) == text
