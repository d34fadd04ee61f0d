"""Memory planned against memory taken: tensors byte by byte, a process's peak within a stated tolerance, and refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import ARCHITECTURES, N_NEW, Tiny, tiny, tokenizer
from typer.testing import CliRunner

import npti_interp as npti
from npti_interp.cli import app
from npti_interp.errors import ArtifactError, NotEnoughMemoryError
from npti_interp.generation import Decoding, LocalEngine, Row, _buffers
from npti_interp.models import Model, _memory
from npti_interp.models._embedded import _wheel_gguf, gguf_elements
from npti_interp.models._memory import Available, available_memory, plan_memory, statistics_bytes
from npti_interp.models._weights import compute_dtype

GIB = 2**30
L8B: dict[str, Any] = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                       "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
L70B: dict[str, Any] = {"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
                        "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip


def llama_config(shape: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(**shape, tie_word_embeddings=False)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the CPU says is left."""

    def to(n: int) -> None:
        monkeypatch.setattr(_memory, "available_memory", lambda *_, **__: Available(n, "this test"))

    return to


# -------------------------------------------------------------------------------------------------------- byte by byte


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_from_the_configuration_are_those_in_memory(kind: str, dtype: torch.dtype) -> None:
    hf = copy.deepcopy(tiny(kind).plain).to(dtype)
    plan = plan_memory(hf.config, dtype=dtype)
    tensors = {id(t): t for t in (*hf.parameters(), *hf.buffers())}.values()
    # A rotary embedding's frequencies stay float32 in a model that is loaded in half precision; .to() above halves them.
    buffers = sum((4 if "inv_freq" in name else b.element_size()) * b.numel() for name, b in hf.named_buffers())
    assert plan.bytes("weights") == sum(p.numel() * p.element_size() for p in hf.parameters()) + buffers
    loaded = plan_memory(Model(hf, tokenizer(), kind))
    assert loaded.bytes("weights") == sum(t.numel() * t.element_size() for t in tensors)
    assert {i.present for i in loaded.items if i.what == "weights"} == {True}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_keys_and_values_are_those_of_the_buffers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tiny(kind)
    made: list[Any] = []

    def kept(n_layers: int, capacity: int) -> Any:
        made.append(_buffers(n_layers, capacity))
        return made[-1]

    monkeypatch.setattr("npti_interp.generation._buffers", kept)
    x.model.backend.generate([Row(p) for p in x.prompts], [None], Decoding(N_NEW), max_rows=4)  # more come than go in
    whole = sum(layer._k.nbytes + layer._v.nbytes for layer in made[0].layers)
    if any(layer._k.shape[0] != 4 for layer in made[0].layers):  # dropped at the end, where fewer rows are left
        whole = whole // made[0].layers[0]._k.shape[0] * 4
    plan = plan_memory(x.model, rows=4, prompt_tokens=max(map(len, x.prompts)), max_new_tokens=N_NEW)
    assert plan.bytes("keys and values") == whole


def test_statistics(llama: Tiny) -> None:
    for n_blocks in (2, 8):
        stats, _ = llama.model.collect(llama.texts, max_new_tokens=4, n_blocks=n_blocks)
        arrays = [stats.active_count, stats.n_tokens, stats.mean, stats.m2, *stats._sketch.tensors().values()]
        assert statistics_bytes(3, 48, n_blocks) == sum(np.asarray(a).nbytes for a in arrays)
        assert statistics_bytes(3, 48, n_blocks, percentiles=True) == sum(
            np.asarray(a).nbytes for a in [*arrays, stats.p95]
        )
    assert statistics_bytes(3, 48) == 3 * 48 * 295 + 64
    assert statistics_bytes(3, 48, percentiles=True) == 3 * 48 * 299 + 64


def test_edits(llama: Tiny) -> None:
    pair = llama.pair()
    edits = [None, pair.edit("high"), pair.edit("low")]
    tables = llama.model.backend._edits(edits).tables["value"]  # pyright: ignore
    plan = plan_memory(llama.model, conditions=3, edited_layers=len(tables))
    assert plan.bytes("edits") == sum(t.nbytes for own in tables.values() for t in own)


def test_a_plan_by_device() -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu",
              "model.layers": "disk"}  # fmt: skip
    plan = plan_memory(llama_config(L8B), dtype=torch.bfloat16, device_map=places)
    ends = 2 * (2 * 128_256 * 4096 + 4096)
    assert plan.bytes("weights", "cpu") == ends + 2 * 64 * 4
    assert plan.bytes("weights", "disk") == 2 * 8_030_261_248 - ends
    assert plan.devices == ["cpu"]
    with pytest.raises(ValueError, match="device_map says nothing of"):
        plan_memory(llama_config(L8B), device_map={"lm_head": "cpu"})
    two = _memory.placing(_memory.skeleton_of(llama_config(L8B), torch.bfloat16),
                          {"": 0, "model.layers.31": 1}, "cpu", torch.bfloat16)  # fmt: skip
    assert (two("model.layers.3.mlp"), two("model.layers.31"), two("lm_head")) == ("cuda:0", "cuda:1", "cuda:0")


