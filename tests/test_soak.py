"""The soak: its short form finds nothing, and its detector finds and names everything that is planted."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from torch import nn
from tqdm.auto import tqdm

from benchmarks import soak as program
from benchmarks.leaks import _SETTLING, Limits, Round, census, digest, verdict, watch

ROOT = Path(__file__).parent.parent
FEW = 7


class Plants:
    """Steps that each leave something behind in every round; `undo` takes it all away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.round = folder, 0
        self.model, self.elsewhere = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
        self.kept: list[Any] = []
        self.threads: list[threading.Event] = []
        self.files: list[Any] = []
        self.children: list[Any] = []
        self.bars: list[Any] = []
        self.handles: list[Any] = []
        self.memory: list[bytes] = []

    def hook(self) -> None:
        self.round += 1
        self.handles.append(self.model[0].register_forward_hook(lambda *_: None))
        self.handles.append(self.elsewhere.register_forward_pre_hook(lambda *_: None))

    def tensors(self) -> None:
        self.kept.append(torch.zeros(11, 3))

    def modules(self) -> None:
        self.kept.append(nn.ReLU())

    def thread(self) -> None:
        self.threads.append(threading.Event())
        threading.Thread(target=self.threads[-1].wait, name="left-running", daemon=True).start()

    def file(self) -> None:
        path = self.folder / "not-closed.txt"
        path.touch()
        self.files.append(path.open())

    def child(self) -> None:
        if self.round == 4:  # not one a round: a single thing left behind is to be found too
            self.children.append(subprocess.Popen(["sleep", "600"]))

    def figure(self) -> None:
        pyplot.figure()

    def bar(self) -> None:
        self.bars.append(tqdm(total=3, file=io.StringIO()))

    def temporary(self) -> None:
        os.close(tempfile.mkstemp()[0])

    def half_written(self) -> None:
        (self.folder / ".half-abcdefgh.json").touch()

    def grown(self) -> None:
        self.memory.append(os.urandom(3 * 2**20))

    def setting(self) -> None:
        warnings.filters.append(warnings.filters[-1])

    def answer(self) -> list[int]:
        return [1, 2, 3 if self.round < 5 else 4]

    def failure(self) -> None:
        if self.round == 6:
            raise ArithmeticError("on purpose")

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()
        for event in self.threads:
            event.set()
        for own in (*self.files, *self.bars):
            own.close()
        for child in self.children:
            child.kill()
            child.wait()
        pyplot.close("all")


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What other tests hold is left out of what the garbage collector sees: counting then takes no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run(folder: Path, steps: dict[str, Any], model: nn.Module, limits: Limits | None = None) -> list[str]:
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "tmp")
    (folder / "tmp").mkdir()
    (folder / "work").mkdir(exist_ok=True)
    try:
        rounds = watch(steps, lambda n, _: n < 1 + FEW, models=lambda: [model], folder=folder / "work", warm_up=1)
    finally:
        tempfile.tempdir = before
    return verdict(rounds, 1, limits).findings


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is found when everything is planted at once."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "work").mkdir()
    names = (
        "hook", "tensors", "modules", "thread", "file", "child", "figure", "bar", "temporary", "half_written", "grown",
        "setting", "answer", "failure",
    )  # fmt: skip
    with warnings.catch_warnings(), apart():
        plants = Plants(folder / "work")
        try:
            return run(folder, {name: getattr(plants, name) for name in names}, plants.model, Limits(mib_in_all=8.0))
        finally:
            plants.undo()


