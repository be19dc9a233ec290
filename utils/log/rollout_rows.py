"""A rollout as a row of rollouts.jsonl, and which rollouts are written: whole groups, chosen without any generator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from utils.log.files import Row
from utils.records import Reward, Rollout
from utils.seeding import derive_seed


def rollout_rows(
    split: str,
    grpo_step: int,
    rollouts: Sequence[Rollout],
    rewards: Sequence[Reward],
    advantages: Sequence[float] | None = None,
    *,
    group_size: int = 1,
    chosen: Sequence[int] | None = None,
) -> Iterator[Row]:
    """The rows of the `chosen` groups (None: all groups). Rollouts of one prompt are `group_size` side by side.

    Rows of one split, step and `group` belong together: they answer the same prompt.
    """
    for group in range(len(rollouts) // group_size) if chosen is None else chosen:
        for i in range(group * group_size, (group + 1) * group_size):
            rollout, reward = rollouts[i], rewards[i]
            yield {
                "split": split,
                "grpo_step": grpo_step,
                "group": group,
                "index": i,
                "question": rollout.prompt.problem.question,
                "prompt": rollout.prompt.text,
                "response": rollout.response,
                "truth": rollout.prompt.problem.answer,
                "format_reward": float(reward.format),
                "answer_reward": float(reward.answer),
                "reward": float(reward.total),
                "advantage": None if advantages is None else float(advantages[i]),
                "finish_reason": rollout.finish_reason,
                "response_length": len(rollout.response_ids),
            }


def choose_groups(split: str, grpo_step: int, n_rollouts: int, group_size: int, n: int) -> list[int]:
    """The groups that n rollouts fill, the last one made whole.

    The choice depends only on split, step and number: no random generator is used, and a repeat chooses the same
    groups. The split "eval" has the same problems at every step.
    """
    n_groups, wanted = n_rollouts // group_size, -(-n // group_size)
    seed = derive_seed(0, f"logging/{split}", 0 if split == "eval" else grpo_step)
    return sorted(random.Random(seed).sample(range(n_groups), min(wanted, n_groups)))
