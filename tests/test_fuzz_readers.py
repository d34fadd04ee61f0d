"""Every file that is read, damaged: what comes is the documented error or a value that is right, soon, in little memory.

Checksums show damage, not intent, so files are damaged behind their checksums as well. Nothing in a file is ever run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import CONTENTS, HOSTILE, Target, bomb, bounded, changed, changed_arrays, damaged
from helpers import hf_model, tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import npti_interp as npti
from npti_interp._files import parse_json, read_tensors, sha256_of, write_json, write_tensors
from npti_interp.activations import ActivationCollector, ActivationStatistics
from npti_interp.backends._jobs import JobStore
from npti_interp.bench import PersonalityBench
from npti_interp.chat._cache import ReplyCache, _digest
from npti_interp.chat._request import ChatRequest, Reply
from npti_interp.errors import (
    ArtifactError,
    FingerprintMismatchError,
    RunFolderError,
    UnsupportedModelError,
)
from npti_interp.evaluation import Calibration
from npti_interp.evaluation._embedding import EmbeddingFit
from npti_interp.evaluation._judge import Judge  # noqa: F401 - the package's import order
from npti_interp.evaluation.humans import RankingConfig, RankingTask, human_report, make_task, read_judge_file
from npti_interp.evaluation.humans._report import _checksum
from npti_interp.evaluation.humans._task import _sha
from npti_interp.evaluation.questionnaires import Item, Questionnaire
from npti_interp.evaluation.retention import read_gsm8k
from npti_interp.experiments._overlap import _TABLES, OverlapConfig, OverlapResult
from npti_interp.methods._base import SearchData
from npti_interp.methods._caa import CAA
from npti_interp.methods._pas import PAS
from npti_interp.methods._records import read_record, write_record
from npti_interp.models import ModelFingerprint
from npti_interp.neurons import NeuronSet, select_neurons
from npti_interp.runs import RunFolder, read_table, verify_folder, write_table
from npti_interp.serving._base import Completion, TokenCall
from npti_interp.traits import POLES, TRAITS, Pole, Trait

ROOT = Path(npti.__file__).parent
REWRITES = 60
"""Examples of each way to damage each file."""


# -- whole files to start from ---------------------------------------------------------------------------------------


def statistics(seed: int = 0, layers: int = 3, neurons: int = 48, tokens: int = 400) -> ActivationStatistics:
    fingerprint = ModelFingerprint("Made", layers, neurons, 32, 97, "silu", "w" * 32, "t" * 32, "")
    rng = np.random.default_rng(seed)
    collector = ActivationCollector(fingerprint, 4)
    blocks = np.arange(tokens) % 4
    collector.begin(blocks)
    shift = rng.normal(size=(layers, neurons))
    for layer in range(layers):
        values = torch.from_numpy(
            rng.normal(size=(tokens, neurons)).astype(np.float32) + shift[layer].astype(np.float32)
        )
        collector.add(layer, values, np.arange(tokens), blocks)
    return collector.result({"trait": "Openness", "decoding": {"max_new_tokens": 5}})


def chosen(**settings_: Any) -> NeuronSet:
    return select_neurons(statistics(0), statistics(1), threshold=0.2, **settings_)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _tensors(path: Path, kind: str) -> tuple[Callable[[np.random.Generator], None], ...]:
    """Other arrays, other metadata: each under a checksum that fits."""
    arrays, metadata = read_tensors(path, kind, 1)

    def odd_arrays(rng: np.random.Generator) -> None:
        write_tensors(path, kind, 1, changed_arrays(arrays, rng), metadata)

    def odd_metadata(rng: np.random.Generator) -> None:
        other = changed(metadata, rng)
        inner = other.get("fingerprint") if isinstance(other, dict) else None
        if isinstance(inner, str) and rng.random() < 0.5:
            other["fingerprint"] = json.dumps(changed(json.loads(metadata["fingerprint"]), rng))
        write_tensors(path, kind, 1, arrays, other if isinstance(other, dict) else {"metadata": other})

    return odd_arrays, odd_metadata


def _json(path: Path, sign: Callable[[Any], Any] = lambda value: value) -> Callable[[np.random.Generator], None]:
    whole = json.loads(path.read_text())
    return lambda rng: (path.write_text(json.dumps(sign(changed(whole, rng)))), None)[1]


def make_statistics(folder: Path) -> Target:
    path = folder / "a.safetensors"
    statistics().save(path)

    def read() -> None:
        loaded = ActivationStatistics.load(path)
        assert loaded.p95.shape == loaded.shape == loaded.probability.shape
        assert ((loaded.probability >= 0) & (loaded.probability <= 1)).all()
        assert np.isfinite(loaded.variance).all()
        with np.errstate(invalid="ignore"):
            assert not (loaded.p95 < 0).any()
        twice = loaded.merge(loaded)
        assert twice.total_tokens == 2 * loaded.total_tokens and twice.p95.shape == loaded.shape
        loaded._repr_html_()

    return Target("statistics", path, read, (ArtifactError, FileNotFoundError), _tensors(path, "ActivationStatistics"))


def make_neurons(folder: Path) -> Target:
    path = folder / "n.safetensors"
    chosen().save(path)

    def read() -> None:
        loaded = NeuronSet.load(path)
        assert len(loaded) == len(loaded.pole("high")) + len(loaded.pole("low"))
        assert loaded.per_layer().sum() == len(loaded) and loaded.digest
        repr(loaded), loaded._repr_html_()
        if loaded.fingerprint is not None and not np.isnan(loaded.p95).any():
            edit = loaded.edit(1.0)
            edit.dense()
            assert len(loaded.random_matched(0)) == len(loaded)

    return Target("neurons", path, read, (ArtifactError, FileNotFoundError), _tensors(path, "NeuronSet"))


def make_published_neurons(folder: Path) -> Target:
    high, low = folder / "O_dict.json", folder / "O_reversed_dict.json"
    chosen().to_npti_json(high, low)

    def read() -> None:
        loaded = NeuronSet.from_npti_json(high, low)
        assert np.isfinite(loaded.delta).all() and (np.abs(loaded.delta) <= 1).all()
        assert sum(map(len, json.loads(high.read_text()).values())) == len(loaded.pole("high")), "a row is lost"

    return Target(
        "published neurons", high, read, (ArtifactError, FileNotFoundError), (_json(high),), ("an object",)
    )  # fmt: skip


def _bench_checked(folder: Path) -> None:
    bench = PersonalityBench.from_directory(folder)
    assert len(bench.digest) == 64 and str(bench.report)
    for question in bench.questions():
        question.text.encode()


def _lines(path: Path) -> Callable[[np.random.Generator], None]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def rewrite(rng: np.random.Generator) -> None:
        at = int(rng.integers(len(rows)))
        every = [changed(row, rng) if k == at else row for k, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in every))

    return rewrite


KEYS = [t.value for t in TRAITS] + [f"{t.value}_reversed" for t in TRAITS]


def make_published_bench(folder: Path, file: str = "search.jsonl") -> Target:
    (folder / "test").mkdir()
    contents: dict[str, list[Any]] = {
        "description.json": [{k: f"You are {k}, number {i}." for k in KEYS} for i in range(8)],
        "search.jsonl": [
            {"BFI": t.value, "tag": t.info.facets[0], "facet": "Frets.", "topic": "Rain", "sign": "-", "question": f"{t}?"}
            for t in TRAITS
        ],
        **{f"test/{t.value}.json": [{"question": f"{t} {i}?"} for i in range(2)] for t in TRAITS},
    }  # fmt: skip
    for name, rows in contents.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / file
    takes = ("nothing",) if file == "search.jsonl" else ()
    errors = (ValueError, FileNotFoundError)
    return Target(f"published {file}", path, lambda: _bench_checked(folder), errors, (_lines(path),), takes)


def make_own_bench(folder: Path, file: str = "questions/openness.jsonl") -> Target:
    where = folder / "own"
    PersonalityBench.from_directory(make_published_bench(folder).path.parent).save(where)
    path = where / file
    rewrite = _json(path) if file == "bench.json" else _lines(path)
    takes = () if file == "bench.json" else ("nothing",)
    return Target(
        f"own {file}", path, lambda: _bench_checked(where), (ValueError, FileNotFoundError), (rewrite,), takes
    )


def make_config(folder: Path) -> Target:
    where, config = folder / "run", {"experiment": "x", "settings": {"seed": 1, "traits": ["Openness"]}, "bench": "b"}
    with RunFolder(where, config) as run:
        run.table("a.parquet", lambda: pd.DataFrame({"a": [1]}))
    path = where / "config.json"

    def read() -> None:
        with RunFolder(where, config) as run:
            assert run.done("a.parquet")

    errors = (ArtifactError, RunFolderError)
    return Target("run config", path, read, errors, (_json(path),))


def make_manifest(folder: Path) -> Target:
    where = make_config(folder).path.parent
    path = where / "manifest.json"

    def read() -> None:
        for name, digest in verify_folder(where).items():
            assert (where / name).resolve().is_relative_to(where) and sha256_of(where / name) == digest

    return Target("manifest", path, read, (ArtifactError, FileNotFoundError), (_json(path),))


def make_result(folder: Path, part: str = "config.json") -> Target:
    """A finished run under a manifest that fits, whatever its files hold."""
    where = folder / "overlap"
    where.mkdir()
    settings_ = asdict(OverlapConfig(traits=("Openness",), n_questions=2))
    write_json(where / "config.json", {"experiment": "overlap", "settings": settings_, "fingerprint": "{}"})
    (where / "summary.md").write_text("done")
    for name in _TABLES:
        write_table(where / f"{name}.parquet", pd.DataFrame({"trait": ["Openness"], "value": [0.5]}))
    path = where / part

    def read() -> None:
        files = {p.name: sha256_of(p) for p in where.iterdir() if p.is_file() and p.name != "manifest.json"}
        write_json(where / "manifest.json", {"files": files})
        result = OverlapResult.load(where)
        assert set(result.tables) == set(_TABLES) and result.config.n_questions >= 2
        result._repr_html_()

    rewrites = (_json(path),) if path.suffix == ".json" else ()
    return Target(f"result's {part}", path, read, (ArtifactError, FileNotFoundError), rewrites)


def make_calibration(folder: Path) -> Target:
    path = folder / "calibration-Openness.json"
    write_json(path, asdict(Calibration(1.5, -0.2, 0.8, 24, 24, 0.7, 0.9)))

    def read() -> None:
        own = Calibration.load(path)
        assert np.isfinite(own.rating([0.0, 1.0])).all() and str(own)

    return Target("calibration", path, read, (ArtifactError, FileNotFoundError), (_json(path),))


def make_fit(folder: Path) -> Target:
    path = folder / "fit.safetensors"
    rng = np.random.default_rng(3)
    arrays = {"weights": rng.normal(size=8), "held_high": rng.random(12), "held_low": rng.random(12)}
    about = {
        "intercept": 0.1, "strength": 1.0, "held_questions": [f"q{k}" for k in range(12)], "n_fit": 24,
        "embedder": "e" * 64, "bench": "b" * 64, "versions": {"scikit-learn": "1"},
    }  # fmt: skip
    write_tensors(path, "embedding judge", 1, arrays, about)

    def read() -> None:
        fit = EmbeddingFit.load(path)
        assert len(fit.held_high) == len(fit.held_low) == len(fit.held_questions) and str(fit)
        assert isinstance(fit.embedder, str) and isinstance(fit.n_fit, int)

    return Target("embedding fit", path, read, (ArtifactError, FileNotFoundError), _tensors(path, "embedding judge"))


def make_reply(folder: Path) -> Target:
    cache, form, key = ReplyCache(folder / "chat", "ChatReply", Reply), ChatRequest("Hello?").plain_form, "ab" * 32
    cache.keep(key, form, {"model": "m"}, Reply("Hello.", "stop", None, "m", 3, 2))
    path = folder / "chat" / "ab" / f"{key}.json"

    def sign(entry: Any) -> Any:
        if isinstance(entry, dict):
            try:
                entry["sha256"] = _digest(entry)
            except ValueError:
                entry["sha256"] = ""
        return entry

    def read() -> None:
        reply = cache.get(key)
        assert reply is None or (reply.content is None or isinstance(reply.content, str))
        cache.keep(key + "0", form, {"model": "m"}, Reply("Hello.", "stop"))

    return Target("chat reply", path, read, (), (_json(path, sign),), (*CONTENTS, "a pickle"))


def make_completion(folder: Path) -> Target:
    cache = ReplyCache(folder / "chat", "TokenCompletion", Completion)
    call, key = TokenCall((1, 2, 3), (0,), 4), "cd" * 32
    cache.keep(key, call, {"fingerprint": "m"}, Completion((5, 6, 0), "stop", 0, (-0.5, -1.0, -2.0)))
    assert cache.get(key) == Completion((5, 6, 0), "stop", 0, (-0.5, -1.0, -2.0)), "lists in the file, tuples here"
    path = folder / "chat" / "cd" / f"{key}.json"

    def sign(entry: Any) -> Any:
        if isinstance(entry, dict):
            try:
                entry["sha256"] = _digest(entry)
            except ValueError:
                entry["sha256"] = ""
        return entry

    def read() -> None:
        own = cache.get(key)
        if own is not None:
            assert isinstance(own.tokens, tuple) and all(type(t) is int for t in own.tokens)
            assert own.finish_reason in ("stop", "length") and type(own.stop_reason) in (int, str, type(None))
            assert own.log_probabilities is None or (
                len(own.log_probabilities) == len(own.tokens) and all(type(v) is float for v in own.log_probabilities)
            )

    return Target("served completion", path, read, (), (_json(path, sign),), (*CONTENTS, "a pickle"))


@pytest.fixture(scope="module")
def ranking() -> RankingTask:
    rows = [
        {
            "trait": t.value, "condition": m, "pole": p, "question_id": f"{t.letter}-{q}", "split": "test",
            "facet": t.info.facets[q], "question": f"Question {q}?", "answer": f"{m} says {q} of {t.letter} {p}.",
        }
        for t in TRAITS for p in ("high", "low") for q in range(4) for m in ("npti", "simple", "p2")
    ]  # fmt: skip
    return make_task(pd.DataFrame(rows), RankingConfig(n_items=10, judges=2, attention_rate=0.1))


def make_judge_file(folder: Path, task: RankingTask) -> Target:
    judge, when = "judge-1", "2026-01-02T03:04:05.000Z"
    items = [
        {"item": i, "status": "ranked", "ranks": {a: k + 1 for k, a in enumerate(order)}, "ms": 20_000, "decided": when}
        for i, order in task.layouts[judge]
    ]
    record: dict[str, Any] = {
        "schema": "answer-ranking", "version": 1, "task": task.digest, "judge": judge, "started": when,
        "exported": when, "items": items,
    }  # fmt: skip
    path = folder / "judge-1.json"
    path.write_text(json.dumps(record | {"checksum": _checksum(record)}))

    def sign(own: Any) -> Any:
        try:
            return own | {"checksum": _checksum(own)}
        except (LookupError, TypeError, AttributeError):
            return own

    def read() -> None:
        own = read_judge_file(path, task)
        assert own["judge"] in task.layouts
        human_report(task, [path], n_resamples=20)

    return Target("judge's file", path, read, (ArtifactError, FileNotFoundError), (_json(path, sign),))


def make_ranking_key(folder: Path, task: RankingTask) -> Target:
    task.save(folder)
    path = folder / "key.json"

    def sign(own: Any) -> Any:
        if isinstance(own, dict):
            content = {k: v for k, v in own.items() if k != "digest"}
            own["digest"] = _sha(content)
        return own

    def read() -> None:
        loaded = RankingTask.load(path)
        assert all(isinstance(i.question, str) for i in loaded.items.values())
        assert len(loaded.counted) + len(loaded.checks) == len(loaded.items)

    return Target("ranking key", path, read, (ArtifactError, FileNotFoundError), (_json(path, sign),))


def _items() -> tuple[Item, ...]:
    return tuple(
        Item(f"{t.letter}{k}", f"{t.value} matters, {k}.", t, t.info.facets[k], (-1) ** k, 2 * n + k + 1)
        for n, t in enumerate(TRAITS)
        for k in range(2)
    )


def _questionnaire_checked(own: Questionnaire) -> None:
    assert len(own) >= 1 and own.digest and all(own.statement(i) for i in own.items)
    own.table(), repr(own)


def make_questionnaire(folder: Path) -> Target:
    path = Questionnaire("Made", _items(), source="here").save(folder / "q.json")

    def read() -> None:
        _questionnaire_checked(Questionnaire.load(path))

    return Target("questionnaire", path, read, (ValueError, FileNotFoundError), (_json(path),))


def _table_of_items() -> pd.DataFrame:
    return pd.DataFrame([{k: str(v) for k, v in asdict(i).items() if k != "position"} for i in _items()])


def make_sheet(folder: Path, kind: str = "csv") -> Target:
    path = folder / f"q.{kind}"
    table = _table_of_items()
    if kind == "csv":
        table.to_csv(path, index=False)
    else:
        workbook([list(table.columns), *table.to_numpy().tolist()], path)

    def read() -> None:
        _questionnaire_checked(Questionnaire.from_csv(path))

    return Target(f"items in {kind}", path, read, (ValueError, FileNotFoundError))


def make_item_key(folder: Path) -> Target:
    from npti_interp.evaluation.questionnaires._questionnaire import ipip_facet

    rows: list[dict[str, Any]] = []
    for n in range(1, 121):
        code, _, facet = ipip_facet(n)
        rows.append(
            {"Full#": n, "Short#": n, "Sign": f"+{code}", "Key": code, "Facet": facet, "Item": f"Do thing {n}."}
        )
    path = folder / "key.csv"
    pd.DataFrame(rows).to_csv(path, index=False)

    def read() -> None:
        _questionnaire_checked(Questionnaire.from_item_key(path))

    return Target("item key", path, read, (ValueError, FileNotFoundError))


def workbook(rows: list[list[str]], path: Path, last: str | None = None) -> None:
    """The smallest .xlsx: one sheet of inline texts; ``last`` adds a cell far away."""

    def column(k: int) -> str:
        return chr(ord("A") + k)

    cells = "".join(
        f'<row r="{r}">' + "".join(
            f'<c r="{column(c)}{r}" t="inlineStr"><is><t>{text}</t></is></c>' for c, text in enumerate(row)
        ) + "</row>"
        for r, row in enumerate(rows, start=1)
    )  # fmt: skip
    if last is not None:
        number = "".join(filter(str.isdigit, last))
        cells += f'<row r="{number}"><c r="{last}" t="inlineStr"><is><t>far</t></is></c></row>'
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="xml" '
        'ContentType="application/xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet name="S" sheetId="1" '
        'r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, text in parts.items():
            out.writestr(name, text)


def search_data() -> SearchData:
    bench, model = npti.PersonalityBench.embedded(), tiny("llama").model
    questions = bench.questions("Openness", "search", 8)
    prompts = {pole: [f"w{20 + k} w{30 + n} w9" for k in range(8)] for n, pole in enumerate(POLES)}
    answers = {pole: model.generate(prompts[pole], max_new_tokens=6) for pole in POLES}
    return SearchData(model, bench, Trait.OPENNESS, questions, prompts, answers)


@pytest.fixture(scope="module")
def data() -> SearchData:
    return search_data()


def make_record(folder: Path, data: SearchData) -> Target:
    from npti_interp.methods._prompts import FILE, load_personas

    personas = {p.value: [asdict(x) for x in data.bench.personas("Openness", p, "elicit")[:2]] for p in POLES}
    path = write_record(folder / FILE, "simple", data.model.fingerprint, data.trait, {"personas": personas})

    def sign(own: Any) -> Any:
        if isinstance(own, dict):
            own.pop("sha256", None)
            own["sha256"] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        return own

    def read() -> None:
        assert isinstance(read_record(path, "simple", data), dict)
        found, _ = load_personas(folder, "simple", data)
        assert all(isinstance(p.text, str) and isinstance(p.id, str) for own in found.values() for p in own)

    return Target("method's record", path, read, (ArtifactError, FingerprintMismatchError), (_json(path, sign),))


def make_learnt(folder: Path, data: SearchData, method: Any) -> Target:
    (path,) = method.prepare(data).save(folder)
    setting = method.grid(data.model)[0]

    def read() -> None:
        own = method.load(folder, data)
        try:
            own.intervention(Pole.HIGH, setting).additions(data.model.sites)
        except ValueError as error:  # numbers that no edit can be made of are refused by the edit
            if not any(word in str(error) for word in ("finite", "NaN", "differ", "no vectors", "beyond")):
                raise AssertionError("an edit refused for another reason") from error

    kind = type(method.prepare(data)).__name__
    errors = (ArtifactError, FingerprintMismatchError)
    return Target(f"{method.name}'s tensors", path, read, errors, _tensors(path, kind))


def make_job(folder: Path) -> Target:
    store = JobStore(folder)
    store.keep("d" * 8, {"tokens": [[1, 2], [3]], "counts": torch.arange(6).reshape(2, 3), "about": {"a": 1}})
    path = folder / ("d" * 8 + ".safetensors")

    def read() -> None:
        result = store.load("d" * 8)
        assert result is None or isinstance(result, dict)

    return Target("finished job", path, read, (ArtifactError,), _tensors(path, "Job"))


def make_job_note(folder: Path) -> Target:
    store = JobStore(folder)
    path = folder / ("d" * 8 + ".json")
    store.note("d" * 8, "0f0f-11")

    def read() -> None:
        found = store.under_way("d" * 8)
        assert found is None or not set(found) & set("/?#@ \n")

    return Target("job's note", path, read, (), (_json(path),), (*CONTENTS, "a pickle"))


def make_gsm8k(folder: Path) -> Target:
    path = folder / "gsm8k_test.json"
    path.write_text(
        json.dumps([{"question": f"What is {k} + 1?", "answer": f"{k} + 1\n#### {k + 1}"} for k in range(4)])
    )

    def read() -> None:
        assert all(p.question.strip() and p.number is not None for p in read_gsm8k(path))

    return Target("GSM8K", path, read, (ArtifactError, FileNotFoundError), (_json(path),))


def make_table(folder: Path) -> Target:
    path = folder / "t.parquet"
    write_table(
        path, pd.DataFrame({"id": ["a", "b", None], "x": [1.0, np.nan, 3.0], "n": [1, 2, 3], "l": [[1], [2, 3], []]})
    )

    def read() -> None:
        read_table(path).to_dict("records")

    return Target("table", path, read, (ArtifactError,))


def make_shard(folder: Path) -> Target:
    from npti_interp.bench.construction._tables import read_rows

    path = folder / "openness-0.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": "a", "text": "b", "n": 1}] * 20), path, compression="zstd")
    return Target("shard", path, lambda: read_rows(path), (ArtifactError,))


SIMPLE: dict[str, Callable[[Path], Target]] = {
    "statistics": make_statistics,
    "neurons": make_neurons,
    "published neurons": make_published_neurons,
    **{
        f"published {name}": lambda folder, name=name: make_published_bench(folder, name)
        for name in ("description.json", "search.jsonl", "test/Openness.json")
    },
    **{
        f"own {name}": lambda folder, name=name: make_own_bench(folder, name)
        for name in ("questions/openness.jsonl", "personas/openness.jsonl", "bench.json")
    },
    "config": make_config,
    "manifest": make_manifest,
    "result's config": make_result,
    "result's table": lambda folder: make_result(folder, "pairs.parquet"),
    "calibration": make_calibration,
    "embedding fit": make_fit,
    "chat reply": make_reply,
    "served completion": make_completion,
    "questionnaire": make_questionnaire,
    "items in CSV": make_sheet,
    "items in a workbook": lambda folder: make_sheet(folder, "xlsx"),
    "item key": make_item_key,
    "job": make_job,
    "job's note": make_job_note,
    "GSM8K": make_gsm8k,
    "table": make_table,
    "shard": make_shard,
}
WITH_TASK = {"judge's file": make_judge_file, "ranking key": make_ranking_key}
WITH_DATA: dict[str, Callable[[Path, SearchData], Target]] = {
    "record": make_record,
    "vectors": lambda folder, data: make_learnt(folder, data, CAA()),
    "probes": lambda folder, data: make_learnt(folder, data, PAS(n_heads=2)),
}
EVERY = (*SIMPLE, *WITH_TASK, *WITH_DATA)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The kernels are compiled before anything is timed."""
    own = statistics().merge(statistics(1))
    assert np.isfinite(own.p95).any()


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    name = request.param
    if name in WITH_TASK:
        return WITH_TASK[name](tmp_path, request.getfixturevalue("ranking"))
    return WITH_DATA[name](tmp_path, request.getfixturevalue("data")) if name in WITH_DATA else SIMPLE[name](tmp_path)


