"""Files are whole and what they say they are, or they are refused; a failed write leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from npti_interp._files import (
    library_versions,
    read_json,
    read_tensors,
    sha256_of,
    write_atomic,
    write_json,
    write_tensors,
)
from npti_interp.errors import ArtifactError

ARRAYS = {
    "counts": np.arange(24, dtype=np.int64).reshape(2, 3, 4),
    "bins": np.arange(200, dtype=np.uint8),
    "mean": np.linspace(-1, 1, 7),
    "empty": np.zeros((0, 3), np.float32),
    "flag": np.array([True, False]),
}
METADATA = {"trait": "Openness", "seed": 7, "nested": {"list": [1, 2.5, None, "ü"], "nan": 0.1}, "weights": "a1b2"}


def write(path: Path) -> bytes:
    write_tensors(path, "Thing", 2, ARRAYS, METADATA)
    return path.read_bytes()


def same(arrays: dict[str, Any], metadata: dict[str, Any]) -> bool:
    return (
        metadata == METADATA
        and arrays.keys() == ARRAYS.keys()
        and all(a.dtype == ARRAYS[k].dtype and np.array_equal(a, ARRAYS[k]) for k, a in arrays.items())
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "thing.safetensors"
    first = write(path)
    assert same(*read_tensors(path, "Thing", 2))
    assert same(*read_tensors(str(path), "Thing", 3)), "a later version reads an earlier one's file"
    assert write(path) == first, "equal content gives equal bytes"
    assert [p.name for p in path.parent.iterdir()] == ["thing.safetensors"]
    turned = np.arange(6).reshape(2, 3).T
    write_tensors(path, "Thing", 1, {"turned": turned, "strided": np.arange(10)[::2]}, {})
    arrays, metadata = read_tensors(path, "Thing", 1)
    assert np.array_equal(arrays["turned"], turned)
    assert arrays["strided"].tolist() == [0, 2, 4, 6, 8]
    assert metadata == {}
    write_tensors(path, "Thing", 1, {}, {10: "keys", 9: ("become", "strings")})  # type: ignore[dict-item]
    assert read_tensors(path, "Thing", 1) == ({}, {"10": "keys", "9": ["become", "strings"]})


def test_other_kind_newer_version_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    write(path)
    with pytest.raises(ArtifactError, match=r"holds Thing, not Other"):
        read_tensors(path, "Other", 2)
    with pytest.raises(ArtifactError, match=r"format 2; .* reads up to 1: upgrade"):
        read_tensors(path, "Thing", 1)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        read_tensors(tmp_path / "none.safetensors", "Thing", 2)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path, "Thing", 2)


def test_what_this_toolkit_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    save_file(ARRAYS, path)
    with pytest.raises(ArtifactError, match="something this toolkit did not write"):
        read_tensors(path, "Thing", 2)
    for header in ("[]", "7", "null", '{"kind": "Thing"}', '{"kind": "Thing", "version": "2"}', "{"):
        save_file(ARRAYS, path, metadata={"npti": header, "npti_interp": header, "header": header})
        with pytest.raises(ArtifactError):
            read_tensors(path, "Thing", 2)
    for content in (
        b"",
        b"x",
        b"{}",
        bytes(8),
        bytes(100),
        b"\xff" * 64,
        json.dumps(METADATA).encode(),
        b"PK\x03\x04" + bytes(60),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a whole safetensors file"):
            read_tensors(path, "Thing", 2)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = tmp_path / "thing.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtifactError):
        read_tensors(path, "Thing", 2)
    assert not (tmp_path / "exploded").exists()


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    whole = write(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="truncated or altered"):
            read_tensors(path, "Thing", 2)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArtifactError):
        read_tensors(path, "Thing", 2)
    path.write_bytes(whole)
    assert same(*read_tensors(path, "Thing", 2))


@given(st.data())
def test_any_altered_byte(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """In the arrays, their names and shapes, or the metadata: refused, unless the content is still the same."""
    path = tmp_path_factory.getbasetemp() / "altered.safetensors"
    whole = bytearray(write(path))
    for _ in range(10):
        altered = bytearray(whole)
        place = data.draw(st.integers(0, len(whole) - 1))
        altered[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(altered)
        try:
            arrays, metadata = read_tensors(path, "Thing", 2)
        except ArtifactError:
            continue
        assert same(arrays, metadata), f"byte {place} was altered and nobody noticed"


@pytest.mark.parametrize(("old", "new"), [(b"Openness", b"openness"), (b"a1b2", b"a1b3"), (b"mean", b"meen")])
def test_altered_metadata(tmp_path: Path, old: bytes, new: bytes) -> None:
    """A fingerprint or trait changed by hand, with the arrays left alone."""
    path = tmp_path / "thing.safetensors"
    whole = write(path)
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(ArtifactError, match="was altered"):
        read_tensors(path, "Thing", 2)


def test_altered_array(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    whole = bytearray(write(path))
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ArtifactError, match="was altered"):
        read_tensors(path, "Thing", 2)


# ------------------------------------------------------------------------------------------------------ whole or not


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def failing(scratch: Path) -> None:
        scratch.write_text("half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_atomic(path, failing)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_atomic(path, failing)
    assert path.read_text() == "old", "the earlier file stands"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda scratch: (_ for _ in ()).throw(KeyboardInterrupt))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "t.safetensors", "Thing", 1, ARRAYS, {"bad": object()})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_file_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    seen: list[bool] = []

    def writing(scratch: Path) -> None:
        scratch.write_text("whole")
        seen.append(path.exists())
        assert scratch.parent == path.parent, "the same file system, so that renaming is one step"
        assert scratch.name.startswith(".")
        assert scratch.suffix == path.suffix

    write_atomic(path, writing)
    assert seen == [False]
    assert path.read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o644


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x" / "a.json"
    write_json(path, {"b": [1, None], "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "ü",\n "b": [\n  1,\n  null\n ]\n}\n'
    assert read_json(path) == {"a": "ü", "b": [1, None]}
    for content in (b"{", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="is not JSON"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_sha256_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    versions = library_versions()
    assert versions["numpy"] == np.__version__
    assert set(versions) == {"npti-interp", "torch", "transformers", "transformer-lens", "nnsight", "numpy"}
