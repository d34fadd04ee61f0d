"""Personality neurons in language models: locate them, induce traits with them, measure it against controls."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npti_interp.activations import ActivationStatistics, collect_activations
    from npti_interp.audit import AuditConfig, AuditReport, audit_bench
    from npti_interp.backends import RemoteSettings
    from npti_interp.bench import Persona, PersonalityBench, Question
    from npti_interp.chat import ChatClient, ChatRequest, ChatResult, LocalChat
    from npti_interp.errors import (
        ArtifactError,
        FingerprintMismatchError,
        NonFiniteActivationError,
        NotEnoughMemoryError,
        NptiError,
        RemoteJobError,
        RemoteServiceError,
        RunFolderError,
        UnsupportedMethodError,
        UnsupportedModelError,
    )
    from npti_interp.evaluation import (
        EmbeddingJudge,
        Interval,
        Judge,
        LikelihoodJudge,
        LLMJudge,
        LocalRatingJudge,
        bootstrap_mean,
        pair_scores,
    )
    from npti_interp.experiments import (
        EXPERIMENTS,
        Lab,
        Location,
        LocationShard,
        ReproduceConfig,
        ReproduceResult,
        choose_threshold,
        compare,
        locate,
        merge_shards,
        published_overlap,
        reproduce,
        trait_overlap,
    )
    from npti_interp.figures import save_figure
    from npti_interp.generation import Answer
    from npti_interp.interventions import (
        FrontSteering,
        HeadShift,
        Intervention,
        NeuronEdit,
        ProductShift,
        ResidualSteering,
        compose,
        stack,
    )
    from npti_interp.methods import METHODS, Method, Prepared, SearchData
    from npti_interp.models import MemoryPlan, Model, ModelFingerprint, generate_sweep, load_model, plan_memory
    from npti_interp.neurons import NeuronSet, select_lape, select_neurons
    from npti_interp.serving import Generator, ServedGenerator, VLLMGenerator
    from npti_interp.traits import POLES, TRAITS, Pole, Trait

__version__ = "0.1.0"

_HOME = {
    "activations": ("ActivationStatistics", "collect_activations"),
    "audit": ("AuditConfig", "AuditReport", "audit_bench"),
    "backends": ("RemoteSettings",),
    "bench": ("Persona", "PersonalityBench", "Question"),
    "errors": (
        "ArtifactError",
        "FingerprintMismatchError",
        "NonFiniteActivationError",
        "NotEnoughMemoryError",
        "NptiError",
        "RemoteJobError",
        "RemoteServiceError",
        "RunFolderError",
        "UnsupportedMethodError",
        "UnsupportedModelError",
    ),
    "chat": ("ChatClient", "ChatRequest", "ChatResult", "LocalChat"),
    "evaluation": (
        "EmbeddingJudge",
        "Interval",
        "Judge",
        "LLMJudge",
        "LikelihoodJudge",
        "LocalRatingJudge",
        "bootstrap_mean",
        "pair_scores",
    ),
    "experiments": (
        "EXPERIMENTS",
        "Lab",
        "Location",
        "LocationShard",
        "ReproduceConfig",
        "ReproduceResult",
        "choose_threshold",
        "compare",
        "locate",
        "merge_shards",
        "published_overlap",
        "reproduce",
        "trait_overlap",
    ),
    "figures": ("save_figure",),
    "generation": ("Answer",),
    "interventions": (
        "FrontSteering",
        "HeadShift",
        "Intervention",
        "NeuronEdit",
        "ProductShift",
        "ResidualSteering",
        "compose",
        "stack",
    ),
    "methods": ("METHODS", "Method", "Prepared", "SearchData"),
    "models": ("MemoryPlan", "Model", "ModelFingerprint", "generate_sweep", "load_model", "plan_memory"),
    "neurons": ("NeuronSet", "select_lape", "select_neurons"),
    "serving": ("Generator", "ServedGenerator", "VLLMGenerator"),
    "traits": ("POLES", "TRAITS", "Pole", "Trait"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "EXPERIMENTS",
    "METHODS",
    "POLES",
    "TRAITS",
    "ActivationStatistics",
    "Answer",
    "ArtifactError",
    "AuditConfig",
    "AuditReport",
    "ChatClient",
    "ChatRequest",
    "ChatResult",
    "EmbeddingJudge",
    "FingerprintMismatchError",
    "FrontSteering",
    "Generator",
    "HeadShift",
    "Interval",
    "Intervention",
    "Judge",
    "LLMJudge",
    "Lab",
    "LikelihoodJudge",
    "LocalChat",
    "LocalRatingJudge",
    "Location",
    "LocationShard",
    "MemoryPlan",
    "Method",
    "Model",
    "ModelFingerprint",
    "NeuronEdit",
    "NeuronSet",
    "NonFiniteActivationError",
    "NotEnoughMemoryError",
    "NptiError",
    "Persona",
    "PersonalityBench",
    "Pole",
    "Prepared",
    "ProductShift",
    "Question",
    "RemoteJobError",
    "RemoteServiceError",
    "RemoteSettings",
    "ReproduceConfig",
    "ReproduceResult",
    "ResidualSteering",
    "RunFolderError",
    "SearchData",
    "ServedGenerator",
    "Trait",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VLLMGenerator",
    "audit_bench",
    "bootstrap_mean",
    "choose_threshold",
    "collect_activations",
    "compare",
    "compose",
    "generate_sweep",
    "load_model",
    "locate",
    "merge_shards",
    "pair_scores",
    "plan_memory",
    "published_overlap",
    "reproduce",
    "save_figure",
    "select_lape",
    "select_neurons",
    "stack",
    "trait_overlap",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``npti --help`` does not wait for PyTorch."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