every_target = pytest.mark.parametrize("target", EVERY, indirect=True)


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- the tests -------------------------------------------------------------------------------------------------------


@every_target
def test_whole_files_are_read(target: Target) -> None:
    """Otherwise the tests below would test nothing."""
    assert target.tried() == "read"


@every_target
def test_what_is_no_file(target: Target) -> None:
    whole = target.path.read_bytes()
    for name, put in HOSTILE.items():
        clear(target.path)
        put(target.path)
        found = target.tried()
        # Some are allowed to be missing: a reply that is asked for again, a job that is sent again, a first run.
        optional = target.name in (
            "chat reply", "served completion", "job's note", "finished job", "run config", "published search.jsonl",
        )  # fmt: skip
        assert found != "read" or optional or target.name == "own bench.json", name
        clear(target.path)
        target.path.write_bytes(whole)


@every_target
def test_content_of_another_kind(target: Target, tmp_path: Path) -> None:
    whole = target.path.read_bytes()
    mark = tmp_path / "was unpickled"
    for name, content in {**CONTENTS, "a pickle": bomb(mark)}.items():
        target.path.write_bytes(content)
        found = target.tried()
        assert found != "read" or name in target.takes, name
        assert not mark.exists(), "something was unpickled"
    target.path.write_bytes(whole)


