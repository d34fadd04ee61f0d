"""One thread, no network, the same hypothesis examples on every machine; models that several files share."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from helpers import Tiny

    from npti_interp.models import Model

torch.set_num_threads(1)
settings.register_profile(
    "npti", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("npti")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Every session runs on one core."""
    torch.set_num_threads(1)
    yield
    assert torch.get_num_threads() == 1, "a test changed the number of threads"


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests were started in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm() -> Model:
    """The embedded model."""
    from npti_interp.models import load_model

    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def llama() -> Tiny:
    """The tiny Llama that tests of things other than architectures use."""
    from helpers import tiny

    return tiny("llama")
