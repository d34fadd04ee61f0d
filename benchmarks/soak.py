"""A long session, round after round, and whether anything is left behind.

    python -m benchmarks.soak --minutes 120       # two cores; with one: OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
    python -m benchmarks.soak --minutes 5         # what `tests/test_soak.py` runs as a slow test

A round is what researchers do in a notebook, in small sizes, on the embedded model and both engines: locate, select,
edit, generate, sweep, replay, read, judge, save and load, an experiment that is interrupted and continued, a chat
endpoint, figures, mistakes and interrupts, models loaded and dropped. After each round `benchmarks.leaks` counts what
the process still holds. The record (JSON, CSV), the figure and the summary in ``--out`` are written anew after every
round. Exit code 1, and a sentence a leak, if anything leaked.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from torch import nn

import npti_interp as npti
from benchmarks import harness
from benchmarks.leaks import CONFIDENCE, Limits, Round, Step, Verdict, as_json, hooks_on, step_table, verdict, watch
from npti_interp import figures
from npti_interp._files import sha256_of, write_atomic, write_json
from npti_interp.evaluation import Calibration
from npti_interp.runs import verify_folder

TRAIT = "Neuroticism"
WARM_UP, LONG_WARM_UP = 4, 15
"""Rounds before which nothing is held against memory or counts; the second in runs of half an hour and more. Alone in a
loop, the experiment takes a few MiB more until its fourth run (round 9) and booting a bridge until its sixth (round 10);
then both are level. A short run's bound on growth in all is wide enough for that."""
MODEL = "smollm2-135m"
PROMPTS = ("Your flight is late. What goes through your mind?", "Tell me about your weekend.")
EVERY = {"experiment": 3, "calibrate": 3, "judge": 2, "nnsight": 2, "load_and_drop": 2}
"""The long steps run in every second or third round; each of them twice before the warm-up ends."""
EXPERIMENT = npti.ReproduceConfig(
    traits=(TRAIT,), n_search=8, search_tokens=4, n_test=2, test_tokens=4, n_calibration=8, personas_per_pole=1,
    random_draws=1, dose_trait=None,
)  # fmt: skip


class SoakError(Exception):
    """A step did not do what it must."""


def must(truth: object, what: str) -> None:
    if not truth:
        raise SoakError(what)


# -- things that go wrong on purpose ---------------------------------------------------------------------------------


class Planned(Exception):  # noqa: N818
    """Raised inside the model by a hook of the user's."""


def refused(error: type[BaseException] | tuple[type[BaseException], ...], work: Callable[[], object]) -> str:
    """The message with which ``work`` is refused."""
    try:
        work()
    except error as found:
        return f"{type(found).__name__}: {found}"
    raise SoakError(f"nothing was raised where {error} was due")