@every_target
def test_damaged_bytes(target: Target) -> None:
    whole = target.path.read_bytes()
    found: list[str] = []

    @settings(max_examples=REWRITES)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        target.path.write_bytes(damaged(whole, np.random.default_rng(seed)))
        found.append(target.tried())

    check()
    # Text files can be damaged in a word; what has a checksum cannot be damaged anywhere.
    assert any(f != "read" for f in found) or not target.errors
    if target.path.suffix == ".safetensors" and target.name != "finished job":
        assert "read" not in found


@every_target
def test_damaged_behind_the_checksum(target: Target) -> None:
    if not target.rewrites:
        pytest.skip("the format has no structure of ours")
    found: list[str] = []

    @settings(max_examples=REWRITES)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        target.rewrites[seed % len(target.rewrites)](rng)
        found.append(target.tried())

    check()
    assert any(f != "read" for f in found) or not target.errors


# -- single files ----------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_fingerprints(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = statistics_fingerprint().to_json()
    text = json.dumps(changed(json.loads(whole), rng)) if seed % 2 else damaged(whole.encode(), rng).decode("latin-1")
    try:
        made = ModelFingerprint.from_json(text)
    except ArtifactError:
        return
    assert made == ModelFingerprint.from_json(made.to_json()) and made.digest and str(made)
    assert all(isinstance(getattr(made, n), int) and getattr(made, n) > 0 for n in ("n_layers", "d_mlp", "d_model"))


