"""Rollouts and settings that tests of the update share."""

from __future__ import annotations

import torch

from configs.defaults import Training
from utils.algorithm.advantages import compute_advantages
from utils.algorithm.batch import TrainBatch, make_train_batch
from utils.records import Problem, Prompt, Rollout

N = 8
ON_POLICY = Training(
    rollout_batch_size=N, train_batch_size=N, gradient_accumulation_steps=2, group_size=4, learning_rate=1e-3,
    use_gradient_checkpointing=False, use_bnb_adamw8bit=False, dtype="float32", device="cpu", max_tokens=16,
    normalize_constant=16.0, max_grad_norm=1e9,
)  # fmt: skip


def make_batch(
    rewards: tuple[float, ...] = (1, 0, 0, 1, 1, 1, 1, 1), pad_id: int = 0, seed: int = 0, n_repeats: int = 1
) -> TrainBatch:
    """Eight rollouts of several lengths (times `n_repeats`), one empty; the second group's rewards are equal."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(1, 250, (n,), generator=generator).tolist())  # noqa: E731
    rollouts = []
    for i, length in enumerate(n_repeats * n for n in [3, 7, 0, 5, 2, 9, 4, 1]):
        prompt = Prompt(Problem("?", "1"), "", draw(2 + i % 3))
        rollouts.append(Rollout(prompt, "", draw(length), (-1.0,) * length, "stop"))
    raw = torch.tensor(rewards, dtype=torch.float32)
    return make_train_batch(rollouts, raw, compute_advantages(raw, ON_POLICY), pad_id=pad_id)
