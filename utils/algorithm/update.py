"""The inner loop of GRPO: epochs x minibatches x microbatches, gradient clipping, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.defaults import Training
from utils.algorithm.batch import Microbatch, split_rows, take_microbatch
from utils.algorithm.log_probs import response_log_probs
from utils.algorithm.losses import grpo_microbatch_train_step, length_denominators
from utils.algorithm.packing import is_packable
from utils.algorithm.statistics import StepSums, add_sampler_gap, add_statistics
from utils.algorithm.weight_movement import WeightMovement
from utils.records import TrainBatch
from utils.seeding import derive_seed


@dataclass
class UpdateResult:
    """What one rollout batch did to the policy."""

    metrics: dict[str, float]
    n_optimizer_steps: int = 0  # taken
    skipped: list[bool] = field(default_factory=list)  # an entry an optimizer step: skipped for a non-finite number?
    nonfinite_rows: list[int] = field(default_factory=list)  # rows of the batch that may have caused it
    abandoned: bool = False  # asked to stop before any optimizer step: the weights are as they were

    def skipped_in_a_row(self, before: int) -> int:
        """How many optimizer steps have been skipped since the last one taken, after `before` and these."""
        for was_skipped in self.skipped:
            before = before + 1 if was_skipped else 0
        return before


def update_policy(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    training: Training,
    grpo_step: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> UpdateResult:
    """Train on one rollout batch: `epochs_per_rollout_batch` passes, an optimizer step for each `train_batch_size`.

    A rollout whose advantage (with `no_baseline`: reward) is exactly 0 has no gradient and is left out where
    `skip_zero_advantage`; the loss is still a mean over all rollouts. An optimizer step with a non-finite loss or
    gradient is skipped. `stop_requested` is asked after every microbatch; if it says yes before the first optimizer
    step, the update is abandoned with the weights untouched, and otherwise finished, so that weights are always those
    of a whole GRPO step.
    """
    device = next(policy.parameters()).device
    result, sums = UpdateResult(metrics={}), StepSums()
    signal = batch.rewards if training.loss_type == "no_baseline" else batch.advantages
    trained = (signal != 0) if training.skip_zero_advantage else torch.ones_like(signal, dtype=torch.bool)
    movement = WeightMovement(policy)
    old_log_probs = None
    if needs_old_log_probs(training):
        old_log_probs = compute_old_log_probs(policy, batch, trained.nonzero().flatten(), training)

    for rows in minibatches(len(signal), training, grpo_step):
        untouched = sums.weights_untouched
        if untouched and not trained[rows].any():
            compare_without_training(policy, batch, rows, training, sums)
        loss = torch.zeros((), device=device)
        nonfinite = []
        for microbatch in microbatches(policy, batch, rows, trained, old_log_probs, training):
            microbatch_loss, bad_rows = train_on_microbatch(policy, microbatch, training, sums)
            loss += microbatch_loss
            nonfinite.append((microbatch.rows, bad_rows))
            if untouched and stop_requested():
                optimizer.zero_grad()
                result.abandoned = True
                return result
        take_optimizer_step(policy, optimizer, loss, nonfinite, training.max_grad_norm, sums, result)

    result.metrics = {
        "frac_trained_rollouts": trained.double().mean().item(),
        "nonfinite_steps": float(sum(result.skipped)),
        "frac_weights_moved": movement.share(),
        **sums.metrics(training.max_grad_norm),
    }
    return result


def needs_old_log_probs(training: Training) -> bool:
    """Whether the loss has a ratio and more than one optimizer step follows a rollout batch.

    With one step the current weights are those that sampled, so old log-probs are the current ones, detached.
    """
    return training.loss_type in ("grpo_clip", "grpo_no_clip") and takes_several_steps(training)


def takes_several_steps(training: Training) -> bool:
    """Whether more than one optimizer step follows a rollout batch: off-policy from the second on."""
    return training.epochs_per_rollout_batch > 1 or training.train_batch_size < training.rollout_batch_size


@torch.no_grad()
def compute_old_log_probs(policy: torch.nn.Module, batch: TrainBatch, rows: Tensor, training: Training) -> Tensor:
    """(B, T-1) float32 on the CPU: log-probs under the weights that sampled, 0 outside the responses of `rows`."""
    parameter = next(policy.parameters())
    unused = torch.ones(len(batch.rewards))
    computed = []
    packed = is_packable(policy)
    group_size = training.group_size if packed else 1
    for piece in split_rows(rows, batch.sequence_lengths, training.old_log_probs_train_size, None, group_size):
        microbatch = take_microbatch(batch, piece, unused, None, parameter.device, packed)
        computed.append((piece, policy_log_probs(policy, microbatch, training, with_entropy=False)[0]))
    old_log_probs = torch.zeros(batch.response_mask.shape, dtype=torch.promote_types(parameter.dtype, torch.float32))
    for piece, log_probs in computed:  # copied here and not above, where each copy would wait for the device
        old_log_probs[piece, : log_probs.shape[1]] = log_probs.cpu()
    return old_log_probs


def minibatches(n_rollouts: int, training: Training, grpo_step: int) -> Iterator[Tensor]:
    """The rows of each optimizer step: every rollout once an epoch, in an order of the epoch's own."""
    for epoch in range(training.epochs_per_rollout_batch):
        generator = torch.Generator().manual_seed(derive_seed(training.seed, "minibatches", grpo_step, epoch))
        yield from torch.randperm(n_rollouts, generator=generator).split(training.train_batch_size)


