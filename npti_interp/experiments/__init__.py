"""Experiments: each a function from a config to a result, with its figures."""

from npti_interp.experiments._ablations import (
    ABLATIONS_PRESETS,
    AblationsConfig,
    AblationsResult,
    ablations,
    equal_dose_gamma,
)
from npti_interp.experiments._compare import COMPARE_PRESETS, CompareConfig, CompareResult, compare, compare_models
from npti_interp.experiments._dose import DOSE_PRESETS, DoseConfig, DoseResult, GammaChoice, choose_gamma, dose_response
from npti_interp.experiments._inside import INSIDE_PRESETS, InsideConfig, InsideResult, inside
from npti_interp.experiments._judges import JUDGES_PRESETS, JudgesConfig, JudgesResult, compare_judges
from npti_interp.experiments._lab import Condition, ExperimentConfig, ExperimentResult, Lab
from npti_interp.experiments._layerwise import LAYERWISE_PRESETS, LayerwiseConfig, LayerwiseResult, layerwise
from npti_interp.experiments._locate import Location, LocationShard, choose_threshold, locate
from npti_interp.experiments._merge import merge_shards
from npti_interp.experiments._overlap import (
    OVERLAP_PRESETS,
    OverlapConfig,
    OverlapResult,
    TraitOverlap,
    effect_overlap,
    overlap,
    published_overlap,
    trait_overlap,
)
from npti_interp.experiments._registry import EXPERIMENTS, Experiment
from npti_interp.experiments._reproduce import (
    PRESETS,
    ReproduceConfig,
    ReproduceResult,
    Verdict,
    edit_against_random,
    reproduce,
    write_figures,
)
from npti_interp.experiments._retention import RETENTION_PRESETS, RetentionConfig, RetentionResult, retention_costs
from npti_interp.experiments._search_data import search_data
from npti_interp.experiments._selfreport import SELF_REPORT_PRESETS, SelfReportConfig, SelfReportResult, self_report
from npti_interp.experiments._several import (
    SEVERAL_PRESETS,
    SeveralTraitsConfig,
    SeveralTraitsResult,
    several_traits,
    token_effects,
)
from npti_interp.experiments._spillover import SPILLOVER_PRESETS, SpilloverConfig, SpilloverResult, spillover
from npti_interp.experiments._stability import (
    STABILITY_PRESETS,
    StabilityConfig,
    StabilityResult,
    agreement_curve,
    stability,
)
from npti_interp.experiments._writes import WRITES_PRESETS, WritesConfig, WritesResult, writes

__all__ = [
    "ABLATIONS_PRESETS",
    "COMPARE_PRESETS",
    "DOSE_PRESETS",
    "EXPERIMENTS",
    "INSIDE_PRESETS",
    "JUDGES_PRESETS",
    "LAYERWISE_PRESETS",
    "OVERLAP_PRESETS",
    "PRESETS",
    "RETENTION_PRESETS",
    "SELF_REPORT_PRESETS",
    "SEVERAL_PRESETS",
    "SPILLOVER_PRESETS",
    "STABILITY_PRESETS",
    "WRITES_PRESETS",
    "AblationsConfig",
    "AblationsResult",
    "CompareConfig",
    "CompareResult",
    "Condition",
    "DoseConfig",
    "DoseResult",
    "Experiment",
    "ExperimentConfig",
    "ExperimentResult",
    "GammaChoice",
    "InsideConfig",
    "InsideResult",
    "JudgesConfig",
    "JudgesResult",
    "Lab",
    "LayerwiseConfig",
    "LayerwiseResult",
    "Location",
    "LocationShard",
    "OverlapConfig",
    "OverlapResult",
    "ReproduceConfig",
    "ReproduceResult",
    "RetentionConfig",
    "RetentionResult",
    "SelfReportConfig",
    "SelfReportResult",
    "SeveralTraitsConfig",
    "SeveralTraitsResult",
    "SpilloverConfig",
    "SpilloverResult",
    "StabilityConfig",
    "StabilityResult",
    "TraitOverlap",
    "Verdict",
    "WritesConfig",
    "WritesResult",
    "ablations",
    "agreement_curve",
    "choose_gamma",
    "choose_threshold",
    "compare",
    "compare_judges",
    "compare_models",
    "dose_response",
    "edit_against_random",
    "effect_overlap",
    "equal_dose_gamma",
    "inside",
    "layerwise",
    "locate",
    "merge_shards",
    "overlap",
    "published_overlap",
    "reproduce",
    "retention_costs",
    "search_data",
    "self_report",
    "several_traits",
    "spillover",
    "stability",
    "token_effects",
    "trait_overlap",
    "write_figures",
    "writes",
]
