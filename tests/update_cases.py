"""Rollouts and settings that tests of the update share."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.defaults import Training
from utils.algorithm.advantages import compute_advantages
from utils.algorithm.batch import TrainBatch, make_train_batch
from utils.algorithm.optimizers import LOW_BITS
from utils.algorithm.policy import build_optimizer, load_policy
from utils.records import Problem, Prompt, Rollout
from utils.run.checkpoint import Checkpoints, TrainState

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


def assert_resumes_exactly(model_dir: Path, folder: Path, training: Training) -> None:
    """A step, a save, and a step: the last one gives the same weights from the checkpoint as without it."""
    from train_grpo import update_policy
    from utils import tiny

    def step_once_more(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        assert update_policy(policy, optimizer, make_batch(seed=1), training, 1).n_optimizer_steps == 1
        masters = [state[LOW_BITS] for state in optimizer.state.values() if LOW_BITS in state]
        return torch.cat([t.detach().float().cpu().flatten() for t in [*policy.parameters(), *masters]])

    policy = load_policy(str(model_dir), training)
    optimizer, checkpoints = build_optimizer(policy, training), Checkpoints(folder, keep=1)
    update_policy(policy, optimizer, make_batch(seed=0), training, 0)
    assert checkpoints.save(TrainState(steps_done=1), policy, tiny.build_tokenizer(), optimizer) is None
    straight = step_once_more(policy, optimizer)
    policy = load_policy(str(folder / "last"), training)
    optimizer = build_optimizer(policy, training)
    checkpoints.load(folder / "last", optimizer)
    # sums on a GPU may come in another order, and an update that is rounded may differ by one of its steps
    allowed = 0.0 if training.device == "cpu" else 2 * training.learning_rate
    assert (step_once_more(policy, optimizer) - straight).abs().max() <= allowed
