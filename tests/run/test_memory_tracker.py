"""The memory tracker against real allocations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.run.memory_tracker import MemoryTracker


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory cannot be reset here")
def test_tracker_sees_what_was_allocated_between_marks():
    tracker = MemoryTracker("cpu")
    before = tracker.mark("start")
    tensor = torch.ones(64 * 2**20)  # 256 MiB
    del tensor
    during = tracker.mark("large")
    after = tracker.mark("large")
    assert during - before == pytest.approx(256 * 2**20, rel=0.1)
    assert after < during - 200 * 2**20
    assert tracker.report() == {"start": before, "large": during}
    assert tracker.report() == {}


def test_tracker_that_is_off_reports_nothing():
    tracker = MemoryTracker("cpu", enabled=False)
    assert tracker.mark("anything") == 0
    assert tracker.report() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tracker_on_the_gpu():
    tracker = MemoryTracker(torch.device("cuda"))
    before = tracker.mark("start")
    torch.ones(2**20, device="cuda")
    assert tracker.mark("large") - before == 4 * 2**20
