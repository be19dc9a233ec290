"""Supervised fine-tuning: the library half of play-scripts/train_sft.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from configs.defaults import Training
from utils.algorithm.batch import lengths_of, pad, response_mask
from utils.algorithm.log_probs import response_log_probs
from utils.algorithm.policy import build_optimizer, trainable
from utils.problems import ProblemStream
from utils.records import Demonstration

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}  # our names: transformers'


def train_step(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    demonstrations: Sequence[Demonstration],
    training: Training,
) -> tuple[float, float]:
    """One optimizer step; returns the loss (nats per response token) and the gradient norm before clipping.

    The response tokens are counted once for the whole batch, so how it is cut into microbatches changes nothing.
    Raises ValueError if loss or gradient is not finite; the weights are then those before the step.
    """
    mean_length = sum(len(demonstration.response_ids) for demonstration in demonstrations) / len(demonstrations)
    longest_first = sorted(demonstrations, key=len, reverse=True)  # neighbours in length need little padding
    size = len(demonstrations) // training.gradient_accumulation_steps
    total_loss = 0.0
    for start in range(0, len(demonstrations), size):
        microbatch = longest_first[start : start + size]
        prompts, responses = [d.prompt_ids for d in microbatch], [d.response_ids for d in microbatch]
        # any pad id will do: masks come from lengths, and no real token sees what is to its right
        input_ids = pad([p + r for p, r in zip(prompts, responses, strict=True)], pad_id=0)
        mask = response_mask(lengths_of(prompts), lengths_of(responses), input_ids.shape[1]).to(policy.device)
        log_probs, _ = response_log_probs(policy, input_ids.to(policy.device), mask)
        summed = torch.where(mask, -log_probs, 0.0).sum()
        loss = summed / mean_length / len(microbatch) / training.gradient_accumulation_steps
        loss.backward()
        total_loss += loss.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(trainable(policy), training.max_grad_norm).item()
    if not math.isfinite(total_loss + grad_norm):
        raise ValueError(f"the loss is {total_loss}, its gradient norm {grad_norm}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return total_loss, grad_norm


def train(
    policy: PreTrainedModel,
    demonstrations: Sequence[Demonstration],
    training: Training,
    n_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
) -> Iterator[dict[str, float]]:
    """Train the policy in place, in shuffled epochs; yields each step's metrics once it is taken.

    Of `training` it reads the batch (`train_batch_size`, `gradient_accumulation_steps`), the optimizer's fields and
    `seed`. Raises ValueError as `train_step` does.
    """
    from transformers import get_scheduler  # brings bitsandbytes, whose warnings `adapters` has silenced by now

    optimizer = build_optimizer(policy, training)
    scheduler = get_scheduler(SCHEDULES[schedule], optimizer, warmup_steps, n_steps)
    stream = ProblemStream(demonstrations, training.seed)
    for step in range(1, n_steps + 1):
        learning_rate = scheduler.get_last_lr()[0]
        loss, grad_norm = train_step(policy, optimizer, stream.draw(training.train_batch_size), training)
        scheduler.step()
        yield {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