# ---------------------------------------------------------------------------------------------------- models not loaded


def test_llama_3_8b_and_70b() -> None:
    """Against the published sizes (8.03 and 70.6 billion parameters), and by hand."""
    for shape, n in ((L8B, 8_030_261_248), (L70B, 70_553_706_496)):
        plan = plan_memory(llama_config(shape), dtype=torch.bfloat16, rows=16, prompt_tokens=200, max_new_tokens=100)
        assert plan.bytes("weights") == 2 * n + 2 * 4 * (shape["hidden_size"] // shape["num_attention_heads"] // 2)
        place = 2 * shape["num_hidden_layers"] * 8 * 128 * 2
        assert plan.bytes("keys and values") == 16 * (200 + 100 + 25) * place
        neurons = shape["num_hidden_layers"] * shape["intermediate_size"]
        assert plan.bytes("statistics") == neurons * (2 * 299 + 295) + 3 * 64
        assert plan.bytes("edits") == neurons * 8
    four = plan_memory(llama_config(L70B), dtype=torch.bfloat16, quantization="4bit")
    eight = plan_memory(llama_config(L70B), dtype=torch.bfloat16, quantization="8bit")
    packed = 70_553_706_496 - 2 * 128_256 * 8192 - (2 * 80 + 1) * 8192
    rest = 2 * (2 * 128_256 * 8192 + (2 * 80 + 1) * 8192) + 2 * 4 * 64
    assert four.bytes("weights") == packed // 2 + packed // 16 + 7 * 80 * 64 + rest
    rows = 80 * (8192 + 2 * 1024 + 8192 + 2 * 28_672 + 8192)
    assert eight.bytes("weights") == packed + 4 * rows + rest


def test_70b_on_a_server() -> None:
    plan = plan_memory(
        llama_config(L70B), remote=True, traits=5, n_questions=200, prompt_tokens=200, max_new_tokens=100
    )
    neurons = 80 * 28_672
    assert plan.bytes("weights") == 0
    assert plan.bytes("statistics") == neurons * (10 * (32 + 16 + 72 + 4) + 32 + 16 + 72) + 11 * 64
    assert plan.bytes("results under way") == 4 * neurons * 60
    assert plan.remote is not None
    # 200 questions in jobs of 16, both poles; then a second pass over 6 rows a job (2,048 tokens of 300 each).
    assert plan.remote.jobs == 5 * (2 * 13 + 2 * 34)
    counting, windows = 2 * 13 * neurons * 60, 2 * 34 * int(0.05 * neurons) * 4 * 36
    assert plan.remote.bytes_back == 5 * (counting + windows)
    assert "60 bytes a neuron" in str(plan) and "14 bytes an edited neuron" in str(plan)


def test_text_html_and_data(llama: Tiny) -> None:
    plan = plan_memory(llama.model, rows=4)
    data = json.loads(json.dumps(plan.to_dict()))
    assert sum(i["bytes"] for i in data["items"]) == plan.total("cpu") == data["total"]["cpu"]
    assert data["fits"] and data["settings"]["rows"] == 4
    text, page = str(plan), plan._repr_html_()
    for what in ("weights", "keys and values", "statistics", "edits", "working set", "total", "fits"):
        assert what in text and what in page
    assert page.count("<tr>") == page.count("</tr>") == len(plan._lines()) + 1
    plan = plan_memory(llama_config(L70B))
    assert not plan.fits and "too much" in str(plan) and "<" not in str(plan)


def test_settings_out_of_range(llama: Tiny) -> None:
    for wrong in ({"rows": 0}, {"conditions": 0}, {"max_new_tokens": 0}, {"n_blocks": 1}, {"traits": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            plan_memory(llama.model, **wrong)
    with pytest.raises(ValueError, match="unknown quantization"):
        plan_memory(llama_config(L8B), quantization="3bit")
    with pytest.raises(ValueError, match="loaded model has"):
        plan_memory(llama.model, dtype=torch.float16)
    with pytest.raises(npti.UnsupportedModelError):
        plan_memory(transformers.MixtralConfig())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_are_those_in_memory(kind: str, quantization: str, tmp_path: Path) -> None:
    tiny(kind).plain.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = npti.load_model(tmp_path, quantization=quantization)
    assert plan_memory(tmp_path, quantization=quantization).bytes("weights") == plan_memory(model).bytes("weights")
    full = plan_memory(tmp_path).bytes("weights")
    assert plan_memory(model).bytes("weights") < full


# ----------------------------------------------------------------------------------------------------- what there is


def groups(root: Path, lines: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    two = groups(tmp_path / "2", "0::/a/b\n", {
        "a/memory.max": f"{3 << 20}\n", "a/memory.current": f"{2 << 20}\n", "a/memory.stat": f"anon 5\ninactive_file {1 << 19}\n",
        "a/b/memory.max": "max\n", "a/b/memory.current": "77\n",
    })  # fmt: skip
    assert available_memory("cpu", root=two) == Available((1 << 20) + (1 << 19), "control group /a")
    one = groups(tmp_path / "1", "4:memory:/host/path\n0::/\n", {
        "memory/memory.limit_in_bytes": f"{5 << 20}\n", "memory/memory.usage_in_bytes": f"{6 << 20}\n",
        "memory/memory.stat": "total_inactive_file 0\n",
    })  # fmt: skip
    assert available_memory("cpu", root=one) == Available(0, "control group /")
    free = groups(tmp_path / "0", "4:memory:/x\n", {
        "memory/x/memory.limit_in_bytes": "9223372036854771712\n", "memory/x/memory.usage_in_bytes": "5\n",
    })  # fmt: skip
    assert available_memory("cpu", root=free).limit == available_memory("cpu", root=tmp_path / "none").limit


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited otherwise elsewhere")
def test_the_limit_of_address_space() -> None:
    code = (
        "import resource, psutil; n = psutil.Process().memory_info().vms\n"
        "from npti_interp.models._memory import available_memory\n"
        "n = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (n + 2**28, n + 2**28))\n"
        "own = available_memory(); print(own.bytes, own.limit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    n, limit = done.stdout.split(maxsplit=1)
    assert abs(int(n) - 2**28) < 2**24 and "ulimit -v" in limit


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_loading_is_refused_before_weights_are_read(room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llama_config(L8B).save_pretrained(tmp_path)  # no weights there at all
    monkeypatch.setattr("npti_interp.models._loading._require_checkpoint", lambda _folder: None)  # which asks for some
    room(20 * GIB)
    with pytest.raises(NotEnoughMemoryError, match=r"loading .*29\.9 GiB.*20\.0 GiB are left by this test.*dtype=torch.bfloat16") as caught:  # fmt: skip
        npti.load_model(tmp_path)
    message = str(caught.value)
    assert "quantization='4bit'" in message and "remote=True" in message and "NPTI_ALLOW_OVERCOMMIT=1" in message
    room(10 * GIB)
    with pytest.raises(NotEnoughMemoryError) as caught:
        npti.load_model(tmp_path, dtype=torch.bfloat16)
    assert "quantization='4bit'" in str(caught.value) and "dtype=torch.bfloat16 (" not in str(caught.value)
    room(GIB)
    with pytest.raises(NotEnoughMemoryError, match="no smaller dtype or quantization fits"):
        npti.load_model(tmp_path)
    with pytest.raises(ArtifactError, match="no file named"):  # past the check: there are no weights to read
        npti.load_model(tmp_path, allow_overcommit=True)
    monkeypatch.setenv("NPTI_ALLOW_OVERCOMMIT", "1")
    with pytest.raises(ArtifactError, match=r"no file named"):
        npti.load_model(tmp_path)


def test_a_gguf_is_refused_before_it_is_read(room: Any, tmp_path: Path) -> None:
    assert gguf_elements(_wheel_gguf()) == 134_515_008
    room(GIB)
    with pytest.raises(NotEnoughMemoryError, match=r"1\.0 GiB on cpu \(weights 513\.1 MiB, reading 513\.1 MiB\)"):
        npti.load_model(_wheel_gguf())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(_wheel_gguf().read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not a whole GGUF header"):
        gguf_elements(cut)


def test_rows_are_chosen_to_fit_and_change_nothing(llama: Tiny, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(copy.deepcopy(llama.plain), tokenizer(), "tight")
    used: list[int] = []
    real = LocalEngine.generate

    def spied(self: Any, *args: Any, max_rows: int, **more: Any) -> Any:
        used.append(max_rows)
        return real(self, *args, max_rows=max_rows, **more)

    monkeypatch.setattr(LocalEngine, "generate", spied)
    edits = [None, llama.pair().edit("high")]
    want = model.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW)
    three = _memory.make_plan(
        model.shape, rows=3, prompt_tokens=20, max_new_tokens=N_NEW, conditions=2, layers=3, traits=0, loaded=True
    )
    room(three.needed("cpu"))
    got = model.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW)
    assert 1 <= used[1] <= 3 < used[0]
    assert [[a.tokens for a in own] for own in got] == [[a.tokens for a in own] for own in want]
    model.generate(llama.texts, max_new_tokens=N_NEW, batch_size=100)
    assert used[2] <= 6 < 100
    room(1000)
    for work in (
        lambda: model.generate(llama.texts, max_new_tokens=N_NEW),
        lambda: model.generate(llama.texts, max_new_tokens=N_NEW, batch_size=3),
        lambda: model.collect(llama.texts, max_new_tokens=N_NEW),
        lambda: model.generate_sweep(llama.texts, edits, max_new_tokens=N_NEW),
    ):
        with pytest.raises(NotEnoughMemoryError, match=r"even 1 row at once needs .* left by this test"):
            work()
    assert len(used) == 3, "work began"
    model.allow_overcommit = True
    assert [a.tokens for a in model.generate(llama.texts, max_new_tokens=N_NEW)] == [a.tokens for a in want[0]]


def test_scoring_keeps_its_keys_and_values_within_the_budget(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each continuation holds its whole prompt: many short ones would take more than any batch of answers."""
    model = Model(copy.deepcopy(llama.plain), tokenizer(), "scoring")
    prompts = llama.texts * 5
    texts = [[f"w{5 + k}" for k in range(6)] for _ in prompts]
    want = model.log_likelihoods(prompts, texts)
    held: list[int] = []

    def kept(n_layers: int, capacity: int) -> Any:
        made = _buffers(n_layers, capacity)
        whole = made.layers[0].lazy_initialization

        def first(keys: torch.Tensor, values: torch.Tensor) -> None:
            held.append(2 * n_layers * keys.shape[0] * keys.shape[1] * capacity * keys.shape[3] * keys.element_size())
            whole(keys, values)

        made.layers[0].lazy_initialization = first  # pyright: ignore
        return made

    monkeypatch.setattr("npti_interp.generation._buffers", kept)
    model.log_likelihoods(prompts, texts)
    before = max(held)
    held.clear()
    model.cache_bytes = before // 4
    got = model.log_likelihoods(prompts, texts)
    assert max(held) <= model.cache_bytes < before
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    assert got[1] == want[1]


# --------------------------------------------------------------------------------------------- against the machine


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 64])
def test_a_process_takes_no_more_than_planned(rows: int) -> None:
    """The peak of a process that collects under the plan, beside what importing takes: at most the plan and 10 %."""
    code = f"""
import gc, json, psutil, threading, time, torch
torch.set_num_threads(1)
import npti_interp as npti
from npti_interp.backends import _kernels
import npti_interp.experiments, transformers.models.llama.modeling_llama
me = psutil.Process()
start = me.memory_info().rss
model = npti.load_model("smollm2-135m")
prompts = ["Tell me about your week, day by day, and leave nothing out. " * 6] * {rows}
plan = npti.plan_memory(model, rows={rows}, prompt_tokens=len(model.encode(prompts[0])), max_new_tokens=12)
peak, going = [0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], me.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
model.collect(prompts, max_new_tokens=12, batch_size={rows})
going[0] = False; thread.join()
print(json.dumps([peak[0] - start, plan.total("cpu")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    taken, planned = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 * planned < taken < 1.1 * planned, (taken / 2**20, planned / 2**20)


# ---------------------------------------------------------------------------------------------------------- command line


def test_npti_plan(tmp_path: Path, room: Any) -> None:
    llama_config(L8B).save_pretrained(tmp_path)
    room(20 * GIB)
    fits = CliRunner().invoke(app, ["plan", str(tmp_path), "--dtype", "bfloat16", "--rows", "8", "--tokens", "60"])
    assert fits.exit_code == 0 and "8 rows ×" in fits.output and "fits" in fits.output
    short = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert short.exit_code == 1 and "too much" in short.output
    data = CliRunner().invoke(
        app, ["plan", str(tmp_path), "--quantization", "4bit", "--dtype", "bfloat16", "--conditions", "9", "--traits", "5", "--json"]
    )  # fmt: skip
    made = json.loads(data.output)
    assert made["fits"] and made["settings"]["conditions"] == 9 and made["settings"]["quantization"] == "4bit"
    far = CliRunner().invoke(app, ["plan", str(tmp_path), "--remote"])
    assert far.exit_code == 0 and "over the network: at most" in far.output
    for wrong in (["--dtype", "int3"], ["--device", "nowhere"], ["--quantization", "3bit"]):
        assert isinstance(CliRunner().invoke(app, ["plan", str(tmp_path), *wrong]).exception, ValueError)


def test_item_size_of_keys_and_values(llama: Tiny) -> None:
    assert compute_dtype(copy.deepcopy(llama.plain).half()) == torch.float16