def statistics_fingerprint() -> ModelFingerprint:
    return ModelFingerprint("Made", 3, 48, 32, 97, "silu", "w" * 32, "t" * 32, "")


@pytest.mark.parametrize("text", [None, 3, [], {}, b"\xff"])
def test_what_is_no_text_is_no_fingerprint(text: Any) -> None:
    with pytest.raises(ArtifactError, match="not a model fingerprint"):
        ModelFingerprint.from_json(text)


def test_one_far_cell_makes_no_table_of_billions(tmp_path: Path) -> None:
    path = tmp_path / "far.xlsx"
    table = _table_of_items()
    workbook([list(table.columns), *table.to_numpy().tolist()], path, last="XFD1048576")
    assert path.stat().st_size < 5000
    with bounded(), pytest.raises(ValueError, match="cannot read"):
        Questionnaire.from_csv(path)


def test_a_layer_named_twice_loses_no_rows(tmp_path: Path) -> None:
    high, low = tmp_path / "h.json", tmp_path / "l.json"
    high.write_text('{"1": [[1, 2, 0.3, 0.5, 1.0]], "1": [[1, 3, 0.3, 0.5, 1.0]]}')
    low.write_text("{}")
    with pytest.raises(ArtifactError, match="'1' occurs twice"):
        NeuronSet.from_npti_json(high, low)


