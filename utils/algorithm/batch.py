"""Rollouts -> padded tensors with masks -> minibatches -> microbatches.

How a minibatch is cut into microbatches never changes its loss: denominators are counted before it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configs.defaults import Training
from utils.algorithm.aggregation import length_denominators
from utils.algorithm.loss_inputs import LossInputs
from utils.algorithm.losses import Loss
from utils.algorithm.packing import Packing, is_packable, pack
from utils.algorithm.parallel import own_rows
from utils.records import Rollout
from utils.seeding import derive_seed


@dataclass(frozen=True)
class TrainBatch:
    """B rollouts as tensors on the CPU, padded on the right to T tokens (prompt and response together).

    `response_mask` is aligned with the labels, `input_ids[:, 1:]`: entry t is True where label t is trained on. It
    comes from lengths, since the pad id may be the end id. What else a loss or its aggregation needs is a field.
    """

    input_ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T-1) bool
    sequence_lengths: Tensor  # (B,) int64: prompt and response
    rewards: Tensor  # (B,) float32, raw
    advantages: Tensor  # (B,) float32
    sampler_log_probs: Tensor  # (B, T-1) float32, 0 outside the response
    old_log_probs: Tensor | None = None  # (B, T-1), 0 outside the response; None: those of the current weights
    reference_log_probs: Tensor | None = None  # (B, T-1)
    has_gradient: Tensor | None = None  # (B,) bool: rollouts that go through the model; None: all
    denominators: Tensor | None = None  # (B,) what each sequence's summed loss is divided by
    vocabulary_size: int | None = None  # ids from this one on cannot be sampled: probability 0; None: all can

    @property
    def rows_with_gradient(self) -> Tensor:
        """(B,) bool."""
        return torch.ones(len(self.rewards), dtype=torch.bool) if self.has_gradient is None else self.has_gradient


def make_train_batch(
    rollouts: Sequence[Rollout],
    rewards: Tensor,
    advantages: Tensor,
    vocabulary_size: int | None = None,
    mask_truncated: bool = False,
    pad_id: int = 0,
) -> TrainBatch:
    """Exactly the ids that were sampled, with rewards and advantages (B,), as tensors on the CPU.

    With `mask_truncated` no token of a response that ran into max_tokens is trained on. Any `pad_id`
    will do, since masks come from lengths and no real token sees what is to its right.
    """
    prompts = [rollout.prompt.token_ids for rollout in rollouts]
    responses = [rollout.response_ids for rollout in rollouts]
    input_ids = pad([p + r for p, r in zip(prompts, responses, strict=True)], pad_id)
    prompt_lengths, response_lengths = lengths_of(prompts), lengths_of(responses)
    mask = response_mask(prompt_lengths, response_lengths, input_ids.shape[1])
    sampler_log_probs = torch.zeros(mask.shape, dtype=torch.float32)
    # a mask lists its True entries row by row, which is the order of the rollouts
    sampler_log_probs[mask] = torch.tensor([lp for rollout in rollouts for lp in rollout.sampler_log_probs])
    if mask_truncated:
        mask = mask & ~torch.tensor([[rollout.truncated] for rollout in rollouts])
    return TrainBatch(
        input_ids=input_ids,
        response_mask=mask,
        sequence_lengths=prompt_lengths + response_lengths,
        rewards=rewards,
        advantages=advantages,
        sampler_log_probs=sampler_log_probs,
        vocabulary_size=vocabulary_size,
    )


def mark_gradients(batch: TrainBatch, loss: Loss, training: Training) -> TrainBatch:
    """Leave rollouts that cannot change the policy out of forward and backward, if `skip_zero_advantage`.

    They still count in the denominators: the loss is a mean over all rollouts.
    """
    if not training.skip_zero_advantage:
        return batch
    has_gradient = loss.has_gradient(batch.rewards, batch.advantages, training)
    if training.mask_truncated:
        has_gradient = has_gradient & batch.response_mask.any(dim=1)
    return replace(batch, has_gradient=has_gradient)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad id, or the end id if the tokenizer has none: masks come from lengths, so any id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of ids -> (B, T) int64, padded on the right."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id)


def response_mask(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """(B,), (B,), T -> (B, T-1) bool, aligned with labels: True where the label is a response token."""
    start, label = prompt_lengths[:, None], torch.arange(1, width)
    return (label >= start) & (label < start + response_lengths[:, None])


def lengths_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """B rows of ids -> (B,) int64."""
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


@dataclass(frozen=True)
class Microbatch:
    """M rows of a TrainBatch that go through the model at once, cut to their longest, on the policy's device."""

    rows: Tensor  # (M,) which rows of the batch these are, on the CPU
    input_ids: Tensor  # (M, t)
    response_mask: Tensor  # (M, t-1)
    response_index: Tensor  # (N,) where the flattened mask is True
    rewards: Tensor  # (M,)
    advantages: Tensor  # (M,)
    sampler_log_probs: Tensor  # (M, t-1)
    old_log_probs: Tensor | None  # (M, t-1), None if they are those of the current weights
    reference_log_probs: Tensor | None  # (M, t-1)
    denominators: Tensor | None  # (M,)
    packing: Packing | None  # the same tokens without padding, for policies that take them so
    vocabulary_size: int | None

    def loss_inputs(self, policy_log_probs: Tensor) -> LossInputs:
        """What a loss sees of these rows, with log-probs (M, t-1) under the current weights."""
        return LossInputs(
            policy_log_probs=policy_log_probs,
            response_mask=self.response_mask,
            rewards=self.rewards,
            advantages=self.advantages,
            old_log_probs=self.old_log_probs,
            sampler_log_probs=self.sampler_log_probs,
            reference_log_probs=self.reference_log_probs,
        )


