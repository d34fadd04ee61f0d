"""`load_model`: every way a model gets in."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from npti_interp._files import read_json
from npti_interp.backends import RemoteSettings, Service
from npti_interp.errors import ArtifactError, NptiError, UnsupportedModelError
from npti_interp.models._embedded import EMBEDDED_MODELS, embedded_checkpoint, load_gguf, require_plausible
from npti_interp.models._memory import require_gguf, require_load, require_quantization
from npti_interp.models._model import Model
from npti_interp.models._sites import SUPPORTED_MODEL_TYPES
from npti_interp.models._weights import multiply_out

__all__ = ["load_model"]

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None
"""Where a model's parts go: see `load_model`."""


def load_model(
    name: str | Path,
    backend: str = "transformer_lens",
    *,
    remote: bool | RemoteSettings = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: DeviceMap = None,
    quantization: str | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
    trust_cache_only: bool = False,
    allow_overcommit: bool = False,
) -> Model:
    """Load a chat model.

    What was tried on what: float32, bfloat16 and float16, weights left on the disk, and 8- and 4-bit weights on a CPU,
    against the plain model; two devices with a device that only keeps its tensors apart. ``device="cuda"`` and maps over
    several GPUs go through the same code, and accelerate's; no GPU was at hand to try them.

    Args:
        name: ``"smollm2-135m"`` (embedded, no download), a hub id, a local directory, or a ``.gguf`` file.
        backend: the engine, ``"transformer_lens"`` or ``"nnsight"``.
        remote: True runs on NDIF (needs ``backend="nnsight"``); `RemoteSettings` says how. Configuration and tokenizer
            come from ``name``, the weights stay on the server.
        dtype: of the weights; statistics are float32 and counts integers in any case, edits' tables, sampling and
            log-probabilities float32. A server has its own. What overflows float16 raises `NonFiniteActivationError`.
        device: where the model runs.
        device_map: spreads the weights instead: ``"auto"`` lets accelerate choose, a mapping gives each part its place
            (``{"": 0, "model.layers.30": "cpu", "model.layers.31": "disk"}``). Each layer's keys, values and edits are
            on its device. What is on the CPU (beside GPUs) or on the disk is fetched for each pass.
        quantization: ``"8bit"`` or ``"4bit"`` (NF4) weights by bitsandbytes; embeddings, unembedding and norms stay in
            ``dtype``, in which all products are computed, from the stored weights multiplied out one projection at a time
            (LLM.int8's own product would let the rows of a batch change each other). Such a model has a fingerprint of
            its own: neurons located on the full-precision one are refused, unless ``neurons.bound_to(model)`` says they
            shall be used.
        offload_folder: where weights go that ``device_map`` sends to ``"disk"``; a checkpoint in safetensors needs none.
        revision: branch, tag or commit, for a hub id.
        trust_cache_only: never ask the hub, use only what has been downloaded.
        allow_overcommit: read weights, and later generate, even where memory will not do by `plan_memory`.

    Returns:
        the model; embedded, its second load takes about a second beside imports.

    Raises:
        FileNotFoundError: no such file or directory, or the embedded model's package is not installed.
        ArtifactError: a GGUF that is none, a directory that holds no whole checkpoint, or a damaged embedded model.
        UnsupportedModelError: mixture-of-experts or unknown architecture, or a checkpoint that is quantised in a way the
            toolkit does not read.
        NotEnoughMemoryError: the weights and one short row will not fit; said before they are read, with what would.
        ImportError: ``quantization`` without bitsandbytes.
        ValueError: unknown backend or quantization, ``remote`` with a backend that cannot, settings that exclude each
            other, or a device map that leaves something out.
        RemoteServiceError: the service is not there, runs other versions, lacks a key or the model.
    """
    from npti_interp.backends import BACKENDS

    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if remote and backend != "nnsight":
        raise ValueError(f"backend {backend!r} runs in memory only; remote jobs need backend='nnsight'")
    kind = require_quantization(quantization)
    if remote:
        for given, said in (
            (str(device) != "cpu", f"device={str(device)!r}"),
            (device_map is not None, "device_map"),
            (bool(kind), f"quantization={kind!r}"),
        ):
            if given:
                raise ValueError(f"{said} means nothing to a model on a server; leave it out")
        settings = remote if isinstance(remote, RemoteSettings) else RemoteSettings()
        return _load_remote(str(name), settings, dtype, revision, trust_cache_only)
    if device_map is not None and str(device) != "cpu":
        raise ValueError(f"give either device={str(device)!r} or device_map, not both")
    if kind:
        _require_bitsandbytes(kind, device_map)
    wanted = _Wanted(dtype, str(device), device_map, kind, offload_folder, allow_overcommit)
    text = str(name)
    path = Path(text).expanduser()
    if text in EMBEDDED_MODELS:
        model, tokenizer = _from_pretrained(str(embedded_checkpoint(text)), text, wanted, None, local=True)
    elif path.suffix.lower() == ".gguf" or path.is_file():
        if kind or device_map is not None:
            raise ValueError(
                "a GGUF file is dequantised when it is read: quantization and device_map need the checkpoint it was made "
                "of, in safetensors"
            )
        if path.is_file():
            require_gguf(path, dtype, allowed=allow_overcommit)
        model, tokenizer = load_gguf(path, dtype=dtype)
        model = model.to(device)
    elif path.is_dir():
        model, tokenizer = _from_pretrained(str(path), path.name, wanted, None, local=True)
    elif path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no model directory or GGUF file at {text}")
    else:
        model, tokenizer = _from_pretrained(text, text, wanted, revision, local=trust_cache_only)
    made = Model(model, tokenizer, path.name if path.exists() else text, backend=backend)
    made.allow_overcommit = allow_overcommit
    return made


