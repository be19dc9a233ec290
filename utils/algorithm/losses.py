"""The mathematics of GRPO: tensors in, tensors out. Nothing here moves, logs or changes what it is given.

Shapes: B sequences, G group size, T tokens (aligned with labels), V vocabulary. Log-probs and entropy are in nats.
Sources: DeepSeekMath (Shao et al. 2024, arXiv:2402.03300) for GRPO; PPO (Schulman et al. 2017, arXiv:1707.06347) for
the clipped objective; Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) for `constant` length normalization and advantages
without division by the standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def masked_mean(tensor: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the entries where mask is 1, along `dim` (None: all). NaN where none is, as `torch.mean` of nothing."""
    mask = mask.bool()
    kept = torch.where(mask, tensor, 0.0)
    return kept.sum() / mask.sum() if dim is None else kept.sum(dim) / mask.sum(dim)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: float = 1.0) -> Tensor:
    """Sum over the entries where mask is 1, along `dim` (None: all), divided by a constant."""
    kept = torch.where(mask.bool(), tensor, 0.0)
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits): (..., V) -> (...), in nats. H = logsumexp(z) - sum p z, safe for large logits."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    # p log p is 0 where p is 0, also for a logit of minus infinity
    weighted = torch.where(shifted == -torch.inf, 0.0, shifted.softmax(dim=-1) * shifted)
    return shifted.logsumexp(dim=-1) - weighted.sum(dim=-1)


def group_advantages(rewards: Tensor, group_size: int, normalize_by_std: bool, advantage_eps: float) -> Tensor:
    """Rewards (B,), those of one prompt side by side -> advantages (B,).

    A = R - mean(group), divided by std(group) + advantage_eps where asked (unbiased, N - 1): DeepSeekMath section
    4.1.2. A group whose rewards are all equal gets exactly 0: the mean of equal floats may be off by a rounding error,
    which the division would blow up. Raises ValueError for sizes that do not divide, or a group without a deviation.
    """
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not divide into groups of {group_size}")
    if normalize_by_std and group_size < 2:
        raise ValueError("a group of 1 has no standard deviation: raise group_size or turn use_std_normalization off")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps)
    return torch.where(zero_std_groups(rewards, group_size)[:, None], 0.0, advantages).flatten()


