"""The mathematics against numbers worked by hand and slow independent formulas."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.defaults import Training
from utils.algorithm.advantages import ADVANTAGES, compute_advantages, zero_std_groups
from utils.algorithm.aggregation import DENOMINATORS, aggregate_loss, length_denominators
from utils.algorithm.corrections import KL_ESTIMATORS, SAMPLER_CORRECTIONS
from utils.algorithm.log_probs import compute_entropy
from utils.algorithm.loss_inputs import LossInputs
from utils.algorithm.losses import LOSSES, objective
from utils.preflight.loss_rules import CLIPPED_LOSSES, LOSSES_WITHOUT_BASELINE, LOSSES_WITHOUT_RATIO

SETTINGS = Training(group_size=3, train_batch_size=6, gradient_accumulation_steps=3, normalize_constant=7.0)


def tensor(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_config_names_every_entry_and_nothing_else() -> None:
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(Training)}
    assert choices["loss_type"] == list(LOSSES)
    assert choices["normalize_mode"] == list(DENOMINATORS)
    assert choices["advantage"] == list(ADVANTAGES)
    assert choices["sampler_correction"] == list(SAMPLER_CORRECTIONS)
    assert choices["kl_estimator"] == list(KL_ESTIMATORS)


def test_what_the_config_check_knows_of_losses() -> None:
    assert {name for name, loss in LOSSES.items() if loss.clips} == set(CLIPPED_LOSSES)
    assert {name for name, loss in LOSSES.items() if loss.weighs_by == "rewards"} == set(LOSSES_WITHOUT_BASELINE)
    # dppo has its ratio to the sampler
    assert {name for name, loss in LOSSES.items() if not loss.has_ratio} == {*LOSSES_WITHOUT_RATIO, "dppo"}


def test_entropy_by_hand_and_of_large_logits() -> None:
    logits = torch.log(tensor([0.5, 0.25, 0.25], [1.0, 1.0, 1.0]))
    expected = [1.5 * math.log(2), math.log(3)]
    assert compute_entropy(logits).tolist() == pytest.approx(expected)
    assert compute_entropy(logits + 1e4).tolist() == pytest.approx(expected)
    assert compute_entropy(torch.tensor([1e30, 0.0, -math.inf])) == 0.0


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20))
def test_entropy_agrees_with_torch_distributions(logits: list[float]) -> None:
    expected = torch.distributions.Categorical(logits=tensor(*logits)).entropy()
    assert compute_entropy(tensor(*logits)) == pytest.approx(expected.item(), abs=1e-9)


def test_group_advantages_by_hand() -> None:
    rewards = tensor(1, 0, 0, 1, 1, 1)
    centred = compute_advantages(rewards, replace(SETTINGS, use_std_normalization=False))
    assert centred.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    # the unbiased standard deviation of 1, 0, 0 is sqrt((4/9 + 1/9 + 1/9) / 2) = sqrt(1/3)
    scaled = compute_advantages(rewards, replace(SETTINGS, advantage_eps=0.5))
    assert scaled[0] == pytest.approx((2 / 3) / (math.sqrt(1 / 3) + 0.5))


@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 16))
def test_a_group_of_equal_rewards_gets_exactly_zero(reward: float, group_size: int) -> None:
    rewards = torch.full((group_size,), reward)
    assert torch.equal(compute_advantages(rewards, replace(SETTINGS, group_size=group_size)), torch.zeros(group_size))
    assert zero_std_groups(rewards, group_size).tolist() == [True]


@given(st.permutations(range(4)), st.booleans())
def test_advantages_do_not_depend_on_the_order_of_groups(order: list[int], by_std: bool) -> None:
    settings = replace(SETTINGS, group_size=8, use_std_normalization=by_std)
    groups = torch.rand(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = compute_advantages(groups.flatten(), settings).view(4, 8)
    assert torch.equal(compute_advantages(groups[order].flatten(), settings).view(4, 8), whole[order])


def test_advantages_complain() -> None:
    with pytest.raises(ValueError, match="groups of 3"):
        compute_advantages(torch.zeros(8), SETTINGS)
    with pytest.raises(ValueError, match=r"group of 1.*raise group_size"):
        compute_advantages(torch.zeros(8), replace(SETTINGS, group_size=1))


def test_length_denominators_by_hand() -> None:
    mask = torch.arange(5) < torch.tensor([3, 0, 5, 2])[:, None]
    settings = Training(train_batch_size=4, gradient_accumulation_steps=2, normalize_constant=9.0)
    groups = torch.tensor([7, 7, 4, 7])
    expected = {
        "mean": [3, 1, 5, 2],
        "constant": [9, 9, 9, 9],
        "microbatch": [3, 3, 5, 5],
        "token": [10 / 4] * 4,  # divided by 4 sequences later: 10 tokens in all
        "prompt": [5 * 2 / 4, 5 * 2 / 4, 5 * 2 / 4, 5 * 2 / 4],  # either prompt has 5 tokens, and there are 2 prompts
    }
    assert expected.keys() == DENOMINATORS.keys()
    for mode, values in expected.items():
        assert length_denominators(mask, groups, replace(settings, normalize_mode=mode)).tolist() == values
    with pytest.raises(ValueError, match="'sum'; choose one of: mean"):
        length_denominators(mask, groups, replace(settings, normalize_mode="sum"))


def test_other_advantages_by_hand() -> None:
    rewards = tensor(1, 0, 0, 1, 1, 1, 0, 0, 0)
    plain = replace(SETTINGS, use_std_normalization=False, advantage_eps=0.0)
    # the mean of the other two of 1, 0, 0: 0 for the first, 1/2 for the others
    assert compute_advantages(rewards, replace(plain, advantage="rloo"))[:3].tolist() == pytest.approx([1, -0.5, -0.5])
    maxrl = compute_advantages(rewards, replace(plain, advantage="maxrl"))
    assert maxrl.tolist() == pytest.approx([2, -1, -1, 0, 0, 0, 0, 0, 0])
    # four rewards of 1 and five of 0: variance (4 * 25 + 5 * 16) / 81 / 8
    by_batch = compute_advantages(rewards, replace(SETTINGS, std_scope="batch", advantage_eps=0.0))
    assert by_batch[0] == pytest.approx((2 / 3) / math.sqrt(180 / 81 / 8))
    assert by_batch[3:].tolist() == [0] * 6


def example(seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return LossInputs(
        policy_log_probs=(-2 * rand(6, 5)).requires_grad_(),
        old_log_probs=-2 * rand(6, 5),
        response_mask=torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 2])[:, None],
        advantages=2 * rand(6) - 1,
        rewards=rand(6).round(),
    )


def test_objective_makes_the_advantages_itself() -> None:
    training = replace(SETTINGS, loss_type="grpo_clip")
    without = replace(example(), advantages=None, rewards=tensor(1, 0, 0, 1, 1, 0))
    given_them = replace(without, advantages=compute_advantages(without.rewards, training))
    assert torch.equal(objective(without, training), objective(given_them, training))


def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient() -> None:
    """On-policy the clipped loss, the unclipped one and REINFORCE have the same gradient."""
    gradients = []
    for loss_type in ("grpo_clip", "grpo_no_clip", "reinforce_with_baseline"):
        inputs = replace(example(), old_log_probs=None)
        assert torch.equal(inputs.ratio, torch.ones(6, 5, dtype=torch.float64))
        objective(inputs, replace(SETTINGS, loss_type=loss_type)).backward()
        gradients.append(inputs.policy_log_probs.grad)
    assert gradients[0].abs().max() > 0.01
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-15, rtol=0)


def test_microbatches_add_up_to_the_whole() -> None:
    training, inputs = replace(SETTINGS, loss_type="grpo_clip"), example()
    per_token, _ = LOSSES["grpo_clip"].per_token(inputs, training)
    denominators = length_denominators(inputs.response_mask, torch.arange(6) // 3, training)
    parts = [
        aggregate_loss(per_token[rows], inputs.response_mask[rows], denominators[rows], n_sequences=6)
        for rows in torch.tensor([4, 0, 5, 2, 1, 3]).split([1, 3, 2])
    ]
    torch.testing.assert_close(sum(parts), objective(inputs, training))


def test_masked_nan_does_no_harm() -> None:
    inputs = example()
    with torch.no_grad():
        inputs.policy_log_probs[2] = math.nan  # the response of length 0: padding may hold anything
    value = objective(inputs, replace(SETTINGS, loss_type="reinforce_with_baseline"))
    value.backward()
    assert value.isfinite()
    assert inputs.policy_log_probs.grad.isfinite().all()
    assert torch.equal(inputs.policy_log_probs.grad[2], torch.zeros(5, dtype=torch.float64))


def test_has_gradient_asks_rewards_or_advantages() -> None:
    rewards, advantages = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.5, -0.5])
    for name, loss in LOSSES.items():
        expected = [True, False, True] if name == "no_baseline" else [False, True, True]
        assert loss.has_gradient(rewards, advantages, Training()).tolist() == expected
        assert loss.has_gradient(rewards, advantages, Training(kl_coef=0.1)).all()