def test_digits_without_end_are_no_number() -> None:
    from npti_interp.evaluation.retention._gsm8k import final_number

    assert final_number("The answer is: " + "7" * 6000) is None
    assert final_number("The answer is: " + "7" * 900) == int("7" * 900)


@settings(max_examples=150)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
))  # fmt: skip
def test_strict_json_reads_all_that_is_json(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="surrogate"):
            parse_json(json.dumps(value))
        return
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value, ensure_ascii=False))


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model("llama").save_pretrained(folder)
    tokenizer("{{ messages[0].content }}").save_pretrained(folder)
    return folder


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def tried_checkpoint(folder: Path) -> str:
    with bounded(extra=3 << 30):
        try:
            npti.load_model(folder).encode("w9 w10")
        except (ArtifactError, UnsupportedModelError, FileNotFoundError) as error:
            return type(error).__name__
        except ValueError as error:  # of a tokenizer or a template that reads, and is none
            assert any(w in str(error) for w in ("chat template", "no token", "layer", "prompt")), error  # noqa: PT017
            return "ValueError"
    return "read"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_checkpoints_of_odd_json(own: Path, name: str) -> None:
    rewrite, found = _json(own / name), list[str]()

    @settings(max_examples=15)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        rewrite(np.random.default_rng(seed))
        found.append(tried_checkpoint(own))

    check()
    (own / name).write_bytes(b"\x00\xff")
    assert tried_checkpoint(own) != "read"


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**9}, {"hidden_size": 10**7, "intermediate_size": 10**7}, {"vocab_size": 2**40},
        {"num_attention_heads": 10**6, "head_dim": 10**6}, {"num_hidden_layers": "3"}, {"hidden_size": -32},
    ],
)  # fmt: skip
def test_a_configuration_that_claims_more_than_the_weights_is_refused_at_once(own: Path, sizes: dict[str, Any]) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | sizes))
    with bounded(), pytest.raises(ArtifactError, match="claims|no size"):
        npti.load_model(own)


