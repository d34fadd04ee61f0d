"""Faster matrix products on some CPUs, exact in float32.

PyTorch sends float32 products on a CPU to MKL, which on AMD processors leaves AVX-512 unused. oneDNN, which PyTorch
ships as well, uses it: `benchmarks/decode.py` shows the ratio on the machine at hand (1.8 to 2.6 on a Zen 5). The
choice depends on the processor alone, never on a timing, so that one machine always gives one result.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npti_interp.models._weights import execution_device

__all__ = ["linear_kernel", "use_fast_linear"]


@functools.cache
def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def linear_kernel() -> str:
    """Which library multiplies float32 matrices on this CPU: ``"onednn"`` or ``"default"``.

    ``$NPTI_LINEAR`` overrides the choice.

    Raises:
        ValueError: ``$NPTI_LINEAR`` is neither.
    """
    chosen = os.environ.get("NPTI_LINEAR", "")
    if chosen not in ("", "onednn", "default"):
        raise ValueError(f"NPTI_LINEAR must be 'onednn' or 'default', got {chosen!r}")
    if chosen:
        return chosen
    able = (
        _vendor() == "AuthenticAMD"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    return "onednn" if able else "default"


def use_fast_linear(model: nn.Module) -> int:
    """Let the plain `nn.Linear` modules of a float32 CPU model multiply with the faster library.

    Args:
        model: changed in place; give a twin, not the user's model.

    Returns:
        how many modules were changed (0 where nothing is to be won).
    """
    if linear_kernel() != "onednn":
        return 0
    changed = 0
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and module.weight.dtype == torch.float32
            and execution_device(module).type == "cpu"
        ):
            changeable: Any = module
            # accelerate's own forward fetches an offloaded module's weights, then calls the one that it has kept.
            kept = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(changeable, kept, _onednn_forward(module))
            changed += 1
    return changed


def _onednn_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    product: Any = torch.ops.mkldnn._linear_pointwise.default  # pyright: ignore[reportUnknownMemberType]

    def forward(input: Tensor) -> Tensor:
        return product(input, module.weight, module.bias, "none", [], "")

    return forward


def keep_heap() -> None:
    """Let glibc keep freed memory for the next tensor instead of handing it back to the system.

    Large tensors come and go at every layer; fetching their pages anew costs up to a fifth of the time on a virtual
    machine. Process-wide, so the command line calls it, and the library never does. No effect on other systems.
    """
    import ctypes

    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold, limit = -1, -3, 2**30
    libc.mallopt(m_trim_threshold, limit)
    libc.mallopt(m_mmap_threshold, limit)
