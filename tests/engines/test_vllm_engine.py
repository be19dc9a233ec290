"""The vLLM engine, run for real: in step with the policy, against the transformers engine and the slow way."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import (
    N_PROMPTS,
    RULES,
    assert_log_probs_of_the_rule,
    assert_same_greedy,
    assert_stops_and_goes_on,
    cpu_config,
    ids_of,
    needs_vllm_cpu,
    preserved_environment,
    prompts_of,
    sampling,
    set_sampling,
    sharpen,
    slow_log_probs,
    start,
    tiny_policy,  # noqa: F401, the fixture `policy`
    tiny_tokenizer,  # noqa: F401, the fixture `tokenizer`
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.algorithm.policy import count_full_weights, load_policy, trainable
from utils.records import RolloutEngine
from utils.run.engine_check import EngineOutOfStep, compare_log_probs, log_prob_gap, tolerance_of

pytestmark = needs_vllm_cpu


@pytest.fixture(scope="module")
def engine(
    tiny_model_dir: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[RolloutEngine]:
    """One engine for all tests here, which set its sampling as they need."""
    with preserved_environment():
        engine = start(cpu_config(tiny_model_dir), policy, tokenizer)
        yield engine
        engine.close()


# In step with the policy


def test_same_greedy_ids_as_transformers_before_and_after_pushes(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Prompts of one block and of several, so that a prefix cache that outlived a push would show."""
    other = set_sampling(engine, policy, max_tokens=16)
    prompts = prompts_of(tokenizer, N_PROMPTS)
    seen = []
    for seed in (1, 2, 3):
        sharpen(policy, seed)
        metrics = engine.update_weights(policy)
        assert metrics["push_gb"] == pytest.approx(4e-9 * sum(p.numel() for p in policy.parameters()))
        ours = engine.generate(prompts, n=1, seed=0, temperature=0.0)
        assert_same_greedy(ours, other.generate(prompts, n=1, seed=0, temperature=0.0))
        seen.append(ids_of(ours))
    for first, second in ((0, 1), (1, 2)):
        assert not any(a == b for a, b in zip(seen[first], seen[second], strict=True))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampled_log_probs_are_of_the_distribution_sampled_from(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top_p: float
) -> None:
    rule = {"temperature": 0.7, "top_p": top_p, "min_tokens": 3, "max_tokens": 8}
    policy.generation_config.eos_token_id = list(range(60, 130))
    set_sampling(engine, policy, **rule)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    engine.update_weights(policy)
    rollouts = engine.generate(prompts_of(tokenizer, 10), n=2, seed=3)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert min(len(rollout.response_ids) for rollout in rollouts) == 4
    for rollout in rollouts:
        expected = slow_log_probs(policy, rollout, sampling(**rule), engine.reader.end_ids, len(tokenizer))
        np.testing.assert_allclose(rollout.sampler_log_probs, expected, atol=1e-4)


@pytest.mark.parametrize("included", [True, False])
def test_stop_strings_as_with_transformers(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, included: bool
) -> None:
    other = set_sampling(engine, policy, max_tokens=24)
    engine.update_weights(policy)
    prompts = prompts_of(tokenizer, 40)
    texts = [rollout.response for rollout in other.generate(prompts, n=1, seed=0, temperature=0.0)]
    # what the first responses hold from their eighth character on, so that stop strings do occur
    stops = tuple(text[8:11] for text in texts[:12] if "\ufffd" not in text[8:11])
    other = set_sampling(engine, policy, max_tokens=24, min_tokens=6, stop=stops, include_stop_str_in_output=included)
    ours = engine.generate(prompts, n=1, seed=0, temperature=0.0)
    assert_same_greedy(ours, other.generate(prompts, n=1, seed=0, temperature=0.0))
    assert sum(rollout.response.endswith(stops) for rollout in ours if not rollout.truncated) == (
        sum(not rollout.truncated for rollout in ours) if included else 0
    )
    assert any(rollout.truncated for rollout in ours) and not all(rollout.truncated for rollout in ours)


def test_seeds(engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    set_sampling(engine, policy)
    engine.update_weights(policy)
    prompts = prompts_of(tokenizer, 5)
    rollouts = engine.generate(prompts, n=3, seed=2**47)
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(3)]
    assert len(set(ids_of(rollouts))) == 15
    assert ids_of(engine.generate(prompts, n=3, seed=2**47)) == ids_of(rollouts)
    assert ids_of(engine.generate([prompts[4]], n=1, seed=2**47 + 4 * 3 + 2)) == ids_of(rollouts)[14:]
    greedy = engine.generate(prompts, n=3, seed=0, temperature=0.0)
    assert ids_of(greedy) == [ids for ids in ids_of(greedy)[::3] for _ in range(3)]


