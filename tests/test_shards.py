"""Locating in run folders and in shards: killed anywhere it ends in the same bytes, and the parts are the whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import StopError, digests, hf_model, spelling_model

import npti_interp as npti
from npti_interp import POLES
from npti_interp.activations import ActivationCollector, ActivationStatistics
from npti_interp.backends import RemoteSettings
from npti_interp.experiments._search_folder import StoredRows, stored_answers
from npti_interp.experiments._search_plan import SearchPlan, as_shard, chunk_spans, question_blocks
from npti_interp.generation import Decoding, Row
from npti_interp.models import Model
from npti_interp.prompts import persona_prompts
from npti_interp.runs import RunFolder

BENCH = npti.PersonalityBench.embedded()
SMALL: dict[str, Any] = {
    "n_questions": 22, "max_new_tokens": 6, "threshold": 0.08, "n_blocks": 4, "chunk": 4, "progress": False,
}  # fmt: skip
N_CHUNKS, N_SHARDS = 6, 3


def locate(folder: Path | None = None, model: Model | None = None, **changes: Any) -> Any:
    return npti.locate(model or spelling_model(), BENCH, "N", run=folder, **{**SMALL, **changes})


def merge(folders: list[Path], out: Path, **settings: Any) -> npti.Location:
    return npti.merge_shards(folders, out, progress=False, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> npti.Location:
    """One run over all questions, in a folder, that never stopped."""
    return locate(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [locate(folder / f"{k}", shard=f"{k}/{N_SHARDS}").folder for k in range(1, N_SHARDS + 1)]


@pytest.fixture(scope="module")
def merged(shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> npti.Location:
    return merge(shards, tmp_path_factory.mktemp("merged") / "run")


def require_equal(one: ActivationStatistics, other: ActivationStatistics) -> None:
    """As the documentation promises it of merged statistics."""
    assert one.active_count.dtype == other.active_count.dtype
    assert np.array_equal(one.active_count, other.active_count)
    assert np.array_equal(one.n_tokens, other.n_tokens)
    assert np.allclose(one.mean, other.mean, rtol=1e-12, atol=1e-14)
    assert np.allclose(one.m2, other.m2, rtol=1e-10, atol=1e-12)
    known = ~np.isnan(one.p95) & ~np.isnan(other.p95)
    assert np.array_equal(one.p95[known], other.p95[known]), "where it is known it is the same bin"
    assert known.mean() > 0.99
    assert {**one.metadata, "versions": None} == {**other.metadata, "versions": None}


# -- one run in a folder ----------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_call_without_one_gives(whole: npti.Location, tmp_path: Path) -> None:
    here = locate()
    assert here.folder is None and here.questions == list(whole.questions)
    for pole in POLES:
        own, other = getattr(here, pole.value), getattr(whole, pole.value)
        own.save(tmp_path / "statistics.safetensors")
        written = whole.folder / f"statistics/Neuroticism-{pole}.safetensors"
        assert (tmp_path / "statistics.safetensors").read_bytes() == written.read_bytes(), "one code, the same bits"
        assert np.array_equal(own.p95, other.p95, equal_nan=True)
        assert isinstance(whole.answers[pole], StoredRows)
        assert here.answers[pole] == list(whole.answers[pole])
        assert [a.tokens for a in here.answers[pole]] == [a.tokens for a in whole.answers[pole]]
        assert [a.finished for a in here.answers[pole]] == [a.finished for a in whole.answers[pole]]
    here.neurons.save(tmp_path / "neurons.safetensors")
    assert (tmp_path / "neurons.safetensors").read_bytes() == (
        whole.folder / "neurons/Neuroticism.safetensors"
    ).read_bytes()
    assert len(here.neurons) > 4


def test_chunks_change_nothing_but_rounding(whole: npti.Location) -> None:
    """Another size of chunk is other batches, so a value that rounding carries over zero may count otherwise."""
    for chunk in (512, 7):
        other = locate(chunk=chunk)
        for pole in POLES:
            assert other.answers[pole] == list(whole.answers[pole])
            own = getattr(whole, pole.value)
            apart = np.abs(getattr(other, pole.value).active_count.astype(int) - own.active_count)
            assert apart.max() <= 1 and apart.sum() <= 2


def test_chunked_counting_is_that_of_all_prompts_at_once(whole: npti.Location) -> None:
    """Blocks and personas by a question's place in the whole list, written out here once more."""
    model, questions = spelling_model(), BENCH.questions("N", "search", 22)
    for pole in POLES:
        own, answers = model.collect(
            persona_prompts(BENCH, "N", pole, questions), max_new_tokens=6, n_blocks=4, blocks=question_blocks(22, 4)
        )
        assert [str(a) for a in answers] == [str(a) for a in whole.answers[pole]]
        assert np.array_equal(own.n_tokens, getattr(whole, pole.value).n_tokens)


