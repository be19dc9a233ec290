"""The functions of Stanford's CS336, assignment 5, under their names: thin adapters over the project's own.

The training loop uses none of them. `r1_zero_reward_fn` and `question_only_reward_fn` are in `utils/rewards/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configs.defaults import Training
from utils.algorithm.advantages import compute_advantages, zero_std_groups
from utils.algorithm.aggregation import aggregate_loss, length_denominators
from utils.algorithm.batch import lengths_of, pad, pad_id_of, response_mask
from utils.algorithm.log_probs import compute_entropy, get_response_log_probs
from utils.algorithm.loss_inputs import LossInputs
from utils.algorithm.losses import find_loss

__all__ = [
    "compute_entropy",
    "compute_group_normalized_rewards",
    "compute_grpo_clip_loss",
    "compute_naive_policy_gradient_loss",
    "compute_policy_gradient_loss",
    "get_response_log_probs",
    "grpo_microbatch_train_step",
    "masked_mean",
    "masked_normalize",
    "sft_microbatch_train_step",
    "tokenize_prompt_and_output",
]


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenize pairs of text: dict of `input_ids`, `labels`, `response_mask`, each (B, T-1), padded on the right.

    Prompt and output are tokenized apart, so no token spans both. `labels` are `input_ids` shifted by one; the mask
    (bool) is True where the label is an output token.
    """
    prompts = [tokenizer(text).input_ids for text in prompt_strs]
    outputs = [tokenizer(text, add_special_tokens=False).input_ids for text in output_strs]
    ids = pad([p + o for p, o in zip(prompts, outputs, strict=True)], pad_id_of(tokenizer))
    mask = response_mask(lengths_of(prompts), lengths_of(outputs), ids.shape[1])
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask}


def masked_mean(tensor: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the entries where mask is 1, along `dim` (None: all). NaN if none is, as `torch.mean` of nothing."""
    mask = mask.bool()
    kept = torch.where(mask, tensor, 0.0)
    return kept.sum() / mask.sum() if dim is None else kept.sum(dim) / mask.sum(dim)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: float = 1.0) -> Tensor:
    """Sum over the entries where mask is 1, along `dim` (None: all), divided by a constant."""
    kept = torch.where(mask.bool(), tensor, 0.0)
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


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
    settings = Training(group_size=group_size, advantage_eps=advantage_eps, use_std_normalization=normalize_by_std)
    metadata = {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        "format_reward_mean": sum(score["format_reward"] for score in scores) / len(scores),
        "answer_reward_mean": sum(score["answer_reward"] for score in scores) / len(scores),
        "frac_zero_std_groups": zero_std_groups(rewards, group_size).float().mean().item(),
    }
    return compute_advantages(rewards, settings), rewards, metadata


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages: Tensor, policy_log_probs: Tensor) -> Tensor:
    """-A log pi, per token: (B, 1), (B, T) -> (B, T)."""
    return compute_policy_gradient_loss(
        policy_log_probs, "reinforce_with_baseline", advantages=raw_rewards_or_advantages
    )[0]


def compute_grpo_clip_loss(
    advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_clip`: (B, 1), (B, T), (B, T) -> (B, T) and metadata `ratio` (B, T) and `clipped` (B, T) bool."""
    return compute_policy_gradient_loss(
        policy_log_probs, "grpo_clip", advantages=advantages, old_log_probs=old_log_probs, cliprange=cliprange
    )


def compute_policy_gradient_loss(
    policy_log_probs: Tensor,
    loss_type: str,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token loss (B, T) that `loss_type` names, and its metadata; raw_rewards and advantages are (B, 1).

    Raises ValueError for an unknown loss type, and if what the loss needs is None.
    """
    loss = find_loss(loss_type)
    given = {"raw_rewards": raw_rewards, "advantages": advantages, "old_log_probs": old_log_probs}
    needed = ["raw_rewards" if loss.weighs_by == "rewards" else "advantages"] + ["old_log_probs"] * loss.has_ratio
    missing = [name for name in needed if given[name] is None]
    if loss_type == "grpo_clip" and cliprange is None:
        missing.append("cliprange")
    if missing:
        raise ValueError(f"loss_type {loss_type!r} needs {' and '.join(missing)}")
    inputs = LossInputs(
        policy_log_probs=policy_log_probs,
        response_mask=torch.ones_like(policy_log_probs, dtype=torch.bool),
        rewards=None if raw_rewards is None else raw_rewards.squeeze(1),
        advantages=None if advantages is None else advantages.squeeze(1),
        old_log_probs=old_log_probs,
    )
    settings = Training() if cliprange is None else Training(cliprange=cliprange)
    per_token, extras = loss.per_token(inputs, settings)
    return per_token, extras | ({"ratio": inputs.ratio.detach()} if loss.has_ratio else {})


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one microbatch and its backward pass: (loss, metadata), the loss detached.

    The loss is the microbatch's mean over sequences / gradient_accumulation_steps. Calls `backward()`.
    """
    per_token, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )
    n_rows = len(policy_log_probs)
    settings = Training(
        normalize_mode=normalize_mode,
        normalize_constant=normalize_constant,
        train_batch_size=n_rows,
        gradient_accumulation_steps=1,
    )
    denominators = length_denominators(response_mask, torch.arange(n_rows), settings)
    loss = aggregate_loss(per_token, response_mask.bool(), denominators, n_rows * gradient_accumulation_steps)
    loss.backward()
    return loss.detach(), metadata


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the responses and its backward pass: (loss, metadata), the loss detached.

    The masked sum over all tokens / normalize_constant / batch size / gradient_accumulation_steps. Calls `backward()`.
    """
    summed = masked_normalize(-policy_log_probs, response_mask, normalize_constant=normalize_constant)
    loss = summed / len(policy_log_probs) / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {}
