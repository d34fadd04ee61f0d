"""`load_model`: every way a model gets in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from npti_interp.models._embedded import EMBEDDED_MODELS, embedded_checkpoint, load_gguf
from npti_interp.models._model import Model

__all__ = ["load_model"]


def load_model(
    name: str | Path,
    backend: str = "transformer_lens",
    *,
    remote: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_cache_only: bool = False,
) -> Model:
    """Load a chat model.

    Args:
        name: ``"smollm2-135m"`` (embedded, no download), a hub id, a local directory, or a ``.gguf`` file.
        backend: the engine, ``"transformer_lens"``.
        remote: run on NDIF; needs ``backend="nnsight"``.
        dtype: of the weights; statistics are float32 and counts integers in any case.
        device: where the model runs.
        revision: branch, tag or commit, for a hub id.
        trust_cache_only: never ask the hub, use only what has been downloaded.

    Returns:
        the model; embedded, its second load takes about a second beside imports.

    Raises:
        FileNotFoundError: no such file or directory, or the embedded model's package is not installed.
        ArtifactError: a GGUF that is none, or a damaged embedded model.
        UnsupportedModelError: mixture-of-experts or unknown architecture.
        ValueError: unknown backend, or ``remote=True`` with a backend that cannot.
    """
    from npti_interp.backends import BACKENDS

    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if remote:
        raise ValueError(f"backend {backend!r} runs in memory only; this version has no remote backend")
    text = str(name)
    path = Path(text).expanduser()
    if text in EMBEDDED_MODELS:
        model, tokenizer = _from_pretrained(str(embedded_checkpoint(text)), dtype, None, local=True)
    elif path.suffix.lower() == ".gguf" or path.is_file():
        model, tokenizer = load_gguf(path, dtype=dtype)
    elif path.is_dir():
        model, tokenizer = _from_pretrained(str(path), dtype, None, local=True)
    elif path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no model directory or GGUF file at {text}")
    else:
        model, tokenizer = _from_pretrained(text, dtype, revision, local=trust_cache_only)
    return Model(model.to(device), tokenizer, path.name if path.exists() else text, backend=backend)


def _from_pretrained(source: str, dtype: torch.dtype, revision: str | None, *, local: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from npti_interp.errors import UnsupportedModelError
    from npti_interp.models._sites import SUPPORTED_MODEL_TYPES

    place: dict[str, Any] = {"revision": revision, "local_files_only": local}
    config = AutoConfig.from_pretrained(source, **place)
    if config.model_type not in SUPPORTED_MODEL_TYPES:  # before gigabytes of weights are read
        raise UnsupportedModelError(
            f"no FFN site is known for model type {config.model_type!r} (mixture-of-experts models have none); "
            f"supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **place)
    return model, AutoTokenizer.from_pretrained(source, **place)
