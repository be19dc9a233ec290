"""The inner loop against plain autograd, and what must not change its result."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from update_cases import ON_POLICY, N, assert_resumes_exactly, make_batch

from configs.defaults import Training
from train_grpo import update_policy
from utils.algorithm.batch import TrainBatch, minibatches
from utils.algorithm.statistics import UpdateResult, UpdateStatistics
from utils.algorithm.update import take_optimizer_step


@pytest.fixture(scope="module")
def policy_float64(tiny_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)


@pytest.fixture
def policy(policy_float64: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(policy_float64)


def update(policy: torch.nn.Module, batch: TrainBatch, training: Training) -> UpdateResult:
    optimizer = torch.optim.SGD(policy.parameters(), lr=training.learning_rate)
    return update_policy(policy, optimizer, batch, training, steps_done=0)


def gradients(policy: torch.nn.Module, before: torch.nn.Module, rate: float) -> dict[str, torch.Tensor]:
    """What one step of plain gradient descent went along."""
    moved = dict(policy.named_parameters())
    return {name: (p - moved[name]).detach() / rate for name, p in before.named_parameters()}


def paper_gradients(policy: torch.nn.Module, batch: TrainBatch, cliprange: float, old: torch.Tensor) -> dict:
    """The clipped objective (DeepSeekMath, equation 3, without KL), sequence by sequence from full logits."""
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch.rewards)):
        length, n_response = int(batch.sequence_lengths[i]), int(batch.response_mask[i].sum())
        if n_response == 0:
            continue
        ids = batch.input_ids[i, :length]
        log_softmax = policy(ids[None]).logits[0].log_softmax(-1)
        token_log_probs = log_softmax[:-1].gather(1, ids[1:, None])[:, 0][-n_response:]
        ratio = (token_log_probs - old[i][batch.response_mask[i]]).exp()
        advantage = batch.advantages[i].double()
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - cliprange, 1 + cliprange) * advantage)
        objective = objective + surrogate.mean() / len(batch.rewards)
    parameters = dict(policy.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(-objective, list(parameters.values())), strict=True))


@pytest.mark.parametrize("skip", [True, False])
def test_gradient_equals_the_paper_formula(policy: torch.nn.Module, skip: bool) -> None:
    batch, before = make_batch(), copy.deepcopy(policy)
    with torch.no_grad():
        old = policy(batch.input_ids).logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    expected = paper_gradients(before, batch, 0.2, old)
    update(policy, batch, replace(ON_POLICY, skip_zero_advantage=skip))
    for name, gradient in gradients(policy, before, ON_POLICY.learning_rate).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-8, rtol=0)
    assert max(g.abs().max() for g in expected.values()) > 1e-3


@pytest.mark.parametrize("mode", ["mean", "constant", "microbatch"])
@pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"])
def test_result_does_not_depend_on_how_a_minibatch_is_cut(
    policy_float64: torch.nn.Module, loss_type: str, mode: str
) -> None:
    batch = make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1))
    plain = replace(ON_POLICY, loss_type=loss_type, normalize_mode=mode, skip_zero_advantage=False)
    cuts = [plain, replace(plain, skip_zero_advantage=True)]
    cuts += [replace(plain, max_tokens_per_microbatch=tokens) for tokens in (1, 12, 1000)]
    if mode != "microbatch":  # the one mode whose definition holds the cut
        cuts += [replace(plain, gradient_accumulation_steps=steps) for steps in (1, 8)]
    results = []
    for training in cuts:
        policy = copy.deepcopy(policy_float64)
        metrics = update(policy, batch, training).metrics
        results.append((gradients(policy, policy_float64, training.learning_rate), metrics["loss"]))
    for other_gradients, other_loss in results[1:]:
        assert other_loss == pytest.approx(results[0][1], abs=1e-6)
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-7, rtol=1e-5)


def test_pad_id_does_not_matter(policy_float64: torch.nn.Module) -> None:
    results = []
    for pad_id in (0, 7):
        policy = copy.deepcopy(policy_float64)
        update(policy, make_batch(pad_id=pad_id), ON_POLICY)
        results.append(policy)
    for one, other in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_on_policy_ratio_is_one_and_off_policy_ratio_moves(policy: torch.nn.Module) -> None:
    metrics = update(policy, make_batch(), ON_POLICY).metrics
    assert metrics["mean_ratio"] == 1.0
    assert metrics["clip_fraction"] == 0.0
    several = replace(ON_POLICY, epochs_per_rollout_batch=3, train_batch_size=4, learning_rate=0.05)
    result = update(policy, make_batch(), several)
    assert result.n_optimizer_steps == 6
    assert abs(result.metrics["mean_ratio"] - 1) > 1e-4
    assert result.metrics["clip_fraction"] > 0


def test_clip_and_no_clip_are_one_on_policy_and_two_off_policy(policy_float64: torch.nn.Module) -> None:
    def weights_after(training: Training) -> list[torch.Tensor]:
        policy = copy.deepcopy(policy_float64)
        update(policy, make_batch(), training)
        return [p.detach() for p in policy.parameters()]

    def equal(training: Training) -> bool:
        pairs = zip(weights_after(training), weights_after(replace(training, loss_type="grpo_no_clip")), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    assert equal(ON_POLICY)
    assert not equal(replace(ON_POLICY, epochs_per_rollout_batch=4, learning_rate=0.05))


def sampler_gap(policy: torch.nn.Module, batch: TrainBatch, rows: list[int]) -> tuple[float, float]:
    """KL(sampler || policy) and the largest difference over these rows' response tokens, from full logits."""
    with torch.no_grad():
        log_softmax = policy(batch.input_ids).logits[:, :-1].log_softmax(-1)
    log_probs = log_softmax.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    difference = (log_probs - batch.sampler_log_probs)[rows][batch.response_mask[rows]]
    return (difference.exp() - 1 - difference).mean().item(), difference.abs().max().item()


