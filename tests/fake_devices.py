"""Devices that only keep their tensors apart: their data lie on the CPU, and mixing two of them raises as on GPUs.

Inside `fake_devices()` any tensor can go to ``"ve:0"`` or ``"ve:1"`` (a device type that this PyTorch knows by name and
cannot run). Products, indices and copies between two devices fail where a GPU's would: zero-dimensional CPU tensors may
go anywhere, indices may come from the CPU, ``copy_`` and ``to`` cross over; everything else must be on one device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

KIND = "ve"
_aten = torch.ops.aten
_CROSSING = {_aten.copy_.default, _aten._to_copy.default, _aten._copy_from.default}
_CPU_INDICES = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class _Elsewhere(Tensor):
    """A tensor that says it is on a fake device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device,
            requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (own := _by_hand(func, args)) is not NotImplemented:
            return own
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"on {self.device}: {self.held!r}"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    places = {t.device for t in tensors if not (t.device.type == "cpu" and t.ndim == 0)}
    asked = kwargs.get("device")
    asked = torch.device(asked) if asked is not None else None
    if func in _CPU_INDICES and isinstance(args[0], _Elsewhere):
        places = {args[0].device} | {t.device for t in tensors if t.device.type != "cpu"}
    if func not in _CROSSING and len(places) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {sorted(map(str, places))}")
    home = args[0].device if func in _CROSSING else next(iter(places), torch.device("cpu"))
    out = asked if asked is not None else home
    if asked is not None and asked.type == KIND:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    result = func(*_bare(args), **_bare(kwargs))
    if func.overloadpacket.__name__.endswith("_") and isinstance(args[0], _Elsewhere):
        return args[0]
    if out.type != KIND:
        return result
    return tree_map(
        lambda t: _Elsewhere(t, out) if isinstance(t, Tensor) and not isinstance(t, _Elsewhere) else t, result
    )


def _bare(value: Any) -> Any:
    return tree_map(lambda t: t.held if isinstance(t, _Elsewhere) else t, value)


def _by_hand(func: Any, args: Any) -> Any:
    """What PyTorch does in C++ with a guard of the device, before any of the hooks above is asked."""
    if func == Tensor.tolist:
        return args[0].held.tolist()
    if func in (Tensor.contiguous, Tensor.__invert__) and isinstance(args[0], _Elsewhere):
        return _Elsewhere(func(args[0].held), args[0].device)
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        whole, index = args[:2]
        indices = [t for t in tree_flatten(index)[0] if isinstance(t, Tensor)]
        if wrong := {t.device for t in indices} - {whole.device, torch.device("cpu")}:
            raise RuntimeError(f"indices should be on the CPU or on {whole.device}, found {wrong}")
        if func == Tensor.__getitem__:
            found = _bare(whole)[_bare(index)]
            return _Elsewhere(found, whole.device) if isinstance(whole, _Elsewhere) else found
        value = args[2]
        far = isinstance(value, Tensor) and value.ndim and value.device != whole.device
        if indices and far:
            raise RuntimeError(f"what is put at indices of {whole.device} is on {value.device}")
        _bare(whole)[_bare(index)] = _bare(value)
        return None
    return NotImplemented


class _Functions(TorchFunctionMode):
    """Tensors from lists: made on the CPU, then sent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == KIND:
            del kwargs["device"]
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Mode(TorchDispatchMode):
    """Catches what makes tensors from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def fake_devices() -> Iterator[None]:
    """Inside, ``"ve:0"`` and ``"ve:1"`` work; without gradients."""
    with torch.no_grad(), _Functions(), _Mode():
        yield
