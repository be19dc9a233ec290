"""A longest-case microbatch before the first step: a run that would run out of memory at step 120 fails at once."""

from __future__ import annotations

import torch

from configs.defaults import Training
from utils.algorithm.batch import make_train_batch, take_microbatch
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.policy import trainable
from utils.preflight.memory_estimate import optimizer_state_bytes
from utils.records import Problem, Prompt, Rollout

KNOBS = (
    "training.gradient_accumulation_steps (more), training.max_tokens_per_microbatch (fewer), training.max_tokens, "
    "training.log_prob_chunk_size, training.use_gradient_checkpointing, training.optimizer, "
    "vllm.gpu_memory_utilization"
)


def try_longest_microbatch(policy: torch.nn.Module, training: Training, longest_prompt: int) -> None:
    """Forward and backward of the largest possible microbatch; weights and random states stay as they are.

    A dummy block stands in for the optimizer state, which is allocated only at the first step. Gradients are there from
    the beginning, as in every microbatch but the first. Raises ValueError if memory runs out, with the free memory
    and the fields to change.
    """
    device = next(policy.parameters()).device
    length = longest_prompt + training.max_tokens
    size = training.microbatch_size
    if training.max_tokens_per_microbatch is not None:
        size = max(1, min(training.train_batch_size, training.max_tokens_per_microbatch // length))
    # prompts that differ, for a prompt shared by several rollouts is computed once
    n_ids = policy.get_input_embeddings().num_embeddings
    prompts = [Prompt(Problem("", ""), "", (row % n_ids,) * longest_prompt) for row in range(size)]
    response = (0,) * training.max_tokens
    rollouts = [Rollout(prompt, "", response, (0.0,) * len(response), "length") for prompt in prompts]
    ones = torch.ones(size)
    batch = make_train_batch(rollouts, ones, ones)
    try:
        optimizer_state = torch.empty(optimizer_bytes(policy, training), dtype=torch.uint8, device=device)
        for parameter in trainable(policy):
            parameter.grad = torch.zeros_like(parameter)
        microbatch = take_microbatch(policy, batch, torch.arange(size))
        log_probs, _ = policy_log_probs(policy, microbatch, training)
        log_probs.sum().backward()  # the losses are elementwise: beside the model their memory is nothing
        del optimizer_state
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"a microbatch of {size} x {length} tokens, the longest that can come, does not fit: {free / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB were free when memory ran out. The knobs: {KNOBS}"
        ) from error
    finally:
        policy.zero_grad()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def optimizer_bytes(policy: torch.nn.Module, training: Training) -> int:
    """What the optimizer's state will take, as the estimate counts it."""
    trained = trainable(policy)
    return optimizer_state_bytes(sum(p.numel() for p in trained), trained[0].element_size(), training)
