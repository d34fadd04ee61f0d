"""Models: how they get in, what identifies them, where their neurons are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from npti_interp.models._fingerprint import ModelFingerprint
from npti_interp.models._sites import SUPPORTED_MODEL_TYPES, FFNSites

if TYPE_CHECKING:
    from npti_interp.models._loading import load_model
    from npti_interp.models._memory import MemoryPlan, plan_memory
    from npti_interp.models._model import Model, Prompt, generate_sweep

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "FFNSites",
    "MemoryPlan",
    "Model",
    "ModelFingerprint",
    "Prompt",
    "generate_sweep",
    "load_model",
    "plan_memory",
]

_LATER = {
    "MemoryPlan": "_memory",
    "Model": "_model",
    "Prompt": "_model",
    "generate_sweep": "_model",
    "load_model": "_loading",
    "plan_memory": "_memory",
}


def __getattr__(name: str) -> Any:
    """`Model` stands on the engines, and they on fingerprints and sites: it is imported when asked for."""
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
