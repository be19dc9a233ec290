"""Both engines on a GPU: sleep and wake, memory, and how far bfloat16 log-probs may lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import (
    N_PROMPTS,
    RULES,
    asked_to_stop,
    assert_log_probs_of_the_rule,
    assert_same_greedy,
    assert_stops_and_goes_on,
    cpu_config,
    ids_of,
    prompts_of,
    sampling,
    set_sampling,
    sharpen,
    slow_log_probs,
    start,
    tiny_tokenizer,  # noqa: F401, the fixture `tokenizer`
)
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from configs.defaults import Config
from utils import tiny
from utils.engines import installed_vllm
from utils.engines.transformers_engine import TransformersEngine
from utils.run.engine_check import EngineOutOfStep, compare_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
own_process = pytest.mark.own_process  # vLLM lets one engine that can sleep live in a process
needs_vllm = pytest.mark.skipif(installed_vllm() != "vllm", reason="runs vLLM's CUDA build, which is not installed")


@pytest.fixture(scope="module")
def large_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """About 100 M parameters, so that weights stand out from what else takes memory."""
    folder = tmp_path_factory.mktemp("large")
    tiny.build_model(seed=0, hidden_size=1024, n_layers=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def policy_of(folder: Path, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to("cuda:0")


def gpu_config(folder: Path, dtype: str, **training: object) -> Config:
    config = cpu_config(folder, device="cuda:0", dtype=dtype, **training)
    config.vllm.dtype = dtype
    return config


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    torch.cuda.empty_cache()


def test_transformers_engine(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, rule = policy_of(tiny_model_dir, "float32"), sampling(temperature=0.8, top_p=0.7, min_tokens=2)
    engine = TransformersEngine(policy, tokenizer, rule, batch_size=8)
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state().tolist()
    rollouts = engine.generate(prompts_of(tokenizer, 6), n=2, seed=0)
    assert torch.cuda.get_rng_state().tolist() == before
    reference = policy.cpu()
    for rollout in rollouts:
        expected = slow_log_probs(reference, rollout, rule, engine.reader.end_ids, len(tokenizer))
        np.testing.assert_allclose(rollout.sampler_log_probs, expected, atol=1e-3)


@needs_vllm
@own_process
def test_same_greedy_ids_as_transformers(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = policy_of(tiny_model_dir, "float32")
    engine = start(gpu_config(tiny_model_dir, "float32"), policy, tokenizer)
    try:
        other = set_sampling(engine, policy)
        prompts = prompts_of(tokenizer, N_PROMPTS)
        for seed in (1, 2):
            sharpen_on_gpu(policy, seed)
            engine.update_weights(policy)
            ours = engine.generate(prompts, n=1, seed=0, temperature=0.0)
            assert_same_greedy(ours, other.generate(prompts, n=1, seed=0, temperature=0.0), atol=1e-2)
    finally:
        engine.close()


@needs_vllm
@own_process
def test_stop_leaves_no_rollouts_and_a_working_engine(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Asleep right after a stop as well, when a batch may still be computed."""
    policy = policy_of(tiny_model_dir, "float32")
    engine = start(gpu_config(tiny_model_dir, "float32"), policy, tokenizer, min_tokens=8)
    try:
        prompts = prompts_of(tokenizer, 40)
        assert_stops_and_goes_on(engine, policy, prompts)
        whole = ids_of(engine.generate(prompts, n=3, seed=5))
        assert engine.generate(prompts, n=3, seed=5, should_stop=asked_to_stop(4)) == []
        engine.sleep()
        engine.update_weights(policy)
        assert ids_of(engine.generate(prompts, n=3, seed=5)) == whole
    finally:
        engine.close()


