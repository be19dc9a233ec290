"""The assignment's functions against numbers worked by hand and the papers' formulas, token by token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from utils.algorithm.cs336 import (
    compute_group_normalized_rewards,
    compute_grpo_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
    grpo_microbatch_train_step,
    masked_mean,
    masked_normalize,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)

ASSIGNED = ["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]


def tensor(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_masked_mean_by_hand() -> None:
    values, mask = tensor([1, 2, 3], [4, 5, 6]), torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert masked_mean(values, mask) == 3.0  # (1 + 2 + 6) / 3
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 6.0]
    assert masked_mean(values, mask, dim=0).tolist() == [1.0, 2.0, 6.0]


def test_masked_mean_of_nothing_is_nan_and_ignores_what_is_masked() -> None:
    values = tensor([1.0, math.nan], [math.inf, 2.0])
    result = masked_mean(values, torch.tensor([[1, 0], [0, 0]]), dim=1)
    assert result[0] == 1.0
    assert math.isnan(result[1])


def test_masked_normalize_by_hand() -> None:
    values, mask = tensor([1, 2, 3], [4, 5, 6]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert masked_normalize(values, mask, normalize_constant=2.0) == 7.0  # (1 + 2 + 5 + 6) / 2
    assert masked_normalize(values, mask, dim=1, normalize_constant=10.0).tolist() == [0.3, 1.1]


def test_compute_group_normalized_rewards() -> None:
    def reward_fn(response: str, truth: str) -> dict[str, float]:
        right = float(response == truth)
        return {"format_reward": 1.0, "answer_reward": right, "reward": right}

    advantages, raw, metadata = compute_group_normalized_rewards(
        reward_fn, ["a", "b", "c", "c"], ["a", "a", "c", "c"], 2, 1e-6, normalize_by_std=False
    )
    assert raw.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert metadata["reward_mean"] == 0.75
    assert metadata["frac_zero_std_groups"] == 0.5


def test_clip_loss_by_hand() -> None:
    # ratios 1.5 and 0.5 with cliprange 0.2, for a good and for a bad response
    log_probs = torch.log(tensor([1.5, 0.5], [1.5, 0.5]))
    loss, metadata = compute_grpo_clip_loss(tensor([2.0], [-2.0]), log_probs, torch.zeros_like(log_probs), 0.2)
    assert loss.flatten().tolist() == pytest.approx([-2.4, -1.0, 3.0, 1.6])
    # good and likelier, bad and unlikelier: clipped; the other two left the interval as well, and are not
    assert metadata["clipped"].tolist() == [[True, False], [False, True]]
    assert metadata["ratio"].flatten().tolist() == pytest.approx([1.5, 0.5, 1.5, 0.5])


def test_clipped_tokens_have_no_gradient() -> None:
    log_probs = torch.log(tensor([1.5, 0.5], [1.5, 0.5])).requires_grad_()
    loss, metadata = compute_grpo_clip_loss(tensor([2.0], [-2.0]), log_probs, torch.zeros(2, 2), 0.2)
    loss.sum().backward()
    assert torch.equal(log_probs.grad == 0, metadata["clipped"])


def test_naive_loss_by_hand() -> None:
    loss = compute_naive_policy_gradient_loss(tensor([2.0], [-1.0]), tensor([-1.0, -3.0], [-2.0, 0.0]))
    assert loss.tolist() == [[2.0, 6.0], [-2.0, 0.0]]


def test_losses_need_what_they_need() -> None:
    log_probs = torch.zeros(1, 1)
    for loss_type, missing in [("no_baseline", "raw_rewards"), ("reinforce_with_baseline", "advantages")]:
        with pytest.raises(ValueError, match=f"{loss_type}.*needs {missing}"):
            compute_policy_gradient_loss(log_probs, loss_type)
    for loss_type in ("grpo_clip", "grpo_no_clip"):
        with pytest.raises(ValueError, match=f"{loss_type}.*needs old_log_probs"):
            compute_policy_gradient_loss(log_probs, loss_type, advantages=torch.ones(1, 1), cliprange=0.2)
    with pytest.raises(ValueError, match=r"unknown loss_type .ppo.*grpo_clip"):
        compute_policy_gradient_loss(log_probs, "ppo")


def example_microbatch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, width = 6, 5
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = torch.tensor([5, 3, 0, 1, 4, 2])
    return {
        "policy_log_probs": -2 * rand(batch, width),
        "old_log_probs": -2 * rand(batch, width),
        "response_mask": torch.arange(width) < lengths[:, None],
        "advantages": 2 * rand(batch, 1) - 1,
        "raw_rewards": rand(batch, 1).round(),
    }


def slow_loss(example: dict, loss_type: str, mode: str, constant: float, cliprange: float) -> torch.Tensor:
    """The loss as the papers write it, one token at a time."""
    log_probs, old, mask = example["policy_log_probs"], example["old_log_probs"], example["response_mask"]
    longest = int(mask.sum(dim=1).max())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(log_probs)):
        advantage, reward = example["advantages"][i, 0], example["raw_rewards"][i, 0]
        length = int(mask[i].sum())
        for t in range(length):
            ratio = (log_probs[i, t] - old[i, t]).exp()
            clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
            token_loss = {
                "no_baseline": -reward * log_probs[i, t],
                "reinforce_with_baseline": -advantage * log_probs[i, t],
                "grpo_clip": -min(ratio * advantage, clipped * advantage),
                "grpo_no_clip": -ratio * advantage,
            }[loss_type]
            total = total + token_loss / {"mean": length, "constant": constant, "microbatch": longest}[mode]
    return total / len(log_probs)


@pytest.mark.parametrize("loss_type", ASSIGNED)
@pytest.mark.parametrize("mode", ["mean", "constant", "microbatch"])
def test_microbatch_step_equals_the_slow_formula(loss_type: str, mode: str) -> None:
    ours, slow = example_microbatch(), example_microbatch()
    ours["policy_log_probs"].requires_grad_()
    slow["policy_log_probs"].requires_grad_()
    loss, _ = grpo_microbatch_train_step(
        gradient_accumulation_steps=4, loss_type=loss_type, cliprange=0.2, normalize_mode=mode,
        normalize_constant=7.0, **ours,
    )  # fmt: skip
    expected = slow_loss(slow, loss_type, mode, 7.0, 0.2) / 4
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-12)
    assert not loss.requires_grad
    torch.testing.assert_close(ours["policy_log_probs"].grad, slow["policy_log_probs"].grad, atol=1e-12, rtol=0)


def test_an_empty_or_masked_nan_response_does_no_harm() -> None:
    example = example_microbatch()
    example["policy_log_probs"][2] = math.nan  # the response of length 0: padding may hold anything
    example["policy_log_probs"].requires_grad_()
    loss, _ = grpo_microbatch_train_step(gradient_accumulation_steps=1, loss_type="reinforce_with_baseline", **example)
    assert loss.isfinite()
    gradient = example["policy_log_probs"].grad
    assert torch.equal(gradient[2], torch.zeros(5, dtype=torch.float64))
    assert gradient.isfinite().all()


def test_nothing_passed_in_is_changed() -> None:
    example, kept = example_microbatch(), example_microbatch()
    example["policy_log_probs"].requires_grad_()
    grpo_microbatch_train_step(gradient_accumulation_steps=1, loss_type="grpo_clip", cliprange=0.2, **example)
    for name, value in kept.items():
        assert torch.equal(example[name].detach(), value), name


def test_sft_step_by_hand() -> None:
    log_probs = tensor([-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    loss, _ = sft_microbatch_train_step(log_probs, mask, gradient_accumulation_steps=2, normalize_constant=7.0)
    assert loss == pytest.approx((1 + 2 + 5 + 6) / 7 / 2 / 2)
    assert torch.allclose(log_probs.grad, -mask.double() / 28)


def test_tokenize_prompt_and_output(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts, outputs = ["User: 1+1=?", "hi"], [" 2", " hello"]
    result = tokenize_prompt_and_output(prompts, outputs, tokenizer)
    longest = max(len(tokenizer(p).input_ids + tokenizer(o).input_ids) for p, o in zip(prompts, outputs, strict=True))
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        assert result["input_ids"].shape == (2, longest - 1)
        labels, mask = result["labels"][i], result["response_mask"][i]
        assert tokenizer.decode(labels[mask]) == output
        whole = tokenizer(prompt).input_ids + tokenizer(output).input_ids
        row = torch.tensor(whole + [tokenizer.pad_token_id] * (longest - len(whole)))
        assert torch.equal(result["input_ids"][i], row[:-1])
        assert torch.equal(labels, row[1:])