def minibatches(n_rollouts: int, training: Training, steps_done: int) -> Iterator[Tensor]:
    """The rows of each optimizer step: every rollout once per epoch, in an order that is the epoch's own."""
    for epoch in range(training.epochs_per_rollout_batch):
        generator = torch.Generator().manual_seed(derive_seed(training.seed, "minibatches", steps_done, epoch))
        yield from torch.randperm(n_rollouts, generator=generator).split(training.train_batch_size)


def microbatches(policy: torch.nn.Module, batch: TrainBatch, rows: Tensor, training: Training) -> Iterator[Microbatch]:
    """Cut the rows (N,) of a minibatch that have a gradient into microbatches, on the policy's device.

    With several ranks only this one's share of those rows; what their losses are divided by is counted over all.
    """
    denominators = torch.ones(len(batch.rewards), dtype=torch.float64)
    denominators[rows] = length_denominators(batch.response_mask[rows], rows // training.group_size, training)
    batch = replace(batch, denominators=denominators)
    trained = rows[batch.rows_with_gradient[rows]]
    # a prompt is computed once for the rows that stay together
    group_size = training.group_size if is_packable(policy) else 1
    size, max_tokens = training.microbatch_size, training.max_tokens_per_microbatch
    own = own_rows(trained, batch.sequence_lengths, group_size)
    for piece in split_rows(own, batch.sequence_lengths, size, max_tokens, group_size):
        yield take_microbatch(policy, batch, piece)


def take_microbatch(policy: torch.nn.Module, batch: TrainBatch, rows: Tensor) -> Microbatch:
    """Pick rows (M,) out of a batch, for the policy's device; on a GPU the copies do not make the host wait."""
    device = next(policy.parameters()).device
    width = int(batch.sequence_lengths[rows].max())
    input_ids, mask = batch.input_ids[rows, :width], batch.response_mask[rows, : width - 1]

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def picked(values: Tensor | None) -> Tensor | None:
        """Of (B,) or (B, T-1)."""
        if values is None:
            return None
        return on_device(values[rows] if values.ndim == 1 else values[rows, : width - 1])

    return Microbatch(
        rows=rows,
        input_ids=on_device(input_ids),
        response_mask=on_device(mask),
        response_index=on_device(mask.flatten().nonzero().squeeze(-1)),
        rewards=picked(batch.rewards),
        advantages=picked(batch.advantages),
        sampler_log_probs=picked(batch.sampler_log_probs),
        old_log_probs=picked(batch.old_log_probs),
        reference_log_probs=picked(batch.reference_log_probs),
        denominators=picked(batch.denominators),
        packing=pack(input_ids, mask).to(device) if is_packable(policy) and mask.any() else None,
        vocabulary_size=batch.vocabulary_size,
    )


def split_rows(
    rows: Tensor, sequence_lengths: Tensor, size: int, max_tokens: int | None = None, group_size: int = 1
) -> list[Tensor]:
    """Cut rows (N,) into microbatches of neighbours in length, so that little is padding; longest first.

    `size` sequences each, or as many as fit into `max_tokens` with their padding (at least one). With `group_size`, the
    rows of a group, which share a prompt, stay together, and groups are sorted by their longest row.
    """
    lengths, groups = sequence_lengths[rows], rows // group_size
    longest = torch.zeros(len(sequence_lengths), dtype=torch.int64).scatter_reduce(0, groups, lengths, "amax")[groups]
    # lexicographic, the weightiest key last: within a group by length, then by group, then by the group's longest
    order = lengths.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    order = order[longest[order].argsort(descending=True, stable=True)]
    pieces, start, width = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        width = max(width, length)
        if i > start and (i - start == size if max_tokens is None else (i + 1 - start) * width > max_tokens):
            pieces.append(rows[order[start:i]])
            start, width = i, length
    if len(rows):
        pieces.append(rows[order[start:]])
    return pieces