@dataclass(frozen=True)
class _Wanted:
    """How weights are to be read."""

    dtype: torch.dtype
    device: str
    device_map: Any
    quantization: str
    offload_folder: str | Path | None
    allow_overcommit: bool

    def arguments(self) -> dict[str, Any]:
        """For ``from_pretrained``: weights go straight to where they shall be, never through a whole copy elsewhere."""
        found: dict[str, Any] = {"dtype": self.dtype}
        if self.device_map is not None:
            found["device_map"] = self.device_map
        elif self.device != "cpu" or self.quantization:
            found["device_map"] = {"": self.device}
        if self.offload_folder is not None:
            found["offload_folder"] = str(self.offload_folder)
        if self.quantization:
            from transformers import BitsAndBytesConfig

            found["quantization_config"] = (
                BitsAndBytesConfig(load_in_8bit=True)
                if self.quantization == "8bit"
                else BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype,
                    bnb_4bit_use_double_quant=False,
                )
            )  # fmt: skip
        return found


def _require_bitsandbytes(kind: str, device_map: Any) -> None:
    """Raise unless weights can be quantised as asked.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: quantised weights would have to be fetched from elsewhere.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization={kind!r} needs the package bitsandbytes, which is not installed: "
            "pip install 'npti-interp[quantization]'"
        )
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "quantised weights cannot be fetched from the disk or from the processor's memory (bitsandbytes): leave "
                "'disk' and 'cpu' out of device_map, or leave out quantization"
            )


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


def require_supported(model_type: Any) -> None:
    """Raise unless the toolkit knows where such a model's neurons are.

    Raises:
        UnsupportedModelError: it does not.
    """
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"no FFN site is known for model type {model_type!r} (mixture-of-experts models have none); "
            f"supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )


def _from_pretrained(
    source: str, name: str, wanted: _Wanted, revision: str | None, *, local: bool
) -> tuple[Any, Any]:  # fmt: skip
    """A checkpoint's model and tokenizer. Of what lies in it nothing is run, and nothing is unpickled.

    That is said outright at each step: left unsaid, transformers asks at the terminal whether code that comes with a
    checkpoint shall run, and takes weights from a pickle where there are no safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"revision": revision, "local_files_only": local, "trust_remote_code": False}
    if Path(source).is_dir():
        _require_checkpoint(Path(source))
    with _damage_named(source):
        config = AutoConfig.from_pretrained(source, **place)
    require_supported(config.model_type)  # before gigabytes of weights are read
    stored = getattr(config, "quantization_config", None)
    if stored is not None and wanted.quantization:
        raise ValueError(f"{name} is quantised already ({_method(stored)}); leave out quantization")
    if stored is not None and _method(stored) != "bitsandbytes":
        raise UnsupportedModelError(
            f"{name} is quantised by {_method(stored)}, which the toolkit does not read; name the checkpoint in floating "
            "point it was made of, with quantization='8bit' or '4bit' if need be"
        )
    with _damage_named(source, but_values=wanted.device_map is not None):
        if stored is None:
            require_load(
                config, name, dtype=wanted.dtype, quantization=wanted.quantization, device=wanted.device,
                device_map=wanted.device_map, allowed=wanted.allow_overcommit,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **wanted.arguments(), **place)
        multiply_out(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **place)
        tokenizer("a")  # settings of a wrong type show when it is used
    return model, tokenizer


@contextlib.contextmanager
def _damage_named(source: str, *, but_values: bool = False) -> Generator[None]:
    """Inside the block whatever transformers says is wrong with a directory's files is an `ArtifactError`.

    Args:
        source: the directory; a hub id is let be.
        but_values: a `ValueError` is about the caller's settings.
    """
    try:
        yield
    except (NptiError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers says in many ways what is wrong with a file
        if not Path(source).is_dir() or (but_values and isinstance(error, ValueError)):
            raise
        raise ArtifactError(f"transformers cannot load the checkpoint in {source}: {error}") from error


def _method(stored: Any) -> str:
    """How a checkpoint says that it is quantised."""
    settings = stored if isinstance(stored, Mapping) else stored.to_dict()
    return str(settings.get("quant_method", "?")).rpartition(".")[2].lower()


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
    require_supported(config.get("model_type"))
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
