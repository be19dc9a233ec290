"""The longest-case microbatch that is tried at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.defaults import Training
from utils.algorithm.packing import enable_packing
from utils.run import trial
from utils.run.trial import optimizer_bytes, try_longest_microbatch

SETTINGS = Training(
    device="cpu", dtype="float32", train_batch_size=8, gradient_accumulation_steps=4, max_tokens=6,
    use_gradient_checkpointing=False, use_bnb_adamw8bit=False,
)  # fmt: skip


@pytest.fixture
def policy(tiny_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def test_packed_rows_share_nothing(policy: torch.nn.Module) -> None:
    assert enable_packing(policy)
    shapes = []
    policy.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try_longest_microbatch(policy, replace(SETTINGS, max_tokens_per_microbatch=33), longest_prompt=5)
    assert shapes[-1] == (1, 3 * 10)  # three sequences of 11, whose last tokens predict nothing


@pytest.mark.parametrize(("budget", "rows"), [(None, 2), (1, 1), (33, 3), (10_000, 8)])
def test_it_is_the_longest_that_can_come_and_leaves_no_trace(
    policy: torch.nn.Module, budget: int | None, rows: int
) -> None:
    shapes = []
    hook = policy.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    before = [p.detach().clone() for p in policy.parameters()]
    random_state = torch.get_rng_state()
    try_longest_microbatch(policy, replace(SETTINGS, max_tokens_per_microbatch=budget), longest_prompt=5)
    hook.remove()
    assert shapes[-1] == (rows, 11)
    assert all(torch.equal(b, p) for b, p in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_gradients_are_there_from_the_beginning(policy: torch.nn.Module) -> None:
    """As in every microbatch but the first of a step: the peak is higher by a gradient."""
    seen = []
    policy.get_decoder().register_forward_pre_hook(
        lambda *_: seen.append(all(p.grad is not None and not p.grad.any() for p in policy.parameters()))
    )
    try_longest_microbatch(policy, SETTINGS, longest_prompt=5)
    assert seen[-1] and all(p.grad is None for p in policy.parameters())


def test_running_out_names_the_knobs(policy: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "policy_log_probs", out_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10**9, 24 * 10**9))
    with pytest.raises(ValueError, match=r"2 x 11 tokens.*1.0 of 24.0 GB were free.*use_gradient_checkpointing"):
        try_longest_microbatch(policy, SETTINGS, longest_prompt=5)


def test_optimizer_bytes_are_those_of_adamw(policy: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert optimizer_bytes(policy, SETTINGS) == sum(moment.nbytes for moment in moments)