def test_torn_weights(own: Path) -> None:
    path = own / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with bounded(), pytest.raises(ArtifactError, match="safetensors"):
        npti.load_model(own)


PLANTED = "import pathlib\npathlib.Path({mark!r}).touch()\nfrom transformers import LlamaConfig as Own\n"


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_checkpoint_is_not_run_and_nobody_is_asked(
    own: Path, tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "was run"
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "planted.Own", "AutoModelForCausalLM": "planted.Own"}
    if not known:
        config["model_type"] = "planted"
    (own / "config.json").write_text(json.dumps(config))
    about = json.loads((own / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": ["planted.Own", None]}, "tokenizer_class": "Own"} if not known else {}
    (own / "tokenizer_config.json").write_text(json.dumps(about))
    (own / "custom_generate").mkdir()
    for path in (own / "planted.py", own / "custom_generate/generate.py", own / "__init__.py"):
        path.write_text(PLANTED.format(mark=str(mark)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run it"))
    if known:
        model = npti.load_model(own)
        model.generate(["w9 w10"], max_new_tokens=2)
    else:
        with pytest.raises(UnsupportedModelError, match="planted"):
            npti.load_model(own)
    assert not mark.exists(), "code from the checkpoint was run"


def test_weights_in_a_pickle_are_not_read(own: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was unpickled"
    (own / "model.safetensors").unlink()
    (own / "pytorch_model.bin").write_bytes(bomb(mark))
    with pytest.raises(ArtifactError, match="weights in pickles are never read"):
        npti.load_model(own)
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**12) %}x{% endfor %}", "{{ 1 / 0 }}", "{{ undefined.thing }}", "{% if %}",
        "{{ messages.clear() }}", "{% include '/etc/passwd' %}",
    ],
)  # fmt: skip
def test_a_template_can_only_write_text(own: Path, template: str) -> None:
    for path in (own / "chat_template.jinja",):
        path.write_text(template)
    with bounded():
        model = npti.load_model(own)
        assert model.tokenizer.chat_template == template
        with pytest.raises(ValueError, match="chat template of model fails|no token"):
            model.encode("w9")


def make_gguf(path: Path) -> None:
    """A Llama of two layers with random weights and a vocabulary of letters."""
    import gguf

    rng, layers, width, ffn, heads = np.random.default_rng(0), 2, 32, 48, 4
    words = ["<unk>", "<s>", "</s>", *map(chr, range(97, 123)), "Ġ", "ab", "bc"]
    out = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (out.add_name, "tiny"), (out.add_block_count, layers), (out.add_context_length, 64),
        (out.add_embedding_length, width), (out.add_feed_forward_length, ffn), (out.add_head_count, heads),
        (out.add_head_count_kv, heads), (out.add_layer_norm_rms_eps, 1e-5), (out.add_vocab_size, len(words)),
        (out.add_rope_dimension_count, width // heads), (out.add_tokenizer_model, "gpt2"), (out.add_token_list, words),
        (out.add_token_merges, ["a b", "b c"]), (out.add_bos_token_id, 1), (out.add_eos_token_id, 2),
        (out.add_unk_token_id, 0),
    ):  # fmt: skip
        add(value)  # pyright: ignore
    shapes = {"token_embd": (len(words), width), "output_norm": (width,), "output": (len(words), width)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{n}": (width,) for n in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{n}": (ffn, width) for n in ("gate", "up")} | {
            f"blk.{layer}.ffn_down": (width, ffn)
        }
    for name, shape in shapes.items():
        out.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    assert npti.load_model(path).sites.n_layers == 2
    whole = path.read_bytes()
    head = whole.index(b"token_embd")  # before it: sizes and vocabulary

    @settings(max_examples=25)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        # Every other example in the tables, where a byte says most.
        path.write_bytes(damaged(whole[:head], rng) + whole[head:] if seed % 2 else damaged(whole, rng))
        with bounded(extra=3 << 30):
            try:
                npti.load_model(path).encode("a b c")
            except (ArtifactError, UnsupportedModelError):
                pass
            except ValueError as error:
                assert "no token" in str(error) or "layer" in str(error), error  # noqa: PT017

    check()
    for name in ("nothing", "noise", "GGUF of many", "GGUF of one", "safetensors of a terabyte"):
        path.write_bytes(CONTENTS[name])
        with bounded(), pytest.raises(ArtifactError):
            npti.load_model(path)


# -- nothing is run --------------------------------------------------------------------------------------------------

LOADERS = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle",
    "pandas.read_pickle", "joblib.load", "os.system", "os.popen",
}  # fmt: skip