@contextlib.contextmanager
def struck(module: nn.Module, nth: int, strike: Callable[[], object]) -> Generator[None]:
    """Call ``strike`` in the ``nth`` forward pass of a module, by a hook that is gone afterwards."""
    passes = 0

    def hook(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == nth:
            strike()

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fall() -> None:
    raise Planned("a hook that fails")


def interrupt() -> None:
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def _engine(model: npti.Model) -> Any:
    """The twin that the TransformerLens backend decodes with."""
    backend: Any = model.backend
    return backend._model


def _nnsight_twin(model: npti.Model) -> Any:
    """The twin inside nnsight's wrapper."""
    backend: Any = model.backend
    return backend.nnsight_model._module


class Tripwire:
    """A progress bar that raises when it is advanced."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def update(self, n: float = 1) -> None:
        """Raise."""
        raise self._error


class Endpoint:
    """A chat endpoint on loopback that answers by what it is asked, and at first misbehaves: 429, 500, a cut reply."""

    def __init__(self) -> None:
        self._lock, self._faults = threading.Lock(), [429, 500, 0]
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that left

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            fault = self._faults.pop(0) if self._faults else None
        asked = body["messages"][-1]["content"]
        said = json.dumps({"reason": "as asked", "rating": 1 + len(asked) % 5})
        message = {"role": "assistant", "content": said}
        reply: dict[str, Any] = {
            "id": "0", "object": "chat.completion", "created": 0, "model": "soak",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }  # fmt: skip
        if fault:
            reply = {"error": {"message": "not now", "type": "planned"}}
        data = json.dumps(reply).encode()
        handler.send_response(fault or 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if fault == 0 else data)
        handler.wfile.flush()
        handler.close_connection = handler.close_connection or fault == 0


# -- the session -----------------------------------------------------------------------------------------------------


class Session:
    """What a researcher has open: a model on each engine, the questions, and what the round has found so far.

    Args:
        folder: where its files go.
        model: name for `npti.load_model`.
    """

    def __init__(self, folder: Path, model: str = MODEL) -> None:
        self.folder, self.name = folder, model
        folder.mkdir(parents=True, exist_ok=True)
        self.bench = npti.PersonalityBench.embedded()
        self.model = npti.load_model(model)
        self.other = npti.load_model(model, "nnsight")
        self.questions = self.bench.questions(TRAIT, "test", 2)
        self.found: npti.Location | None = None

    def models(self) -> list[nn.Module]:
        """Those on which no hook may be left."""
        return [self.model.hf_model, _engine(self.model), self.other.hf_model, _nnsight_twin(self.other)]  # fmt: skip

    @property
    def location(self) -> npti.Location:
        """What this round's `locate` found."""
        must(self.found is not None, "nothing was located in this round")
        assert self.found is not None
        return self.found

    @property
    def edit(self) -> npti.NeuronEdit:
        """Towards the high pole."""
        return self.location.neurons.edit(gamma=1.4, pole="high")

    def vectors(self, width: int, layers: Sequence[int] = (10, 20)) -> dict[int, torch.Tensor]:
        """Seeded directions."""
        generator = torch.Generator().manual_seed(0)
        return {layer: 0.05 * torch.randn(width, generator=generator) for layer in layers}

    def steps(self) -> dict[str, Step]:
        """The round, in order."""
        names = (
            "locate", "select", "generate", "sweep", "replay", "read", "calibrate", "judge", "plain_generate", "statistics", "draw",
            "experiment", "ask", "bridge", "nnsight", "mistakes", "interrupts", "load_and_drop",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def locate(self) -> Any:
        """Both poles, with a progress bar."""
        self.found = None
        with contextlib.redirect_stderr(io.StringIO()):
            self.found = npti.locate(
                self.model, self.bench, TRAIT, n_questions=4, n_blocks=2, max_new_tokens=5, threshold="auto"
            )
        found = self.found
        shown = len(found._repr_html_())
        return [
            shown, {p.value: [a.tokens for a in own] for p, own in found.answers.items()},
            found.high.active_count, found.low.mean, found.low.p95,
        ]  # fmt: skip

    def select(self) -> Any:
        """Neurons, saved and loaded, in both formats."""
        neurons = self.location.neurons
        loose = self.location.select(threshold=0.05)
        file, published = self.folder / "neurons.safetensors", [self.folder / f"{p}.json" for p in ("high", "low")]
        neurons.save(file)
        neurons.to_npti_json(*published)
        again = npti.NeuronSet.load(file)
        foreign = npti.NeuronSet.from_npti_json(*published)
        amount, clamp = again.edit(gamma=1.4, pole="low").dense()
        return [len(neurons), len(loose), len(foreign), sha256_of(file), [sha256_of(p) for p in published], amount, clamp]  # fmt: skip

    def generate(self) -> Any:
        """Greedy, drawn, with a system message, edited."""
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0]}]
        made = [
            self.model.generate([*PROMPTS, chat], max_new_tokens=5),
            self.model.generate(PROMPTS, max_new_tokens=5, temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3),
            self.model.generate(PROMPTS, max_new_tokens=5, intervention=self.edit),
        ]
        return [[a.tokens for a in answers] for answers in made]

    def sweep(self) -> Any:
        """Every kind of intervention, more rows than slots."""
        sites = self.model.sites
        heads = {
            k: v.reshape(sites.n_heads, sites.d_head) for k, v in self.vectors(sites.n_heads * sites.d_head).items()
        }
        edits = [
            None,
            self.edit,
            self.location.neurons.edit(gamma=1.0, pole="low", drop=0.1, seed=1),
            npti.ResidualSteering(self.vectors(sites.d_model), 2.0),
            npti.HeadShift(heads, 2.0),
            npti.ProductShift(self.vectors(sites.d_mlp), 1.0),
            npti.FrontSteering({6: self.vectors(sites.d_model)[10][None]}, 2.0),
            npti.stack([self.edit, npti.ResidualSteering(self.vectors(sites.d_model), 1.0)]),
        ]
        made = npti.generate_sweep(self.model, PROMPTS, edits, max_new_tokens=4, batch_size=5)
        return [[a.tokens for a in answers] for answers in made]

    def replay(self) -> Any:
        """Teacher-forced statistics and likelihoods of answers."""
        answers = self.model.generate(PROMPTS, max_new_tokens=6)
        stats = npti.collect_activations(self.model, PROMPTS, answers, n_blocks=2)
        texts = [[str(a), "I feel fine."] for a in answers]
        sums, lengths = self.model.log_likelihoods(PROMPTS, texts, intervention=self.edit)
        return [stats.active_count, stats.p95, sums, lengths, self.model.next_token_logits(PROMPTS)]

    def read(self) -> Any:
        """What layers hold, at each site."""
        answers = self.model.generate(PROMPTS, max_new_tokens=4)
        found: list[Any] = [
            self.model.read(PROMPTS, answers, site=site, intervention=self.edit)
            for site in ("residual", "heads", "product", "value")
        ]  # fmt: skip
        return [*found, self.model.read(PROMPTS, at="prompt_end"), self.model.read_positions(["Love", "Hate"])]

    def calibrate(self) -> Any:
        """The likelihood judge, calibrated on answers that were written for it."""
        judge = npti.LikelihoodJudge(self.model, self.bench, personas_per_pole=1)
        questions = self.bench.questions(TRAIT, "search", 8)
        high = [f"I would worry {n} nights about it." for n in range(2, 10)]
        low = [f"I would sleep {n} hours and forget it." for n in range(2, 10)]
        return str(judge.calibrate(TRAIT, questions, high, low))

    def judge(self) -> Any:
        """Ratings by likelihoods and by logits, with an interval."""
        judge = npti.LikelihoodJudge(self.model, self.bench, personas_per_pole=1)
        judge.use_calibration(TRAIT, Calibration(3.0, 0.0, 0.8, 8, 8))
        answers = self.model.generate([q.text for q in self.questions], max_new_tokens=5, intervention=self.edit)
        scores = judge.score(self.questions, answers, TRAIT)
        rated = npti.LocalRatingJudge(self.model).score(self.questions, answers, TRAIT)
        mean = npti.bootstrap_mean(scores["rating"].to_numpy())
        return [scores.to_json(), rated.to_json(), str(mean)]

    def plain_generate(self) -> Any:
        """The user's own `generate` inside ``edit.on``."""
        ids = torch.tensor([self.model.encode(PROMPTS[0])])
        asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            before = self.model.hf_model.generate(ids, **asked)
            with (
                self.edit.on(self.model),
                self.model.editing(npti.ResidualSteering(self.vectors(self.model.sites.d_model))),
            ):
                edited = self.model.hf_model.generate(ids, **asked)
                inside = self.model.generate([PROMPTS[0]], max_new_tokens=6)
            after = self.model.hf_model.generate(ids, **asked)
        must(torch.equal(before, after), "hf_model answers otherwise after an editing block than before it")
        return [before, edited, inside[0].tokens]

    def statistics(self) -> Any:
        """Save, load, merge."""
        file = self.folder / "high.safetensors"
        self.location.high.save(file)
        again = npti.ActivationStatistics.load(file)
        merged = again.merge(self.location.low)
        merged.save(self.folder / "merged.safetensors")
        return [sha256_of(file), sha256_of(self.folder / "merged.safetensors"), len(merged._repr_html_())]

    def draw(self) -> Any:
        """A figure, saved in all its forms."""
        figure, data = figures.plot_neurons_per_layer({npti.Trait.NEUROTICISM: self.location.neurons})
        return [sha256_of(p) for p in npti.save_figure(figure, self.folder / "figures" / "layers", data)]

    def experiment(self) -> Any:
        """The main experiment, tiny: interrupted and continued; its files are the same every time."""
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)

        def go() -> npti.ReproduceResult:
            with contextlib.redirect_stderr(io.StringIO()):
                return npti.reproduce(EXPERIMENT, folder, model=self.model, bench=self.bench)

        with struck(_engine(self.model), 9, interrupt):
            refused(KeyboardInterrupt, go)
        result = go()
        again = go()  # nothing left to do: all of it is read back
        must(str(result) == str(again), "a finished run read back is not the run")
        return [verify_folder(folder), len(result._repr_html_())]

    def ask(self) -> Any:
        """A chat client and a judge at an endpoint that fails at first; a job that is left early; a mistake."""
        cache = self.folder / "replies"
        shutil.rmtree(cache, ignore_errors=True)
        answers = [str(a) for a in self.model.generate([q.text for q in self.questions], max_new_tokens=4)]
        with Endpoint() as endpoint:
            client = npti.ChatClient(endpoint.url, "soak", concurrency=2, pause=0.01, timeout=20, cache=cache)
            judge = npti.LLMJudge(client)
            scores = judge.score(self.questions, answers, TRAIT)
            again = npti.LLMJudge(client).score(self.questions, answers, TRAIT)
            asked = [npti.ChatRequest(f"Number {k}?", max_tokens=8) for k in range(12)]
            leaving: Any = client.complete(asked)
            first = next(leaving)
            leaving.close()
            rest = [r.text for r in client.complete(asked)]
        local = npti.LocalChat(self.model, cache=None).complete([npti.ChatRequest(PROMPTS[0], max_tokens=6)])
        shown = refused(ValueError, lambda: npti.ChatClient("ftp://nowhere", "soak"))
        return [scores.to_json(), again["rating"].tolist(), first.text, rest, [r.text for r in local], shown]

    def bridge(self) -> Any:
        """TransformerLens' cache, on the model that stays open."""
        ids = torch.tensor([self.model.encode(PROMPTS[0])])
        with torch.no_grad():
            logits, cache = self.model.bridge.run_with_cache(ids, names_filter=lambda n: n.endswith("mlp.hook_pre"))
        return [logits[:, -1], cache["blocks.0.mlp.hook_pre"], len(cache)]

    def nnsight(self) -> Any:
        """The same work on the other engine; its tokens are those of the first."""
        edit = self.edit
        made = self.other.generate(PROMPTS, max_new_tokens=5, intervention=edit)
        same = self.model.generate(PROMPTS, max_new_tokens=5, intervention=edit)
        must([a.tokens for a in made] == [a.tokens for a in same], "the engines' tokens differ")
        stats, answers = self.other.collect(PROMPTS, max_new_tokens=4, n_blocks=2)
        again, _ = self.other.collect(PROMPTS, answers, n_blocks=2)
        read = self.other.read(PROMPTS, answers, site="residual")
        sums, _ = self.other.log_likelihoods(PROMPTS, [["Fine.", "Badly."]] * 2)
        shown = [
            refused(npti.NonFiniteActivationError, lambda: self.other.collect(PROMPTS, intervention=self.huge(), max_new_tokens=3, n_blocks=2)),
            refused(ValueError, lambda: self.other.generate([""])),
        ]  # fmt: skip
        twin = _nnsight_twin(self.other)
        for work in (
            lambda: self.other.generate(PROMPTS, max_new_tokens=4, intervention=edit),
            lambda: self.other.collect(PROMPTS, answers, n_blocks=2),
        ):
            with struck(twin.model.layers[7], 1, fall):
                refused(Exception, work)
            with struck(twin.model.layers[7], 1, interrupt):
                refused(BaseException, work)
        return [[a.tokens for a in made], stats.active_count, again.active_count, read, sums, shown]

    def huge(self) -> npti.NeuronEdit:
        """An edit after which nothing is finite any more."""
        f = self.model.fingerprint
        n = 64
        return npti.NeuronEdit(np.zeros(n, int), np.arange(n), np.full(n, 3e38), np.zeros(n, bool), f)

    def mistakes(self) -> Any:
        """Bad input, values that are not finite, and hooks and bars that raise, in every kind of work."""
        model, edit = self.model, self.edit
        alien = npti.NeuronEdit(edit.layer, edit.neuron, edit.amount, edit.clamp, None)
        outside = npti.NeuronEdit(np.array([99]), np.array([0]), np.array([1.0]), np.array([False]))
        shown = [
            refused(ValueError, lambda: model.generate([])),
            refused(ValueError, lambda: model.generate(["  "])),
            refused(ValueError, lambda: model.generate("one string")),
            refused(ValueError, lambda: model.generate(PROMPTS, intervention=outside)),
            refused(ValueError, lambda: npti.locate(model, self.bench, "Honesty")),
            refused(ValueError, lambda: model.read(PROMPTS, site="nowhere")),  # pyright: ignore[reportArgumentType]
            refused(FileNotFoundError, lambda: npti.load_model("./no/such/model")),
            refused(FileNotFoundError, lambda: npti.NeuronSet.load(self.folder / "none.safetensors")),
            refused(npti.NonFiniteActivationError, lambda: model.collect(PROMPTS, intervention=self.huge(), max_new_tokens=3, n_blocks=2)),
        ]  # fmt: skip
        damaged = self.folder / "damaged.safetensors"
        self.location.high.save(damaged)
        damaged.write_bytes(damaged.read_bytes()[:-7])
        shown.append(refused(npti.ArtifactError, lambda: npti.ActivationStatistics.load(damaged)))
        damaged.unlink()
        answers = model.generate(PROMPTS, max_new_tokens=4, intervention=alien)
        for work in self._work(answers):
            with struck(_engine(model).model.layers[7], 1, fall):
                shown.append(refused(Planned, work))
        for error in (Planned("in the bar"), KeyboardInterrupt("in the bar")):
            bar = Tripwire(error)
            work = functools.partial(model.collect, PROMPTS, max_new_tokens=3, n_blocks=2, progress=bar)
            shown.append(refused((Planned, KeyboardInterrupt), work))
        with contextlib.suppress(Planned), edit.on(model), struck(model.hf_model.model.layers[3], 2, fall):
            ids = torch.tensor([model.encode(PROMPTS[0])])
            model.hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        shown.append(str(hooks_on(self.models())))
        return [s.replace(str(self.folder), "") for s in shown]

    def _work(self, answers: Sequence[str]) -> list[Callable[[], object]]:
        model, edit = self.model, self.edit
        return [
            lambda: model.generate(PROMPTS, max_new_tokens=4, intervention=edit),
            lambda: model.collect(PROMPTS, max_new_tokens=4, n_blocks=2),
            lambda: model.collect(PROMPTS, answers, n_blocks=2, intervention=edit),
            lambda: model.read(PROMPTS, answers, intervention=edit),
            lambda: model.log_likelihoods(PROMPTS, [["Fine."], ["Badly."]], intervention=edit),
        ]

    def interrupts(self) -> Any:
        """Ctrl-C in the middle of every kind of work; the answers afterwards are as before."""
        answers = self.model.generate(PROMPTS, max_new_tokens=4)
        for work in self._work(answers):
            with struck(_engine(self.model).model.layers[11], 1, interrupt):
                refused(KeyboardInterrupt, work)
        after = self.model.generate(PROMPTS, max_new_tokens=4)
        must([a.tokens for a in after] == [a.tokens for a in answers], "answers after an interrupt are others")
        return [a.tokens for a in after]

    def load_and_drop(self) -> Any:
        """Models come and go, used on each engine, one after an error that still holds its frames."""
        tokens = []
        for backend in ("transformer_lens", "nnsight"):
            held = _used_model(self.name, backend, tokens)
            gc.collect()
            alive = [name for name, reference in held.items() if reference() is not None]
            must(not alive, f"{', '.join(alive)} of a dropped {backend} model still live")
        return tokens


