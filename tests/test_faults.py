"""What breaks from outside: kills, full disks, places that cannot be written, exchanged files, NaN, interrupts.

A kill is a real SIGKILL that a forked child sends itself right before a file operation drawn by a seeded generator. Full
and read-only disks are real mounts; where mounting is not allowed these tests are skipped, and those that say "injected"
still run. Figures are replaced by a few bytes, as drawing them takes most of a small run; the slow tests draw them.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_construction as construction
import torch
from chat_server import Body, ChatServer, prompt_of
from faults import hooks_on, in_child, killed_anywhere, read_only, small_disk, twin_of
from helpers import Tiny, digests, make_lab, spelling_model, tiny, tokenizer
from matplotlib.figure import Figure

import npti_interp as npti
from npti_interp import _programs, cli
from npti_interp._files import cannot_write, require_writable, write_atomic, write_json, write_tensors
from npti_interp.activations import ActivationCollector
from npti_interp.audit import AuditConfig, audit_bench
from npti_interp.chat import ChatClient
from npti_interp.errors import ArtifactError, NonFiniteActivationError, RunFolderError
from npti_interp.evaluation import Calibration, LikelihoodJudge, LLMJudge
from npti_interp.evaluation.humans import RankingConfig, RankingTask, make_task
from npti_interp.experiments import PRESETS, DoseConfig, DoseResult, Lab, ReproduceResult, dose_response
from npti_interp.experiments import _reproduce as reproduce_module
from npti_interp.generation import hooked
from npti_interp.models import Model
from npti_interp.neurons import NeuronSet, select_neurons
from npti_interp.runs import RunFolder, at_work_in, read_table, require_usable, verify_folder, write_table

SMALL = replace(
    PRESETS["tiny"], traits=("Neuroticism", "Extraversion"), n_search=8, search_tokens=4, n_test=2, test_tokens=3,
    n_dose=2, dose_gammas=(1.0,), random_draws=2, n_calibration=8,
)  # fmt: skip
DOSE = DoseConfig(traits=("Neuroticism",), n_questions=4, max_new_tokens=4, gammas=(0.5, 1.0))


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """No figure is drawn: its files hold a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"drawn"))
        yield


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Runs without the second judge, whose packages may be missing."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(reproduce_module, "embedder_available", lambda: "not in this test")
        warnings.simplefilter("ignore", UserWarning)
        yield


def reproduced(folder: Path) -> ReproduceResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return npti.reproduce(SMALL, folder, model=spelling_model(), progress=False)


