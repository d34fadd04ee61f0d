"""The fused kernel, in Triton's interpreter on CPU tensors, against the operations it replaces."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from test_activations import PRINT
from test_device import CPU, both
from test_sketch import DISTRIBUTIONS, silu

from npti_interp._device import DeviceReducer, Part
from npti_interp.activations import ActivationCollector

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel, made for the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "npti_interp._device_triton", raising=False)
    from npti_interp import _device_triton

    yield _device_triton.reduce
    sys.modules.pop("npti_interp._device_triton", None)


def states(part: Part) -> dict[str, torch.Tensor]:
    return {k: v for k, v in vars(part).items() if isinstance(v, torch.Tensor)}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_its_twin(fused: Any, dtype: torch.dtype) -> None:
    """Every list, window and counter to the bit, from lists through windows to narrow ones, in slices of a part."""
    rng = np.random.default_rng(0)
    kinds = ["silu", "silu, sparse", "silu, tiny", "lognormal", "gamma, narrow", "constant", "two values", "zero"]
    n = 450
    columns = np.concatenate([DISTRIBUTIONS[k](rng, (n, 4)) for k in kinds], axis=1)
    values = torch.tensor(np.concatenate([columns, -columns], axis=1), dtype=torch.float32).to(dtype)
    width = columns.shape[1]
    one, two = Part(range(2), width, 3, CPU), Part(range(2), width, 3, CPU, fused)
    start = 0
    while start < n:
        size = int(rng.integers(1, 100))
        own, blocks = values[start : start + size], torch.from_numpy(rng.integers(0, 3, size))[: n - start]
        for part in (one, two):
            if start % 2:
                part.take(0, own, blocks)
            else:  # a layer at a time
                part.take(0, own[:, :width], blocks)
                part.take(1, own[:, width:], blocks)
        start += size
    assert {int(w) for w in one.width} == {0, 60, 240}
    for name, wanted in states(one).items():
        found = states(two)[name]
        if name.startswith(("m2", "mean")):
            continue
        assert torch.equal(found, wanted), name
    for high, low in (("mean", "mean_rest"), ("m2", "m2_rest")):
        mine, theirs = (states(p)[high].double() + states(p)[low].double() for p in (two, one))
        scale = values.double().abs().mean(0) if high == "mean" else theirs.abs() + values.double().square().mean(0)
        assert ((mine - theirs).abs() <= 1e-6 * scale).all(), high


@needs_triton
def test_collector(fused: Any) -> None:
    rng = np.random.default_rng(1)
    print_ = PRINT.__class__("Nothing", 2, 50, 4, 5, "silu", "w", "t", "")
    steps = [
        (torch.tensor(silu(rng.normal(size=(2, 32, 50))), dtype=torch.float32), np.arange(0, 32, 2), np.arange(16) % 3)
        for _ in range(10)
    ]
    host, device = both(print_, steps)
    collector = ActivationCollector(print_, 3, reduce="triton")
    assert isinstance(collector._device, DeviceReducer)
    for values, rows, blocks in steps:
        collector.begin(blocks)
        for layer, own in enumerate(values):
            collector.add(layer, own, rows, blocks)
    assert collector.deferred
    found = collector.result()
    assert np.array_equal(found.active_count, host.active_count)
    assert np.array_equal(found._sketch.bins, device._sketch.bins)  # type: ignore[union-attr]
    assert np.allclose(found.m2, host.m2, rtol=2e-6)


def test_what_is_said_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "npti_interp._device_triton", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install triton"):
        ActivationCollector(PRINT, 2, reduce="triton")
