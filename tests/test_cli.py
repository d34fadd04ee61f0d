"""The command line, as a user meets it."""

import subprocess
import sys
import time

import pytest

import npti_interp as npti


def npti_command(*arguments, ok=True):
    done = subprocess.run(
        [sys.executable, "-m", "npti_interp.cli", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def test_help_names_the_commands_and_does_not_wait_for_torch():
    start = time.perf_counter()
    text = npti_command("--help")
    assert time.perf_counter() - start < 10
    for command in ("reproduce", "locate", "induce", "inspect", "figures"):
        assert command in text
    probe = "import sys, npti_interp.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("locate", "Honesty"), "unknown trait 'Honesty'; choose one of"),
        (("locate", "N", "--threshold", "two"), "threshold must be a number"),
        (("reproduce", "--preset", "huge"), "unknown preset 'huge'"),
        (("inspect", "nothing.here"), "nothing at nothing.here"),
        (("induce", "nothing.here", "Hello?"), "no file at"),
        (("figures", "nowhere"), "no finished run"),
    ],
)
def test_errors_are_one_clear_line(arguments, words):
    text = npti_command(*arguments, ok=False)
    assert text.startswith("npti: ")
    assert words in text
    assert "Traceback" not in text


def test_locate_induce_inspect(tmp_path, smollm):
    out = tmp_path / "n.safetensors"
    text = npti_command(
        "locate", "N", "--questions", "8", "--max-new-tokens", "6", "--threshold", "auto", "--out", str(out)
    )
    assert "high:" in text
    assert npti_command("inspect", str(out)) in text.replace(f"written to {out}\n", "")
    neurons = npti.NeuronSet.load(out)
    answers = smollm.generate(["How are you?"], intervention=neurons.edit(2.0, "low"), max_new_tokens=8)
    spoken = npti_command("induce", str(out), "How are you?", "--pole", "low", "--gamma", "2", "--max-new-tokens", "8")
    assert f"low: {answers[0]}" in spoken
    assert "unedited:" in spoken
