"""The mathematics of GRPO: tensors in, tensors out. Nothing here moves, logs, or changes what it is given.

Read `objective` first: it is the whole objective of an optimizer step in one function. The training loop computes the
same number piece by piece, and a test holds the two equal.

Shapes: B sequences, G group size, T tokens (aligned with labels). Log-probs are in nats.
Sources: DeepSeekMath (Shao et al. 2024, arXiv:2402.03300) for GRPO; PPO (Schulman et al. 2017, arXiv:1707.06347) for
the clipped objective; Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) for `constant` length normalization and advantages
without division by the standard deviation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.defaults import Training
from utils.own_code import is_own, load_own, place_of, told_with_file_and_line


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at: B responses, padded to T tokens."""

    policy_log_probs: Tensor  # (B, T) under the weights now, with gradient
    response_mask: Tensor  # (B, T) bool: the tokens that are trained on
    rewards: Tensor  # (B,) raw
    advantages: Tensor | None = None  # (B,)
    old_log_probs: Tensor | None = None  # (B, T) under the weights that sampled; None: the weights now are those
    sampler_log_probs: Tensor | None = None  # (B, T) as the engine reported them while it sampled
    reference_log_probs: Tensor | None = None  # (B, T) under a frozen reference policy

    @property
    def ratio(self) -> Tensor:
        """(B, T) pi / pi_old. Without old log-probs it is 1, and still has the gradient of log pi."""
        old = self.policy_log_probs.detach() if self.old_log_probs is None else self.old_log_probs
        return torch.exp(self.policy_log_probs - old)


# Advantages: rewards (B,), those of one prompt side by side -> (B,)


def group_advantages(rewards: Tensor, training: Training) -> Tensor:
    """A = R - mean(group), over std(group) + `advantage_eps` where `use_std_normalization` (unbiased, N - 1).

    DeepSeekMath, section 4.1.2. A group whose rewards are all equal gets exactly 0: the mean of equal floats may be off
    by a rounding error, which the division would blow up. Raises ValueError for a size that does not divide, and for a
    standard deviation of groups of one.
    """
    if rewards.ndim != 1 or rewards.numel() % training.group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not divide into groups of {training.group_size}")
    if training.use_std_normalization and training.group_size < 2:
        raise ValueError("a group of 1 has no standard deviation: raise group_size or turn use_std_normalization off")
    groups = rewards.view(-1, training.group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if training.use_std_normalization:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + training.advantage_eps)
    return torch.where(zero_std_groups(rewards, training.group_size)[:, None], 0.0, advantages).flatten()


def zero_std_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / G,) bool: True for a group whose rewards are all equal, which teaches nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


ADVANTAGES: dict[str, Callable[[Tensor, Training], Tensor]] = {"group": group_advantages}


def compute_advantages(rewards: Tensor, training: Training) -> Tensor:
    """The advantages (B,) of rewards (B,) that the config asks for."""
    return ADVANTAGES["group"](rewards, training)


# Losses: what each token adds to the loss, (B, T), and what is worth measuring, named, each (B, T)

PerToken = tuple[Tensor, dict[str, Tensor]]


def no_baseline(inputs: LossInputs, training: Training) -> PerToken:
    """-R log pi, with the raw reward: REINFORCE (Williams 1992)."""
    return -inputs.rewards[:, None] * inputs.policy_log_probs, {}


def reinforce_with_baseline(inputs: LossInputs, training: Training) -> PerToken:
    """-A log pi: REINFORCE, with the group's mean as baseline."""
    return -inputs.advantages[:, None] * inputs.policy_log_probs, {}


def grpo_clip(inputs: LossInputs, training: Training) -> PerToken:
    """-min(r A, clip(r, 1 - `cliprange`, 1 + `cliprange`) A): PPO equation 7, DeepSeekMath equation 3 without its KL.

    `clipped` is True where clipping changed the objective, that is where the clipped term is strictly the smaller. A
    token whose ratio left the interval on the side where the minimum keeps r A is not clipped.
    """
    ratio, advantages = inputs.ratio, inputs.advantages[:, None]
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - training.cliprange, 1.0 + training.cliprange) * advantages
    return -torch.minimum(unclipped, clipped), {"clipped": (clipped < unclipped).detach()}


def grpo_no_clip(inputs: LossInputs, training: Training) -> PerToken:
    """-r A: the surrogate objective without its clip."""
    return -inputs.ratio * inputs.advantages[:, None], {}


