"""Every loss, correction and aggregation against the papers' formulas, in the whole objective and in the loop."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paper_formulas import slow_objective
from transformers import AutoModelForCausalLM
from update_cases import ON_POLICY, N, make_batch

from configs.defaults import Training
from train_grpo import update_policy
from utils.algorithm.batch import TrainBatch, minibatches
from utils.algorithm.loss_inputs import LossInputs
from utils.algorithm.losses import LOSSES, objective
from utils.preflight.config import load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "configs" / "recipes").glob("*.yaml") if path.stem != "base")
LENGTHS = torch.tensor([6, 3, 0, 1, 5, 2, 4, 6, 2])
WIDTH = 6
SETTINGS = Training(group_size=3, train_batch_size=9, rollout_batch_size=9, gradient_accumulation_steps=3)


def recipe(path: Path) -> Training:
    return load_config([path], ["training.device=cpu"]).training


def example(scale: float = 1.0) -> LossInputs:
    """Log-probs some tenths apart from each other, times `scale`; one response is empty."""
    generator = torch.Generator().manual_seed(0)

    def noise(size: float) -> torch.Tensor:
        return size * scale * torch.randn(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)

    policy = -3 * torch.rand(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
    return LossInputs(
        policy_log_probs=policy.clone().requires_grad_(),
        old_log_probs=policy + noise(0.3),
        sampler_log_probs=policy + noise(0.3) + 0.2 * scale,
        reference_log_probs=policy + noise(0.3),
        response_mask=torch.arange(WIDTH) < LENGTHS[:, None],
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 1, 0], dtype=torch.float64),
        advantages=torch.tensor([1.2, -0.6, -0.6, 0.4, 0.4, -0.8, 0.0, 0.5, -0.5], dtype=torch.float64),
    )


def assert_equals_papers(training: Training, inputs: LossInputs) -> torch.Tensor:
    value = objective(inputs, training)
    (gradient,) = torch.autograd.grad(value, inputs.policy_log_probs)
    slow = slow_objective(inputs, training)
    (expected,) = torch.autograd.grad(slow, inputs.policy_log_probs)
    assert value.item() == pytest.approx(slow.item(), abs=1e-9, rel=1e-9)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-9)
    return gradient


@pytest.mark.parametrize("mode", ["mean", "constant", "microbatch", "token", "prompt"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_with_every_aggregation(loss_type: str, mode: str) -> None:
    training = replace(SETTINGS, loss_type=loss_type, normalize_mode=mode, cliprange=0.1)
    assert assert_equals_papers(training, example()).abs().max() > 1e-4


CLIPS = [
    {"cliprange_high": 0.05},
    {"dual_clip": 1.2},
    {"cliprange_high": 0.05, "dual_clip": 1.05},
    {"loss_type": "gspo", "cliprange": 3e-4, "cliprange_high": 4e-4},
    {"loss_type": "cispo", "cispo_max_ratio": 1.1},
    {"loss_type": "sapo", "sapo_tau_positive": 0.7, "sapo_tau_negative": 3.0},
    {"loss_type": "dppo", "dppo_delta": 0.02, "dppo_max_ratio": 1.1},
]
CORRECTIONS = [
    {"sampler_correction": "tis", "tis_cap": 1.2},
    {"sampler_correction": "icepop", "icepop_low": 0.8, "icepop_high": 1.3},
    {"sampler_correction": "mis", "mis_cap": 1.2},
    {"sampler_correction": "geo", "geo_low": 0.9, "geo_high": 1.1},
    {"negative_mask": 0.01},
    {"sampler_correction": "tis", "negative_mask": 0.05},
]
KLS = [{"kl_coef": 0.3, "kl_estimator": estimator} for estimator in ("k1", "k2", "k3")]


@pytest.mark.parametrize("changes", [*CLIPS, *CORRECTIONS, *KLS], ids=str)
def test_numbers_that_bite(changes: dict) -> None:
    """Each is set so that it changes the gradient of some token, compared with the setting that does nothing."""
    training = replace(SETTINGS, **changes)
    gradient = assert_equals_papers(training, example())
    defaults = {name: getattr(SETTINGS, name) for name in changes if name != "loss_type"}
    (plain,) = torch.autograd.grad(
        objective(inputs := example(), replace(training, **defaults)), inputs.policy_log_probs
    )
    assert not torch.allclose(gradient, plain)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("correction", [None, "tis", "icepop", "mis", "geo"])
def test_log_probs_thirty_apart_make_no_nan(loss_type: str, correction: str | None) -> None:
    for scale in (100.0, -100.0):
        inputs = example(scale)
        gap = inputs.old_log_probs - inputs.policy_log_probs
        assert gap.abs().max() > 30
        clamped = {name: inputs.policy_log_probs.detach() + gap.detach().clamp(-30, 30) for name in ("old_log_probs",)}
        inputs = replace(
            inputs, **clamped, sampler_log_probs=inputs.policy_log_probs.detach() - gap.detach().clamp(-30, 30)
        )
        value = objective(inputs, replace(SETTINGS, loss_type=loss_type, sampler_correction=correction))
        (gradient,) = torch.autograd.grad(value, inputs.policy_log_probs)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.fixture(scope="module")
def policy_float64(tiny_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)


def full_log_probs(policy: torch.nn.Module, batch: TrainBatch) -> torch.Tensor:
    log_softmax = policy(batch.input_ids).logits[:, :-1].log_softmax(-1)
    return log_softmax.gather(-1, batch.input_ids[:, 1:, None])[..., 0]


def inputs_of(batch: TrainBatch, log_probs: torch.Tensor, rows: torch.Tensor) -> LossInputs:
    def pick(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows].double()

    return LossInputs(
        policy_log_probs=log_probs[rows],
        response_mask=batch.response_mask[rows],
        rewards=pick(batch.rewards),
        advantages=pick(batch.advantages),
        old_log_probs=pick(batch.old_log_probs),
        sampler_log_probs=pick(batch.sampler_log_probs),
        reference_log_probs=pick(batch.reference_log_probs),
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_loop_follows_the_objective_on_policy(policy_float64: torch.nn.Module, path: Path) -> None:
    """One optimizer step of plain gradient descent, against autograd through `objective` from full logits."""
    policy, before = copy.deepcopy(policy_float64), policy_float64
    training = on_the_cpu(recipe(path))
    batch = make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1))
    log_probs = full_log_probs(before, batch)
    batch = replace(
        batch, sampler_log_probs=log_probs.detach().float() + 0.003, reference_log_probs=log_probs.detach() - 0.1
    )
    result = update_policy(policy, torch.optim.SGD(policy.parameters(), lr=1e-3), batch, training, 0)
    value = objective(inputs_of(batch, log_probs, torch.arange(N)), training)
    expected = torch.autograd.grad(value, list(before.parameters()))
    assert result.metrics["loss"] == pytest.approx(value.item(), abs=1e-6)
    for new, old, gradient in zip(policy.parameters(), before.parameters(), expected, strict=True):
        torch.testing.assert_close((old - new).detach() / 1e-3, gradient, atol=1e-7, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_loop_follows_the_papers_in_four_minibatches(policy_float64: torch.nn.Module, path: Path) -> None:
    """Four steps of gradient descent on the token-by-token formulas end at the loop's weights; the later ones clip."""
    training = replace(on_the_cpu(recipe(path)), train_batch_size=2, gradient_accumulation_steps=1)
    batch = make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1))
    old = full_log_probs(policy_float64, batch).detach()
    batch = replace(batch, sampler_log_probs=old.float() + 0.003)
    loop, slow = copy.deepcopy(policy_float64), copy.deepcopy(policy_float64)
    update_policy(loop, torch.optim.SGD(loop.parameters(), lr=0.02), batch, training, 0)
    for rows in minibatches(N, training, 0):
        inputs = inputs_of(replace(batch, old_log_probs=old), full_log_probs(slow, batch), rows)
        value = slow_objective(inputs, training, (rows // training.group_size).tolist())
        value = value + 0 * inputs.policy_log_probs.sum()  # with every token clipped it has no gradient at all
        gradients = torch.autograd.grad(value, list(slow.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(slow.parameters(), gradients, strict=True):
                parameter -= 0.02 * gradient
    moved = 0.0
    for new, expected, before in zip(loop.parameters(), slow.parameters(), policy_float64.parameters(), strict=True):
        torch.testing.assert_close(new, expected, atol=1e-9, rtol=1e-7)
        moved = max(moved, (new - before).abs().max().item())
    assert moved > 1e-4


def test_the_page_of_recipes_points_at_each_loss() -> None:
    rows = [line for line in (ROOT / "docs/recipes.md").read_text().splitlines() if line.startswith("| [")]
    code = (ROOT / "utils/algorithm/losses.py").read_text().splitlines()
    named = {}
    for row in rows:
        name, line = re.search(r"recipes/(\w+)\.yaml", row)[1], int(re.search(r"losses\.py#L(\d+)", row)[1])
        named[name] = re.match(r"def (\w+)\(", code[line - 1])[1]
    assert named == {path.stem: recipe(path).loss_type for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_loop_does_not_depend_on_the_cut_in_four_minibatches(policy_float64: torch.nn.Module, path: Path) -> None:
    training = replace(on_the_cpu(recipe(path)), train_batch_size=2, gradient_accumulation_steps=1, learning_rate=0.02)
    batch = make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1))
    batch = replace(batch, sampler_log_probs=full_log_probs(policy_float64, batch).detach().float() + 0.003)
    ends = []
    for cut in ({}, {"gradient_accumulation_steps": 2}, {"max_tokens_per_microbatch": 9}, {"use_packing": False}):
        policy = copy.deepcopy(policy_float64)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.02)
        result = update_policy(policy, optimizer, batch, replace(training, **cut), 0)
        assert result.n_optimizer_steps == 4
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in policy_float64.parameters()])
    assert (ends[0] - start).abs().max() > 1e-4
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], atol=1e-8, rtol=0)


