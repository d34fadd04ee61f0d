"""Notebooks are paired with their scripts and run from top to bottom on the embedded model."""

from pathlib import Path

import jupytext
import nbclient
import pytest

import npti_interp as npti

FOLDER = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def test_there_is_something_to_test():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_script_and_notebook_are_the_same(script):
    source, notebook = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_committed_outputs_hold_figures_and_no_errors(script):
    outputs = [o for c in jupytext.read(script.with_suffix(".ipynb")).cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o["output_type"] == "error"]


def execute(script, parameters):
    notebook = jupytext.read(script)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    shown = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert any({"text/html", "text/markdown"} & set(o.get("data", {})) for o in shown)


def on_a_run(script):
    return 'run = "' in script.read_text()


LONG = ("01_personalitybench", "03_induce")
"""They take a minute each, so they run with the slow tests."""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(s, id=s.stem, marks=[pytest.mark.slow] if s.stem in LONG else [])
        for s in SCRIPTS
        if not on_a_run(s)
    ],
)
def test_it_runs(script):
    small = {"n_search": 16, "n_test": 4, "n_tokens": 12}
    execute(script, {k: v for k, v in small.items() if k in script.read_text()})


@pytest.fixture(scope="module")
def tiny_run(smollm, tmp_path_factory):
    """Two traits, located and judged in a minute: what the notebooks about experiments stand on."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    npti.reproduce("tiny", folder, model=smollm, progress=False)
    return folder


@pytest.mark.slow
def test_those_on_a_run_run(tiny_run):
    for script in filter(on_a_run, SCRIPTS):
        execute(script, {"run": str(tiny_run), "preset": "tiny"})


def test_the_quickstart_has_at_most_twelve_code_cells():
    cells = [c for c in jupytext.read(FOLDER / "00_quickstart.py").cells if c.cell_type == "code"]
    assert len(cells) <= 12