def assert_sampler_gap(metrics: dict[str, float], expected: tuple[float, float]) -> None:
    found = metrics["sampler_kl"], metrics["sampler_max_diff"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_statistics_are_over_response_tokens_of_the_whole_step(policy: torch.nn.Module) -> None:
    batch = make_batch()
    with torch.no_grad():
        log_softmax = policy(batch.input_ids).logits[:, :-1].log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)[batch.response_mask].mean()
    expected = sampler_gap(policy, batch, list(range(N)))
    metrics = update(policy, batch, replace(ON_POLICY, skip_zero_advantage=False)).metrics
    assert metrics["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert_sampler_gap(metrics, expected)
    assert metrics["trained_tokens"] == batch.response_mask.sum()


SEVERAL_STEPS = replace(ON_POLICY, train_batch_size=4, epochs_per_rollout_batch=2, learning_rate=0.05)


def test_sampler_statistics_with_old_log_probs_are_over_all_that_is_trained_on(policy: torch.nn.Module) -> None:
    batch = make_batch()
    expected = sampler_gap(policy, batch, [0, 1, 2, 3])  # the second group's advantages are 0
    assert_sampler_gap(update(policy, batch, SEVERAL_STEPS).metrics, expected)


@pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline"])
def test_sampler_statistics_without_old_log_probs_are_the_first_optimizer_steps(
    policy: torch.nn.Module, loss_type: str
) -> None:
    """Later ones train on the same tokens with weights that the sampler never had."""
    batch, training = make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1)), replace(SEVERAL_STEPS, loss_type=loss_type)
    signal = batch.rewards if loss_type == "no_baseline" else batch.advantages
    first = [row for row in next(minibatches(N, training, steps_done=0)).tolist() if signal[row] != 0]
    expected = sampler_gap(policy, batch, first)
    metrics = update(policy, batch, training).metrics
    assert metrics["trained_tokens"] > batch.response_mask[first].sum()
    assert "mean_ratio" not in metrics
    assert_sampler_gap(metrics, expected)