PLANTED = {
    "hook on a model": ("hooks on the models", "Sequential.0"),
    "hook anywhere": ("hooks grew from", ""),
    "tensors": ("tensors grew from", "Tensor[11, 3]"),
    "modules": ("modules grew from", ""),
    "thread": ("threads grew from", "left-running"),
    "file": ("open files grew from", "not-closed.txt"),
    "child": ("child processes grew from 0 to 1", "sleep"),
    "figure": ("pyplot figures grew from", ""),
    "bar": ("progress bars grew from", ""),
    "temporary": ("temporary files grew from", "tmp"),
    "half-written": ("half-written files", ".half-abcdefgh.json"),
    "memory": ("memory grew", "grown"),
    "setting": ("warnings.filters was", ""),
    "answer": ("what answer returned in round 4", ""),
    "failure": ("round 5 failed in failure", "on purpose"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found_and_named(findings: list[str], planted: str) -> None:
    start, name = PLANTED[planted]
    assert any(found.startswith(start) and name in found for found in findings), findings


def test_the_same_work_without_leaks_is_clean(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)

    def tidy() -> list[str]:
        handle = model.register_forward_hook(lambda *_: None)
        model(torch.zeros(1, 2))
        handle.remove()
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        with tempfile.TemporaryFile() as file, tqdm(total=1, file=io.StringIO()) as bar:
            file.write(b"x")
            bar.update()
        pyplot.close(pyplot.figure())
        subprocess.run(["true"], check=True)
        return ["the same"]

    with apart():
        assert run(tmp_path, {"tidy": tidy}, model) == []


# -- the verdict, on made-up rounds ----------------------------------------------------------------------------------


def rounds_with(memory: Any, hours: float = 2.0, **counts: Any) -> list[Round]:
    """Rounds with these values, one each."""
    n = len(memory)
    return [
        Round(
            k, hours * k / n, 1.0, float(memory[k]), 2000.0, {name: int(own[k]) for name, own in counts.items()}
            | {"hooks on the models": 0, "half-written files": 0}, {}, {}, {}, {"step": "same"}, {"step": 0.0}
        )
        for k in range(n)
    ]  # fmt: skip


def noise(n: int = 60, size: float = 1.5) -> Any:
    return 700 + np.random.default_rng(0).normal(0, size, n)


def test_flat_memory_is_flat_and_its_interval_says_so() -> None:
    found = verdict(rounds_with(noise()), 4)
    assert found.findings == []
    assert found.slope_low < 0 < found.slope_high < found.bound == 12.0
    assert found.rounds == 56


def test_a_slow_leak_under_the_noise_is_found() -> None:
    found = verdict(rounds_with(noise() + 20 * 2.0 * np.arange(60) / 60), 4)
    (finding,) = found.findings
    assert finding.startswith("memory grew")
    assert found.slope == pytest.approx(20, abs=1) and found.slope_low < 20 < found.slope_high


def test_noise_too_large_to_tell_is_no_pass() -> None:
    (finding,) = verdict(rounds_with(noise(size=60.0)), 4, Limits(jump_mib=1e9)).findings
    assert finding.startswith("memory was not shown to be flat")


def test_a_lasting_jump_is_found_and_a_passing_one_is_not() -> None:
    jump, spike = noise(), noise()
    jump[50:] += 40
    spike[50] += 400
    (finding,) = verdict(rounds_with(jump), 4).findings
    assert "at round 50 and stayed" in finding
    assert verdict(rounds_with(spike), 4).findings == []


def test_growth_in_the_warm_up_is_none() -> None:
    memory = noise()
    memory[:4] -= [300, 200, 100, 50]
    threads = [1, 2, 3, 4] + [5] * 56
    assert verdict(rounds_with(memory, threads=threads), 4).findings == []
    assert verdict(rounds_with(memory, threads=threads), 0).findings


def test_a_rhythm_is_no_growth_and_one_thing_left_once_is() -> None:
    rhythm = [3 + (k % 3 == 0) for k in range(60)]
    once = [3 + (k > 33) for k in range(60)]
    assert verdict(rounds_with(noise(), threads=rhythm), 4).findings == []
    assert verdict(rounds_with(noise(), threads=once), 4).findings == ["threads grew from 3 to 4 over 56 rounds"]


def test_too_few_rounds_tell_nothing() -> None:
    with pytest.raises(ValueError, match="2 rounds after 4 of warm-up are too few"):
        verdict(rounds_with(noise(6)), 4)


def test_a_short_run_is_held_to_growth_in_all() -> None:
    limits = Limits()
    assert limits.bound(2.0) == limits.mib_per_hour
    assert limits.bound(1 / 12) == pytest.approx(12 * limits.mib_in_all)


def test_a_digest_tells_the_last_bit() -> None:
    value = torch.tensor([1.0, 2.0])
    same = digest([value, {"a": np.float64(0.1)}])
    assert same == digest([value.clone(), {"a": np.float64(0.1)}])
    assert same != digest([torch.nextafter(value, value + 1), {"a": np.float64(0.1)}])
    assert digest([1]) != digest([1.0])
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="set, which has no digest"):
        digest({1})


def test_a_census_counts_storage_once() -> None:
    with apart():
        before = census().counts
        held = torch.zeros(1024)
        views = [held[:3], held.view(32, 32)]
        after = census().counts
    assert after["tensors"] - before["tensors"] == 1 + len(views)
    assert after["tensor_bytes"] - before["tensor_bytes"] == 4096


# -- the program -----------------------------------------------------------------------------------------------------


class Small:
    """In place of the session: one step, which may leak."""

    leaks: list[Any] | None = None

    def __init__(self, folder: Path) -> None:
        self.model = type("M", (), {"name": "small"})

    def models(self) -> list[nn.Module]:
        return []

    def steps(self) -> dict[str, Any]:
        return {"work": lambda: None if self.leaks is None else self.leaks.append(torch.zeros(3))}


@pytest.mark.parametrize("leaks", [None, []], ids=["clean", "leaking"])
def test_the_program_says_what_leaked_and_leaves_whole_files(
    leaks: list[Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Small, "leaks", leaks)
    monkeypatch.setattr(program, "Session", Small)
    handler = signal.getsignal(signal.SIGINT)
    with apart():
        code = program.main(["--minutes", "0", "--warm-up", "1", "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert code == (0 if leaks is None else 1), shown.out
    assert ("leak: tensors grew from" in shown.err) is (leaks is not None)
    assert signal.getsignal(signal.SIGINT) is handler
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soak.csv", "soak.json", "soak.md", "soak.png"]
    record = json.loads((tmp_path / "soak.json").read_text())
    assert len(record["rounds"]) == len(pd.read_csv(tmp_path / "soak.csv")) == 7
    assert record["verdict"]["bound"] > 0
    assert ("Nothing leaked" in (tmp_path / "soak.md").read_text()) is (leaks is None)
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_five_minutes_leave_nothing_behind(tmp_path: Path) -> None:
    """At least ten rounds of the whole session, in a process of its own."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes", "5", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, **one, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["verdict"]["findings"] == []
    assert len(record["rounds"]) >= 10
    assert set(record["rounds"][0]["answers"]) == set(record["rounds"][0]["steps"]) - {_SETTLING}
    assert all(not r["failures"] and not r["counts"]["hooks on the models"] for r in record["rounds"])
