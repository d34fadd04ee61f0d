"""The benchmarks run, in a small size, and report what they measured. No time is asserted: that is for a quiet machine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.harness import Section, Timing, exponent, measure, peak_memory

ROOT = Path(__file__).parents[1]


def test_ratios_are_taken_repeat_by_repeat() -> None:
    """A slow minute hits both ways alike, and drops out."""
    slow, fast = Timing([4.0, 40.0, 6.0]), Timing([2.0, 20.0, 2.0])
    assert fast.ratio(slow) == (2.0, 2.0, 3.0)
    assert slow.median == 6.0
    assert slow.spread == pytest.approx(6.0)


def test_ways_are_measured_in_turn() -> None:
    calls: list[str] = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == [*"ab", *"ab", *"ba", *"ab"]
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_exponent_is_that_of_a_power_law() -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_peak_memory_sees_what_is_freed_again() -> None:
    held = peak_memory(lambda: np.ones(100 * 2**17).sum())
    assert 90 * 2**20 < held < 150 * 2**20


def test_a_target_that_is_missed_is_said() -> None:
    section = Section("Speed")
    section.target("as fast as", 0.5, at_least=0.97)
    section.target("no larger than", 0.2, at_most=0.25)
    assert "as fast as: 0.5, target at least 0.97: **missed**" in section.markdown()
    assert "no larger than: 0.2, target at most 0.25: reached" in section.markdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs_in_a_small_size(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--repeats", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    section = report["sections"][name]
    assert section["rows"], section
    assert all(len(row) == len(section["columns"]) for row in section["rows"])
    assert all(math.isfinite(target["value"]) for target in section["targets"])
    assert f"## {section['title']}" in (tmp_path / "report.md").read_text()
    assert report["machine"]["versions"]["torch"]
