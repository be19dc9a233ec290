"""float16 under a dynamic loss scale: what it saves, what it costs, and where its state goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from update_cases import ON_POLICY, assert_resumes_exactly, make_batch

from train_grpo import update_policy
from utils.algorithm.loss_scale import (
    FIRST,
    GROWTH_STEPS,
    KEY,
    adapt_loss_scale,
    fit_loss_scale,
    loss_scale,
    loss_scale_metrics,
)
from utils.algorithm.policy import build_optimizer, load_policy
from utils.algorithm.statistics import UpdateResult

FLOAT16 = replace(ON_POLICY, autocast_dtype="float16", normalize_mode="constant", normalize_constant=1e5)


def plain_optimizer(policy: torch.nn.Module, scale: float | None) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    if scale is not None:
        fit_loss_scale(optimizer, "float16")
        optimizer.state[KEY]["scale"] = scale
    return optimizer


def one_update(model_dir: Path, training, scale: float | None) -> tuple[torch.Tensor, UpdateResult, dict]:
    """The gradient that a step of plain gradient descent went along, what the update reports, and the state."""
    policy = load_policy(str(model_dir), training)
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    optimizer = plain_optimizer(policy, scale)
    result = update_policy(policy, optimizer, make_batch(), training, steps_done=0)
    return before - torch.cat([p.detach().flatten() for p in policy.parameters()]), result, optimizer.state


def test_small_gradients_survive_with_the_scale_alone(tiny_model_dir: Path) -> None:
    """A loss divided by 1e5 has gradients below float16's smallest number."""
    exact, _, _ = one_update(tiny_model_dir, replace(FLOAT16, autocast_dtype=None), None)
    scaled, result, _ = one_update(tiny_model_dir, FLOAT16, FIRST)
    lost, _, _ = one_update(tiny_model_dir, FLOAT16, None)
    moved = exact != 0  # a weight may be too large to show its step in float32
    assert (scaled - exact)[moved].norm() < 0.02 * exact.norm()
    assert (lost - exact)[moved].norm() > 0.5 * exact.norm()
    assert result.n_optimizer_steps == 1 and result.metrics["loss_scale_skips"] == 0


def test_too_large_a_scale_skips_halves_and_is_no_fault_of_the_rollouts(tiny_model_dir: Path) -> None:
    moved, result, state = one_update(tiny_model_dir, FLOAT16, 2.0**60)
    assert not moved.any()
    assert state[KEY] == {"scale": 2.0**59, "steps": 0}
    assert (result.n_optimizer_steps, result.skipped, result.nonfinite_rows) == (0, [], [])
    assert result.metrics["loss_scale_skips"] == 1 and "loss" not in result.metrics


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_scale(tiny_model_dir: Path) -> None:
    batch = make_batch()
    batch.advantages[0] = float("nan")
    policy = load_policy(str(tiny_model_dir), FLOAT16)
    result = update_policy(policy, plain_optimizer(policy, FIRST), batch, FLOAT16, steps_done=0)
    assert result.skipped == [True] and result.metrics["loss_scale_skips"] == 0


def test_the_scale_grows_and_stops_at_its_lowest() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert loss_scale(optimizer) is None and loss_scale_metrics(optimizer) == {}
    assert not adapt_loss_scale(optimizer, finite=False)  # without a scale, it is no cause
    fit_loss_scale(optimizer, "float16")
    assert not any(adapt_loss_scale(optimizer, finite=True) for _ in range(GROWTH_STEPS))
    assert loss_scale(optimizer).item() == loss_scale_metrics(optimizer)["loss_scale"] == 2 * FIRST
    blamed = [adapt_loss_scale(optimizer, finite=False) for _ in range(18)]
    assert blamed == [True] * 17 + [False]
    assert loss_scale(optimizer).item() == 1.0


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw8bit"])
def test_the_scale_is_in_the_checkpoint(tiny_model_dir: Path, tmp_path: Path, optimizer_name: str) -> None:
    if optimizer_name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    training = replace(FLOAT16, optimizer=optimizer_name)
    assert_resumes_exactly(tiny_model_dir, tmp_path, training)
    saved = torch.load(tmp_path / "last" / "optimizer.pt", weights_only=True)
    assert saved["state"][KEY] == {"scale": FIRST, "steps": 1}
    policy = load_policy(str(tiny_model_dir), training)
    optimizer = build_optimizer(policy, training)
    saved["state"][KEY]["scale"] = 8.0
    optimizer.load_state_dict(saved)
    fit_loss_scale(optimizer, "float16")  # as a resumed run does
    assert loss_scale(optimizer).item() == 8.0
    fit_loss_scale(optimizer, "bfloat16")  # as one resumed in another dtype
    assert loss_scale(optimizer) is None
