"""The main experiment on the embedded model, in a small size: complete, interrupted, damaged, disputed."""

import contextlib
import copy
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import StopError, digests, stop_after

import npti_interp as npti
from npti_interp.experiments import PRESETS, write_figures
from npti_interp.experiments import _reproduce as module
from npti_interp.experiments._search_plan import SearchPlan
from npti_interp.runs import RunFolder

SMALL = replace(
    PRESETS["tiny"], traits=("Neuroticism",), n_search=8, chunk=4, search_tokens=8, n_test=4, test_tokens=6, n_dose=3,
    dose_gammas=(1.0,), random_draws=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(smollm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    return npti.reproduce(SMALL, folder, model=smollm, progress=False)


def test_it_is_all_there(finished):
    assert set(finished.answers["condition"]) >= {"none", "npti", "random", "persona"}
    assert len(finished.answers) == 4 * (1 + 2 * (finished.answers["condition"].nunique() - 1))
    assert finished.scores["rating"].between(1, 5).all()
    assert {"score_low", "score_high", "variance", "nll", "judge_auc", "unscored"} <= set(finished.table.columns)
    assert [(v.trait, v.pole) for v in finished.verdicts] == [("Neuroticism", "high"), ("Neuroticism", "low")]
    for stem in ("scores", "layers", "delta", "dose"):
        for end in ("pdf", "png", "csv", "json"):
            assert (finished.folder / "figures" / f"{stem}.{end}").stat().st_size > 50
    text = (finished.folder / "summary.md").read_text()
    assert "interval" in text
    assert "AUC" in text


def test_two_judges_stand_side_by_side(finished):
    table = finished.judges.set_index(["judge", "pole"])
    assert set(table.index) == {(j, p) for j in ("likelihood", "embedding") for p in ("high", "low")}
    rated = finished.embedding.set_index(["condition", "pole", "question_id"])["rating"].sort_index()
    assert len(finished.embedding) == len(finished.answers) and rated.between(1, 5).all()
    low = rated["npti", "low"] - rated["random", "low"]
    assert table.loc[("embedding", "low"), "difference"] == pytest.approx(low.mean())
    verdict = next(v for v in finished.verdicts if v.pole == "low")
    assert table.loc[("likelihood", "low"), "difference"] == pytest.approx(verdict.difference.mean)
    fit = finished.embedding_fits[npti.Trait.NEUROTICISM]
    assert table.loc[("embedding", "low"), "auc"] == fit.auc and (fit.n_fit, fit.quality.auc.n) == (8, 8)
    text = finished.summary()
    assert "Two judges side by side" in text and f"{fit.auc:.2f} [" in text
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [11] * 4


def test_a_run_without_the_second_judge_is_read_and_completed(finished, smollm, tmp_path, monkeypatch):
    """One made before there was such a judge, or where its packages are not installed."""
    old = tmp_path / "old"
    shutil.copytree(finished.folder, old)
    manifest = json.loads((old / "manifest.json").read_text())
    for name in [n for n in manifest["files"] if "embedding-" in n or n == "judges.csv"]:
        (old / name).unlink()
        del manifest["files"][name]
    del manifest["sha256"]  # a manifest of its time had none
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert "no second opinion" in npti.ReproduceResult.load(old).summary()
    assert npti.experiments.Lab.from_run(old, model=smollm).traits == [npti.Trait.NEUROTICISM]
    monkeypatch.setattr(module, "embedder_available", lambda: "install it")
    with pytest.warns(UserWarning, match="no second opinion by the embedding judge: install it"):
        result = npti.reproduce(SMALL, old, model=smollm, progress=False)
    assert (
        "There is no second opinion" in (old / "summary.md").read_text()
        and "npti-interp[embedding]" in result.summary()
    )
    assert set(result.judges["judge"]) == {"likelihood"}
    monkeypatch.undo()
    npti.reproduce(SMALL, old, model=smollm, progress=False)
    assert digests(old) == digests(finished.folder)


def test_the_manifest_names_every_file_with_its_checksum(finished):
    manifest = json.loads((finished.folder / "manifest.json").read_text())["files"]
    found = digests(finished.folder)
    assert manifest == {k: v for k, v in found.items() if k != "manifest.json"}


def test_every_setting_is_in_the_answers_table(finished):
    row = pd.read_parquet(finished.folder / "answers.parquet").query("condition == 'random' and pole == 'low'").iloc[0]
    assert row["gamma"] == SMALL.gamma
    assert row["n_raised"] > 0
    assert row["fingerprint"] == finished.neurons[npti.Trait.NEUROTICISM].fingerprint.digest
    assert not pd.isna(row["random_seed"])
    persona = finished.answers.query("condition == 'persona' and pole == 'low'")["persona"]
    assert persona.str.startswith("N-").all()
    assert pd.isna(row["persona"])
    assert len(row["tokens"]) > 0


def test_unedited_answers_are_the_models_own(finished, smollm):
    row = finished.answers.query("condition == 'none'").iloc[0]
    ids = torch.tensor([smollm.encode(row["question"])])
    out = smollm.hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SMALL.test_tokens, do_sample=False
    )
    assert out[0, ids.shape[1] :].tolist() == list(row["tokens"])


@pytest.mark.slow
def test_it_runs_as_remote_jobs(finished, tmp_path):
    """Every step through jobs that reduce on the other side: the same neurons, the same answers."""
    settings = npti.RemoteSettings(here=True, jobs=tmp_path / "jobs", show=False)
    model = npti.load_model("smollm2-135m", "nnsight", remote=settings)
    again = npti.reproduce(SMALL, tmp_path / "run", model=model, progress=False)
    for trait, own in finished.neurons.items():
        assert own.jaccard(again.neurons[trait]) > 0.99
    same = finished.answers["answer"].to_numpy() == again.answers["answer"].to_numpy()
    assert same[(finished.answers["condition"] == "none").to_numpy()].all()
    assert same.mean() > 0.9, "edits differ by an a95 here and there"
    both = finished.scores.merge(again.scores, on=["condition", "pole", "question_id"])
    assert (both["rating_x"] - both["rating_y"]).abs().median() < 1e-3


@pytest.mark.parametrize(("after", "chunks"), [(2, 3), (5, 1), (9, 0)])
def test_interrupted_it_continues_to_the_same_bytes(finished, smollm, tmp_path, monkeypatch, after, chunks):
    stop_after(monkeypatch, after)
    with pytest.raises(StopError):
        npti.reproduce(SMALL, tmp_path / "b", model=smollm, progress=False)
    monkeypatch.undo()
    left = digests(tmp_path / "b")
    calls = []
    answer = SearchPlan.answer
    monkeypatch.setattr(SearchPlan, "answer", lambda *a: calls.append(1) or answer(*a))
    npti.reproduce(SMALL, tmp_path / "b", model=smollm, progress=False)
    assert len(calls) == chunks, "what was done is not done again"
    assert digests(tmp_path / "b") == digests(finished.folder)
    assert len(left) < len(digests(tmp_path / "b"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [6.0, 11.0])
def test_killed_it_continues_to_the_same_bytes(finished, smollm, tmp_path, seconds):
    """SIGKILL at some moment, from outside."""
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests_settings import SMALL\n"
        "import npti_interp as npti\n"
        f"npti.reproduce(SMALL, {str(tmp_path / 'k')!r}, progress=False)\n"
    )
    (tmp_path / "tests_settings.py").write_text(
        f"from npti_interp.experiments import ReproduceConfig\nSMALL = {SMALL!r}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "k").is_dir():
        (tmp_path / "k" / ".scores.part-ab12_9zz.parquet").write_text("as a kill leaves it")
    npti.reproduce(SMALL, tmp_path / "k", model=smollm, progress=False)
    assert digests(tmp_path / "k") == digests(finished.folder)


def test_a_finished_run_is_read_without_a_model(finished, tmp_path):
    again = npti.ReproduceResult.load(finished.folder)
    pd.testing.assert_frame_equal(again.table, finished.table)
    assert again.summary() == finished.summary()
    drawn = write_figures(again, tmp_path / "figures")
    for path in drawn:
        assert path.read_bytes() == (finished.folder / "figures" / path.name).read_bytes()


def test_a_damaged_file_is_named(finished, smollm, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "c")
    victim = tmp_path / "c" / "neurons" / "Neuroticism.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(npti.ArtifactError, match=r"Neuroticism\.safetensors was altered"):
        npti.reproduce(SMALL, tmp_path / "c", model=smollm, progress=False)
    victim.unlink()
    with pytest.raises(npti.ArtifactError, match="missing"):
        npti.reproduce(SMALL, tmp_path / "c", model=smollm, progress=False)


def test_other_settings_other_files_and_other_processes_are_refused(finished, smollm, tmp_path):
    with pytest.raises(npti.RunFolderError, match="gamma"):
        npti.reproduce(replace(SMALL, gamma=2.0), finished.folder, model=smollm, progress=False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("precious")
    (tmp_path / "d" / ".env").write_text("precious")
    with pytest.raises(npti.RunFolderError, match="holds other files"):
        npti.reproduce(SMALL, tmp_path / "d", model=smollm, progress=False)
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"thesis.tex", ".env", ".lock"}
    with RunFolder(tmp_path / "e", {"a": 1}), pytest.raises(npti.RunFolderError, match="another process"):
        RunFolder(tmp_path / "e", {"a": 1}).__enter__()
    with RunFolder(tmp_path / "e", {"a": 1}):
        pass  # the lock was given back


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"traits": ("Honesty",)}, "unknown trait"),
        ({"traits": ()}, "no traits"),
        ({"gamma": float("nan")}, "finite"),
        ({"n_test": 0}, "n_test"),
        ({"n_calibration": 4}, "n_calibration"),
        ({"dose_trait": "Openness"}, "dose_trait"),
        ({"traits": ("N", "Neuroticism")}, "twice"),
        ({"dose_gammas": (1.0, 1.0)}, "dose_gammas"),
        ({"dose_gammas": (0.0,)}, "dose_gammas"),
        ({"min_share": 2.0}, "min_share"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **settings)


def test_traits_are_known_by_any_of_their_names():
    config = replace(SMALL, traits=("n", "openness"), dose_trait="N")
    assert (config.traits, config.dose_trait) == (("Neuroticism", "Openness"), "Neuroticism")


def test_resuming_with_another_precision_is_refused(finished, smollm):
    other = npti.Model(copy.deepcopy(smollm.hf_model).to(torch.bfloat16), smollm.tokenizer, smollm.name)
    with pytest.raises(npti.RunFolderError, match="dtype"):
        npti.reproduce(SMALL, finished.folder, model=other, progress=False)


def test_too_many_questions_are_refused_before_any_work(smollm, tmp_path):
    with pytest.raises(ValueError, match="5000"):
        npti.reproduce(replace(SMALL, n_test=5000), tmp_path / "f", model=smollm, progress=False)
    assert not (tmp_path / "f").exists()
    with pytest.raises(ValueError, match="unknown preset"):
        npti.reproduce("huge", tmp_path / "f")


def test_locating_on_no_questions_is_refused(smollm):
    with pytest.raises(ValueError, match="0"):
        npti.locate(smollm, npti.PersonalityBench.embedded(), "N", n_questions=0, progress=False)
