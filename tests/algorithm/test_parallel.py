"""Updates on two and three ranks against the same on one: weights and metrics, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import on_ranks
from transformers import AutoModelForCausalLM
from update_cases import ON_POLICY, make_batch

from configs.defaults import Training
from train_grpo import update_policy
from utils.algorithm import parallel
from utils.algorithm.batch import TrainBatch
from utils.algorithm.policy import build_optimizer, load_policy, trainable
from utils.engines.split_engine import SplitEngine
from utils.ranks import RanksDiffer
from utils.records import Problem, Prompt, Rollout
from utils.rewards.grader import Grader
from utils.rewards.split_scorer import SplitScorer
from utils.run.ending import StoppedWhileLoading
from utils.run.start import together

STEPS = 2
OFF_POLICY = replace(
    ON_POLICY, train_batch_size=4, epochs_per_rollout_batch=2, skip_zero_advantage=False, max_grad_norm=0.1
)
CASES: dict[str, Training] = {
    **{f"{mode}": replace(ON_POLICY, normalize_mode=mode) for mode in ("mean", "constant", "microbatch", "token")},
    "prompt, off-policy": replace(OFF_POLICY, normalize_mode="prompt"),
    "no_baseline": replace(ON_POLICY, loss_type="no_baseline", gradient_accumulation_steps=1),
    **{name: replace(OFF_POLICY, loss_type=name) for name in ("gspo", "cispo", "dppo")},
    "padded": replace(OFF_POLICY, max_tokens_per_microbatch=12, normalize_mode="microbatch"),
    "corrected": replace(OFF_POLICY, sampler_correction="mis", mask_truncated=True, learning_rate=3e-3),
}


@pytest.fixture(scope="module")
def policy(one_layer_model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(one_layer_model_dir, dtype=torch.float64)


def batch_of(seed: int) -> TrainBatch:
    return make_batch(rewards=(1, 0, 0, 1, 1, 0, 1, 1), seed=seed)


def updated(policy: torch.nn.Module, training: Training) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """All weights after a few updates, and the metrics of each."""
    policy = copy.deepcopy(policy)
    optimizer = build_optimizer(policy, training)
    metrics = [update_policy(policy, optimizer, batch_of(step), training, step).metrics for step in range(STEPS)]
    parallel.check_same_weights(policy)
    return torch.cat([weight.detach().double().flatten() for weight in trainable(policy)]).numpy(), metrics


def nonfinite_and_stopped(policy: torch.nn.Module) -> dict[str, Any]:
    """A rollout with a NaN, a gradient with an infinity, and a stop that only the last rank hears of."""
    spoiled = batch_of(0)
    spoiled.sampler_log_probs[5] = torch.where(spoiled.response_mask[5], torch.nan, 0.0)
    results = {}
    for name, batch, stop in (("nan", spoiled, False), ("stop", batch_of(0), True)):
        own, last = copy.deepcopy(policy), parallel.rank() == parallel.n_ranks() - 1
        optimizer = build_optimizer(own, ON_POLICY)
        update = update_policy(own, optimizer, batch, ON_POLICY, 0, lambda stop=stop, last=last: stop and last)
        moved = any(not torch.equal(a, b) for a, b in zip(own.parameters(), policy.parameters(), strict=True))
        results[name] = update.abandoned, update.skipped, update.nonfinite_rows, moved
    return results


class Sampler:
    """An engine whose responses tell prompt and seed, and which stops as it is asked."""

    name, sampling = "sampler", None

    def generate(self, prompts, n, seed, temperature=None, label="", should_stop=lambda: False):
        if should_stop():
            return []
        pairs = [(prompt, seed + i * n + j) for i, prompt in enumerate(prompts) for j in range(n)]
        return [Rollout(prompt, f"{prompt.text} {s}", (s,), (-0.5,), "stop") for prompt, s in pairs]


PROMPTS = [Prompt(Problem(str(i), "1"), f"prompt {i}", (i,)) for i in range(5)]


def sampled_and_scored() -> dict[str, Any]:
    engine = SplitEngine(Sampler())
    rollouts = engine.generate(PROMPTS, 3, 100)
    grader = Grader(workers=1)
    scorers = {name: SplitScorer(name, {}, grader) for name in ("r1_zero", "gsm8k_random")}
    try:
        return {
            "rollouts": rollouts,
            "own prompts": all(rollout.prompt is PROMPTS[i // 3] for i, rollout in enumerate(rollouts)),
            "one prompt": engine.generate(PROMPTS[:1], 2, 7),
            "stopped": engine.generate(PROMPTS, 3, 100, should_stop=lambda: parallel.rank() == 1),
            **{name: scorer.score(rollouts) for name, scorer in scorers.items()},
        }
    finally:
        grader.close()


def disagreements(policy: torch.nn.Module) -> list[str]:
    """What is raised on this rank if weights differ, if rank 1 meets a mistake, and if it is asked to stop."""

    def meet_weights() -> None:
        own = copy.deepcopy(policy)
        if parallel.rank() == 1:
            own.lm_head.weight.data[3, 3] += 1e-15
        parallel.check_same_weights(own)

    def meet_error(error: Exception) -> None:
        with together():
            if parallel.rank() == 1:
                raise error

    raised = []
    for case in (
        meet_weights,
        lambda: meet_error(ValueError("no such model")),
        lambda: meet_error(StoppedWhileLoading("x")),
    ):
        try:
            case()
        except (RanksDiffer, ValueError, StoppedWhileLoading) as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised


def everything(policy: torch.nn.Module, model_dir: Path) -> dict[str, Any]:
    """With three ranks, which shows how eight rows are shared unevenly, only two of the cases."""
    loaded = {"adapter": replace(ON_POLICY, lora_rank=2), "bfloat16": replace(ON_POLICY, dtype="bfloat16")}
    names = CASES
    if parallel.n_ranks() == 3:
        names, loaded = ("prompt, off-policy", "padded"), {}
    return {
        "updates": {name: updated(policy, CASES[name]) for name in names},
        "loaded": {name: updated(load_policy(str(model_dir), training), training) for name, training in loaded.items()},
        "nonfinite": nonfinite_and_stopped(policy),
        "samples": sampled_and_scored(),
        "raised": disagreements(policy) if parallel.n_ranks() == 2 else [],
    }


@pytest.fixture(scope="module")
def alone(policy: torch.nn.Module, one_layer_model_dir: Path) -> dict[str, Any]:
    return everything(policy, one_layer_model_dir)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, policy: torch.nn.Module, one_layer_model_dir: Path) -> list[dict[str, Any]]:
    """What comes of everything on each rank."""
    return on_ranks(request.param, lambda: everything(policy, one_layer_model_dir))


def test_weights_and_metrics_are_those_of_one_rank(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for name in ranks[0]["updates"]:
        expected, expected_metrics = alone["updates"][name]
        for rank in ranks:
            weights, metrics = rank["updates"][name]
            assert abs(weights - expected).max() < 1e-10, name
            assert (weights == ranks[0]["updates"][name][0]).all(), name
            for step, expected_step in zip(metrics, expected_metrics, strict=True):
                assert step == pytest.approx(expected_step, rel=1e-9, abs=1e-12), name


def test_adapters_and_bfloat16_are_those_of_one_rank_to_their_rounding(alone, ranks) -> None:
    for name, allowed in (("adapter", 1e-5), ("bfloat16", 5e-3)):
        expected, _ = alone["loaded"][name]
        assert abs(expected).max() > 0
        for rank in ranks if len(ranks) == 2 else []:
            assert abs(rank["loaded"][name][0] - expected).max() < allowed, name


def test_what_is_not_finite_or_asked_to_stop_on_one_rank_is_so_on_all(alone, ranks) -> None:
    assert alone["nonfinite"] == {"nan": (False, [True], [5], False), "stop": (True, [], [], False)}
    assert all(rank["nonfinite"] == alone["nonfinite"] for rank in ranks)


def test_every_rank_has_all_rollouts_and_rewards(alone, ranks) -> None:
    assert len(alone["samples"].pop("stopped", ranks)) > 0
    assert sum(reward.total for reward in alone["samples"]["gsm8k_random"]) > 0
    for rank in ranks:
        assert rank["samples"].pop("stopped") == []
        assert rank["samples"] == alone["samples"]
        assert rank["samples"]["own prompts"]


def test_ranks_that_disagree_are_told_so_on_all(ranks) -> None:
    if len(ranks) == 2:
        for rank in ranks:
            differ, mistake, stop = rank["raised"]
            assert differ.startswith("RanksDiffer: the weights of ranks [1]")
            assert (mistake, stop) == ("ConfigError: no such model", "StoppedWhileLoading: x")


def test_shares_are_whole_groups_and_about_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, lengths = torch.randperm(24), torch.randint(1, 100, (24,))
    monkeypatch.setattr(parallel, "n_ranks", lambda: 3)
    shares, slices = [], []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(parallel.own_rows(rows, lengths, group_size=4))
        slices += range(8)[parallel.own_slice(8)]
    assert sorted(torch.cat(shares).tolist()) == list(range(24))
    assert sum(len(set((share // 4).tolist())) for share in shares) == 6
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= max(int(group.sum()) for group in lengths.split(4))
    assert slices == list(range(8))
