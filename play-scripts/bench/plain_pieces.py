"""The inner loop of train_grpo.py taken apart: timed by phase, and with plainer pieces in place of the fast ones.

What is measured as shipped is `train_grpo.update_policy` itself. `same_as_shipped` shows that this loop, with nothing
replaced, changes the weights in the same way, to the bit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.defaults import Training
from train_grpo import update_policy
from utils.algorithm.aggregation import aggregate_loss, length_denominators
from utils.algorithm.batch import Microbatch, TrainBatch, mark_gradients, microbatches, minibatches, take_microbatch
from utils.algorithm.log_probs import chunked_log_probs, compute_entropy, policy_log_probs
from utils.algorithm.losses import find_loss, per_token_loss
from utils.algorithm.packing import packed_hidden_states
from utils.algorithm.policy import build_optimizer
from utils.algorithm.statistics import UpdateResult, UpdateStatistics
from utils.algorithm.update import take_optimizer_step, with_old_log_probs

LogProbs = tuple[Tensor, Tensor]


def from_full_logits(policy: torch.nn.Module, microbatch: Microbatch, training: Training) -> LogProbs:
    """Log-probs and entropy the plain way: logits of prompts too, and of padding if there is any."""
    packing, mask, input_ids = microbatch.packing, microbatch.response_mask, microbatch.input_ids
    if packing is None:
        logits = policy(input_ids, use_cache=False).logits[:, :-1].float() / training.temperature
        values = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        entropy = compute_entropy(logits.detach())
    else:
        everywhere = torch.arange(len(packing.token_ids), device=input_ids.device)
        hidden = packed_hidden_states(policy, dataclasses.replace(packing, predicts=everywhere))
        logits = policy.get_output_embeddings()(hidden).float() / training.temperature
        predicts = packing.tokens_of.new_zeros(mask.shape).masked_scatter(mask, packing.predicts)
        values = logits.log_softmax(-1)[predicts].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        entropy = compute_entropy(logits.detach())[predicts]
    return torch.where(mask, values, 0.0), torch.where(mask, entropy, 0.0)


def with_padding_mask(policy: torch.nn.Module, microbatch: Microbatch, training: Training) -> LogProbs:
    """The chunked head behind a padded forward pass that is given the padding mask it does not need."""
    input_ids, mask = microbatch.input_ids, microbatch.response_mask
    end = torch.arange(1, input_ids.shape[1], device=input_ids.device).mul(mask).amax(1)
    real = torch.arange(input_ids.shape[1], device=input_ids.device) <= end[:, None]
    hidden = policy.get_decoder()(input_ids=input_ids, attention_mask=real, use_cache=False).last_hidden_state
    labels, weight = input_ids[:, 1:][mask], policy.get_output_embeddings().weight
    values, entropy = chunked_log_probs(
        hidden[:, :-1][mask], weight, labels, training.temperature, training.log_prob_chunk_size, with_entropy=True
    )
    empty = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return empty.masked_scatter(mask, values), empty.masked_scatter(mask, entropy)


def in_order_of_arrival(
    policy: torch.nn.Module, batch: TrainBatch, rows: Tensor, training: Training
) -> Iterator[Microbatch]:
    """Microbatches that are not sorted by length."""
    denominators = torch.ones(len(batch.rewards), dtype=torch.float64)
    denominators[rows] = length_denominators(batch.response_mask[rows], rows // training.group_size, training)
    batch = dataclasses.replace(batch, denominators=denominators)
    for piece in rows[batch.rows_with_gradient[rows]].split(training.microbatch_size):
        yield take_microbatch(policy, batch, piece)


@dataclass
class Pieces:
    """What the inner loop is made of."""

    log_probs: Callable[[torch.nn.Module, Microbatch, Training], LogProbs] = policy_log_probs
    microbatches: Callable[..., Iterator[Microbatch]] = microbatches
    always_old_log_probs: bool = False


def no_clock(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


def inner_loop(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    training: Training,
    steps_done: int,
    pieces: Pieces,
    phase: Callable[[str], AbstractContextManager[Any]] = no_clock,
) -> UpdateResult:
    """`train_grpo.update_policy` with its pieces replaced and its phases timed. Metrics: also bench/model_tokens."""
    loss, n_tokens = find_loss(training.loss_type), 0
    batch = mark_gradients(batch, loss, training)
    watch = UpdateStatistics(policy, batch, training)
    if pieces.always_old_log_probs or loss.needs_old_log_probs(training):
        with phase("old log-probs"):
            batch = with_old_log_probs(policy, batch, training)
    for rows in minibatches(len(batch.rewards), training, steps_done):
        watch.minibatch(rows)
        for microbatch in pieces.microbatches(policy, batch, rows, training):
            with phase("forward"):
                log_probs, entropy = pieces.log_probs(policy, microbatch, training)
            with phase("backward"):
                per_token, extras = per_token_loss(microbatch.loss_inputs(log_probs), training)
                value = aggregate_loss(per_token, microbatch.response_mask, microbatch.denominators, len(rows))
                value.backward()
                watch.microbatch(microbatch, log_probs, entropy, value, extras)
            packing = microbatch.packing
            # padding is not counted, a shared prompt once
            lengths = batch.sequence_lengths[microbatch.rows]
            n_tokens += int(lengths.sum()) if packing is None else len(packing.token_ids)
        with phase("optimizer"):
            take_optimizer_step(policy, optimizer, training, watch)
    result = watch.result()
    result.metrics["bench/model_tokens"] = float(n_tokens)
    return result


def same_as_shipped(policy: torch.nn.Module, batch: TrainBatch, training: Training) -> bool:
    """Whether one update by `inner_loop` and one by `update_policy` leave the same weights, to the bit."""
    copies = copy.deepcopy(policy), copy.deepcopy(policy)
    inner_loop(copies[0], build_optimizer(copies[0], training), batch, training, 0, Pieces())
    update_policy(copies[1], build_optimizer(copies[1], training), batch, training, 0)
    return all(torch.equal(a, b) for a, b in zip(copies[0].parameters(), copies[1].parameters(), strict=True))