@pytest.fixture(scope="module")
def run(undrawn: None, alone: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the main experiment on a tiny model."""
    return reproduced(tmp_path_factory.mktemp("faults") / "run").folder


def lab_in(folder: Path) -> Lab:
    lab = make_lab(folder)
    for trait in lab.traits:
        lab.judge.use_calibration(trait, Calibration(8.0, 0.0, 0.8, 8, 8))
    return lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab_in(tmp_path_factory.mktemp("lab"))


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """What the command line says of an error: one line, without a traceback."""
    monkeypatch.setattr(sys, "argv", ["npti", *map(str, arguments)])
    monkeypatch.delenv("NPTI_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.startswith("npti: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


# -- 1. killed, and continued ---------------------------------------------------------------------------------------------


def test_reproduce_killed_at_random_file_operations_ends_with_the_same_bytes(run: Path, tmp_path: Path):
    killed_anywhere(reproduced, tmp_path, digests, seed=1, lives=2)
    assert digests(tmp_path / "whole") == digests(run), "a run in a child is a run"


def test_a_sweep_killed_at_random_file_operations_ends_with_the_same_bytes(undrawn: None, lab: Lab, tmp_path: Path):
    killed_anywhere(lambda folder: dose_response(lab, DOSE, folder, progress=False), tmp_path, digests, seed=2, lives=4)
    answers = pd.read_parquet(tmp_path / "killed-0/answers/Neuroticism.parquet")
    assert not answers.duplicated(["condition", "pole", "question_id"]).any()
    assert (answers.groupby(["condition", "pole"], dropna=False).size() == DOSE.n_questions).all()


def test_a_build_killed_at_random_file_operations_ends_with_the_same_bytes(tmp_path: Path):
    def build(folder: Path) -> None:
        construction.built(folder, config=construction._BRIEF, items=construction.ITEMS[:2])

    killed_anywhere(build, tmp_path, construction.files_of, seed=3, lives=6, times=2)


QUESTIONS = list(npti.PersonalityBench.embedded().questions("Neuroticism", "test", 6))
ANSWERS = [[f"Answer {k} of set {s}." for k in range(6)] for s in range(2)]


def rate(body: Body) -> str:
    return json.dumps({"reason": "so", "rating": 1 + len(prompt_of(body)) % 5})


def judged(url: str, cache: Path, concurrency: int = 2) -> list[pd.DataFrame]:
    chat = ChatClient(url, "judge", cache=cache, concurrency=concurrency, pause=0.01)
    return LLMJudge(chat).score_many(QUESTIONS, ANSWERS, "Neuroticism")


def kept(cache: Path) -> set[str]:
    """The prompts whose replies are on disk."""
    files = [p for p in cache.rglob("*.json") if not p.name.startswith(".")]
    return {json.loads(p.read_text())["call"]["messages"][-1]["content"] for p in files}


def test_a_judge_killed_at_random_loses_no_reply_and_asks_for_none_again(tmp_path: Path):
    with ChatServer(rate) as server:
        expected = judged(server.url, tmp_path / "whole")
        n = in_child(lambda: judged(server.url, tmp_path / "counted"), tmp_path / "counted")
        assert n is not None and len(kept(tmp_path / "whole")) == 24
        rng, cache, lost = np.random.default_rng(4), tmp_path / "killed", 0
        server.answered.clear()
        for _ in range(6):
            there, begun = kept(cache), len(server.received)
            died = in_child(lambda: judged(server.url, cache), cache, int(rng.integers(1, n // 2))) is None
            time.sleep(0.1)  # what is still in the server's hands
            asked = server.prompts[begun:]
            assert not there & set(asked), "a reply that is on disk is not asked for again"
            assert len(asked) == len(set(asked))
            missed = len(set(asked) - kept(cache))
            assert missed <= (4 if died else 0), "only what was under way at the kill, or just arrived, is lost"
            lost += missed
        there, begun = kept(cache), len(server.received)
        found = judged(server.url, cache)
        assert not there & set(server.prompts[begun:])
        assert len(kept(cache)) == 24
        assert sum(count - 1 for count in server.answered.values()) <= lost
    for frame, wanted in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(frame, wanted)


def test_two_processes_may_share_a_judges_replies(tmp_path: Path):
    with ChatServer(rate) as server:
        expected = judged(server.url, tmp_path / "alone")
        other = Elsewhere(lambda: None, lambda: judged(server.url, tmp_path / "both"))
        found = judged(server.url, tmp_path / "both")
        assert other.end() == 0
        assert len(kept(tmp_path / "both")) == 24
    for frame, wanted in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(frame, wanted)


def test_a_run_is_completed_anew_even_if_it_dies_while_its_words_change(run: Path, tmp_path: Path, monkeypatch: Any):
    """A finished run whose words come out differently (a second judge was installed) is killed at each step of that."""
    real = ReproduceResult.summary
    monkeypatch.setattr(ReproduceResult, "summary", lambda self: real(self) + "\nAnd more.\n")
    shutil.copytree(run, tmp_path / "whole")
    n = in_child(lambda: reproduced(tmp_path / "whole"), tmp_path / "whole")
    assert n is not None
    for point in sorted(np.random.default_rng(5).choice(np.arange(1, n + 1), 3, replace=False)):
        shutil.copytree(run, tmp_path / str(point))
        assert in_child(lambda p=point: reproduced(tmp_path / str(p)), tmp_path / str(point), int(point)) is None
        reproduced(tmp_path / str(point))
        assert digests(tmp_path / str(point)) == digests(tmp_path / "whole")


def test_only_temporary_files_are_swept_and_none_of_a_run_inside(tmp_path: Path):
    left = [".scores.part-ab12_9zz.parquet", "prepared/Openness/sft/high/.weights.part-aaaaaaaa.safetensors"]
    precious = [".my-settings.json", "notes/.draft-chapter1.md", "layerwise/.scores.part-ab12_9zz.parquet"]
    with RunFolder(tmp_path, {"a": 1}):
        pass
    for name in [*left, *precious, "layerwise/.lock"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with RunFolder(tmp_path, {"a": 1}):
        assert not any((tmp_path / name).exists() for name in left)
        assert all((tmp_path / name).exists() for name in precious)


@pytest.mark.slow
def test_reproduce_with_its_figures_killed_at_random_ends_with_the_same_bytes(alone: None, tmp_path: Path):
    killed_anywhere(reproduced, tmp_path, digests, seed=11, lives=8, times=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_from_outside_at_random_moments_it_ends_with_the_same_bytes(alone: None, tmp_path: Path, seed: int):
    """SIGKILL by the clock, so also in the middle of a write and of a forward pass."""
    start = time.monotonic()
    expected = digests(reproduced(tmp_path / "whole").folder)
    seconds, rng = time.monotonic() - start, np.random.default_rng(seed)
    for _ in range(6):
        child = os.fork()
        if child == 0:
            try:
                reproduced(tmp_path / "killed")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.02, 0.6) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    reproduced(tmp_path / "killed")
    assert digests(tmp_path / "killed") == expected


# -- 2. full disks -----------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).random(30_000)
WRITERS: dict[str, Callable[[Path], object]] = {
    "x.safetensors": lambda path: write_tensors(path, "Thing", 1, {"x": NOISE}, {}),
    "x.json": lambda path: write_json(path, NOISE.tolist()),
    "x.parquet": lambda path: write_table(path, pd.DataFrame({"x": NOISE})),
    "x.png": lambda path: write_atomic(path, lambda p: _draw(_picture(), p, dpi=400)),
    "x.pdf": lambda path: write_atomic(path, lambda p: _draw(_picture(), p)),
    "x.txt": lambda path: write_atomic(path, lambda p: p.write_text("words " * 100_000)),
}


_draw: Callable[..., None] = Figure.savefig


def _picture() -> Figure:
    figure = Figure(figsize=(4, 4))
    figure.subplots().scatter(NOISE[:9000], NOISE[9000:18_000], c=NOISE[:9000])
    return figure


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was_there(name: str, tmp_path: Path):
    """A real small disk."""
    with small_disk(tmp_path / "small", "64k") as disk:
        (disk / name).write_text("earlier")
        with pytest.raises(
            OSError, match=rf"cannot write .*/{re.escape(name)}: No space left on device; free"
        ) as error:
            WRITERS[name](disk / name)
        assert error.value.errno == errno.ENOSPC
        assert {p.name: p.read_text() for p in disk.iterdir()} == {name: "earlier"}


def test_a_full_disk_is_named_injected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The errors that the libraries were seen to raise on a full disk, injected."""
    import safetensors
    import safetensors.numpy

    def full(error: Exception) -> Callable[..., Any]:
        def fail(*given: Any, **_: Any) -> None:
            next(Path(g) for g in given if isinstance(g, Path)).write_bytes(b"half")
            raise error

        return fail

    rust = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors.numpy, "save_file", full(rust))
    detail = "Error writing bytes to file. Detail: [errno 28] No space left on device"
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full(OSError(errno.ENOSPC, detail)))
    monkeypatch.setattr(Path, "write_text", full(OSError(errno.ENOSPC, "No space left on device")))
    for name in ("x.safetensors", "x.json", "x.parquet"):
        with pytest.raises(OSError, match=rf"cannot write .*/{re.escape(name)}: No space left") as error:
            WRITERS[name](tmp_path / name)
        assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    # What says nothing of the disk stays what it was.
    other = FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/adapter.json")
    assert cannot_write(tmp_path / "x", other) is None and cannot_write(tmp_path / "x", RuntimeError("fire")) is None
    denied = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/adapter.json")
    assert cannot_write(tmp_path / "x", denied) is None, "it is about another file"