def _used_model(name: str, backend: str, tokens: list[Any]) -> dict[str, weakref.ref[Any]]:
    """Load a model, use all of it, and let go of it; what it was made of, weakly."""
    model = npti.load_model(name, backend)
    tokens.append(model.generate(PROMPTS, max_new_tokens=4)[0].tokens)
    tokens.append(model.collect(PROMPTS, max_new_tokens=3, n_blocks=2)[0].active_count)
    held: dict[str, Any] = {"model": model, "hf_model": model.hf_model, "backend": model.backend}
    if backend == "transformer_lens":
        held["bridge"] = model.bridge
        with torch.no_grad():
            ids = torch.tensor([model.encode(PROMPTS[1])])
            model.bridge.run_with_cache(ids, names_filter=lambda n: n.endswith("hook_resid_post"))
        with struck(_engine(model).model.layers[5], 2, fall):
            refused(Planned, lambda: model.generate(PROMPTS, max_new_tokens=4))
        with contextlib.suppress(Planned), model.editing(npti.ResidualSteering({3: torch.zeros(model.sites.d_model)})):
            raise Planned
    else:
        held["nnsight's twin"] = _nnsight_twin(model)
    return {name: weakref.ref(thing) for name, thing in held.items()}


# -- what is written -------------------------------------------------------------------------------------------------