@dataclass(frozen=True)
class Loss:
    """A per-token loss, and what the loop must know of it."""

    per_token: Callable[[LossInputs, Training], PerToken]
    weighs_by: str | None = "advantages"  # or "rewards": what multiplies the gradient of a token; None: unknown
    has_ratio: bool = False  # whether it needs old log-probs, where the weights now are not those that sampled

    def has_gradient(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """(B,), (B,) -> (B,) bool: which rollouts can change the policy. The others need no forward pass."""
        if self.weighs_by is None:
            return torch.ones_like(rewards, dtype=torch.bool)
        return (rewards if self.weighs_by == "rewards" else advantages) != 0

    def needs_old_log_probs(self, training: Training) -> bool:
        """With one optimizer step per rollout batch the weights now are those that sampled: the ratio is 1."""
        return self.has_ratio and training.optimizer_steps_per_rollout_batch > 1


LOSSES: dict[str, Loss] = {
    "no_baseline": Loss(no_baseline, weighs_by="rewards"),
    "reinforce_with_baseline": Loss(reinforce_with_baseline),
    "grpo_clip": Loss(grpo_clip, has_ratio=True),
    "grpo_no_clip": Loss(grpo_no_clip, has_ratio=True),
}


def find_loss(name: str) -> Loss:
    """One of LOSSES, or the function that `path/to/file.py:function` names. Raises ValueError."""
    if is_own(name):
        return own_loss(name)
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; choose one of: {', '.join(LOSSES)}, or path/to/file.py:function")
    return LOSSES[name]


@functools.cache
def own_loss(name: str) -> Loss:
    """A loss from a file. It is tried on a small batch; raises ValueError with file and line if it does not fit."""
    function = load_own(name)

    def per_token(inputs: LossInputs, training: Training) -> PerToken:
        with told_with_file_and_line(name):
            returned = function(inputs, training)
        values, extras = returned if isinstance(returned, tuple) else (returned, {})
        if not isinstance(values, Tensor) or values.shape != inputs.policy_log_probs.shape or not values.requires_grad:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            wanted = tuple(inputs.policy_log_probs.shape)
            raise ValueError(
                f"{place_of(name)}: the loss returned {got}; return a tensor of shape {wanted}, the loss of "
                "each token, that has a gradient"
            )
        return values, extras

    log_probs = torch.tensor([[-0.5, -1.0, -0.1], [-2.0, -0.3, -0.7]], requires_grad=True)
    mask, ones = torch.tensor([[True, True, True], [True, True, False]]), torch.tensor([1.0, 0.0])
    given = log_probs.detach()
    sample = LossInputs(log_probs, mask, rewards=ones, advantages=2 * ones - 1, sampler_log_probs=given)
    for old_log_probs in (None, given):  # on-policy and off-policy
        per_token(replace(sample, old_log_probs=old_log_probs), Training())
    return Loss(per_token, getattr(function, "weighs_by", None), getattr(function, "has_ratio", True))


# Aggregation: what a sequence's summed loss is divided by, lengths (B,) float -> (B,) float


def own_length(lengths: Tensor, training: Training) -> Tensor:
    """The mean over a sequence's own tokens: DeepSeekMath equation 3."""
    return lengths


def constant_length(lengths: Tensor, training: Training) -> Tensor:
    """The same number for all, such as the longest response allowed: Dr. GRPO."""
    return torch.full_like(lengths, training.normalize_constant)


def longest_of_microbatch(lengths: Tensor, training: Training) -> Tensor:
    """The longest among each `microbatch_size` in a row: the one mode whose result depends on how a batch is cut."""
    return torch.cat([chunk.max().expand(len(chunk)) for chunk in lengths.split(training.microbatch_size)])


DENOMINATORS: dict[str, Callable[[Tensor, Training], Tensor]] = {
    "mean": own_length,
    "constant": constant_length,
    "microbatch": longest_of_microbatch,
}


def length_denominators(response_mask: Tensor, training: Training) -> Tensor:
    """(B, T) of a whole optimizer batch -> (B,) float, as `normalize_mode` says.

    A response without a trained token counts as length 1: its sum is 0 whatever it is divided by.
    """
    if training.normalize_mode not in DENOMINATORS:
        choices = ", ".join(DENOMINATORS)
        raise ValueError(f"unknown normalize_mode {training.normalize_mode!r}; choose one of: {choices}")
    return DENOMINATORS[training.normalize_mode](response_mask.sum(dim=1).clamp(min=1).float(), training)


def aggregate_loss(per_token: Tensor, response_mask: Tensor, denominators: Tensor, n_sequences: int) -> Tensor:
    """Sum over each sequence's response tokens / its denominator, summed over sequences / n_sequences: a scalar.

    (B, T), (B, T) bool, (B,), int -> (). `n_sequences` and `denominators` are counted over the whole optimizer batch,
    so that microbatches add up to the same loss however it is cut.
    """
    return (torch.where(response_mask, per_token, 0.0).sum(dim=1) / denominators).sum() / n_sequences


def objective(inputs: LossInputs, training: Training) -> Tensor:
    """The loss of one optimizer step over its B rollouts at once: what the training loop must agree with.

    Where `advantages` is None they follow from the rewards and `group_size`. Minimizing it is gradient ascent on
    DeepSeekMath's equation 3 (`loss_type: grpo_clip`, `normalize_mode: mean`), without the KL term.
    """
    if inputs.advantages is None:
        inputs = replace(inputs, advantages=compute_advantages(inputs.rewards, training))
    per_token, _ = find_loss(training.loss_type).per_token(inputs, training)
    denominators = length_denominators(inputs.response_mask, training)
    return aggregate_loss(per_token, inputs.response_mask, denominators, len(inputs.rewards))