def on_the_cpu(training: Training) -> Training:
    """A recipe's algorithm in the settings of these tests."""
    names = (
        "rollout_batch_size", "train_batch_size", "gradient_accumulation_steps", "group_size", "dtype", "device",
        "use_gradient_checkpointing", "use_bnb_adamw8bit", "max_tokens", "max_grad_norm", "normalize_constant",
    )  # fmt: skip
    kept = {name: getattr(ON_POLICY, name) for name in names}
    return replace(training, **kept, autocast_dtype=None, warmup_steps=0)


def test_a_kl_term_trains_rollouts_without_advantage(policy_float64: torch.nn.Module) -> None:
    batch = make_batch(rewards=(1,) * N)
    batch = replace(batch, reference_log_probs=full_log_probs(policy_float64, batch).detach() - 0.5)
    for coefficient, share in ((0.0, 0.0), (0.1, 1.0)):
        policy = copy.deepcopy(policy_float64)
        training = replace(ON_POLICY, kl_coef=coefficient)
        metrics = update_policy(policy, torch.optim.SGD(policy.parameters(), lr=1e-2), batch, training, 0).metrics
        assert metrics["frac_trained_rollouts"] == share
        assert ("reference_kl" in metrics) == (coefficient > 0)
        moved = any(
            not torch.equal(a, b) for a, b in zip(policy.parameters(), policy_float64.parameters(), strict=True)
        )
        assert moved == (coefficient > 0)