def test_sampler_statistics_of_a_step_that_trains_on_nothing_are_one_microbatchs(policy: torch.nn.Module) -> None:
    """Here of all rollouts, under the weights before AdamW's momentum moves them."""
    training = replace(ON_POLICY, gradient_accumulation_steps=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    update_policy(policy, optimizer, make_batch(), training, 0)
    batch = make_batch(rewards=(1,) * N, seed=1)
    expected = sampler_gap(policy, batch, list(range(N)))
    metrics = update_policy(policy, optimizer, batch, training, 1).metrics
    assert metrics["trained_tokens"] == 0.0
    assert sampler_gap(policy, batch, list(range(N))) != pytest.approx(expected, rel=1e-4)
    assert_sampler_gap(metrics, expected)


def test_sampler_statistics_where_only_later_optimizer_steps_train(policy: torch.nn.Module) -> None:
    """The first minibatch has no signal and is compared all the same; the second meets other weights."""
    training = replace(SEVERAL_STEPS, loss_type="reinforce_with_baseline", epochs_per_rollout_batch=1)
    training.gradient_accumulation_steps = 1
    first = next(minibatches(N, training, steps_done=0)).tolist()
    batch = make_batch()
    batch.advantages[:] = 1.0
    batch.advantages[first] = 0.0
    expected = sampler_gap(policy, batch, first)
    metrics = update(policy, batch, training).metrics
    assert metrics["trained_tokens"] == batch.response_mask.sum() - batch.response_mask[first].sum()
    assert_sampler_gap(metrics, expected)


def test_a_batch_without_signal_moves_weights_by_momentum_alone(policy: torch.nn.Module) -> None:
    """As it would if the zero gradient had been computed: AdamW must step, not skip."""
    plain = copy.deepcopy(policy)
    for model, skip in ((policy, True), (plain, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        training = replace(ON_POLICY, skip_zero_advantage=skip)
        update_policy(model, optimizer, make_batch(), training, 0)
        before = [p.detach().clone() for p in model.parameters()]
        result = update_policy(model, optimizer, make_batch(rewards=(1,) * N), training, 1)
        assert result.n_optimizer_steps == 1
        assert any(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))
    for one, other in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    assert result.metrics["loss"] == 0.0


def test_gradient_is_clipped_to_the_norm(policy_float64: torch.nn.Module) -> None:
    policy = copy.deepcopy(policy_float64)
    training = replace(ON_POLICY, max_grad_norm=1e-3)
    metrics = update(policy, make_batch(), training).metrics
    moved = torch.cat([g.flatten() for g in gradients(policy, policy_float64, training.learning_rate).values()])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert metrics["grad_norm"] > 1e-3
    assert metrics["frac_grad_clipped"] == 1.0


def test_non_finite_numbers_never_reach_the_weights(policy: torch.nn.Module) -> None:
    before = copy.deepcopy(policy)
    with torch.no_grad():
        policy.get_output_embeddings().weight[0, 0] = torch.inf
        before.get_output_embeddings().weight[0, 0] = torch.inf
    result = update(policy, make_batch(), ON_POLICY)
    assert result.skipped == [True]
    assert result.n_optimizer_steps == 0
    assert set(result.nonfinite_rows) == {0, 1, 3}  # row 2 is empty, the second group is not trained on
    assert result.metrics["nonfinite_steps"] == 1.0
    for one, other in zip(policy.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


def test_skipped_in_a_row_by_hand() -> None:
    assert UpdateResult({}, skipped=[True, True]).skipped_in_a_row(1) == 3
    assert UpdateResult({}, skipped=[True, False, True]).skipped_in_a_row(5) == 1
    assert UpdateResult({}).skipped_in_a_row(2) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_gradient_alone_skips_the_step(policy: torch.nn.Module, value: float) -> None:
    before = [p.detach().clone() for p in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(policy.parameters()).grad[0, 0] = value
    watch = UpdateStatistics(policy, make_batch(), ON_POLICY)
    watch.minibatch(torch.arange(N))
    watch._suspects = [(torch.tensor([4, 2]), torch.tensor([False, True]))]
    take_optimizer_step(policy, torch.optim.AdamW(policy.parameters()), ON_POLICY, watch)
    result = watch.result()
    assert result.skipped == [True]
    assert result.nonfinite_rows == [2]
    assert all(torch.equal(b, p) for b, p in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())


def test_a_stop_before_the_first_optimizer_step_leaves_the_weights_alone(policy: torch.nn.Module) -> None:
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    result = update_policy(policy, optimizer, make_batch(), ON_POLICY, 0, should_stop=lambda: True)
    assert result.abandoned
    assert all(torch.equal(b, p) for b, p in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())


def test_a_stop_after_an_optimizer_step_finishes_the_grpo_step(policy: torch.nn.Module) -> None:
    training = replace(ON_POLICY, train_batch_size=4, gradient_accumulation_steps=1)
    answers = iter([False, False, True, True, True])  # before the first step it is asked after a microbatch and again
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    result = update_policy(policy, optimizer, make_batch(), training, 0, should_stop=lambda: next(answers))
    assert not result.abandoned
    assert result.n_optimizer_steps == 2


def test_minibatches_are_shuffled_alike_on_a_repeat(policy_float64: torch.nn.Module) -> None:
    training = replace(ON_POLICY, train_batch_size=2, gradient_accumulation_steps=1, learning_rate=0.05)
    policies = [copy.deepcopy(policy_float64) for _ in range(3)]
    for policy, step in zip(policies, (0, 0, 1), strict=True):
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        update_policy(policy, optimizer, make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1)), training, step)
    first, repeated, another = [torch.cat([p.flatten() for p in policy.parameters()]) for policy in policies]
    assert torch.equal(first, repeated)
    assert not torch.equal(first, another)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_save_and_adam_go_on_as_if_nothing_had_been(tiny_model_dir: Path, tmp_path: Path, eight_bit: bool) -> None:
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    training = replace(ON_POLICY, dtype="bfloat16" if eight_bit else "float32", use_bnb_adamw8bit=eight_bit)
    assert_resumes_exactly(tiny_model_dir, tmp_path, training)