def test_stop_leaves_no_rollouts_and_a_working_engine(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    set_sampling(engine, policy, min_tokens=8)
    assert_stops_and_goes_on(engine, policy, prompts_of(tokenizer, 40))
    outputs = engine._llm.llm_engine.output_processor
    assert not outputs.request_states and not outputs.parent_requests


def test_self_check_catches_a_push_that_was_skipped(
    tiny_model_dir: Path, engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One AdamW step at 1e-5, the smallest rate that anybody would train at, then rollouts without a push."""
    config = cpu_config(tiny_model_dir, temperature=0.7)
    set_sampling(engine, policy, temperature=0.7, min_tokens=2)
    engine.update_weights(policy)
    prompts = prompts_of(tokenizer, 16)
    metrics = compare_log_probs(engine, policy, engine.generate(prompts, n=2, seed=0), config)
    assert metrics["check_mean_diff"] <= metrics["check_max_diff"] < 1e-4
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    ids = torch.tensor([prompts[0].token_ids])
    policy(ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(EngineOutOfStep, match=r"vllm engine is out of step .* temperature 0\.7 .*not pushed after"):
        compare_log_probs(engine, policy, engine.generate(prompts, n=2, seed=1), config)
    engine.update_weights(policy)
    compare_log_probs(engine, policy, engine.generate(prompts, n=2, seed=1), config)


def test_an_adapter_is_pushed_merged_and_a_skipped_push_is_caught(
    tiny_model_dir: Path, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = cpu_config(tiny_model_dir, lora_rank=4, use_gradient_checkpointing=False)
    policy = load_policy(str(tiny_model_dir), config.training).eval()
    other, prompts = set_sampling(engine, policy, max_tokens=16), prompts_of(tokenizer, 40)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        with torch.no_grad():
            for parameter in trainable(policy):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        with pytest.raises(EngineOutOfStep, match="not pushed after"):  # it has the weights of before
            compare_log_probs(engine, policy, engine.generate(prompts, n=2, seed=1), config)
        metrics = engine.update_weights(policy)
        assert metrics["push_gb"] == pytest.approx(4e-9 * count_full_weights(policy))
        compare_log_probs(engine, policy, engine.generate(prompts, n=2, seed=1), config)
        ours, theirs = (each.generate(prompts, n=1, seed=0, temperature=0.0) for each in (engine, other))
        assert_same_greedy(ours, theirs)


def test_log_prob_gap_by_hand() -> None:
    """With top_p = 0.5 the engine may be up to log 2 = 0.693 above the trainer, and never below."""
    sampler, trainer = torch.tensor([[-1.0, -1.0, -1.0, -9.0]]), torch.tensor([[-1.25, -1.5, -0.5, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(log_prob_gap(sampler, trainer, mask, top_p=1.0).tolist(), [0.25, 0.5, 0.5])
    torch.testing.assert_close(log_prob_gap(sampler, trainer, mask, top_p=0.5).tolist(), [0.0, 0.0, 0.5])
    far = log_prob_gap(sampler, trainer - 1, mask, top_p=0.5)
    torch.testing.assert_close(far.tolist(), [1.25 - np.log(2), 1.5 - np.log(2), 0.0], atol=1e-6, rtol=0)


def test_tolerance_is_the_coarser_dtype_s() -> None:
    config = cpu_config(Path("model"))
    assert tolerance_of(config) == 1e-4
    config.vllm.dtype = "bfloat16"
    assert tolerance_of(config) == 5e-2
    config.vllm.check_tolerance = 0.3
    assert tolerance_of(config) == 0.3


def test_log_probs_that_are_not_finite_stop_the_run(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    set_sampling(engine, policy)
    weight = policy.get_decoder().norm.weight
    kept = weight[0].item()
    with torch.no_grad():
        weight[0] = torch.nan
    engine.update_weights(policy)
    try:
        with pytest.raises(RuntimeError, match="vllm engine returned a log-prob that is not finite"):
            engine.generate(prompts_of(tokenizer, 2), n=1, seed=0)
    finally:
        with torch.no_grad():
            weight[0] = kept
        engine.update_weights(policy)


def test_a_push_warns_of_nothing(
    engine: RolloutEngine, policy: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    loader = logging.getLogger("vllm.model_executor.model_loader")
    loader.addHandler(caplog.handler)
    engine.update_weights(policy)
    loader.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_hundred_pushes_take_no_memory(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The weights are 1.7 MB: one copy kept a push would be 170 MB."""
    import psutil  # comes with vLLM

    set_sampling(engine, policy)
    prompts, process = prompts_of(tokenizer, 8), psutil.Process()

    def push_and_generate(count: int) -> None:
        for k in range(count):
            engine.update_weights(policy)
            if k % 5 == 0:
                engine.generate(prompts, n=2, seed=k)

    push_and_generate(20)
    gc.collect()
    before = process.memory_info().rss
    push_and_generate(100)
    gc.collect()
    assert process.memory_info().rss - before < 20e6


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_log_probs_are_those_of_the_rule(
    engine: RolloutEngine, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rule: dict
) -> None:
    """The body that the GPU's tests run on CUDA's own sampler."""
    set_sampling(engine, policy, **rule)
    engine.update_weights(policy)
    assert_log_probs_of_the_rule(engine, policy, prompts_of(tokenizer, 6), atol=1e-4)
