"""Rollouts -> padded tensors with masks -> microbatches. Which rows share a microbatch never changes the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.algorithm.packing import Packing, pack
from utils.records import Rollout, TrainBatch


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenize pairs of text: dict of `input_ids`, `labels`, `response_mask`, each (B, T-1), padded on the right.

    Prompt and output are tokenized apart, so no token spans both. `labels` are `input_ids` shifted by one; the mask
    (bool) is True where the label is an output token. For text that was written, as in SFT; rollouts keep the ids that
    were sampled (`make_train_batch`).
    """
    prompts = [tokenizer(text).input_ids for text in prompt_strs]
    outputs = [tokenizer(text, add_special_tokens=False).input_ids for text in output_strs]
    ids = pad([p + o for p, o in zip(prompts, outputs, strict=True)], pad_id_of(tokenizer))
    mask = response_mask(_lengths(prompts), _lengths(outputs), ids.shape[1])
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask}


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad id, or the end id where the tokenizer has none: masks come from lengths, so any id will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of ids -> (B, T) int64, padded on the right."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id)


def response_mask(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """(B,), (B,), T -> (B, T-1) bool, aligned with labels: True where the label is a response token."""
    label_position = torch.arange(1, width)
    start = prompt_lengths[:, None]
    return (label_position >= start) & (label_position < start + response_lengths[:, None])


def make_train_batch(rollouts: Sequence[Rollout], rewards: Tensor, advantages: Tensor, pad_id: int) -> TrainBatch:
    """The very ids that were sampled, with rewards and advantages (B,), as tensors on the CPU."""
    prompts = [rollout.prompt.token_ids for rollout in rollouts]
    responses = [rollout.response_ids for rollout in rollouts]
    prompt_lengths, response_lengths = _lengths(prompts), _lengths(responses)
    input_ids = pad([p + r for p, r in zip(prompts, responses, strict=True)], pad_id)
    mask = response_mask(prompt_lengths, response_lengths, input_ids.shape[1])
    sampler_log_probs = torch.zeros(mask.shape, dtype=torch.float32)
    # a mask lists its True entries row by row, which is the order that the rollouts stand in
    sampler_log_probs[mask] = torch.tensor([lp for rollout in rollouts for lp in rollout.sampler_log_probs])
    return TrainBatch(
        input_ids=input_ids,
        response_mask=mask,
        sequence_lengths=prompt_lengths + response_lengths,
        response_lengths=response_lengths,
        sampler_log_probs=sampler_log_probs,
        rewards=rewards,
        advantages=advantages,
    )


@dataclass(frozen=True)
class Microbatch:
    """The rows of a TrainBatch that go through the model at once, cut to their longest, on the policy's device."""

    rows: Tensor  # (M,) which rows of the batch these are, on the CPU
    input_ids: Tensor  # (M, t)
    response_mask: Tensor  # (M, t-1)
    response_index: Tensor  # (N,) where the flattened mask is True
    sampler_log_probs: Tensor  # (M, t-1)
    rewards: Tensor  # (M, 1)
    advantages: Tensor  # (M, 1)
    denominators: Tensor  # (M,)
    old_log_probs: Tensor | None  # (M, t-1), or None where they are the current ones
    packing: Packing | None  # the same tokens without padding, for policies that take them so


def take_microbatch(
    batch: TrainBatch,
    rows: Tensor,
    denominators: Tensor,
    old_log_probs: Tensor | None,
    device: torch.device,
    packed: bool = False,
) -> Microbatch:
    """Pick rows (M,) out of a batch; `denominators` (B,), `old_log_probs` (B, T-1). Copies do not stall the GPU."""
    width = int(batch.sequence_lengths[rows].max())

    input_ids, mask = batch.input_ids[rows, :width], batch.response_mask[rows, : width - 1]

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Microbatch(
        rows=rows,
        input_ids=on_device(input_ids),
        response_mask=on_device(mask),
        response_index=on_device(mask.flatten().nonzero().squeeze(-1)),
        sampler_log_probs=on_device(batch.sampler_log_probs[rows, : width - 1]),
        rewards=on_device(batch.rewards[rows, None]),
        advantages=on_device(batch.advantages[rows, None]),
        denominators=on_device(denominators[rows]),
        old_log_probs=None if old_log_probs is None else on_device(old_log_probs[rows, : width - 1]),
        packing=pack(input_ids, mask).to(device) if packed and mask.any() else None,
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


def _lengths(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
