"""`load_model`: every way a model gets in."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from npti_interp._files import read_json
from npti_interp.backends import RemoteSettings, Service
from npti_interp.errors import ArtifactError, NptiError, UnsupportedModelError
from npti_interp.models._embedded import EMBEDDED_MODELS, embedded_checkpoint, load_gguf, require_plausible
from npti_interp.models._model import Model
from npti_interp.models._sites import SUPPORTED_MODEL_TYPES

__all__ = ["load_model"]


def load_model(
    name: str | Path,
    backend: str = "transformer_lens",
    *,
    remote: bool | RemoteSettings = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_cache_only: bool = False,
) -> Model:
    """Load a chat model.

    Args:
        name: ``"smollm2-135m"`` (embedded, no download), a hub id, a local directory, or a ``.gguf`` file.
        backend: the engine, ``"transformer_lens"`` or ``"nnsight"``.
        remote: True runs on NDIF (needs ``backend="nnsight"``); `RemoteSettings` says how. Configuration and tokenizer
            come from ``name``, the weights stay on the server.
        dtype: of the weights; statistics are float32 and counts integers in any case. A server has its own.
        device: where the model runs.
        revision: branch, tag or commit, for a hub id.
        trust_cache_only: never ask the hub, use only what has been downloaded.

    Returns:
        the model; embedded, its second load takes about a second beside imports.

    Raises:
        FileNotFoundError: no such file or directory, or the embedded model's package is not installed.
        ArtifactError: a GGUF that is none, a directory that holds no whole checkpoint, or a damaged embedded model.
        UnsupportedModelError: mixture-of-experts or unknown architecture.
        ValueError: unknown backend, or ``remote`` with a backend that cannot.
        RemoteServiceError: the service is not there, runs other versions, lacks a key or the model.
    """
    from npti_interp.backends import BACKENDS

    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if remote and backend != "nnsight":
        raise ValueError(f"backend {backend!r} runs in memory only; remote jobs need backend='nnsight'")
    if remote and str(device) != "cpu":
        raise ValueError(f"device={str(device)!r} means nothing to a model on a server; leave it out")
    if remote:
        settings = remote if isinstance(remote, RemoteSettings) else RemoteSettings()
        return _load_remote(str(name), settings, dtype, revision, trust_cache_only)
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


def _load_remote(
    name: str, settings: RemoteSettings, dtype: torch.dtype, revision: str | None, cache_only: bool
) -> Model:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # Configuration and tokenizer of the same revision as the weights, unless they are another checkpoint's.
    revision = revision or (None if settings.repo else settings.revision)
    settings = replace(settings, repo=settings.repo or name, revision=settings.revision or revision)
    if settings.here:
        whole = load_model(name, "nnsight", dtype=dtype, revision=revision, trust_cache_only=cache_only)
        return Model(whole.hf_model, whole.tokenizer, whole.name, backend="nnsight", remote=settings)
    service = Service(settings.host)
    service.require_key()
    service.require_model(settings.repo, settings.revision)
    place: dict[str, Any] = {
        "revision": revision, "local_files_only": cache_only or Path(name).is_dir(), "trust_remote_code": False
    }  # fmt: skip
    source = str(embedded_checkpoint(name)) if name in EMBEDDED_MODELS else name
    config = AutoConfig.from_pretrained(source, **place)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    with contextlib.suppress(OSError):  # a checkpoint may have none
        skeleton.generation_config = GenerationConfig.from_pretrained(
            source, revision=revision or "main", local_files_only=place["local_files_only"]
        )
    tokenizer = AutoTokenizer.from_pretrained(source, **place)
    return Model(skeleton, tokenizer, settings.repo, backend="nnsight", remote=settings)


def _from_pretrained(source: str, dtype: torch.dtype, revision: str | None, *, local: bool) -> tuple[Any, Any]:
    """A checkpoint's model and tokenizer. Of what lies in it nothing is run, and nothing is unpickled.

    That is said outright at each step: left unsaid, transformers asks at the terminal whether code that comes with a
    checkpoint shall run, and takes weights from a pickle where there are no safetensors.
    """
    if not Path(source).is_dir():
        return _read_checkpoint(source, dtype, revision, local=local)
    _require_checkpoint(Path(source))
    try:
        return _read_checkpoint(source, dtype, revision, local=True)
    except NptiError:
        raise
    except Exception as error:  # transformers says in many ways what is wrong with a file
        raise ArtifactError(f"transformers cannot load the checkpoint in {source}: {error}") from error


def _read_checkpoint(source: str, dtype: torch.dtype, revision: str | None, *, local: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"revision": revision, "local_files_only": local, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **place)
    _require_supported(config.model_type)  # before gigabytes of weights are read
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **place)
    tokenizer = AutoTokenizer.from_pretrained(source, **place)
    tokenizer("a")  # settings of a wrong type show when it is used
    return model, tokenizer


def _require_supported(model_type: Any) -> None:
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"no FFN site is known for model type {model_type!r} (mixture-of-experts models have none); "
            f"supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )


def _require_checkpoint(folder: Path) -> None:
    """Look at a directory before transformers does.

    Raises:
        UnsupportedModelError: its model type has no known FFN site.
        ArtifactError: no configuration, no safetensors, or a configuration that claims a model far larger than its
            weights: transformers would set out to make it, in memory, however large.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ArtifactError(f"{folder} holds no config.json, so no model in Hugging Face's format")
    config: Any = read_json(file)
    if not isinstance(config, dict):
        raise ArtifactError(f"{file} is no model's configuration")
    _require_supported(config.get("model_type"))
    decoding = folder / "generation_config.json"
    if decoding.exists() and not isinstance(read_json(decoding), dict):  # transformers would pass over it in silence
        raise ArtifactError(f"{decoding} is no object of settings")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ArtifactError(
            f"{folder} holds no .safetensors file; weights in pickles are never read: save the model anew with "
            "save_pretrained"
        )
    tensors, entries = 0, 0
    for path in weights:
        own = _safetensors_sizes(path)
        tensors, entries = tensors + len(own), entries + sum(own)
    require_plausible(config, tensors, entries, str(file))


def _safetensors_sizes(path: Path) -> list[int]:
    """Entries of every tensor of a file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: {error}") from error
