"""Packing: no token lost, no prompt twice, and the numbers of the padded pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config
from update_cases import ON_POLICY, make_batch

from train_grpo import update_policy
from utils.algorithm import log_probs as log_probs_module
from utils.algorithm.batch import response_mask
from utils.algorithm.head import find_head
from utils.algorithm.log_probs import response_log_probs
from utils.algorithm.packing import enable_packing, is_packable, pack
from utils.algorithm.policy import load_policy, load_tokenizer
from utils.engines.transformers_engine import TransformersEngine
from utils.records import Problem, Prompt, Sampling

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def build(config_class: type = Qwen2Config, kernel: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES), attn_implementation=kernel).double()
    for parameter in model.parameters():  # larger than as initialised, so that attention has something to choose from
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Pairs of prompt and response -> input_ids (M, T) and response_mask (M, T-1)."""
    ids = [torch.tensor(prompt + response) for prompt, response in rows]
    grid = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([[len(prompt), len(response)] for prompt, response in rows])
    return grid, response_mask(lengths[:, 0], lengths[:, 1], grid.shape[1])


def test_pack_by_hand() -> None:
    rows = [([5, 6], [7, 8, 9]), ([5, 6], [4]), ([5], [6, 7]), ([1, 2], [])]
    packing = pack(*padded(rows))
    # 9, 4 and 7 end their sequences; the second row has the first one's prompt; the last has nothing to predict
    assert packing.token_ids.tolist() == [5, 6, 7, 8, 5, 6]
    assert packing.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert packing.tokens_of.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [4, 5, 4, 4], [0, 0, 0, 0]]
    assert packing.place_of.tolist() == [0, 1, 2, 3, 8, 9]
    assert packing.predicts.tolist() == [1, 2, 3, 1, 4, 5]


ids = st.integers(0, 2)  # few, so that prompts coincide and are beginnings of each other
some_rows = st.lists(
    st.tuples(st.lists(ids, min_size=1, max_size=4), st.lists(ids, max_size=4)), min_size=1, max_size=7
)
some_rows = some_rows.filter(lambda rows: any(response for _, response in rows))


@given(some_rows)
@settings(max_examples=300)
def test_every_sequence_is_found_and_every_prompt_is_there_once(rows: list[tuple[list[int], list[int]]]) -> None:
    packing = pack(*padded(rows))
    answered = [(prompt, response) for prompt, response in rows if response]
    n_prompt_tokens = sum(map(len, {tuple(prompt) for prompt, _ in answered}))
    assert len(packing.token_ids) == n_prompt_tokens + sum(len(response) - 1 for _, response in answered)
    predicted = iter(packing.predicts.tolist())
    for i, (prompt, response) in enumerate(rows):
        if response:
            tokens = packing.tokens_of[i, : len(prompt + response) - 1]
            assert packing.token_ids[tokens].tolist() == (prompt + response)[:-1]
            assert packing.positions[tokens].tolist() == list(range(len(tokens)))
            assert [next(predicted) for _ in response] == tokens[len(prompt) - 1 :].tolist()
    assert next(predicted, None) is None
    assert torch.equal(packing.tokens_of.flatten()[packing.place_of], torch.arange(len(packing.token_ids)))


ROWS = [([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 7], [3]), ([5, 6], [7, 8]), ([1, 2, 3, 4], []), ([5, 6, 7], [8, 9, 1])]