def test_the_folder_is_clean_and_every_setting_is_in_the_table(whole: npti.Location) -> None:
    folder = whole.folder
    assert folder is not None
    assert set(digests(folder)) == {
        "config.json", "manifest.json", "neurons/Neuroticism.safetensors", "statistics/Neuroticism-high.safetensors",
        "statistics/Neuroticism-low.safetensors", "answers/search-Neuroticism-high.parquet",
        "answers/search-Neuroticism-low.parquet",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["chunk"] == 4 and config["settings"]["shard"] is None
    for pole in POLES:
        table = pd.read_parquet(folder / f"answers/search-Neuroticism-{pole}.parquet")
        assert table["place"].tolist() == list(range(22))
        assert table["question_id"].tolist() == [q.id for q in BENCH.questions("N", "search", 22)]
        assert table["block"].tolist() == question_blocks(22, 4)
        row = table.iloc[5]
        assert (row["pole"], row["max_new_tokens"], row["dtype"]) == (pole.value, 6, "torch.float32")
        assert row["fingerprint"] == spelling_model().fingerprint.digest and row["bench"] == BENCH.digest
        personas = BENCH.personas("N", pole, "elicit")
        assert table["persona"].tolist() == [personas[k % len(personas)].id for k in range(22)]


def test_it_is_read_back_without_a_model(whole: npti.Location) -> None:
    assert whole.folder is not None
    again = npti.Location.load(whole.folder)
    assert again.neurons.digest == whole.neurons.digest
    assert list(again.questions) == BENCH.questions("N", "search", 22)
    assert again.questions[3:5] == BENCH.questions("N", "search", 22)[3:5]
    assert again.answers[POLES[0]][-1] == whole.answers[POLES[0]][21]
    assert again.select(threshold=0.05).rule["threshold"] == 0.05
    with pytest.raises(IndexError, match="row 22 of 22"):
        again.questions[22]
    with pytest.raises(npti.RunFolderError, match="whole run, not a shard"):
        npti.LocationShard.load(whole.folder)


def test_called_again_it_computes_nothing(whole: npti.Location, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole.folder is not None
    before = digests(whole.folder)
    monkeypatch.setattr(Model, "collect_into", lambda *a, **k: pytest.fail("answered again"))
    assert locate(whole.folder).neurons.digest == whole.neurons.digest
    assert digests(whole.folder) == before


def test_memory_does_not_grow_with_the_number_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all answers only one chunk's are alive, of all statistics one file is there, whatever the number of chunks."""
    answers: list[weakref.ref[Any]] = []
    most = {"answers": 0, "statistics": 0}
    real_answer, real_replace = SearchPlan.answer, RunFolder.replace

    def answer(self: SearchPlan, *given: Any) -> Any:
        made = real_answer(self, *given)
        answers.extend(weakref.ref(a) for a in made)
        return made

    def replace(self: RunFolder, old: Any, *names: str) -> None:
        real_replace(self, old, *names)
        most["answers"] = max(most["answers"], sum(ref() is not None for ref in answers))
        there = [p for p in (self.path / "statistics").glob("*-after-*")] if (self.path / "statistics").is_dir() else []
        most["statistics"] = max(most["statistics"], len(there))

    monkeypatch.setattr(SearchPlan, "answer", answer)
    monkeypatch.setattr(RunFolder, "replace", replace)
    locate(tmp_path / "a", chunk=2)
    assert len(answers) == 2 * 22
    assert most == {"answers": 2, "statistics": 1}


# -- killed -----------------------------------------------------------------------------------------------------------

_STEPS = ("os.rename", "os.remove", "os.chmod", "tempfile.mkstemp")
"""What changes a folder: a temporary file begun, written, given its name; a file removed."""


def in_child(work: Callable[[], Any], kill_before: int | None = None) -> tuple[int, int]:
    """Run ``work`` in a forked process, which kills itself (SIGKILL) just before its so-many-th change on the disk.

    Returns:
        the signal that ended it (0 for none), and the changes it made.
    """
    come, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = [0]

        def hook(event: str, _arguments: Any) -> None:
            if event in _STEPS:
                if count[0] == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1

        code = 1
        try:
            sys.addaudithook(hook)
            work()
            os.write(go, str(count[0]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(go)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(come) as pipe:
        made = pipe.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(made or 0)


KILLED = {"n_questions": 9, "max_new_tokens": 4, "chunk": 3}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Files of a run that never stopped, and how many changes on the disk it takes."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    ended, changes = in_child(lambda: locate(folder, **KILLED))
    assert ended == 0 and changes > 80
    return digests(folder), changes


def kill_and_go_on(folder: Path, wanted: tuple[dict[str, str], int], moments: list[int]) -> None:
    files, _ = wanted
    for moment in moments:
        in_child(lambda: locate(folder, **KILLED), moment)
    found = locate(folder, **KILLED)
    assert digests(folder) == files, f"killed before changes {moments}"
    assert [len(found.answers[p]) for p in POLES] == [9, 9]
    assert pd.read_parquet(folder / "answers/search-Neuroticism-low.parquet")["place"].tolist() == list(range(9))


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_it_ends_in_the_same_bytes(
    uncut: tuple[dict[str, str], int], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    kill_and_go_on(tmp_path / "run", uncut, [rng.randrange(uncut[1] // 2) for _ in range(3)])


@pytest.mark.slow
def test_killed_before_any_one_change_on_the_disk_it_ends_in_the_same_bytes(
    uncut: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    for moment in range(uncut[1]):
        kill_and_go_on(tmp_path / f"{moment}", uncut, [moment])
        shutil.rmtree(tmp_path / f"{moment}")


@pytest.mark.parametrize("seed", range(2))
def test_a_merge_that_is_killed_ends_in_the_same_bytes(
    merged: npti.Location, shards: list[Path], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    assert merged.folder is not None
    for _ in range(3):
        in_child(lambda: merge(shards, tmp_path / "m"), rng.randrange(24))
    merge(shards, tmp_path / "m")
    assert digests(tmp_path / "m") == digests(merged.folder)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5.0, 9.0, 12.0])
def test_the_command_killed_from_outside_goes_on(smollm: Model, tmp_path: Path, seconds: float) -> None:
    """On the embedded model, at a moment the clock chooses."""
    command = [
        sys.executable, "-m", "npti_interp.cli", "locate", "N", "--questions", "12", "--max-new-tokens", "6", "--chunk",
        "2", "--run",
    ]  # fmt: skip
    process = subprocess.Popen([*command, str(tmp_path / "k")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    npti.locate(smollm, BENCH, "N", n_questions=12, max_new_tokens=6, chunk=2, run=tmp_path / "a", progress=False)
    done = subprocess.run([*command, str(tmp_path / "k")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "k") == digests(tmp_path / "a")


def test_an_interrupt_loses_one_chunk_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = SearchPlan.answer, list[range]()

    def answer(self: SearchPlan, *given: Any) -> Any:
        asked.append(given[2])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(SearchPlan, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        locate(tmp_path / "a")
    asked.append(range(0))  # counts past the one that raises
    locate(tmp_path / "a")
    assert asked[3] == asked[5] == range(12, 16), "the chunk that was cut off, and none before it"
    assert len(asked) == 4 + 1 + (N_CHUNKS - 3) + N_CHUNKS


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    locate(tmp_path / "run", **KILLED)
    before = digests(tmp_path / "run")
    ready, release = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with RunFolder(tmp_path / "run", json.loads((tmp_path / "run/config.json").read_text())):
                os.write(ready[1], b".")
                os.read(release[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(npti.RunFolderError, match="another process is at work in .*run"):
            locate(tmp_path / "run", **KILLED)
    finally:
        os.write(release[1], b".")
        os.waitpid(pid, 0)
    assert digests(tmp_path / "run") == before
    locate(tmp_path / "run", **KILLED)


def test_a_file_system_without_locks_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(npti.RunFolderError, match="knows no locks"):
        locate(tmp_path / "run", **KILLED)


def test_other_settings_and_altered_files_are_refused(tmp_path: Path) -> None:
    locate(tmp_path / "run", **KILLED)
    with pytest.raises(npti.RunFolderError, match="threshold: 0.08 there, 0.1 now"):
        locate(tmp_path / "run", **KILLED, threshold=0.1)
    with pytest.raises(npti.RunFolderError, match="other settings"):
        locate(tmp_path / "run", **{**KILLED, "chunk": 2})
    victim = tmp_path / "run/answers/search-Neuroticism-high.parquet"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(npti.ArtifactError, match="high.parquet was altered"):
        locate(tmp_path / "run", **KILLED)


# -- windows of the sketches ------------------------------------------------------------------------------------------


def bursts(rng: np.random.Generator, n_answers: int, shift: Any, scale: Any) -> torch.Tensor:
    """Values of neurons that differ from answer to answer as well as from token to token: ``[token, neuron]``."""
    z = rng.normal(0, 1, (100, n_answers, 100)) * scale + rng.normal(0, 0.4, (1, n_answers, 100)) + shift
    return torch.from_numpy((z / (1 + np.exp(-z))).reshape(-1, 100).astype(np.float32))


def test_windows_laid_on_the_same_questions_keep_the_percentiles(whole: npti.Location) -> None:
    """Many small parts of uneven answers: what windows of one pilot know, and what each part's own ones lose."""
    rng = np.random.default_rng(0)
    fingerprint = replace(whole.high.fingerprint, n_layers=1, d_mlp=100)
    shape = rng.normal(-1, 0.7, 100), rng.uniform(0.3, 1.5, 100)

    def counted(collector: ActivationCollector, values: torch.Tensor) -> ActivationCollector:
        blocks = np.zeros(len(values), np.int64)
        collector.begin(blocks)
        collector.add(0, values, np.arange(len(values)), blocks)
        return collector

    pilot = counted(ActivationCollector(fingerprint, 2), bursts(rng, 64, *shape))
    assert pilot.emptied().so_far().total_tokens == 0
    one, sums = ActivationCollector(fingerprint, 2), dict[str, ActivationStatistics]()
    for _ in range(40):
        values = bursts(rng, 50, *shape)
        counted(one, values)
        for name, start in (("own", ActivationCollector(fingerprint, 2)), ("pilot", pilot.emptied())):
            part = counted(ActivationCollector.resume(start.so_far()), values).result()
            sums[name] = sums[name].merge(part) if name in sums else part
    whole_p95 = one.result().p95
    for part in sums.values():
        known = ~np.isnan(part.p95) & ~np.isnan(whole_p95)
        assert np.array_equal(part.p95[known], whole_p95[known]), "known means right"
        assert np.array_equal(part.active_count, one.result().active_count)
    lost = {name: np.isnan(part.p95).mean() for name, part in sums.items()}
    assert lost["pilot"] <= np.isnan(whole_p95).mean() + 0.02
    assert lost["own"] >= lost["pilot"] + 0.03, lost


@pytest.mark.slow
def test_forty_shards_of_real_answers_know_as_many_percentiles_as_one_run(smollm: Model) -> None:
    """The same on what the embedded model really computes, in three of its layers, with the exact percentiles known."""
    layers, n, shards = (0, 15, 29), 160, 40
    asked = [q for t in BENCH.traits for q in BENCH.questions(t, "search", n // len(BENCH.traits))]
    asked = [replace(q, trait=npti.Trait.NEUROTICISM) for q in asked]
    prompts = persona_prompts(BENCH, npti.Trait.NEUROTICISM, npti.Pole.HIGH, asked)
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    places: list[np.ndarray[Any, np.dtype[np.int64]]] = []

    class Keeping:
        n_blocks = n

        def begin(self, blocks: np.ndarray[Any, np.dtype[np.int64]]) -> None:
            places.append(np.array(blocks))  # a question is a block here

        def add(self, layer: int, values: torch.Tensor, rows: Any, _: Any) -> None:
            if layer in kept:
                kept[layer].append(values[torch.from_numpy(rows)].clone())

        def check(self) -> None:
            pass

    rows = [Row(tuple(smollm.encode(p)), 0, k, key=k) for k, p in enumerate(prompts)]
    keeping: Any = Keeping()
    smollm.backend.generate(rows, [None], Decoding(24), collector=keeping, max_rows=64)
    of = np.concatenate(places)
    values = torch.stack([torch.cat(own) for own in kept.values()])  # [layer, token, neuron]
    fingerprint = replace(smollm.fingerprint, n_layers=len(layers))

    def counted(collector: ActivationCollector, questions: range) -> ActivationStatistics:
        tokens = np.flatnonzero(np.isin(of, questions))
        for some in np.split(tokens, range(64, len(tokens), 64)):
            collector.begin(blocks := np.zeros(len(some), np.int64))
            for k in range(len(layers)):
                collector.add(k, values[k, some].contiguous(), np.arange(len(some)), blocks)
        return collector.so_far()

    one = counted(ActivationCollector(fingerprint, 2), range(n))
    pilot = ActivationCollector(fingerprint, 2)
    counted(pilot, range(n // shards))
    merged: ActivationStatistics | None = None
    for k in range(shards):
        part = counted(pilot.emptied(), range(n * k // shards, n * (k + 1) // shards))
        merged = part if merged is None else merged.merge(part)
    assert merged is not None
    assert np.array_equal(one.active_count, merged.active_count)
    assert np.isnan(one.p95).mean() < 0.01 and np.isnan(merged.p95).mean() < 0.01
    known = ~np.isnan(one.p95) & ~np.isnan(merged.p95)
    assert np.array_equal(one.p95[known], merged.p95[known])
    exact = np.quantile(np.maximum(values.double().numpy(), 0), 0.95, axis=1)
    assert (np.abs(merged.p95 - exact)[known] <= 0.0101 * exact[known]).all()


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_add_up_to_the_whole(whole: npti.Location, merged: npti.Location) -> None:
    assert whole.folder is not None and merged.folder is not None
    for pole in POLES:
        require_equal(getattr(whole, pole.value), getattr(merged, pole.value))
        table = f"answers/search-Neuroticism-{pole}.parquet"
        assert (whole.folder / table).read_bytes() == (merged.folder / table).read_bytes()
    for name in ("layer", "neuron", "delta", "probability", "se", "q"):
        assert np.array_equal(getattr(whole.neurons, name), getattr(merged.neurons, name)), name
    assert (whole.folder / "config.json").read_bytes() == (merged.folder / "config.json").read_bytes()
    assert set(digests(merged.folder)) - set(digests(whole.folder)) == {"shards.json"}
    sources = json.loads((merged.folder / "shards.json").read_text())
    assert list(sources["manifests"]) == ["1/3", "2/3", "3/3"] and sources["missing"] == []
    assert npti.Location.load(merged.folder).neurons.digest == merged.neurons.digest


def test_a_merged_folder_is_gone_on_with_as_a_whole_run(merged: npti.Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "collect_into", lambda *a, **k: pytest.fail("answered again"))
    assert locate(merged.folder).neurons.digest == merged.neurons.digest


def test_a_shard_is_its_part_of_the_list(shards: list[Path], whole: npti.Location) -> None:
    places = []
    for k, folder in enumerate(shards, 1):
        own = npti.LocationShard.load(folder)
        assert own.shard == (k, N_SHARDS) and f"{k}/3" in repr(own)
        table = pd.read_parquet(folder / "answers/search-Neuroticism-high.parquet")
        places += table["place"].tolist()
        assert list(own.questions) == [whole.questions[i] for i in table["place"]]
        assert own.high.metadata["shard"] == f"{k}/3" and own.high.metadata["n_prompts"] == len(own.questions)
        with pytest.raises(npti.RunFolderError, match=f"holds shard {k}/3"):
            npti.Location.load(folder)
    assert places == list(range(22))


def test_the_order_of_the_folders_does_not_matter(shards: list[Path], merged: npti.Location, tmp_path: Path) -> None:
    assert merged.folder is not None
    for number, order in enumerate(((2, 0, 1), (2, 1, 0))):
        other = merge([shards[k] for k in order], tmp_path / f"{number}")
        assert other.folder is not None
        assert digests(other.folder) == digests(merged.folder)


def test_shards_may_lie_anywhere(shards: list[Path], merged: npti.Location, tmp_path: Path) -> None:
    """They come from other machines: copied, renamed."""
    assert merged.folder is not None
    moved = [Path(shutil.copytree(own, tmp_path / f"from machine {k}")) for k, own in enumerate(shards)]
    merge(moved, tmp_path / "m")
    assert digests(tmp_path / "m") == digests(merged.folder)


@pytest.mark.parametrize(("n", "chunk", "k_of"), [(22, 4, 3), (180_000, 512, 40), (100, 7, 15), (9, 1, 9), (5, 8, 1)])
def test_every_question_is_in_one_shard(n: int, chunk: int, k_of: int) -> None:
    parts = [chunk_spans(n, chunk, (k, k_of)) for k in range(1, k_of + 1)]
    assert [i for part in parts for span in part for i in span] == list(range(n))
    assert [span for part in parts for span in part] == chunk_spans(n, chunk, None)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard": "4/3"}, "K from 1 to N, such as 3/40; got '4/3'"),
        ({"shard": "0/3"}, "got '0/3'"),
        ({"shard": "half"}, "got 'half'"),
        ({"shard": (1, 7)}, "22 questions in chunks of 4 are 6 chunks, too few for 7 shards; use a chunk of at most 3"),
        ({"shard": "1/23"}, "too few for 23 shards; use fewer"),
        ({"shard": "1/2", "run": None}, "give run="),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"threshold": 2.0}, "threshold must lie in"),
        ({"n_blocks": 40}, "22 questions cannot fill 40 blocks"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_a_folder_is_made(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npti.locate(spelling_model(), BENCH, "N", **{**SMALL, "run": tmp_path / "run", **changes})
    assert not (tmp_path / "run").exists()
    assert as_shard(" 3 / 40 ") == (3, 40) == as_shard((3, 40))


# -- refusals of merging ----------------------------------------------------------------------------------------------


def other_model() -> Model:
    return Model(hf_model("llama", seed=4), spelling_model().tokenizer, "other")


def other_bench() -> npti.PersonalityBench:
    personas = [p for t in npti.TRAITS for pole in POLES for p in BENCH.personas(t, pole)]
    return npti.PersonalityBench(personas, BENCH.questions()[:-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 5}, "differ in max_new_tokens: 6 and 5"),
        ({"n_questions": 21}, "differ in n_questions: 22 and 21"),
        ({"chunk": 3}, "differ in chunk: 4 and 3"),
        ({"threshold": "auto"}, "differ in threshold: 0.08 and 'auto'"),
        ({"model": other_model}, "differ in .*model: .*; model's weights"),
        ({"shard": "3/6"}, r"overlap: 1/3 \(.*\) and 3/6 \(.*cut in 3 and in 6 parts"),
    ],
)
def test_parts_of_different_runs_are_refused(
    shards: list[Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    given = {k: v() if callable(v) else v for k, v in changes.items()}
    stranger = locate(tmp_path / "stranger", **{"shard": "3/3", **given}).folder
    with pytest.raises(ValueError, match=words) as caught:
        merge([*shards[:2], stranger], tmp_path / "out")
    assert str(stranger) in str(caught.value) and str(shards[0]) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_bench_is_refused(shards: list[Path], tmp_path: Path) -> None:
    npti.locate(spelling_model(), other_bench(), "N", **SMALL, run=tmp_path / "b", shard="3/3")
    with pytest.raises(ValueError, match="differ in bench: "):
        merge([*shards[:2], tmp_path / "b"], tmp_path / "out")


def test_missing_and_doubled_shards_are_named(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 3 shards are missing: 2/3; .* --partial"):
        merge([shards[0], shards[2]], tmp_path / "out")
    twin = shutil.copytree(shards[1], tmp_path / "twin")
    with pytest.raises(ValueError, match=r"shard 2/3 was given twice: .* and "):
        merge([*shards, twin], tmp_path / "out")
    with pytest.raises(ValueError, match="2/3 was given twice"):
        merge([*shards, shards[1]], tmp_path / "out", partial=True)
    with pytest.raises(ValueError, match="no shards were given"):
        merge([], tmp_path / "out")
    with pytest.raises(ValueError, match="is one of the shards"):
        merge(shards, shards[0])
    assert not (tmp_path / "out").exists()


def test_what_is_no_shard_is_refused(shards: list[Path], whole: npti.Location, tmp_path: Path) -> None:
    assert whole.folder is not None
    with pytest.raises(npti.RunFolderError, match="holds a whole run, not a shard"):
        merge([*shards, whole.folder], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere holds no run"):
        merge([*shards[:2], tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "reproduce", "settings": {}}))
    with pytest.raises(npti.RunFolderError, match="run of reproduce, not of locate"):
        merge([tmp_path], tmp_path / "out")


def test_unfinished_shards_are_refused(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunFolder.replace

    def replace(self: RunFolder, old: Any, *names: str) -> None:
        real(self, old, *names)
        if any("low-part" in name for name in names):
            raise StopError

    monkeypatch.setattr(RunFolder, "replace", replace)
    with pytest.raises(StopError):
        locate(tmp_path / "two", shard="2/3")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"shard 2/3 \(.*two\) is not finished"):
        merge([shards[0], tmp_path / "two", shards[2]], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        npti.LocationShard.load(tmp_path / "two")
    locate(tmp_path / "two", shard="2/3")
    assert digests(tmp_path / "two") == digests(shards[1])


def test_altered_shards_are_refused(shards: list[Path], tmp_path: Path) -> None:
    two = shutil.copytree(shards[1], tmp_path / "two")
    for name in ("statistics/Neuroticism-low.safetensors", "answers/search-Neuroticism-high.parquet", "config.json"):
        kept = (two / name).read_bytes()
        (two / name).write_bytes(kept.replace(b'"high"', b'"hugh"') + b" ")
        with pytest.raises(npti.ArtifactError, match=f"{name} was altered"):
            merge([shards[0], two, shards[2]], tmp_path / "out")
        (two / name).write_bytes(kept)
    (two / "answers/search-Neuroticism-low.parquet").unlink()
    with pytest.raises(npti.ArtifactError, match="missing"):
        merge([shards[0], two, shards[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_of_other_questions_is_refused(shards: list[Path], tmp_path: Path) -> None:
    """Files and manifest put together by hand: right checksums, wrong rows."""
    forged = shutil.copytree(shards[1], tmp_path / "two")
    name = "answers/search-Neuroticism-high.parquet"
    shutil.copyfile(shards[0] / name, forged / name)
    manifest = json.loads((forged / "manifest.json").read_text())
    manifest["files"][name] = json.loads((shards[0] / "manifest.json").read_text())["files"][name]
    del manifest["sha256"]  # early ones have none
    (forged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(npti.ArtifactError, match="does not hold the questions of shard 2/3"):
        merge([shards[0], forged, shards[2]], tmp_path / "out")


def test_a_folder_in_use_for_something_else_is_refused(
    shards: list[Path], whole: npti.Location, tmp_path: Path
) -> None:
    assert whole.folder is not None
    there = shutil.copytree(whole.folder, tmp_path / "whole")
    with pytest.raises(npti.RunFolderError, match="not merged from shards"):
        merge(shards, there)
    again = [Path(shutil.copytree(own, tmp_path / own.name)) for own in shards]
    merge(shards, tmp_path / "m")
    (again[0] / "manifest.json").write_text((again[0] / "manifest.json").read_text() + "\n")
    with pytest.raises(npti.RunFolderError, match="merged from other shards"):
        merge(again, tmp_path / "m")


def test_a_partial_sum_says_so(shards: list[Path], whole: npti.Location, tmp_path: Path) -> None:
    found = merge([shards[2], shards[0]], tmp_path / "m", partial=True)
    assert found.folder is not None
    assert found.neurons.metadata["missing_shards"] == ["2/3"] == found.high.metadata["missing_shards"]
    assert json.loads((found.folder / "config.json").read_text())["missing_shards"] == ["2/3"]
    parts = [npti.LocationShard.load(shards[k]) for k in (0, 2)]
    assert np.array_equal(found.low.active_count, parts[0].low.active_count + parts[1].low.active_count)
    assert [q.id for q in found.questions] == [q.id for part in parts for q in part.questions]
    assert npti.Location.load(found.folder).neurons.metadata["missing_shards"] == ["2/3"]
    with pytest.raises(npti.RunFolderError, match="missing_shards"):
        locate(found.folder)
    with pytest.raises(npti.RunFolderError, match="missing_shards"):
        merge(shards, found.folder)
    assert "missing_shards" not in whole.neurons.metadata


def test_unlike_machines_are_told_and_recorded(shards: list[Path], whole: npti.Location, tmp_path: Path) -> None:
    locate(tmp_path / "two", shard="2/3", batch_size=2)
    with pytest.warns(UserWarning, match=r"differ in batch_size \(None, 2\): .* to rounding only"):
        found = merge([shards[0], tmp_path / "two", shards[2]], tmp_path / "m")
    assert found.folder is not None
    assert json.loads((found.folder / "config.json").read_text())["settings"]["batch_size"] == [None, 2]
    assert np.array_equal(found.high.n_tokens, whole.high.n_tokens)
    with pytest.raises(npti.RunFolderError, match="batch_size"):
        locate(found.folder)


# -- answers from elsewhere -------------------------------------------------------------------------------------------


class Elsewhere:
    """A generator: a model that goes by another name, and counts what it is asked."""

    def __init__(self, name: str = "one", model: Model | None = None) -> None:
        self.model, self.name, self.asked = model or spelling_model(), name, 0

    @property
    def fingerprint(self) -> npti.ModelFingerprint:
        return self.model.fingerprint

    def generate(self, prompts: Any, **settings: Any) -> list[npti.Answer]:
        self.asked += len(prompts)
        return self.model.generate(prompts, **settings)

    def identity(self) -> dict[str, Any]:
        return {"generator": self.name, "device": "elsewhere"}


def test_answers_from_a_generator_in_a_folder_that_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Elsewhere()
    uncut = locate(tmp_path / "uncut", generator=one, repetition_penalty=1.1)
    assert one.asked == 2 * 22
    decoded, here = locate(repetition_penalty=1.1), locate(generator=Elsewhere(), repetition_penalty=1.1)
    for pole in POLES:
        own = getattr(uncut, pole.value)
        assert list(uncut.answers[pole]) == decoded.answers[pole] == here.answers[pole]
        assert [a.tokens for a in uncut.answers[pole]] == [a.tokens for a in decoded.answers[pole]]
        assert np.abs(own.active_count.astype(int) - getattr(decoded, pole.value).active_count).max() <= 1, "rounding"
        require_equal(own, getattr(here, pole.value))
        assert own.metadata["generator"] == one.identity()
        assert own.metadata["decoding"] == getattr(decoded, pole.value).metadata["decoding"]
        assert own.metadata["decoding"]["repetition_penalty"] == 1.1
        assert "generator" not in getattr(decoded, pole.value).metadata
    assert json.loads((tmp_path / "uncut/config.json").read_text())["settings"]["generator"] == one.identity()
    # Stopped after whatever is recorded: only what is missing is asked for.
    real, two, stops = RunFolder.replace, Elsewhere(), 0

    def replace(self: RunFolder, old: Any, *names: str) -> None:
        real(self, old, *names)
        raise StopError

    monkeypatch.setattr(RunFolder, "replace", replace)
    for _ in range(99):
        try:
            locate(tmp_path / "cut", generator=two, repetition_penalty=1.1)
            break
        except StopError:
            stops += 1
    assert stops > 2 * N_CHUNKS and two.asked == one.asked
    monkeypatch.undo()
    assert digests(tmp_path / "cut") == digests(tmp_path / "uncut")


def test_a_run_goes_on_only_with_its_generator(whole: npti.Location, tmp_path: Path) -> None:
    locate(tmp_path / "run", generator=Elsewhere())
    for other in (None, Elsewhere("two")):
        with pytest.raises(npti.RunFolderError, match=r"made with other settings \(generator: \{.*'one'"):
            locate(tmp_path / "run", generator=other)
    assert whole.folder is not None
    shutil.copytree(whole.folder, tmp_path / "whole")
    with pytest.raises(npti.RunFolderError, match="generator: None there, .*'one'"):
        locate(tmp_path / "whole", generator=Elsewhere())
    assert locate(tmp_path / "run", generator=Elsewhere()).folder == tmp_path / "run"


def test_shards_of_one_generator_add_up_and_of_different_ones_do_not(shards: list[Path], tmp_path: Path) -> None:
    one = locate(tmp_path / "one", generator=Elsewhere())
    mine = [locate(tmp_path / f"{k}", shard=(k, N_SHARDS), generator=Elsewhere()).folder for k in (1, 2, 3)]
    merged = merge(mine, tmp_path / "m")
    for pole in POLES:
        require_equal(getattr(one, pole.value), getattr(merged, pole.value))
        assert getattr(merged, pole.value).metadata["generator"] == Elsewhere().identity()
    assert np.array_equal(one.neurons.neuron, merged.neurons.neuron)
    assert locate(tmp_path / "m", generator=Elsewhere()).neurons.digest == merged.neurons.digest
    locate(tmp_path / "two", shard="2/3", generator=Elsewhere("two"))
    for strange in (shards[1], tmp_path / "two"):
        with pytest.raises(ValueError, match=r"not shards of one run: they differ in generator: \{.*'one'"):
            merge([mine[0], strange, mine[2]], tmp_path / "out")
    with pytest.raises(npti.RunFolderError, match="generator"):
        locate(tmp_path / "1", shard="1/3")
    assert not (tmp_path / "out").exists()


def test_what_cannot_generate_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"generate\(\) and identity\(\), as ServedGenerator .* got a Model"):
        locate(tmp_path / "run", generator=spelling_model())
    with pytest.raises(npti.FingerprintMismatchError, match="the generator and the model"):
        locate(tmp_path / "run", generator=Elsewhere(model=other_model()))
    assert not (tmp_path / "run").exists()


def test_a_bar_counts_an_answer_once(tmp_path: Path) -> None:
    class Bar:
        n = 0

        def update(self, n: int = 1) -> None:
            self.n += n

    bar = Bar()
    locate(tmp_path / "run", generator=Elsewhere(), progress=bar)
    assert bar.n == 2 * 22


# -- other engines, other models --------------------------------------------------------------------------------------


def on_a_server(jobs: Path) -> Model:
    own = spelling_model()
    settings = RemoteSettings(here=True, repo="some/model", jobs=jobs, show=False, rows_per_job=3)
    return Model(own.hf_model, own.tokenizer, own.name, backend="nnsight", remote=settings)


def test_the_second_engine_in_a_folder(tmp_path: Path) -> None:
    own = spelling_model()
    model = Model(own.hf_model, own.tokenizer, own.name, backend="nnsight")
    here, there = locate(model=model), locate(tmp_path / "run", model)
    for pole in POLES:
        require_equal(getattr(here, pole.value), getattr(there, pole.value))
        assert here.answers[pole] == list(there.answers[pole])
    assert here.neurons.digest == there.neurons.digest


def test_what_a_server_reduced_takes_its_second_pass_chunk_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_a_server(tmp_path / "jobs")
    settings = {"n_questions": 9, "max_new_tokens": 4, "chunk": 3, "threshold": 0.05}
    here = locate(model=model, **settings)
    uncut = locate(tmp_path / "uncut", model, **settings)
    assert not here.high.complete and len(here.neurons) > 4 and np.isfinite(here.neurons.p95).mean() > 0.9
    assert uncut.neurons.digest == here.neurons.digest
    # Cut off in the second pass, twice.
    real, count = RunFolder.replace, [0]

    def replace(self: RunFolder, old: Any, *names: str) -> None:
        real(self, old, *names)
        if any("windows" in name for name in names):
            count[0] += 1
            if count[0] in (2, 4):
                raise StopError

    monkeypatch.setattr(RunFolder, "replace", replace)
    for _ in range(2):
        with pytest.raises(StopError):
            locate(tmp_path / "cut", model, **settings)
    monkeypatch.undo()
    locate(tmp_path / "cut", model, **settings)
    assert count[0] == 4 and digests(tmp_path / "cut") == digests(tmp_path / "uncut")
    # In shards the second pass comes when they are merged, or when the whole is gone on with.
    parts = [locate(tmp_path / f"{k}", model, shard=(k, 2), **settings).folder for k in (1, 2)]
    with pytest.raises(ValueError, match="take a second pass .* give the model with model="):
        merge(parts, tmp_path / "m")
    with pytest.raises(npti.FingerprintMismatchError, match="the shards and the model"):
        merge(parts, tmp_path / "m", model=other_model())
    with pytest.raises(ValueError, match="another bench"):
        merge(parts, tmp_path / "m", model=model, bench=other_bench())
    merged = merge(parts, tmp_path / "m", model=model)
    for pole in POLES:
        one, other = getattr(uncut, pole.value), getattr(merged, pole.value)
        assert np.array_equal(one.active_count, other.active_count)
        assert np.array_equal(one.p95, other.p95, equal_nan=True)
    for name in ("layer", "neuron", "delta", "p95"):
        assert np.array_equal(getattr(uncut.neurons, name), getattr(merged.neurons, name), equal_nan=True), name


def test_on_the_embedded_model(smollm: Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "n_questions": 8, "max_new_tokens": 5, "threshold": 0.1, "chunk": 2, "progress": False,
    }  # fmt: skip
    here = npti.locate(smollm, BENCH, "N", **settings)
    parts = [npti.locate(smollm, BENCH, "N", **settings, run=tmp_path / f"{k}", shard=(k, 2)).folder for k in (1, 2)]
    merged = merge(parts[::-1], tmp_path / "m")
    for pole in POLES:
        require_equal(getattr(here, pole.value), getattr(merged, pole.value))
        assert here.answers[pole] == list(merged.answers[pole])
    assert np.array_equal(here.neurons.neuron, merged.neurons.neuron) and len(here.neurons) > 1000
    assert np.array_equal(here.neurons.delta, merged.neurons.delta)


def test_nothing_counted(tmp_path: Path) -> None:
    """Answers of one token feed nothing back: in a shard that may be, in the whole there is nothing to choose from."""
    with pytest.raises(ValueError, match="no generated token was fed back"):
        locate(tmp_path / "run", max_new_tokens=1)
    with pytest.raises(ValueError, match="no generated token was fed back"):
        locate(tmp_path / "run", max_new_tokens=1)
    parts = [locate(tmp_path / f"{k}", max_new_tokens=1, shard=(k, 2)).folder for k in (1, 2)]
    with pytest.raises(ValueError, match="no generated token was fed back in any shard"):
        merge(parts, tmp_path / "m")


def test_a_shard_that_counted_nothing_adds_nothing(whole: npti.Location) -> None:
    from npti_interp.activations import ActivationCollector

    empty = ActivationCollector(whole.high.fingerprint, 4).so_far(whole.high.metadata)
    for both in (whole.high.merge(empty), empty.merge(whole.high)):
        assert np.array_equal(both.active_count, whole.high.active_count)
        assert np.array_equal(both.p95, whole.high.p95, equal_nan=True)
        assert np.allclose(both.m2, whole.high.m2)
    again = ActivationCollector.resume(empty)
    values = torch.randn(5, whole.high.shape[1])
    again.begin(np.zeros(5, np.int64))
    for layer in range(whole.high.shape[0]):
        again.add(layer, values, np.arange(5), np.zeros(5, np.int64))
    assert again.result().total_tokens == 5


def test_stored_answers_of_a_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(npti.ArtifactError, match="not a whole Parquet file"):
        stored_answers(tmp_path / "a.parquet")


# -- the command line -------------------------------------------------------------------------------------------------


def command(*arguments: str, ok: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "npti_interp.cli", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


@pytest.mark.slow
def test_locate_merge_and_inspect(tmp_path: Path) -> None:
    asked = ("locate", "N", "--questions", "32", "--max-new-tokens", "3", "--chunk", "8", "--threshold", "auto")
    for k in (1, 2):
        text = command(*asked, "--run", str(tmp_path / f"{k}"), "--shard", f"{k}/2")
        assert f"{k}/2: 16 questions" in text and "npti merge" in text
    text = command("merge", str(tmp_path / "2"), str(tmp_path / "1"), "--out", str(tmp_path / "m"))
    assert "high:" in text and "answers to 32 questions" in text
    assert command("inspect", str(tmp_path / "m")) == text
    assert "1/2: 16 questions" in command("inspect", str(tmp_path / "1"))
    whole = command(*asked, "--run", str(tmp_path / "w"), "--out", str(tmp_path / "n.safetensors"))
    assert whole.splitlines()[0] == text.splitlines()[0], "the same neurons"
    assert npti.NeuronSet.load(tmp_path / "n.safetensors").digest == npti.Location.load(tmp_path / "w").neurons.digest
    error = command("merge", str(tmp_path / "1"), "--out", str(tmp_path / "p"), ok=False)
    assert error.startswith("npti: 1 of 2 shards are missing: 2/2")
    text = command("merge", str(tmp_path / "1"), "--out", str(tmp_path / "p"), "--partial")
    assert "answers to 16 questions" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shard", "1/2"), "--shard needs --run"),
        (("--shard", "5/2", "--run", "r"), "K from 1 to N"),
        (("--shard", "1/2", "--run", "r", "--out", "n.safetensors"), "a shard has no neurons"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as it is the library's words that matter."""
    from npti_interp import cli

    monkeypatch.setattr(sys, "argv", ["npti", "locate", "N", *arguments])
    monkeypatch.setattr(cli, "_load", lambda *a: pytest.fail("loaded a model first"))
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert error.startswith("npti: ") and words in error