def zero_std_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (B,) -> (B / G,) bool: True for a group whose rewards are all equal, which teaches nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def compute_group_normalized_rewards(
    reward_fn: Callable[[str, str], dict[str, float]],
    rollout_responses: Sequence[str],
    repeated_ground_truths: Sequence[str],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Score B responses and turn the rewards into advantages: (advantages (B,), raw_rewards (B,), metadata)."""
    scores = [reward_fn(r, truth) for r, truth in zip(rollout_responses, repeated_ground_truths, strict=True)]
    rewards = torch.tensor([score["reward"] for score in scores], dtype=torch.float32)
    advantages = group_advantages(rewards, group_size, normalize_by_std, advantage_eps)
    metadata = {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        "format_reward_mean": sum(score["format_reward"] for score in scores) / len(scores),
        "answer_reward_mean": sum(score["answer_reward"] for score in scores) / len(scores),
        "frac_zero_std_groups": zero_std_groups(rewards, group_size).float().mean().item(),
    }
    return advantages, rewards, metadata


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages: Tensor, policy_log_probs: Tensor) -> Tensor:
    """-A log pi, per token: (B, 1), (B, T) -> (B, T). REINFORCE (Williams 1992)."""
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(
    advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - cliprange, 1 + cliprange) A), r = exp(policy_log_probs - old_log_probs), per token.

    (B, 1), (B, T), (B, T) -> (B, T) and metadata: `ratio` (B, T) and `clipped` (B, T) bool, True where clipping changed
    the objective, that is where the clipped term is strictly the smaller: a token whose ratio left the interval on the
    side where the minimum keeps r A is not clipped. PPO equation 7.
    """
    ratio = torch.exp(policy_log_probs - old_log_probs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange) * advantages
    metadata = {"ratio": ratio.detach(), "clipped": (clipped < unclipped).detach()}
    return -torch.minimum(unclipped, clipped), metadata


def compute_policy_gradient_loss(
    policy_log_probs: Tensor,
    loss_type: str,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token loss (B, T) that `loss_type` names, and its metadata; raw_rewards and advantages are (B, 1).

    Raises ValueError for an unknown loss type, or where what the loss needs is None.
    """

    def needed(name: str, value: Tensor | float | None) -> Tensor | float:
        if value is None:
            raise ValueError(f"loss_type {loss_type!r} needs {name}")
        return value

    if loss_type == "no_baseline":
        return compute_naive_policy_gradient_loss(needed("raw_rewards", raw_rewards), policy_log_probs), {}
    if loss_type == "reinforce_with_baseline":
        return compute_naive_policy_gradient_loss(needed("advantages", advantages), policy_log_probs), {}
    if loss_type == "grpo_clip":
        return compute_grpo_clip_loss(
            needed("advantages", advantages),
            policy_log_probs,
            needed("old_log_probs", old_log_probs),
            needed("cliprange", cliprange),
        )
    if loss_type == "grpo_no_clip":
        ratio = torch.exp(policy_log_probs - needed("old_log_probs", old_log_probs))
        return -ratio * needed("advantages", advantages), {"ratio": ratio.detach()}
    choices = "no_baseline, reinforce_with_baseline, grpo_clip, grpo_no_clip"
    raise ValueError(f"unknown loss_type {loss_type!r}; choose one of: {choices}")


def length_denominators(
    response_lengths: Tensor, normalize_mode: str, normalize_constant: float, microbatch_size: int
) -> Tensor:
    """What each sequence's summed token loss is divided by: (B,) int -> (B,) float.

    `mean`: its own length. `constant`: the constant. `microbatch`: the longest response among each `microbatch_size`
    sequences in a row, the one mode whose result depends on how a batch is cut. An empty response counts as length 1:
    its sum is 0 whatever it is divided by.
    """
    lengths = response_lengths.clamp(min=1).float()
    if normalize_mode == "mean":
        return lengths
    if normalize_mode == "constant":
        return torch.full_like(lengths, normalize_constant)
    if normalize_mode == "microbatch":
        return torch.cat([chunk.max().expand(len(chunk)) for chunk in lengths.split(microbatch_size)])
    raise ValueError(f"unknown normalize_mode {normalize_mode!r}; choose one of: mean, constant, microbatch")


def aggregate_loss(per_token_loss: Tensor, response_mask: Tensor, denominators: Tensor, n_sequences: int) -> Tensor:
    """Sum over each sequence's response tokens / its denominator, summed over sequences / n_sequences: a scalar."""
    return (masked_normalize(per_token_loss, response_mask, dim=1) / denominators).sum() / n_sequences


def grpo_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    loss_type: str,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
    normalize_mode: str = "mean",
    normalize_constant: float = 1024.0,
    denominators: Tensor | None = None,
    n_sequences: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one microbatch and its backward pass: (loss, metadata), the loss detached.

    The loss is the microbatch's mean over sequences / gradient_accumulation_steps. The training loop, whose
    microbatches differ in size, gives `denominators` (B,) and `n_sequences` instead, counted over the whole minibatch.
    """
    per_token_loss, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )
    if denominators is None:
        lengths = response_mask.sum(dim=1)
        denominators = length_denominators(lengths, normalize_mode, normalize_constant, len(lengths))
    if n_sequences is None:
        n_sequences = len(policy_log_probs) * gradient_accumulation_steps
    loss = aggregate_loss(per_token_loss, response_mask, denominators, n_sequences)
    loss.backward()
    return loss.detach(), metadata


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the responses and its backward pass: (loss, metadata), the loss detached.

    The masked sum over all tokens / normalize_constant / batch size / gradient_accumulation_steps.
    """
    summed = masked_normalize(-policy_log_probs, response_mask, normalize_constant=normalize_constant)
    loss = summed / len(policy_log_probs) / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {}