def log_probs_and_gradients(policy: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    input_ids, mask = padded(ROWS)
    log_probs, _ = response_log_probs(policy, input_ids, mask, temperature=0.7)
    (log_probs * torch.linspace(-1, 2, mask.numel()).view(mask.shape)).sum().backward()
    return log_probs.detach(), [parameter.grad for parameter in policy.parameters()]


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_are_those_of_the_padded_pass(
    config_class: type, kernel: str, checkpointing: bool
) -> None:
    expected, gradients = log_probs_and_gradients(build(config_class))
    policy = build(config_class, kernel).train()
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert enable_packing(policy)
    find_head(policy)  # looks once, with forward passes of its own
    seen = []
    policy.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[:2]))
    log_probs, packed_gradients = log_probs_and_gradients(policy)
    # 3 + 2 prompt tokens, 3 + 0 + 1 + 2 of responses
    assert seen == [(1, 11)] * (2 if checkpointing else 1)
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()  # the models' norms compute in float32


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_sequence_that_overflows_spoils_no_other(kernel: str) -> None:
    policy = build(Qwen2Config, kernel)
    assert enable_packing(policy)
    input_ids, mask = padded([([5], [6, 7, 8]), ([9], [3]), ([4], [2])])
    with torch.no_grad():
        policy.get_input_embeddings().weight[5] = torch.nan
        log_probs, _ = response_log_probs(policy, input_ids, mask)
    # the head is tied to nothing: only what attends to token 5 is lost
    assert log_probs.isfinite().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_bfloat16_is_as_near_to_float64_as_the_padded_pass(kernel: str) -> None:
    exact, _ = log_probs_and_gradients(build())
    errors = []
    for packed in (True, False):
        policy = build(kernel=kernel).bfloat16()
        if packed:
            assert enable_packing(policy)
        errors.append((log_probs_and_gradients(policy)[0].double() - exact).norm())
    assert errors[0] < 3 * errors[1]


def test_a_microbatch_without_a_response_token_is_harmless() -> None:
    policy = build()
    assert enable_packing(policy)
    input_ids, mask = padded([([5, 6], []), ([7], [])])
    log_probs, entropy = response_log_probs(policy, input_ids, mask, with_entropy=True)
    assert torch.equal(log_probs, torch.zeros(2, 1)) and torch.equal(entropy, torch.zeros(2, 1))


@pytest.mark.parametrize("attention_type", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", [{"gradient_accumulation_steps": 4}, {"max_tokens_per_microbatch": 30}])
def test_an_update_is_the_same_with_and_without(
    tiny_model_dir: Path, attention_type: str, cut: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for use_packing in (True, False):
        training = replace(ON_POLICY, attention_type=attention_type, use_packing=use_packing, **cut)
        policy = load_policy(str(tiny_model_dir), training)
        assert is_packable(policy) == use_packing
        monkeypatch.setattr(log_probs_module, "pack", None)  # packed once, beforehand, and not on the way
        update_policy(policy, torch.optim.SGD(policy.parameters(), lr=1.0), make_batch(), training, 0)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    before = torch.cat([p.detach().flatten() for p in load_policy(str(tiny_model_dir), ON_POLICY).parameters()])
    assert (weights[0] - before).norm() > 0.01
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("attention_type", ["sdpa", "eager"])
@pytest.mark.parametrize("texts", [("1 + 2", "31 + 4 =", "7"), ("12", "34", "56")])  # with a padding mask, without
def test_sampling_is_that_of_the_plain_model(tiny_model_dir: Path, attention_type: str, texts: tuple[str, ...]) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    prompts = [Prompt(Problem(text, ""), text, tuple(tokenizer(text).input_ids)) for text in texts]
    sampling = Sampling(
        temperature=1.0, top_p=1.0, min_tokens=8, max_tokens=8, stop=(), include_stop_str_in_output=True
    )
    sampled = []
    for use_packing in (True, False):
        training = replace(ON_POLICY, attention_type=attention_type, use_packing=use_packing)
        policy = load_policy(str(tiny_model_dir), training)
        sampled.append(TransformersEngine(policy, tokenizer, sampling, batch_size=12).generate(prompts, n=4, seed=3))
    for ours, plain in zip(*sampled, strict=True):
        assert ours.response_ids == plain.response_ids
        assert ours.sampler_log_probs == pytest.approx(plain.sampler_log_probs, abs=1e-5)


def test_the_example_in_the_docstring() -> None:
    packing = pack(torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]]), torch.tensor([[0, 1, 1], [0, 1, 0]]).bool())
    assert packing.token_ids.tolist() == [5, 6, 7]
    assert packing.positions.tolist() == packing.place_of.tolist() == [0, 1, 2]
    assert packing.tokens_of.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert packing.predicts.tolist() == [1, 2, 1]