@needs_vllm
@own_process
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory_and_waking_loses_nothing(
    large_model_dir: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, level: int
) -> None:
    policy, config = policy_of(large_model_dir, dtype), gpu_config(large_model_dir, dtype)
    config.vllm.sleep_level = level
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state().tolist()
    engine = start(config, policy, tokenizer)
    try:
        for seed in (1, 2, 3):
            change_on_gpu(policy, seed)
            engine.update_weights(policy)
            # Not the same ids twice: the prefix cache changes how a prompt's numbers round.
            rollouts = engine.generate(prompts_of(tokenizer, 16), n=2, seed=seed)
            compare_log_probs(engine, policy, rollouts, config)
            free, total = torch.cuda.mem_get_info()
            slept = engine.sleep()
            assert engine.sleep() == {}
            freed = torch.cuda.mem_get_info()[0] - free
            assert freed == pytest.approx(slept["sleep_freed_gb"] * 1e9, rel=0.1)
            assert freed > 0.7 * config.vllm.gpu_memory_utilization * total
        assert torch.cuda.get_rng_state().tolist() == before
    finally:
        engine.close()


@needs_vllm
@own_process
def test_a_push_makes_no_second_copy(large_model_dir: Path, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    policy = policy_of(large_model_dir, dtype)
    engine = start(gpu_config(large_model_dir, dtype), policy, tokenizer)
    try:
        engine.update_weights(policy)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        metrics = engine.update_weights(policy)
        assert torch.cuda.max_memory_allocated() - before < 0.5 * metrics["push_gb"] * 1e9
        assert torch.cuda.memory_allocated() - before < 1e6
    finally:
        engine.close()


@needs_vllm
@own_process
def test_self_check_catches_pushes_that_were_skipped(
    large_model_dir: Path, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    policy, config = policy_of(large_model_dir, dtype), gpu_config(large_model_dir, dtype)
    engine = start(config, policy, tokenizer)
    try:
        engine.update_weights(policy)
        sharpen_on_gpu(policy, seed=9)
        with pytest.raises(EngineOutOfStep):
            compare_log_probs(engine, policy, engine.generate(prompts_of(tokenizer, 16), n=2, seed=0), config)
    finally:
        engine.close()


@needs_vllm
@own_process
def test_more_memory_than_is_free_is_refused(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, config = policy_of(tiny_model_dir, "bfloat16"), gpu_config(tiny_model_dir, "bfloat16")
    config.vllm.gpu_memory_utilization = 1.0
    with pytest.raises(ValueError, match=r"vllm\.gpu_memory_utilization=1\.0 .* are free: lower it below"):
        start(config, policy, tokenizer)


@torch.no_grad()
def change_on_gpu(policy: PreTrainedModel, seed: int) -> None:
    """Other weights, no sharper than they were: log-probs that engines round differently then stay close."""
    generator = torch.Generator("cuda:0").manual_seed(seed)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda:0", dtype=torch.float32)
        parameter.mul_(1 + 0.1 * noise)


@needs_vllm
@own_process
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_log_probs_are_those_of_the_rule(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase, rule: dict) -> None:
    policy = policy_of(tiny_model_dir, "float32")
    engine = start(gpu_config(tiny_model_dir, "float32"), policy, tokenizer, **rule)
    try:
        engine.update_weights(policy)
        assert_log_probs_of_the_rule(engine, policy, prompts_of(tokenizer, 6), atol=5e-3)
    finally:
        engine.close()


@needs_vllm
@own_process
def test_ids_beyond_the_tokenizer_are_never_sampled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = tiny.build_model(seed=0).config
    config.vocab_size = 2 * len(tokenizer)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy.to("cuda:0")
    engine = start(gpu_config(tmp_path, "float32"), policy, tokenizer)
    try:
        engine.update_weights(policy)
        assert_log_probs_of_the_rule(engine, policy, prompts_of(tokenizer, 6), atol=5e-3)
    finally:
        engine.close()


def sharpen_on_gpu(policy: PreTrainedModel, seed: int) -> None:
    policy.cpu()
    sharpen(policy, seed)
    policy.to("cuda:0")