def runs_code(source: str) -> list[str]:
    """Calls and imports in a source by which a file could run code, and where."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in LOADERS]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS:
            found.append(f"{node.lineno}: {name}")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{node.lineno}: {name} without weights_only=True")
        if name.endswith((".load", "memmap", "fromfile")) and given.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: {name} with pickles")
        if given.get("trust_remote_code", "False") != "False":
            found.append(f"{node.lineno}: trust_remote_code")
        if given.get("shell", "False") != "False":
            found.append(f"{node.lineno}: a shell")
        if name.endswith(".from_pretrained") and name.split(".")[-2].startswith("Auto"):
            said = "trust_remote_code" in given or "**" in ast.unparse(node)
            if not said:
                found.append(f"{node.lineno}: {name} does not say trust_remote_code=False")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)", "eval(x)", "exec(x)", "import yaml\nyaml.load(x)",
        "np.load(p, allow_pickle=True)", "f(trust_remote_code=True)", "AutoConfig.from_pretrained(x)",
        "pd.read_pickle(p)", "subprocess.run(c, shell=True)", "def f():\n    import dill", "__import__(name)",
    ],
)  # fmt: skip
def test_what_could_run_code_is_found(source: str) -> None:
    assert runs_code(source)


def test_nothing_in_the_library_could_run_code_from_a_file() -> None:
    assert not runs_code(
        "json.loads(x)\nre.compile(x)\nmodel.eval()\nnp.load(p)\nAutoConfig.from_pretrained(x, **place)"
    )
    found = {str(p.relative_to(ROOT)): runs_code(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}
    assert {name: own for name, own in found.items() if own} == {}
