"""The pieces of the inner loop that are not mathematics: old log-probs, the gradient clip, the optimizer step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from configs.defaults import Training
from utils.algorithm.batch import TrainBatch, split_rows, take_microbatch
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.packing import is_packable
from utils.algorithm.policy import trainable
from utils.algorithm.statistics import UpdateStatistics


@torch.no_grad()
def with_old_log_probs(policy: torch.nn.Module, batch: TrainBatch, training: Training) -> TrainBatch:
    """The batch with `old_log_probs` (B, T-1) float32: those under the weights that sampled, the weights now.

    They are computed for the rollouts that have a gradient; elsewhere, and outside the responses, they are 0.
    """
    rows = batch.rows_with_gradient.nonzero().flatten()
    group_size = training.group_size if is_packable(policy) else 1
    computed = []
    for piece in split_rows(rows, batch.sequence_lengths, training.old_log_probs_train_size, None, group_size):
        log_probs, _ = policy_log_probs(policy, take_microbatch(policy, batch, piece), training, with_entropy=False)
        computed.append((piece, log_probs))
    dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    old_log_probs = torch.zeros(batch.response_mask.shape, dtype=dtype)
    for piece, log_probs in computed:  # copied here and not above, where each copy would wait for the device
        old_log_probs[piece, : log_probs.shape[1]] = log_probs.cpu()
    return replace(batch, old_log_probs=old_log_probs)


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
    """Clip the gradient and step, unless loss or gradient is not finite: then the step is skipped, and counted."""
    for parameter in trainable(policy):
        if parameter.grad is None:
            # No rollout had a gradient. A zero gradient lets AdamW apply its momentum, as if it had been computed.
            parameter.grad = torch.zeros_like(parameter)
    grad_norm = clip_gradients(policy, training.max_grad_norm)
    finite = bool(torch.isfinite(grad_norm) & watch.all_finite())  # the one wait for the device per optimizer step
    if finite:
        optimizer.step()
    watch.optimizer_step(grad_norm, taken=finite)
    optimizer.zero_grad()
