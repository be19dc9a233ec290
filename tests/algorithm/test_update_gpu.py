"""The inner loop on CUDA: the same result as on the CPU, no wait for the device between microbatches, memory tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from update_cases import ON_POLICY, assert_resumes_exactly, make_batch

from train_grpo import update_policy
from utils.algorithm.aggregation import aggregate_loss
from utils.algorithm.batch import microbatches
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.losses import per_token_loss
from utils.algorithm.packing import is_packable
from utils.algorithm.policy import build_optimizer, load_policy
from utils.algorithm.statistics import UpdateStatistics
from utils.run.trial import try_longest_microbatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
ON_CUDA = replace(ON_POLICY, device="cuda:0")


def test_cuda_and_cpu_end_in_the_same_weights(tiny_model_dir: Path) -> None:
    weights = []
    for training in (ON_POLICY, ON_CUDA):
        policy = load_policy(str(tiny_model_dir), training)
        optimizer = build_optimizer(policy, training)
        for step in range(2):
            assert update_policy(policy, optimizer, make_batch(seed=step), training, step).n_optimizer_steps == 1
        weights.append(torch.cat([p.detach().cpu().flatten() for p in policy.parameters()]))
    # AdamW divides by the root of a squared gradient, so a rounding error may move a weight by a share of the rate
    assert (weights[0] - weights[1]).abs().mean() < 0.01 * ON_POLICY.learning_rate


@pytest.mark.parametrize("n_repeats", [1, 200])  # looking tokens up goes other ways for few and for thousands
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_waits_for_the_device_between_microbatches(tiny_model_dir: Path, dtype: str, n_repeats: int) -> None:
    training = replace(ON_CUDA, dtype=dtype)
    policy = load_policy(str(tiny_model_dir), training)
    batch, rows = make_batch(n_repeats=n_repeats), torch.arange(8)
    watch = UpdateStatistics(policy, batch, training)
    assert is_packable(policy)

    def one_microbatch() -> None:
        for microbatch in microbatches(policy, batch, rows, replace(training, gradient_accumulation_steps=1)):
            log_probs, entropy = policy_log_probs(policy, microbatch, training)
            per_token, extras = per_token_loss(microbatch.loss_inputs(log_probs), training)
            value = aggregate_loss(per_token, microbatch.response_mask, microbatch.denominators, len(rows))
            value.backward()
            watch.microbatch(microbatch, log_probs, entropy, value, extras)

    one_microbatch()  # looks at the model once, and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_microbatch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eight_bit", [False, True])
def test_bfloat16_optimizers_step(tiny_model_dir: Path, eight_bit: bool) -> None:
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    training = replace(ON_CUDA, dtype="bfloat16", use_bnb_adamw8bit=eight_bit)
    policy = load_policy(str(tiny_model_dir), training)
    result = update_policy(policy, build_optimizer(policy, training), make_batch(), training, 0)
    assert result.n_optimizer_steps == 1
    assert result.metrics["frac_weights_moved"] > 0.1


def test_a_microbatch_that_cannot_fit_is_told_at_the_start(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), ON_CUDA)
    try_longest_microbatch(policy, ON_CUDA, longest_prompt=8)
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        huge = replace(ON_CUDA, max_tokens=1900, train_batch_size=4096, gradient_accumulation_steps=1)
        with pytest.raises(ValueError, match=r"the longest that can come, does not fit: .* The knobs: "):
            try_longest_microbatch(policy, huge, longest_prompt=8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_takes_the_flash_kernel(tiny_model_dir: Path, checkpointing: bool) -> None:
    """With every other kernel forbidden, a packed microbatch goes forward and backward in bfloat16."""
    training = replace(
        ON_CUDA, dtype="bfloat16", attention_type="sdpa", use_packing=True, use_gradient_checkpointing=checkpointing
    )
    policy = load_policy(str(tiny_model_dir), training)
    assert is_packable(policy)
    (microbatch, *_) = microbatches(policy, make_batch(), torch.arange(8), training)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        log_probs, _ = policy_log_probs(policy, microbatch, training)
        log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_a_save_and_8_bit_adam_go_on_as_if_nothing_had_been(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert_resumes_exactly(tiny_model_dir, tmp_path, replace(ON_CUDA, dtype="bfloat16", use_bnb_adamw8bit=True))