def test_long_responses_that_mis_leaves_out_are_counted_by_length(policy_float64: torch.nn.Module) -> None:
    """Every token a little likelier for the trainer: only long responses add up to more than the cap."""
    batch = make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1))
    batch = replace(batch, sampler_log_probs=full_log_probs(policy_float64, batch).detach().float() - 0.2)
    training = replace(ON_POLICY, sampler_correction="mis", mis_cap=2.0)  # more than 3 tokens
    policy = copy.deepcopy(policy_float64)
    metrics = update_policy(policy, torch.optim.SGD(policy.parameters(), lr=1e-3), batch, training, 0).metrics
    lengths = batch.response_mask.sum(dim=1)
    left_out = lengths > 3
    assert metrics["frac_masked_tokens"] == pytest.approx((lengths * left_out).sum().item() / lengths.sum().item())
    assert metrics["frac_masked_longest"] == 1.0
    assert metrics["frac_masked_shortest"] == 0.0
    weights = torch.exp(0.2 * lengths.double()) * ~left_out
    assert metrics["sampler_weight"] == pytest.approx((weights * lengths).sum().item() / lengths.sum().item(), rel=1e-4)
    expected = (weights * lengths).sum() ** 2 / (weights**2 * lengths).sum() / lengths.sum()
    assert metrics["effective_sample_size"] == pytest.approx(expected.item(), rel=1e-4)
