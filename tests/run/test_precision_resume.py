"""Runs in each precision, killed and resumed: they end as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from run_cases import arguments, assert_equal_runs, finish, launch, rows_of, wait_for

from utils.algorithm.loss_scale import KEY
from utils.algorithm.optimizers import LOW_BITS
from utils.run.checkpoint import OPTIMIZER_FILE
from utils.run.ending import Status

pytestmark = pytest.mark.slow

WAYS = {
    LOW_BITS: ["training.dtype=bfloat16", "training.optimizer=adamw8bit_master", "training.head_dtype=float32"],
    KEY: ["training.autocast_dtype=float16"],
}


@pytest.mark.parametrize("kept", WAYS)
def test_a_kill_leaves_no_trace(world: Path, tmp_path: Path, kept: str) -> None:
    """`kept` is what the optimizer's state holds beside AdamW's moments. Learning rate 1e-5: no weight moves far."""
    if kept == LOW_BITS:
        pytest.importorskip("bitsandbytes")  # here, so that no forked process imports it
    options = [*WAYS[kept], "training.n_grpo_steps=3", "training.learning_rate=1e-5", "training.eval_interval=null"]
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert finish(arguments(world, whole, *options)) == Status.FINISHED
    process = launch(arguments(world, output, *options))
    wait_for(process, lambda: len(rows_of(output / "metrics.jsonl")) >= 1)  # in the second step
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert finish([*arguments(world, output, *options), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, whole)
    state = torch.load(output / "checkpoints" / "last" / OPTIMIZER_FILE, weights_only=True)["state"]
    if kept == KEY:
        assert state[KEY]["steps"] > 0
        assert all(row["train/loss_scale"] > 1 for row in rows_of(output / "metrics.jsonl") if "grpo_step" in row)
    else:
        groups = [group for entry in state.values() for group in (entry, *entry.values()) if isinstance(group, dict)]
        assert any(group[LOW_BITS].any() for group in groups if LOW_BITS in group)  # bitsandbytes nests some
