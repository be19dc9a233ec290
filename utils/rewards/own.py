"""Reward functions of your own: `training.reward_fn: path/to/file.py:function`, and so under `extra_rewards`.

The function takes one `Rollout` and returns its reward: a number, or a dict (or `Reward`) of format, answer and total.
A number counts as all three. The function is tried on two responses when it is loaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from utils.own_code import file_and_function, load_own, place_of, told_with_file_and_line
from utils.records import Problem, Prompt, Reward, Rollout

PARTS = ("format", "answer", "total")
_PROMPT = Prompt(Problem("What is 2 + 3?", "5"), "User: What is 2 + 3?\nAssistant: <think>", (1, 2, 3))
SAMPLES = (
    Rollout(_PROMPT, r"2 + 3 = 5 </think> <answer> \boxed{5} </answer>", (4, 5, 6), (-0.5,) * 3, "stop", 1),
    Rollout(_PROMPT, "", (4,), (-0.5,), "length"),
)


@functools.cache
def own_reward_fn(name: str) -> Callable[[Sequence[Rollout], Any], list[Reward]]:
    """The function as one over batches. Raises ValueError with file and line if it fails on a sample response."""
    function = load_own(name)

    def reward_fn(rollouts: Sequence[Rollout], grader: Any) -> list[Reward]:
        with told_with_file_and_line(name):
            returned = [function(rollout) for rollout in rollouts]
        return [as_reward(value, name) for value in returned]

    needs = getattr(function, "needs", ())
    needs = (needs,) if isinstance(needs, str) else needs
    reward_fn.needs = tuple((texts,) if isinstance(texts, str) else tuple(texts) for texts in needs)
    reward_fn(SAMPLES, None)
    return reward_fn


def as_reward(value: Any, name: str) -> Reward:
    """What the function returned, as a Reward. Raises ValueError for anything else, and for what is not finite."""
    parts = value
    if isinstance(value, Reward):
        parts = vars(value)
    elif not isinstance(value, Mapping):
        parts = dict.fromkeys(PARTS, value)
    if set(parts) != set(PARTS) or not all(isinstance(part, Real) and math.isfinite(part) for part in parts.values()):
        raise ValueError(
            f"{place_of(name)}: {file_and_function(name)[1]} returned {value!r}; return a finite number, or "
            "a dict with the numbers format, answer and total"
        )
    return Reward(**{part: float(number) for part, number in parts.items()})
