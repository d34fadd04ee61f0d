r"""Where the FFN neurons of a Hugging Face model are.

For a gated FFN, ``h = (σ(ĥ W1) ⊙ ĥ W3) W2``, neuron *i*'s value is ``σ(ĥ W1)_i``, **before** the product; for a
plain FFN it is ``σ(ĥ W_in)_i`` (METHOD.md section 1). In both cases that is the output of the layer's activation
module, so reading and editing happen on that module and σ is the model's own by construction.

Rival methods act elsewhere: on the product (the input of the down projection), on the attention heads' outputs (the
input of the attention's output projection) and on the residual stream (the blocks' input and output).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from npti_interp.errors import UnsupportedModelError
from npti_interp.models._weights import plain_weight

__all__ = ["SUPPORTED_MODEL_TYPES", "FFNSites", "find_sites"]


@dataclass(frozen=True)
class _Layout:
    layers: str
    activation: str
    down: str
    gated: bool
    mlp: str = "mlp"
    heads: str = "self_attn.o_proj"


_GATED = _Layout("model.layers", "act_fn", "down_proj", gated=True)
_LAYOUTS: dict[str, _Layout] = {
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "mistral": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "olmo2": _GATED,
    "smollm3": _GATED,
    "phi3": _Layout("model.layers", "activation_fn", "down_proj", gated=True),
    "gpt2": _Layout("transformer.h", "act", "c_proj", gated=False, heads="attn.c_proj"),
    "gpt_neox": _Layout("gpt_neox.layers", "act", "dense_4h_to_h", gated=False, heads="attention.dense"),
}

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(sorted(_LAYOUTS))
"""Values of ``config.model_type`` that the toolkit knows."""


@dataclass(frozen=True)
class FFNSites:
    """The FFN neurons of one model, and the other places where it is read and edited.

    Attributes:
        model_type: ``config.model_type``.
        gated: whether the FFN multiplies by a second projection.
        n_layers: number of transformer blocks.
        d_mlp: neurons a layer.
        d_model: width of the residual stream.
        n_heads: attention heads a layer (those of the queries).
        d_head: width of a head's output; ``n_heads · d_head`` need not be ``d_model``.
    """

    model_type: str
    gated: bool
    n_layers: int
    d_mlp: int
    d_model: int
    n_heads: int
    d_head: int
    _layout: _Layout

    def width(self, site: str) -> int:
        """Width of what flows through a site of `paths`."""
        return {"heads": self.n_heads * self.d_head, "value": self.d_mlp, "product": self.d_mlp}.get(site, self.d_model)

    def _mlps(self, model: nn.Module) -> Iterator[nn.Module]:
        for layer in cast("nn.ModuleList", model.get_submodule(self._layout.layers)):
            yield layer.get_submodule(self._layout.mlp)

    def activation_modules(self, model: nn.Module) -> list[nn.Module]:
        """The module whose output is the neurons' value, one a layer: output ``Float[Tensor, "batch pos d_mlp"]``.

        Args:
            model: the model these sites were found in, or a copy of it.

        Raises:
            UnsupportedModelError: two layers share one module, so hooks could not tell them apart.
        """
        modules = [mlp.get_submodule(self._layout.activation) for mlp in self._mlps(model)]
        if len({id(module) for module in modules}) != len(modules):
            raise UnsupportedModelError(
                f"{type(model).__name__}: several layers share one activation module, so an edit of one layer "
                "would reach others; give each layer its own activation module"
            )
        return modules

    def paths(self) -> dict[str, list[str]]:
        """Dotted path from the model to each layer's module, by site (`npti_interp._programs.SITES`).

        ``before``: the block, whose input is the residual stream before it. ``heads``: the attention's output
        projection, whose input is the heads' outputs side by side. ``value``: the activation module, whose output is
        the neurons' value. ``product``: the down projection, whose input is σ(ĥW1) ⊙ ĥW3 (in a plain FFN the value
        itself). ``residual``: the block, whose output is the residual stream after it.
        """
        at = self._layout
        blocks = [f"{at.layers}.{layer}" for layer in range(self.n_layers)]
        return {
            "before": blocks,
            "heads": [f"{block}.{at.heads}" for block in blocks],
            "value": [f"{block}.{at.mlp}.{at.activation}" for block in blocks],
            "product": [f"{block}.{at.mlp}.{at.down}" for block in blocks],
            "residual": blocks,
        }

    def modules(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """The modules at `paths`.

        Raises:
            UnsupportedModelError: see `activation_modules`.
        """
        self.activation_modules(model)
        return {site: [model.get_submodule(path) for path in paths] for site, paths in self.paths().items()}

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The transformer blocks, whose output is the residual stream."""
        return list(cast("nn.ModuleList", model.get_submodule(self._layout.layers)))

    def down_projections(self, model: nn.Module) -> list[nn.Module]:
        """The modules that write the neurons back into the residual stream."""
        return [mlp.get_submodule(self._layout.down) for mlp in self._mlps(model)]

    def write_weights(self, model: nn.Module, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Row *i* is what neuron *i* of ``layer`` writes, per unit of what it sends on.

        A view of the model's weights; where these are quantised or offloaded, numbers made or fetched for this call.

        A plain FFN sends on the neuron's value, a gated one its product with ``(ĥ W3)_i``. Where a norm follows the FFN
        (Gemma 2 and 3, OLMo 2), this is what goes into that norm.
        """
        down = self.down_projections(model)[layer]
        weight = plain_weight(down)
        return weight if weight.shape == (self.d_mlp, self.d_model) and _is_conv1d(down) else weight.T


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def find_sites(model: nn.Module) -> FFNSites:
    """Find the FFN neurons of ``model``.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        UnsupportedModelError: mixture-of-experts or unknown architecture; the message lists what is supported.
    """
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    supported = f"supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
    experts = next(
        (
            n
            for n in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
            if getattr(config, n, 0)
        ),
        None,
    )
    if experts is not None or "moe" in kind.lower():
        raise UnsupportedModelError(
            f"{kind} is a mixture-of-experts model: a token reaches only some experts, so 'the fraction of tokens on "
            f"which neuron i fires' has no single meaning there; {supported}"
        )
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise UnsupportedModelError(f"no FFN site is known for model type {kind!r}; {supported}")
    try:
        layers = cast("nn.ModuleList", model.get_submodule(layout.layers))
        down = layers[0].get_submodule(layout.mlp).get_submodule(layout.down)
        layers[0].get_submodule(layout.mlp).get_submodule(layout.activation)
        heads = layers[0].get_submodule(layout.heads)
    except (AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} says it is a {kind!r} but lacks {layout.layers}[…].{layout.mlp}.{layout.down} or "
            f"{layout.layers}[…].{layout.heads}; load it with AutoModelForCausalLM; {supported}"
        ) from error
    (d_mlp, d_model), (d_heads, _) = _in_and_out(down), _in_and_out(heads)
    n_heads = int(config.num_attention_heads)
    return FFNSites(kind, layout.gated, len(layers), d_mlp, d_model, n_heads, d_heads // n_heads, layout)


def _in_and_out(module: nn.Module) -> tuple[int, int]:
    """Widths of a projection, by its own description, not the stored shape: 4-bit weights are stored packed."""
    if _is_conv1d(module):
        n_in, n_out = cast(Tensor, module.weight).shape
        return int(n_in), int(n_out)
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def activation_name(model: nn.Module, sites: FFNSites) -> str:
    """Name of σ (``"silu"``, ``"gelu_pytorch_tanh"``, …) as the model's configuration gives it."""
    config: Any = model.config
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        value = getattr(config, name, None)
        if value:
            return str(value)
    return type(sites.activation_modules(model)[0]).__name__


@torch.no_grad()
def sampled_values(tensor: Tensor, count: int) -> Float[Tensor, " sample"]:
    """At most ``count`` evenly spaced entries of ``tensor``, flattened, in bfloat16 on the CPU.

    bfloat16, so that a checkpoint has one digest whether it is loaded in float32, bfloat16 or (for bfloat16
    checkpoints) float16.
    """
    flat = tensor.detach().reshape(-1)
    step = -(-flat.numel() // count) | 1  # odd: an even one would stay in a few columns of most matrices
    return flat[::step].to(torch.bfloat16).cpu()