def table(rounds: Sequence[Round]) -> pd.DataFrame:
    """A row a round."""
    return pd.DataFrame(
        [
            {"round": r.number, "hours": r.hours, "seconds": r.seconds, "memory_mib": r.memory,
             "resident_mib": r.resident, "tensor_mib": r.counts["tensor_bytes"] / 2**20,
             **{name.replace(" ", "_"): n for name, n in r.counts.items() if name != "tensor_bytes"},
             "failures": len(r.failures)}
            for r in rounds
        ]
    )  # fmt: skip


def plot(rounds: Sequence[Round], warm_up: int, found: Verdict | None) -> Figure:
    """Memory over time with its slope, and the counts beside it, as changes since the warm-up."""
    data = table(rounds)
    minutes = data["hours"] * 60
    with mpl.rc_context(figures.paper_style()):
        figure = Figure(figsize=(figures.WIDTH, 3.4))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        top.plot(minutes, data["memory_mib"], ".-", ms=3, lw=0.8, color="#0072B2", label="memory held")
        resident = top.twinx()
        resident.plot(minutes, data["resident_mib"], "-", lw=0.6, color=figures.NEUTRAL, label="resident set (right)")
        resident.set_ylabel("MiB", color=figures.NEUTRAL)
        top.set_ylabel("MiB")
        if found is not None:
            own = minutes[warm_up:]
            line = [found.intercept + found.slope * m / 60 for m in own]
            label = (
                f"{found.slope:+.1f} [{found.slope_low:+.1f}, {found.slope_high:+.1f}] MiB/h; bound {found.bound:.0f}"
            )
            top.plot(own, line, "--", lw=1, color="#D55E00", label=label)
        lines = [line for ax in (top, resident) for line in ax.get_lines() if not line.get_label().startswith("_")]
        top.legend(lines, [line.get_label() for line in lines], fontsize=6, frameon=False, loc="lower right")
        names = (
            "hooks",
            "tensors",
            "threads",
            "open_files",
            "mapped_files",
            "child_processes",
            "figures",
            "progress_bars",
        )
        start = data.iloc[min(warm_up, len(data) - 1)]
        for name in names:
            bottom.plot(minutes, data[name] - start[name], lw=0.9, label=name.replace("_", " "))
        bottom.set_yscale("symlog", linthresh=10)
        bottom.set_ylabel("change of counts")
        bottom.set_xlabel("minutes")
        bottom.legend(fontsize=6, frameon=False, ncols=4, loc="lower right")
        if len(rounds) > warm_up:
            for ax in (top, bottom):
                ax.axvspan(0, minutes.iloc[warm_up] - 1e-9, color=figures.NEUTRAL, alpha=0.15, lw=0)
    return figure