def grown(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_run_stopped_by_a_full_disk_goes_on_to_the_same_bytes(undrawn: None, lab: Lab, tmp_path: Path):
    """A real small disk, at several sizes: each lets the run come further."""
    expected = digests(dose_response(lab, DOSE, tmp_path / "whole", progress=False).folder)
    with small_disk(tmp_path / "small", "16k") as disk:
        for size in ("16k", "28k", "40k", "56k"):
            grown(disk, size)
            with pytest.raises(OSError, match="No space left on device") as error:
                dose_response(lab, DOSE, disk / "run", progress=False)
            assert str(disk) in str(error.value)
            assert not [p for p in disk.rglob(".*") if p.name != ".lock"]
        grown(disk, "4m")
        dose_response(lab, DOSE, disk / "run", progress=False)
        assert digests(disk / "run") == expected


def test_a_judge_stopped_by_a_full_disk_keeps_what_it_has(tmp_path: Path):
    """A real small disk."""
    with ChatServer(rate) as server, small_disk(tmp_path / "small", "32k") as disk:
        expected = judged(server.url, tmp_path / "whole")
        with pytest.raises(OSError, match=r"cannot write .*\.json: No space left on device"):
            judged(server.url, disk / "cache")
        there, begun = kept(disk / "cache"), len(server.received)
        assert 0 < len(there) < 24
        grown(disk, "4m")
        found = judged(server.url, disk / "cache")
        assert not there & set(server.prompts[begun:])
    for frame, wanted in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(frame, wanted)


def test_the_command_line_tells_of_a_full_disk_in_one_line(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    """A real small disk: full from the start, and filled on the way."""
    with small_disk(tmp_path / "small", "16k") as disk:
        said = told(capsys, monkeypatch, "humans", "export", run, "--items", "2", "--out", disk / "humans")
        assert re.search(r"cannot write .*: No space left on device; free some space", said)
        said = told(capsys, monkeypatch, "figures", run, "--out", disk / "figures")
        assert "No space left on device" in said
        with pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(bytes(64_000))
        monkeypatch.setattr("npti_interp.models.load_model", unwanted)
        assert "No space left" in told(capsys, monkeypatch, "reproduce", "--out", disk / "run")


# -- 3. places that cannot be written -----------------------------------------------------------------------------------------


def unwanted(*_: object, **__: object) -> None:
    raise AssertionError("a model is loaded although the results could not be written")


def commands(run: Path, out: Path) -> list[tuple[str | Path, ...]]:
    """Every command that writes, with what it needs."""
    items = run.parent / "items.json"
    if not items.is_file():
        rows = [
            {"id": i.id, "text": i.text, "domain": i.domain.value, "facet": i.facet, "key": i.key}
            for i in construction.ITEMS
        ]
        items.write_text(json.dumps({"name": "own", "items": rows}))
    return [
        ("reproduce", "--preset", "tiny", "--out", out),
        ("audit", "--out", out, "--model", "smollm2-135m"),
        ("humans", "export", run, "--out", out),
        ("figures", run, "--out", out),
        ("build", "--items", items, "--out", out, "--local", "smollm2-135m"),
    ]  # fmt: skip


def test_a_read_only_disk_is_refused_before_a_model_is_loaded(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    """A real read-only mount."""
    place = tmp_path / "read only"
    shutil.copytree(run, place / "run")
    monkeypatch.setattr("npti_interp.models.load_model", unwanted)
    monkeypatch.setattr(reproduce_module, "load_model", unwanted)
    before = digests(place)
    with read_only(place):
        for command in commands(run, place / "out"):
            said = told(capsys, monkeypatch, *command)
            assert re.search(r"cannot write .*: Read-only file system; choose a place", said), command
        assert "Read-only" in told(capsys, monkeypatch, "experiment", "dose", "--run", place / "run")
        with pytest.raises(OSError, match="Read-only file system"):
            npti.reproduce(SMALL, place / "out", progress=False)
        ReproduceResult.load(place / "run")  # reading needs no right to write
    assert digests(place) == before


def test_a_file_in_the_way_is_refused_before_a_model_is_loaded(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.setattr("npti_interp.models.load_model", unwanted)
    monkeypatch.setattr(reproduce_module, "load_model", unwanted)
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        for command in commands(run, out):
            assert "a part of that path is a file" in told(capsys, monkeypatch, *command), command
        with pytest.raises(OSError, match="a part of that path is a file"):
            npti.reproduce(SMALL, out, progress=False)
    for command in commands(run, tmp_path / ("x" * 300)):
        assert "choose a shorter name" in told(capsys, monkeypatch, *command), command
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "precious"
    with pytest.raises(OSError, match=r"cannot write .*/file/x\.json: .*; a part of that path is a file"):
        write_json(tmp_path / "file" / "x.json", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="there is a folder of that name"):
        write_json(tmp_path / "folder", 1)


def test_without_permission_it_is_refused(tmp_path: Path):
    """Rights do not bind root: a child gives them up."""
    if os.getuid() != 0:
        pytest.skip("needs to be root to become somebody else")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "there").mkdir(mode=0o755)
        (Path(name) / "shut").mkdir(mode=0o700)

        def somebody() -> None:
            os.setgid(65534)
            os.setuid(65534)
            for place in (Path(name) / "there", Path(name) / "there" / "new", Path(name) / "shut" / "new"):
                for ask in (require_writable, require_usable, lambda p: RunFolder(p, {}).__enter__()):
                    with pytest.raises(
                        PermissionError, match=r"cannot write .*Permission denied; choose a place that you may"
                    ):
                        ask(place)
                with pytest.raises(PermissionError, match=r"cannot write .*/x\.json: Permission denied"):
                    write_json(place / "x.json", 1)

        assert in_child(somebody, tmp_path) == 0
        assert sorted(p.name for p in Path(name).rglob("*")) == ["shut", "there"]


def test_asking_whether_a_place_can_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    require_writable(tmp_path / "a" / "b")
    require_usable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    require_usable("relative/place")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with space", "ключ-φ-日本語", "q'uo\"te", "n" * 255, "é" * 127, "-dash", "a.b.c"])
def test_names_of_any_kind_work(name: str, tmp_path: Path):
    folder = tmp_path / name
    for _ in range(2):
        with RunFolder(folder, {"name": name}) as made:
            table = made.table("answers/t.parquet", lambda: pd.DataFrame({"x": [1]}))
    assert table["x"].tolist() == [1] and set(verify_folder(folder)) == {"config.json", "answers/t.parquet"}
    room = 255 - len(".safetensors")
    short = name.encode()[:room].decode(errors="ignore") + ".safetensors"
    write_tensors(folder / short, "Thing", 1, {"x": np.arange(3)}, {})
    assert (folder / short).is_file() and not list(folder.glob(".*part*"))
    with pytest.raises(OSError, match="choose a shorter name"):
        write_json(tmp_path / ("x" * 252 + ".json"), 1)


# -- 4. two processes -----------------------------------------------------------------------------------------------------------


class Elsewhere:
    """Another process: it gets hold of something, says so, and then does its work (or waits to be killed)."""

    def __init__(self, hold: Callable[[], Any], work: Callable[[], object] = lambda: time.sleep(600)) -> None:
        receive, send = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            code = 1
            try:
                held = hold()
                os.write(send, b"held")
                work()
                del held
                code = 0
            finally:
                os._exit(code)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            assert pipe.read(4) == b"held"

    def end(self) -> int:
        """Wait for it; its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL


def _entered(manager: Any) -> Any:
    manager.__enter__()
    return manager


@pytest.fixture
def ranking(run: Path) -> RankingTask:
    return make_task(
        read_table(run / "answers.parquet"), RankingConfig(methods=("npti", "random"), n_items=3, judges=1)
    )


def test_a_folder_in_use_is_refused_until_the_other_process_is_gone(
    undrawn: None, alone: None, lab: Lab, run: Path, ranking: RankingTask, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    report = audit_bench(npti.PersonalityBench.embedded(), config=AuditConfig(permutations=99, sample=50))
    shutil.copytree(run, tmp_path / "run")
    jobs: dict[str, Callable[[Path], object]] = {
        "run": reproduced,
        "experiment": lambda folder: dose_response(lab, DOSE, folder, progress=False),
        "build": lambda folder: construction.built(folder, config=construction._BRIEF, items=construction.ITEMS[:2]),
        "audit": report.save,
        "humans": ranking.save,
    }
    for name, job in jobs.items():
        folder = tmp_path / name
        other = Elsewhere(lambda folder=folder: _entered(at_work_in(folder)))
        try:
            before = digests(folder)
            with pytest.raises(RunFolderError, match=f"another process is at work in .*{name}"):
                job(folder)
            with monkeypatch.context() as patch:
                patch.setattr("npti_interp.models.load_model", unwanted)
                patch.setattr(reproduce_module, "load_model", unwanted)
                for command in commands(run, folder):
                    assert "another process is at work" in told(capsys, patch, *command)
                with pytest.raises(RunFolderError, match="another process"):
                    npti.reproduce(SMALL, folder, progress=False)
            assert digests(folder) == before
        finally:
            other.kill()
        assert (folder / ".lock").is_file(), "a dead process's lock"
        job(folder)
    assert digests(tmp_path / "run") == digests(run)


def test_a_file_system_without_locks_is_told_from_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Injected: what flock says on some network file systems."""
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunFolderError, match="its file system knows no locks"):
        RunFolder(tmp_path / "a", {}).__enter__()


# -- 5. truncated, altered and exchanged files -----------------------------------------------------------------------------------


def test_every_file_of_a_run_is_named_if_it_is_cut_altered_or_exchanged(run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    names = list(verify_folder(folder))
    assert {Path(n).suffix for n in names} >= {
        ".json",
        ".parquet",
        ".safetensors",
        ".csv",
        ".md",
        ".html",
        ".tex",
        ".png",
    }
    readers = (ReproduceResult.load, lambda f: Lab.from_run(f, model=spelling_model()), reproduced)
    for k, name in enumerate(names):
        path, whole = folder / name, (folder / name).read_bytes()
        cut, altered = whole[:-1], bytes([*whole[:-1], whole[-1] ^ 1])
        for content in (cut, altered, b""):
            path.write_bytes(content)
            with pytest.raises((ArtifactError, RunFolderError), match=re.escape(name)):
                readers[k % 2](folder)
        path.write_bytes(whole)
    for suffix in (".parquet", ".safetensors", ".csv", ".json"):
        a, b, *_ = [n for n in names if n.endswith(suffix) and n != "config.json"]
        if (folder / a).read_bytes() == (folder / b).read_bytes():
            continue
        (folder / a).rename(folder / "swap")
        (folder / b).rename(folder / a)
        (folder / "swap").rename(folder / b)
        for read in readers:
            with pytest.raises(ArtifactError, match=f"{re.escape(a)}|{re.escape(b)}"):
                read(folder)
        (folder / a).rename(folder / "swap")
        (folder / b).rename(folder / a)
        (folder / "swap").rename(folder / b)
    ReproduceResult.load(folder)


def test_an_edited_manifest_is_named(run: Path, tmp_path: Path):
    def edited(change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(run, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def unlisted(manifest: dict[str, Any]) -> None:
        del manifest["files"]["scores.parquet"]

    for change in (
        unlisted,
        lambda m: m["files"].update({"scores.parquet": "0" * 64}),
        lambda m: m["files"].update({"extra.txt": "0" * 64}),
        lambda m: m.update(sha256="0" * 64),
        lambda m: m.update(files=[]),
        lambda m: m["files"].update({"scores.parquet": 7}),
    ):
        folder = edited(change)
        for read in (ReproduceResult.load, lambda f: Lab.from_run(f, model=spelling_model()), reproduced):
            with pytest.raises(ArtifactError, match=r"manifest\.json (was altered|is not a manifest)"):
                read(folder)
    folder = edited(lambda m: (m["files"].pop("summary.md"), m.pop("sha256")))
    with pytest.raises(FileNotFoundError, match=r"not finished: summary\.md"):
        ReproduceResult.load(folder)  # words that nobody vouches for


def test_a_run_of_another_experiment_is_told_apart(
    undrawn: None, lab: Lab, run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    dose = dose_response(lab, DOSE, tmp_path / "dose", progress=False).folder
    with pytest.raises(ArtifactError, match="holds a run of dose, not of reproduce"):
        ReproduceResult.load(dose)
    with pytest.raises(ArtifactError, match="holds a run of dose, not of reproduce"):
        Lab.from_run(dose)
    with pytest.raises(ArtifactError, match="holds a run of reproduce, not of dose"):
        DoseResult.load(run)
    assert "holds a run of dose" in told(capsys, monkeypatch, "experiment", "dose", "--run", dose)
    assert "holds a run of dose" in told(capsys, monkeypatch, "figures", dose, "--out", tmp_path / "f")
    for folder in (dose, run):  # either is inspected as what it is
        monkeypatch.setattr(sys, "argv", ["npti", "inspect", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0 and capsys.readouterr().out.strip() == (folder / "summary.md").read_text().strip()
    # Answers of another run in the place of its own.
    shutil.copy(run / "answers/test-Neuroticism.parquet", dose / "answers/Neuroticism.parquet")
    with pytest.raises(ArtifactError, match=r"answers/Neuroticism\.parquet was altered"):
        DoseResult.load(dose)


def test_files_alone_say_whose_they_are(run: Path, tmp_path: Path):
    model, bench = spelling_model(), npti.PersonalityBench.embedded()
    shutil.copy(run / "neurons/Extraversion.safetensors", tmp_path / "Neuroticism.safetensors")
    renamed = NeuronSet.load(tmp_path / "Neuroticism.safetensors")
    with pytest.raises(ArtifactError, match="given as those of Neuroticism are neurons of Extraversion"):
        Lab(model, bench, {"Neuroticism": renamed})
    high, low, other = (
        npti.ActivationStatistics.load(run / f"statistics/{stem}.safetensors")
        for stem in ("Neuroticism-high", "Neuroticism-low", "Extraversion-low")
    )
    with pytest.raises(ValueError, match="statistics of the low pole were given as those of the high pole"):
        select_neurons(low, high)
    with pytest.raises(ValueError, match="differ in trait"):
        select_neurons(high, other)
    for kind, stem, end in (("statistics", "", "safetensors"), ("answers", "search-", "parquet")):
        (tmp_path / kind).mkdir()
        for source, target in (("Neuroticism-low", "Neuroticism-high"), ("Extraversion-low", "Neuroticism-low")):
            shutil.copy(run / f"{kind}/{stem}{source}.{end}", tmp_path / f"{kind}/{stem}{target}.{end}")
    mixed = Lab(model, bench, {}, run=tmp_path)
    for pole, whose in (("high", "Neuroticism, low"), ("low", "Extraversion, low")):
        for read in (mixed.statistics, mixed.search_answers):
            with pytest.raises(ArtifactError, match=f"Neuroticism-{pole}.* is of {whose} pole"):
                read("Neuroticism", pole)


def test_a_bench_whose_files_were_exchanged_or_altered_is_noticed(tmp_path: Path):
    folder = npti.PersonalityBench.embedded().save(tmp_path / "bench")
    assert not npti.PersonalityBench.from_directory(folder).report.warnings
    a, b = folder / "questions/openness.jsonl", folder / "questions/neuroticism.jsonl"
    whole_a, whole_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(whole_b)
    b.write_bytes(whole_a)
    with pytest.raises(ValueError, match=r"(openness|neuroticism)\.jsonl.*: trait \w+ in the file of"):
        npti.PersonalityBench.from_directory(folder)
    a.write_bytes(whole_a)
    for content in (whole_b[: whole_b.rindex(b'{"')], whole_b.replace(b"you", b"one", 1)):
        b.write_bytes(content)
        assert any("digest" in w for w in npti.PersonalityBench.from_directory(folder).report.warnings)
    b.write_bytes(whole_b[:-20])
    with pytest.raises(ValueError, match=r"neuroticism\.jsonl"):
        npti.PersonalityBench.from_directory(folder)


def test_a_damaged_reply_is_asked_for_again_and_a_damaged_key_refused(ranking: RankingTask, tmp_path: Path):
    with ChatServer(rate) as server:
        judged(server.url, tmp_path / "cache")
        files = sorted(p for p in (tmp_path / "cache").rglob("*.json"))
        texts = [p.read_text() for p in files[:4]]
        files[0].write_text(texts[1])
        files[1].write_text(texts[0])  # exchanged
        files[2].write_text(texts[2][: len(texts[2]) // 2])
        files[3].write_text(re.sub(r'\\"rating\\": \d', r'\\"rating\\": 9', texts[3]))
        begun = len(server.received)
        judged(server.url, tmp_path / "cache")
        assert len(server.received) - begun == 4
        assert [p.read_text() for p in files[:4]] == texts
    ranking.save(tmp_path / "task")
    key = tmp_path / "task" / "key.json"
    whole = key.read_text()
    for content in (whole[:-30], whole.replace('"npti"', '"other"', 1), whole.replace('"judges": 1', '"judges": 2')):
        key.write_text(content)
        with pytest.raises(ArtifactError, match=r"key\.json"):
            RankingTask.load(key)


# -- 6. NaN ---------------------------------------------------------------------------------------------------------------------

ENGINES = ("transformer_lens", "nnsight")


def engine(name: str) -> Model:
    return Model(copy.deepcopy(tiny("llama").plain), tokenizer(), "tiny", backend=name)


def calls_of(model: Model, case: Tiny, edit: Any = None) -> dict[str, Callable[[], Any]]:
    """Everything that runs the model, on the same prompts."""
    answers = [npti.Answer(str(i), r.tokens) for i, r in enumerate(case.expected)]
    texts = ["w5 w6 w7", "w8"]
    return {
        "generate": lambda: model.generate(case.texts, intervention=edit, max_new_tokens=5),
        "collect": lambda: model.collect(case.texts, intervention=edit, max_new_tokens=5)[0].active_count,
        "replay": lambda: model.collect(case.texts, answers, intervention=edit)[0].active_count,
        "read": lambda: model.read(case.texts, answers, intervention=edit),
        "log_likelihoods": lambda: model.log_likelihoods(case.texts, [texts] * len(case.texts), intervention=edit),
        "next_token_logits": lambda: model.next_token_logits(case.texts),
    }


BLIND = {
    "model.layers.2.mlp.down_proj.weight": {"replay"},  # behind the last place that is counted
    "model.norm.weight": {"replay", "read"},
    "lm_head.weight": {"replay", "read"},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ENGINES)
def test_nan_in_the_weights_is_found_and_named(backend: str, value: float, llama: Tiny):
    places = [
        f"model.layers.1.{p}.weight" for p in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
    ]
    model = engine(backend)
    for place in [*places, "model.layers.1.input_layernorm.weight", *BLIND]:
        parameter = dict(model.hf_model.named_parameters())[place]
        held = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[3] = value
        for name, call in calls_of(model, llama).items():
            if name in BLIND.get(place, ()):
                call()
                continue
            with pytest.raises(NonFiniteActivationError, match=rf"NaN or infinity in the weights {re.escape(place)}"):
                call()
        with torch.no_grad():
            parameter.copy_(held)
    for call in calls_of(model, llama).values():
        call()


@pytest.mark.parametrize("backend", ENGINES)
def test_nan_that_an_edit_makes_is_found_and_no_weight_is_blamed(backend: str, llama: Tiny):
    model = engine(backend)
    edit = replace(llama.pair().edit("high"), amount=np.full(len(llama.pair().edit("high").layer), 1e38))
    for name, call in calls_of(model, llama, edit).items():
        if name == "next_token_logits":
            continue  # the edit does not act on prompts
        with pytest.raises(NonFiniteActivationError, match="NaN or infinit") as error:
            call()
        assert "load the model anew" not in str(error.value)
        assert re.search("layer|edit", str(error.value)), "it says where, or what to do"


def test_a_judge_and_an_experiment_stop_at_nan(undrawn: None, lab: Lab, tmp_path: Path):
    model = copy.copy(spelling_model())
    hurt = Model(copy.deepcopy(model.hf_model), model.tokenizer, "hurt")
    with torch.no_grad():
        hurt.hf_model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    judge = LikelihoodJudge(hurt, lab.bench, personas_per_pole=1)
    judge.use_calibration("Neuroticism", Calibration(8.0, 0.0, 0.8, 8, 8))
    with pytest.raises(NonFiniteActivationError, match=r"layers\.2\.mlp\.down_proj"):
        judge.score(QUESTIONS, ANSWERS[0], "Neuroticism")
    with pytest.raises(NonFiniteActivationError, match=r"layers\.2\.mlp\.down_proj"):
        npti.locate(hurt, lab.bench, "Neuroticism", n_questions=8, max_new_tokens=4, progress=False)


# -- 7. interrupts and errors inside the model -------------------------------------------------------------------------------------


class BoomError(Exception):
    pass


def nothing_left(model: Model) -> None:
    assert hooks_on(model.hf_model) == [] and hooks_on(twin_of(model)) == []
    assert [t.name for t in threading.enumerate() if not t.daemon] == ["MainThread"]
    assert model._active == [] and torch.is_grad_enabled()


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray | torch.Tensor) else a == b


FAULTS = ("edit", "collector", "hook", "signal")


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_raises_inside_a_pass_leaves_the_model_as_it_was(
    backend: str, fault: str, llama: Tiny, monkeypatch: pytest.MonkeyPatch
):
    model = engine(backend)
    calls = calls_of(model, llama, llama.pair().edit("high"))
    expected = {name: call() for name, call in calls.items()}
    nothing_left(model)
    for error in (BoomError("boom"), KeyboardInterrupt()):
        for name, call in calls.items():
            if (fault == "collector") != (name in ("collect", "replay")) and fault == "collector":
                continue
            if fault == "edit" and name == "next_token_logits":
                continue
            times = 0

            def raising(real: Callable[..., Any], error: BaseException = error) -> Callable[..., Any]:
                def fail(*given: Any, **more: Any) -> Any:
                    nonlocal times
                    times += 1
                    if times == 2:
                        raise error
                    return real(*given, **more)

                return fail

            def interrupted(*_: Any) -> None:
                nonlocal times
                times += 1
                if times == 2:
                    signal.raise_signal(signal.SIGINT)

            handle = None
            with monkeypatch.context() as patch:
                if fault == "edit":
                    patch.setattr(_programs.Edits, "change", raising(_programs.Edits.change))
                elif fault == "collector":
                    patch.setattr(ActivationCollector, "add", raising(ActivationCollector.add))
                else:
                    inner = twin_of(model).get_submodule("model.layers.1.mlp")
                    act = interrupted if fault == "signal" else raising(lambda *_: None)
                    handle = inner.register_forward_hook(act)
                    if name in ("read", "replay", "log_likelihoods", "next_token_logits"):
                        times = 1  # one pass is all they make
                try:
                    with pytest.raises(KeyboardInterrupt if fault == "signal" else type(error)):
                        call()
                finally:
                    if handle is not None:
                        handle.remove()
            nothing_left(model)
            assert same(call(), expected[name]), name


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("backend", ENGINES)
def test_an_editing_block_that_is_left_by_an_error_edits_no_more(backend: str, error: Any, llama: Tiny):
    model, edit = engine(backend), llama.pair().edit("high")
    ids = torch.tensor([llama.prompts[0]])

    def plain() -> list[int]:
        return model.hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[
            0
        ].tolist()

    before, inside = plain(), model.generate(llama.texts, intervention=edit, max_new_tokens=6)
    unedited = model.generate(llama.texts, max_new_tokens=6)
    layer = model.hf_model.model.layers[1].mlp
    for enter in (lambda: model.editing(edit), lambda: edit.on(model)):
        real = layer.forward
        passes = 0

        def fail(*given: Any, real: Any = real) -> Any:
            nonlocal passes
            passes += 1
            if passes == 3:
                raise error
            return real(*given)

        layer.forward = fail
        with pytest.raises(error), enter(), enter():
            plain()
        del layer.forward
        nothing_left(model)
        assert plain() == before and model.generate(llama.texts, max_new_tokens=6) == unedited
        with enter():
            assert model.generate(llama.texts, max_new_tokens=6) == inside
        nothing_left(model)
    with pytest.raises(ValueError, match="no key-value cache"), model.editing(edit):
        model.hf_model(ids, use_cache=False)
    nothing_left(model)


def test_an_interrupt_at_any_line_of_the_engine_leaves_no_hooks(llama: Tiny):
    """KeyboardInterrupt at lines drawn by a seeded generator, most of them where hooks come and go."""
    model, edit = engine("transformer_lens"), llama.pair().edit("high")
    file = sys.modules["npti_interp.generation"].__file__
    expected = model.generate(llama.texts, intervention=edit, max_new_tokens=4)

    def at_line(stop: int, of: tuple[str, ...]) -> int:
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != file or (of and frame.f_code.co_name not in of):
                return None
            if event == "line":
                lines += 1
                if lines == stop:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            model.generate(llama.texts, intervention=edit, max_new_tokens=4)
        finally:
            sys.settrace(None)
        return lines

    rng = np.random.default_rng(6)
    for of, points in ((("hooked", "hook_sites", "_remove"), 60), ((), 30)):
        n = at_line(-1, of)
        for stop in rng.choice(np.arange(1, n + 1), points, replace=False):
            with pytest.raises(KeyboardInterrupt):
                at_line(int(stop), of)
            assert hooks_on(twin_of(model)) == [], (of, stop)
            torch.set_grad_enabled(True)  # an interrupt between two lines may keep no_grad from its end
    assert model.generate(llama.texts, intervention=edit, max_new_tokens=4) == expected


def test_hooks_that_could_not_all_be_put_there_are_removed():
    module = torch.nn.Linear(2, 2)

    def registering() -> Iterator[Any]:
        yield module.register_forward_hook(lambda *_: None)
        yield module.register_forward_pre_hook(lambda *_: None)
        raise BoomError

    with pytest.raises(BoomError), hooked(registering()):
        raise AssertionError("never reached")
    assert hooks_on(module) == []


def test_an_error_raised_twice_is_no_endless_chain(llama: Tiny, monkeypatch: pytest.MonkeyPatch):
    """One exception object that is raised again becomes part of its own context."""
    model, boom = engine("nnsight"), BoomError("boom")

    def fail(*_: Any, **__: Any) -> Any:
        raise boom

    monkeypatch.setattr(_programs.Edits, "change", fail)
    for _ in range(3):
        with pytest.raises(BoomError):
            model.generate(llama.texts, intervention=llama.pair().edit("high"), max_new_tokens=4)


def test_a_judgement_that_is_interrupted_ends_its_threads():
    with ChatServer(rate) as server:
        chat = ChatClient(server.url, "judge", cache=None, concurrency=4)
        results = chat.stream(LLMJudge(chat).requests(QUESTIONS, ANSWERS, "Neuroticism"))
        next(results)
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt)  # pyright: ignore[reportAttributeAccessIssue]
        end = time.monotonic() + 20
        while any(t.name.startswith("npti-chat") for t in threading.enumerate()) and time.monotonic() < end:
            time.sleep(0.01)
        assert not [t.name for t in threading.enumerate() if t.name.startswith("npti-chat")]
