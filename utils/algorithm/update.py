"""The pieces of the inner loop that are not mathematics: old log-probs, the gradient clip, the optimizer step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from configs.defaults import Training
from utils.algorithm.adapters import trained_adapter_off
from utils.algorithm.batch import TrainBatch, split_rows, take_microbatch
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.loss_scale import adapt_loss_scale, divide_by_loss_scale
from utils.algorithm.packing import is_packable
from utils.algorithm.parallel import own_rows, sum_gradients, sum_tensor
from utils.algorithm.policy import trainable
from utils.algorithm.statistics import UpdateStatistics


def with_old_log_probs(policy: torch.nn.Module, batch: TrainBatch, training: Training) -> TrainBatch:
    """The batch with `old_log_probs` (B, T-1) float32: under the weights that sampled, which are the current ones."""
    return replace(batch, old_log_probs=frozen_log_probs(policy, batch, training))


def with_reference_log_probs(reference: torch.nn.Module, batch: TrainBatch, training: Training) -> TrainBatch:
    """The batch with `reference_log_probs` (B, T-1) float32, in one pass per rollout batch.

    A policy that trains an adapter is its own reference: what it is without the adapter.
    """
    with trained_adapter_off(reference):
        return replace(batch, reference_log_probs=frozen_log_probs(reference, batch, training))


@torch.no_grad()
def frozen_log_probs(policy: torch.nn.Module, batch: TrainBatch, training: Training) -> Tensor:
    """(B, T-1) float32 log-probs of the rollouts that have a gradient; elsewhere, and outside the responses, 0.

    With several ranks each computes those of its share, and they are put together.
    """
    group_size = training.group_size if is_packable(policy) else 1
    rows = own_rows(batch.rows_with_gradient.nonzero().flatten(), batch.sequence_lengths, group_size)
    computed = []
    for piece in split_rows(rows, batch.sequence_lengths, training.old_log_probs_train_size, None, group_size):
        log_probs, _ = policy_log_probs(policy, take_microbatch(policy, batch, piece), training, with_entropy=False)
        computed.append((piece, log_probs))
    dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    result = torch.zeros(batch.response_mask.shape, dtype=dtype)
    for piece, log_probs in computed:  # copied here: above, each copy would wait for the device
        result[piece, : log_probs.shape[1]] = log_probs.cpu()
    return sum_tensor(result)  # what other ranks compute is 0 here


def learning_rate(training: Training, steps_done: int) -> float:
    """The rate of the GRPO step that follows `steps_done`: risen over `warmup_steps`, then as `lr_schedule` says.

    It depends only on the number of steps, so a resumed run continues exactly.
    """
    if steps_done < training.warmup_steps:
        return training.learning_rate * (steps_done + 1) / training.warmup_steps
    progress = (steps_done - training.warmup_steps) / max(1, training.n_grpo_steps - training.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2}
    return training.learning_rate * factor[training.lr_schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, training: Training, steps_done: int) -> None:
    """Put the schedule's rate into the optimizer; without a schedule, leave it alone."""
    if training.warmup_steps or training.lr_schedule != "constant":
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, steps_done)


def clip_gradients(policy: torch.nn.Module, max_grad_norm: float) -> Tensor:
    """Scale the gradient down to a total norm of `max_grad_norm` if it is above; returns the norm before.

    The norm is summed in float32 at least: in bfloat16 it would be off by up to 0.4 %.
    """
    parameters = trainable(policy)
    gradients = [parameter.grad for parameter in parameters]
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm


def take_optimizer_step(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, training: Training, watch: UpdateStatistics
) -> None:
    """Clip the gradient and step, unless the loss or gradient is not finite: then the step is skipped and counted.

    The gradient is summed over ranks before, so that all of them clip and step alike. If it was only too large for
    float16, that is counted apart, and the loss scale is halved.
    """
    for parameter in trainable(policy):
        if parameter.grad is None:
            # No rollout had a gradient. A zero gradient lets AdamW apply its momentum, as if it had been computed.
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trainable(policy)]
    sum_gradients(gradients)
    divide_by_loss_scale(optimizer, gradients)
    grad_norm = clip_gradients(policy, training.max_grad_norm)
    finite = bool(torch.isfinite(grad_norm) & watch.all_finite())  # the one wait for the device per optimizer step
    if finite:
        optimizer.step()
    too_large = adapt_loss_scale(optimizer, finite) and bool(watch.all_finite())
    watch.optimizer_step(grad_norm, taken=finite, too_large=too_large)
    optimizer.zero_grad()