def summary(rounds: Sequence[Round], warm_up: int, found: Verdict | None, about: Mapping[str, Any]) -> str:
    """For people, in Markdown."""
    lines = ["# Soak", ""]
    if found is None:
        lines += [f"{len(rounds)} rounds so far, too few to tell ({warm_up} are warm-up).", ""]
    else:
        lines += [
            "**Nothing leaked.**" if not found.findings else f"**{len(found.findings)} findings.**",
            "",
            f"{len(rounds)} rounds in {rounds[-1].hours * 60:.1f} minutes, the first {warm_up} of them warm-up. Memory "
            f"{found.slope:+.2f} MiB an hour, {CONFIDENCE:.0%} interval {found.slope_low:+.2f} to {found.slope_high:+.2f} "
            f"(Theil–Sen over {found.rounds} rounds, {found.hours * 60:.1f} minutes), bound {found.bound:.1f}. Largest "
            f"lasting rise {found.jump:.1f} MiB. The interval takes rounds as independent.",
            "",
            *[f"- {finding}" for finding in found.findings],
            "",
        ]
    first, last = rounds[min(warm_up, len(rounds) - 1)], rounds[-1]
    lines += ["| count | first round after warm-up | last | largest |", "|---|---|---|---|"]
    own = rounds[warm_up:] or rounds
    lines += [
        f"| {name.replace('_', ' ')} | {n:,} | {last.counts[name]:,} | {max(r.counts[name] for r in own):,} |"
        for name, n in first.counts.items()
    ]
    lines += [
        "",
        "| step | MiB that stayed, all rounds | of these in warm-up | median of a round |",
        "|---|---|---|---|",
    ]
    warm = {name: total for name, total, _ in step_table(rounds[:warm_up])} if warm_up else {}
    lines += [
        f"| {name} | {total:+.1f} | {warm.get(name, 0.0):+.1f} | {middle:+.2f} |"
        for name, total, middle in step_table(rounds)
    ]
    lines += ["", ", ".join(f"{name}: {value}" for name, value in about.items()), ""]
    return "\n".join(lines)


