"""Copies of a model that share its parameters."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from npti_interp.models._weights import dispatch_hooks

__all__ = ["sharing_twin"]

_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that accelerate covers by functions of one model; a copy's would move the original."""


def sharing_twin(model: nn.Module) -> Any:
    """A copy of the module tree that shares every parameter with ``model``.

    Shared as well is what holds weights without being a parameter: what accelerate fetches offloaded ones from, and
    bitsandbytes' scales and integers. A twin's accelerate hooks act on the twin's own modules.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for hook in dispatch_hooks(module):
            for name in ("weights_map", "tied_params_map"):
                held = getattr(hook, name, None)
                if held is not None:
                    memo[id(held)] = held
        if type(module).__module__.startswith("bitsandbytes"):
            # 8-bit integers move from the parameter to this state in the first forward pass, whoever makes it.
            for name in ("state", "quant_state"):
                held = module.__dict__.get(name)
                if held is not None:
                    memo[id(held)] = held
    twin = copy.deepcopy(model, memo=memo)
    if hasattr(model, "_hf_hook"):
        for name in _MOVERS:
            twin.__dict__.pop(name, None)
    return twin
