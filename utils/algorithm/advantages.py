"""Advantages: how much better a response is than its group. Rewards (B,), those of one prompt side by side -> (B,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from configs.defaults import Training


def group_mean(groups: Tensor, training: Training) -> Tensor:
    """R - mean(group): GRPO (arXiv:2402.03300, section 4.1.2) and, without the standard deviation, Dr. GRPO."""
    return groups - groups.mean(dim=1, keepdim=True)


def leave_one_out(groups: Tensor, training: Training) -> Tensor:
    """R - mean of the group's other rewards = G / (G - 1) (R - mean(group)): RLOO (arXiv:2402.14740)."""
    group_size = groups.shape[1]
    return group_size / (group_size - 1) * group_mean(groups, training)


def maximum_likelihood(groups: Tensor, training: Training) -> Tensor:
    """(R - mean(group)) / (mean(group) + `advantage_eps`), 0 if no response is right: MaxRL (arXiv:2602.02710).

    Expects rewards of 0 or more. The fewer responses are right, the more a right one counts.
    """
    means = groups.mean(dim=1, keepdim=True)
    return torch.where(means == 0, 0.0, group_mean(groups, training) / (means + training.advantage_eps))


ADVANTAGES: dict[str, Callable[[Tensor, Training], Tensor]] = {
    "group": group_mean,
    "rloo": leave_one_out,
    "maxrl": maximum_likelihood,
}


def compute_advantages(rewards: Tensor, training: Training) -> Tensor:
    """(B,) -> (B,): `advantage`, divided by a standard deviation + `advantage_eps` if `use_std_normalization`.

    The standard deviation (unbiased, N - 1) is the group's, or the batch's with `std_scope: batch` (arXiv:2508.08221).
    A group whose rewards are all equal gets exactly 0: the mean of equal floats may be off by a rounding error, which
    the division would amplify. Raises ValueError for a size that does not divide, and for groups of one.
    """
    group_size = training.group_size
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not divide into groups of {group_size}")
    if training.use_std_normalization and group_size < 2:
        raise ValueError("a group of 1 has no standard deviation: raise group_size or turn use_std_normalization off")
    groups = rewards.view(-1, group_size)
    advantages = ADVANTAGES[training.advantage](groups, training)
    if training.use_std_normalization:
        deviation = groups.std(dim=1, keepdim=True) if training.std_scope == "group" else rewards.std()
        advantages = advantages / (deviation + training.advantage_eps)
    return torch.where(zero_std_groups(rewards, group_size)[:, None], 0.0, advantages).flatten()


def zero_std_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / G,) bool: True for a group whose rewards are all equal, which teaches nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)
