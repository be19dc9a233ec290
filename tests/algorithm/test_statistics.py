"""How many weights moved, against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from utils.algorithm import statistics
from utils.algorithm.statistics import WeightMovement


def test_share_by_hand() -> None:
    policy = torch.nn.Linear(3, 2)  # 6 weights and 2 biases
    movement = WeightMovement(list(policy.parameters()))
    assert movement.share() == 0.0
    with torch.no_grad():
        policy.weight[0, 1] += 1.0
        policy.bias += 1.0
    assert movement.share() == pytest.approx(3 / 8)


def test_a_large_tensor_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLES_PER_TENSOR", 10)
    policy = torch.nn.Linear(100, 10, bias=False)
    movement = WeightMovement(list(policy.parameters()))
    with torch.no_grad():
        policy.weight[:5] += 1.0
    assert movement.share() == pytest.approx(0.5)


def test_bfloat16_stays_where_an_update_is_below_half_its_spacing() -> None:
    # around 1, bfloat16 numbers lie 2^-7 apart
    for dtype, moves in ((torch.bfloat16, 0.0), (torch.float32, 1.0)):
        policy = torch.nn.Linear(4, 4, bias=False, dtype=dtype)
        torch.nn.init.ones_(policy.weight)
        movement = WeightMovement(list(policy.parameters()))
        with torch.no_grad():
            policy.weight += 2**-9
        assert movement.share() == moves
