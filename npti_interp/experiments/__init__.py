"""Experiments: each a function from a config to a result, with its figures."""

from npti_interp.experiments._locate import Location, choose_threshold, locate
from npti_interp.experiments._reproduce import (
    PRESETS,
    ReproduceConfig,
    ReproduceResult,
    Verdict,
    reproduce,
    write_figures,
)

__all__ = [
    "PRESETS",
    "Location",
    "ReproduceConfig",
    "ReproduceResult",
    "Verdict",
    "choose_threshold",
    "locate",
    "reproduce",
    "write_figures",
]