def write(out: Path, rounds: Sequence[Round], warm_up: int, limits: Limits, about: Mapping[str, Any]) -> Verdict | None:
    """Write record, table, figure and summary, each whole or not at all; what was found, if there are rounds enough."""
    found = verdict(rounds, warm_up, limits) if len(rounds) - warm_up >= limits.fewest else None
    record = {
        "about": dict(about), "warm_up": warm_up, "limits": vars(limits), "confidence": CONFIDENCE,
        "verdict": None if found is None else vars(found), "rounds": as_json(rounds),
    }  # fmt: skip
    write_json(out / "soak.json", record)
    text = table(rounds).to_csv(index=False, lineterminator="\n")
    write_atomic(out / "soak.csv", lambda p: p.write_text(text, encoding="utf-8"))
    figure = plot(rounds, warm_up, found)
    write_atomic(out / "soak.png", lambda p: figure.savefig(p, dpi=150, metadata={"Software": None}))
    shown = summary(rounds, warm_up, found, about)
    write_atomic(out / "soak.md", lambda p: p.write_text(shown, encoding="utf-8"))
    return found


def soak(
    minutes: float,
    out: Path,
    *,
    warm_up: int = WARM_UP,
    limits: Limits | None = None,
    log: Callable[[str], object] = len,
) -> Verdict:
    """Soak for so many minutes, and as much longer as the fewest rounds take.

    Args:
        minutes: from the first round on.
        out: folder of the record; its ``work`` and ``tmp`` are removed at the end.
        warm_up: rounds that are not held against memory and counts.
        limits: what is still flat.
        log: told of each round.
    """
    limits = limits or Limits()
    work, scratch = out / "work", out / "tmp"
    for folder in (work, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    found: Verdict | None = None
    try:
        session = Session(work)
        about = {"minutes": minutes, "model": session.model.name, **harness.machine()}

        def after(rounds: list[Round]) -> None:
            nonlocal found
            found = write(out, rounds, warm_up, limits, about)
            last = rounds[-1]
            log(
                f"round {last.number}: {last.hours * 60:.1f} min, {last.memory:.1f} MiB held, {last.resident:.0f} MiB "
                f"resident, {last.counts['tensors']} tensors{''.join('; ' + f for f in last.failures)}"
            )

        watch(
            session.steps(),
            lambda n, hours: n < warm_up + limits.fewest or hours * 60 < minutes,
            models=session.models, folder=work, warm_up=warm_up, every=EVERY, after=after,
        )  # fmt: skip
    finally:
        tempfile.tempdir = before
        for folder in (work, scratch):
            shutil.rmtree(folder, ignore_errors=True)
    assert found is not None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    limits = Limits()
    parser.add_argument("--minutes", type=float, default=120.0, help="how long (at least ten rounds in any case)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of the record")
    parser.add_argument(
        "--warm-up", type=int, help=f"rounds that are not judged ({WARM_UP}; from 30 minutes on {LONG_WARM_UP})"
    )
    parser.add_argument("--mib-per-hour", type=float, default=limits.mib_per_hour, help="bound of the memory's slope")
    args = parser.parse_args(arguments)
    warm_up: int = args.warm_up if args.warm_up is not None else LONG_WARM_UP if args.minutes >= 30 else WARM_UP
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it; rounds need it
    try:
        found = soak(
            args.minutes, args.out, warm_up=warm_up, limits=Limits(mib_per_hour=args.mib_per_hour),
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, handler)
    print((args.out / "soak.md").read_text(encoding="utf-8"))
    for finding in found.findings:
        print(f"leak: {finding}", file=sys.stderr)
    return 1 if found.findings else 0


if __name__ == "__main__":
    sys.exit(main())