def microbatches(
    policy: torch.nn.Module,
    batch: TrainBatch,
    rows: Tensor,
    trained: Tensor,
    old_log_probs: Tensor | None,
    training: Training,
) -> Iterator[Microbatch]:
    """Cut the rows of a minibatch that are trained on. Denominators are counted before anything is left out."""
    device, packed = next(policy.parameters()).device, is_packable(policy)
    size = training.microbatch_size
    denominators = torch.ones(len(trained))
    denominators[rows] = length_denominators(
        batch.response_lengths[rows], training.normalize_mode, training.normalize_constant, size
    )
    group_size = training.group_size if packed else 1  # a prompt is computed once for the rows that stay together
    for piece in split_rows(
        rows[trained[rows]], batch.sequence_lengths, size, training.max_tokens_per_microbatch, group_size
    ):
        yield take_microbatch(batch, piece, denominators, old_log_probs, device, packed)


def policy_log_probs(
    policy: torch.nn.Module, microbatch: Microbatch, training: Training, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(M, t-1) log-probs of the response tokens as they were sampled (temperature applied), and their entropy."""
    autocast = nullcontext()
    if training.autocast_dtype is not None:
        autocast = torch.autocast(microbatch.input_ids.device.type, getattr(torch, training.autocast_dtype))
    with autocast:
        return response_log_probs(
            policy,
            microbatch.input_ids,
            microbatch.response_mask,
            temperature=training.temperature,
            chunk_size=training.log_prob_chunk_size,
            with_entropy=with_entropy,
            response_index=microbatch.response_index,
            packing=microbatch.packing,
        )


def train_on_microbatch(
    policy: torch.nn.Module, microbatch: Microbatch, training: Training, sums: StepSums
) -> tuple[Tensor, Tensor]:
    """Forward and backward: (loss, which rows are non-finite (M,) bool), both left on the device."""
    log_probs, entropy = policy_log_probs(policy, microbatch, training, with_entropy=True)
    current = log_probs.detach()
    old = current if microbatch.old_log_probs is None else microbatch.old_log_probs
    loss, metadata = grpo_microbatch_train_step(
        log_probs,
        microbatch.response_mask,
        training.gradient_accumulation_steps,
        training.loss_type,
        raw_rewards=microbatch.rewards,
        advantages=microbatch.advantages,
        old_log_probs=old,
        cliprange=training.cliprange,
        denominators=microbatch.denominators,
        n_sequences=training.train_batch_size,
    )
    # several optimizer steps with a loss that needs no old log-probs: nothing tells the ratio
    known = microbatch.old_log_probs is not None or not takes_several_steps(training)
    add_statistics(sums, microbatch.response_mask, torch.exp(current - old) if known else None, entropy, metadata)
    if microbatch.old_log_probs is not None or sums.weights_untouched:
        add_sampler_gap(sums, microbatch, old)
    finite = torch.isfinite(current) & torch.isfinite(old) & torch.isfinite(microbatch.sampler_log_probs)
    return loss, ~finite.all(dim=1)


@torch.no_grad()
def compare_without_training(
    policy: torch.nn.Module, batch: TrainBatch, rows: Tensor, training: Training, sums: StepSums
) -> None:
    """Compare one microbatch of these rows with the sampler, by a forward pass: none of them is trained on."""
    all_rows = torch.ones(len(batch.rewards), dtype=torch.bool)
    microbatch = next(microbatches(policy, batch, rows, all_rows, None, training))
    add_sampler_gap(sums, microbatch, policy_log_probs(policy, microbatch, training, with_entropy=False)[0])


def clip_gradients(policy: torch.nn.Module, max_grad_norm: float) -> Tensor:
    """Scale the gradient down to a total norm of `max_grad_norm` where it is above; returns the norm before.

    The norm is summed in float32 at least: in bfloat16 it would be off by up to 0.4 %.
    """
    gradients = [parameter.grad for parameter in policy.parameters()]
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)))
    torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_grad_norm, norm)
    return norm


def take_optimizer_step(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    nonfinite: list[tuple[Tensor, Tensor]],
    max_grad_norm: float,
    sums: StepSums,
    result: UpdateResult,
) -> None:
    """Clip the gradient and step, unless loss or gradient is non-finite: then skip the step and note its rows."""
    for parameter in policy.parameters():
        if parameter.grad is None:
            # nothing was trained on: Adam's momentum moves the weights all the same, as with a gradient of 0
            parameter.grad = torch.zeros_like(parameter)
    grad_norm = clip_gradients(policy, max_grad_norm)
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    for _, bad in nonfinite:
        finite = finite & ~bad.any()
    finite = bool(finite)  # the one wait for the device an optimizer step
    if finite:
        optimizer.step()
        result.n_optimizer_steps += 1
        sums.losses.append(loss)
        sums.grad_norms.append(grad_norm)
    else:
        flagged = [rows[bad.cpu()] for rows, bad in nonfinite]
        if not any(map(len, flagged)):  # the gradient alone is non-finite: any of the rows may have caused it
            flagged = [rows for rows, _ in nonfinite]
        result.nonfinite_rows += torch.cat(flagged).tolist() if flagged else []
    result.skipped.append(not finite)
    optimizer.zero_grad()
