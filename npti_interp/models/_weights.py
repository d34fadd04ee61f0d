"""Where a model's weights are, and how they are stored: on several devices, offloaded, or quantised.

accelerate puts a hook (``module._hf_hook``) on the modules of a model that is spread over devices; the weights of an
offloaded module are on the meta device and come from ``hook.weights_map`` for the time of its forward pass. bitsandbytes
stores a projection's weights packed (4-bit) or as integers with a scale a row (8-bit).
"""

from __future__ import annotations

import math
import types
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from npti_interp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from npti_interp.models._sites import FFNSites

__all__ = [
    "compute_dtype",
    "devices_of",
    "dispatch_hooks",
    "execution_device",
    "has_hooks",
    "is_offloaded",
    "layer_devices",
    "multiply_out",
    "plain_weight",
    "quantisation_of",
    "stored",
    "stored_parameters",
]


def dispatch_hooks(module: nn.Module) -> list[Any]:
    """The accelerate hooks of one module, those inside a sequence of hooks each by itself."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))


def has_hooks(model: nn.Module) -> bool:
    """Whether accelerate has spread the model over devices."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _weights_map(module: nn.Module) -> Mapping[str, Tensor] | None:
    return next((h.weights_map for h in dispatch_hooks(module) if getattr(h, "offload", False)), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are fetched (from a disk, or from the processor's memory) for each forward pass."""
    return any(_weights_map(module) is not None for module in model.modules())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where they are fetched to.

    A module without weights of its own answers for its first part that has some. ``meta`` for a skeleton.
    """
    for part in module.modules():
        for name, own in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if own.device.type != "meta":
                return own.device
            for hook in dispatch_hooks(part):
                if getattr(hook, "offload", False) and name in hook.weights_map:
                    where = hook.execution_device
                    return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
            return own.device
    return torch.device("cpu")


def layer_devices(model: nn.Module, sites: FFNSites) -> list[torch.device]:
    """Where each transformer block computes."""
    return [execution_device(block) for block in sites.block_modules(model)]


def stored(module: nn.Module, name: str) -> Tensor:
    """A parameter of ``module`` by its own name, fetched if it is offloaded."""
    own = cast(Tensor, getattr(module, name))
    if own.device.type == "meta" and (held := _weights_map(module)) is not None:
        fetched = held[name]
        return fetched.to(own.dtype) if fetched.is_floating_point() and own.is_floating_point() else fetched
    return own


def stored_parameters(model: nn.Module) -> Generator[tuple[str, Tensor]]:
    """Every parameter by name, sorted, as it is stored; tied ones once, as `nn.Module.named_parameters` gives them."""
    for name, own in sorted(model.named_parameters()):
        if own.device.type != "meta":
            yield name, own
            continue
        path, _, last = name.rpartition(".")
        yield name, stored(model.get_submodule(path), last)


def quantisation_of(model: nn.Module) -> str:
    """How the projections are stored: ``"8bit"``, ``"4bit"`` or ``""``.

    Raises:
        UnsupportedModelError: quantised in another way, or not made ready by `multiply_out`.
    """
    kinds = {"8bit" if _is_8bit(module) else "4bit" for module in model.modules() if _is_packed(module)}
    if len(kinds) > 1 or (not kinds and getattr(model, "is_quantized", False)):
        method = "in several ways" if kinds else f"by {getattr(model, 'quantization_method', '?')}"
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised {method}, which the toolkit does not read; load the checkpoint in "
            "floating point, or with quantization='8bit' or '4bit'"
        )
    if not all(getattr(module, _READY, False) for module in model.modules() if _is_packed(module)):
        raise UnsupportedModelError(
            f"{type(model).__name__} multiplies its quantised weights by bitsandbytes' own kernels, in which the rows of a "
            "batch change each other; load it with npti.load_model(…, quantization='8bit' or '4bit')"
        )
    return next(iter(kinds), "")


_READY = "_npti_multiplied_out"


def _is_packed(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


def _is_8bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt"


def multiply_out(model: nn.Module) -> int:
    """Let quantised projections multiply by their weights' numbers, made anew from the stored ones for each product.

    bitsandbytes' own products do not fit here. In 8 bits they pick the columns that are not rounded over all rows of a
    batch, so that a row's result depends on the others, and round the activations besides. In 4 bits a single row goes
    through another kernel than several, and some processors pack the weights anew in the first pass. Multiplied out, a
    result depends on the stored weights alone. It costs memory for one projection's numbers at a time.

    Args:
        model: changed in place.

    Returns:
        how many projections were changed.
    """
    changed = 0
    for module in model.modules():
        if _is_packed(module):
            changeable: Any = module
            kept = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(changeable, kept, types.MethodType(_product, module))  # a method, so that a copy's acts on the copy
            setattr(changeable, _READY, True)
            changed += 1
    return changed


def _product(module: nn.Module, x: Tensor) -> Tensor:
    bias: Any = module.bias
    return nn.functional.linear(x, plain_weight(module).to(x.dtype), None if bias is None else bias.to(x.dtype))


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Precision that activations, keys and values have: that of the weights which are stored as plain numbers."""
    for own in model.parameters():
        if own.is_floating_point() and own.dtype.itemsize >= 2:
            return own.dtype
    return torch.get_default_dtype()


@torch.no_grad()
def plain_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """A projection's weights as numbers, as the module stores them otherwise: offloaded ones fetched, quantised ones multiplied out.

    Of a projection in floating point that is not offloaded: the weights themselves, not a copy. Of a quantised one: a
    copy of full size, in the precision that its weights had (float32 of 8-bit ones), so take one at a time.
    """
    if not _is_packed(module):
        return stored(module, "weight")
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    weight: Any = module.weight
    if not _is_8bit(module):
        state = weight.quant_state
        if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            return _unpacked(weight.data, state)
        return functional.dequantize_4bit(weight.data, state)
    # Fresh from a checkpoint, integers and scales are on the parameter; after a pass of bitsandbytes' own, on the state.
    scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """4-bit weights as numbers, by their definition: level × scale of the block.

    bitsandbytes 0.50 on a CPU takes wrong scales where a row's end is not a block's.
    """
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    flat = packed.flatten()
    levels = torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()[: math.prod(state.shape)]
    blocks = scales.float().repeat_interleave(state.blocksize)[: len(levels)]
    return (state.code[levels] * blocks).view(state.shape).to(state.dtype)


def devices_of(model: nn.Module) -> Sequence[torch.device]:
    """All devices that hold weights or compute, in the order of the model."""
    found = [execution_device(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None]  # fmt: skip
    return list(dict.fromkeys(found))
