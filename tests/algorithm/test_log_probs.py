"""Response log-probs against the plain version, sequence by sequence and without padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from utils.algorithm import head as head_module
from utils.algorithm.head import Head, find_head
from utils.algorithm.log_probs import (
    _rounded_product,
    chunked_log_probs,
    compute_entropy,
    get_response_log_probs,
    response_log_probs,
)

VOCABULARY = 61
PLAIN = (Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, GemmaConfig, Gemma3TextConfig)
HEADS = {Gemma2Config: Head(cap=30.0), GraniteConfig: Head(scale=0.125), CohereConfig: Head(scale=0.0625)}


def build(config_class: type[PretrainedConfig] = Qwen2Config, attention: str = "sdpa", **changes) -> torch.nn.Module:
    """A small random model. Its head is scaled up so that the distributions are far from uniform."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if config_class is GraniteConfig:
        settings["logits_scaling"] = 8.0
    if config_class is PhiConfig:
        settings["num_key_value_heads"] = 4
    torch.manual_seed(0)
    config = config_class(**(settings | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def make_batch(lengths: list[tuple[int, int]], pad: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (B, T) ids and (B, T-1) response mask for (prompt, response) lengths, `pad` tokens of padding at least."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + response for prompt, response in lengths) + pad
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(lengths):
        total = prompt + response
        input_ids[row, :total] = torch.randint(VOCABULARY, (total,), generator=generator)
        mask[row, prompt - 1 : total - 1] = True
    return input_ids, mask


LENGTHS = [(3, 9), (7, 1), (1, 14), (5, 0), (2, 6)]


def one_by_one(policy: torch.nn.Module, lengths, input_ids, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy from the full logits of each sequence alone, unpadded, in the order of the mask."""
    log_probs, entropy = [], []
    for row, (prompt, response) in enumerate(lengths):
        ids = input_ids[row : row + 1, : prompt + response]
        logits = policy(ids).logits[0, prompt - 1 : -1] / temperature
        distribution = torch.distributions.Categorical(logits=logits, validate_args=False)  # refuses empty responses
        log_probs.append(distribution.log_prob(ids[0, prompt:]))
        entropy.append(distribution.entropy())
    return torch.cat(log_probs), torch.cat(entropy)


def gradients(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config_class", (*PLAIN, *HEADS, PhiConfig), ids=lambda c: c.__name__)
def test_padded_batch_agrees_with_sequences_alone(config_class, attention):
    policy = build(config_class, attention)
    reference_policy = copy.deepcopy(policy)
    input_ids, mask = make_batch(LENGTHS)
    weights = torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(1))

    log_probs, entropy = response_log_probs(policy, input_ids, mask, temperature=0.7, chunk_size=8, with_entropy=True)
    expected, expected_entropy = one_by_one(reference_policy, LENGTHS, input_ids, temperature=0.7)

    torch.testing.assert_close(log_probs[mask], expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[mask], expected_entropy, atol=2e-5, rtol=1e-5)
    assert not log_probs[~mask].any() and not entropy[~mask].any()
    assert not entropy.requires_grad

    (log_probs[mask] * weights).sum().backward()
    (expected * weights).sum().backward()
    expected_gradients = gradients(reference_policy)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config_class", [*PLAIN, *HEADS], ids=lambda c: c.__name__)
def test_heads_are_found(config_class, dtype):
    assert find_head(build(config_class).to(dtype)) == HEADS.get(config_class, Head())


def test_a_head_of_another_kind_is_none(monkeypatch):
    assert find_head(build(PhiConfig)) is None  # it has a bias
    monkeypatch.setattr(head_module, "proposed_head", lambda _policy: Head())
    for config_class in HEADS:  # a config that says nothing of what the model does to its logits
        assert find_head(build(config_class)) is None


@pytest.mark.parametrize("head", [Head(), Head(scale=0.3), Head(cap=2.0), Head(scale=3.0, cap=1.5)])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_head_against_autograd_in_float64(head, chunk_size):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6, dtype=torch.float64), torch.randn(VOCABULARY, 6, dtype=torch.float64)
    labels, upstream = torch.randint(VOCABULARY, (10,)), torch.randn(10, dtype=torch.float64)
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            log_probs, entropy = chunked_log_probs(h, w, labels, 0.7, chunk_size, with_entropy=True, head=head)
        else:
            logits = (h @ w.T) * head.scale
            logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
            distribution = torch.distributions.Categorical(logits=logits / 0.7)
            log_probs, entropy = distribution.log_prob(labels), distribution.entropy()
        (log_probs * upstream).sum().backward()
        results.append((log_probs, entropy, h.grad, w.grad))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 5, 29, 30, 31, 1000])
def test_chunk_size_changes_nothing(chunk_size):
    policy = build(tie_word_embeddings=True)
    input_ids, mask = make_batch(LENGTHS)
    results = []
    for size in (10_000, chunk_size):
        policy.zero_grad()
        log_probs, entropy = response_log_probs(policy, input_ids, mask, 1.3, size, with_entropy=True)
        log_probs.square().sum().backward()
        results.append((log_probs.detach(), entropy, policy.model.embed_tokens.weight.grad.clone()))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-5)


def test_backward_twice_gives_the_same_gradient():
    policy = build()
    input_ids, mask = make_batch(LENGTHS)
    loss = response_log_probs(policy, input_ids, mask, chunk_size=8)[0].sum()
    loss.backward(retain_graph=True)
    first = {name: gradient.clone() for name, gradient in gradients(policy).items()}
    policy.zero_grad()
    loss.backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, first[name], msg=name)


def test_hand_worked_distribution():
    """A head that gives every token the same logit: log-prob -ln V, entropy ln V, at any temperature."""
    policy = build()
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    input_ids, mask = make_batch([(2, 3)])
    log_probs, entropy = response_log_probs(policy, input_ids, mask, temperature=0.3, with_entropy=True)
    expected = torch.log(torch.tensor(float(VOCABULARY)))
    torch.testing.assert_close(log_probs[mask], -expected.expand(3))
    torch.testing.assert_close(entropy[mask], expected.expand(3))


def test_precomputed_index_gives_the_same():
    policy = build()
    input_ids, mask = make_batch(LENGTHS)
    index = torch.tensor([row * mask.shape[1] + t for row, t in mask.nonzero().tolist()])
    without, _ = response_log_probs(policy, input_ids, mask)
    given, _ = response_log_probs(policy, input_ids, mask, response_index=index)
    assert torch.equal(given, without)


def test_batch_without_any_response_token():
    policy = build()
    input_ids, mask = make_batch([(4, 0), (2, 0)])
    log_probs, entropy = response_log_probs(policy, input_ids, mask, with_entropy=True)
    log_probs.sum().backward()
    assert not log_probs.any() and not entropy.any()
    assert not policy.lm_head.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float32_as_the_plain_version(autocast):
    exact_policy = build(vocab_size=VOCABULARY)
    policy = copy.deepcopy(exact_policy) if autocast else copy.deepcopy(exact_policy).bfloat16()
    plain_policy = copy.deepcopy(policy)
    input_ids, mask = make_batch(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_probs, _ = response_log_probs(policy, input_ids, mask, chunk_size=7)
        plain = get_response_log_probs(plain_policy, input_ids[:, :-1], input_ids[:, 1:], False)["log_probs"]
    exact, _ = response_log_probs(exact_policy, input_ids, mask)
    for values in (log_probs[mask], plain[mask], exact[mask]):
        values.sum().backward()

    def distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
        return float((tensor.float() - reference).norm() / reference.norm())

    assert log_probs.dtype == torch.float32
    assert policy.lm_head.weight.grad.dtype == policy.lm_head.weight.dtype
    assert distance(log_probs[mask], exact[mask]) < 1.2 * distance(plain[mask], exact[mask]) < 0.05
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        ours, theirs, reference = (p.get_parameter(name).grad for p in (policy, plain_policy, exact_policy))
        assert distance(ours, reference) < 1.3 * distance(theirs, reference) < 0.1, name


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    policy = build(vocab_size=4096)
    input_ids, mask = make_batch([(10, 80), (10, 60)])
    assert find_head(policy) == Head()
    with LargestTensor() as largest:
        response_log_probs(policy, input_ids, mask, chunk_size=40, with_entropy=True)[0].sum().backward()
    assert largest.elements == 40 * 4096  # 140 tokens in all; the head's weight is 32 * 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_device():
    policy = build().cuda().bfloat16()
    input_ids, mask = make_batch(LENGTHS)
    index = mask.flatten().nonzero().squeeze(-1).cuda()
    input_ids, mask = input_ids.cuda(), mask.cuda()
    response_log_probs(policy, input_ids, mask, response_index=index)[0].sum().backward()  # asks for the head, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        log_probs, _ = response_log_probs(
            policy, input_ids, mask, chunk_size=8, with_entropy=True, response_index=index
        )
        log_probs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_backbone_compiled_in_place_keeps_its_names():
    """The way to compile that leaves state-dict names alone; compiling itself is the library's business."""
    policy = build()
    names = list(policy.state_dict())
    input_ids, mask = make_batch(LENGTHS)
    expected, _ = response_log_probs(policy, input_ids, mask)
    policy.get_decoder().compile(backend="eager")
    compiled, _ = response_log_probs(policy, input_ids, mask)
    torch.testing.assert_close(compiled, expected)
    assert list(policy.state_dict()) == names
    with pytest.raises(AssertionError, match="compile get_decoder"):
        response_log_probs(torch.compile(policy), input_ids, mask)


def test_plain_version_against_cross_entropy():
    policy = build()
    input_ids, _ = make_batch(LENGTHS)
    result = get_response_log_probs(policy, input_ids[:, :-1], input_ids[:, 1:], True)
    logits = policy(input_ids).logits[:, :-1]
    expected = -F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    torch.testing.assert_close(result["log_probs"], expected)
    torch.testing.assert_close(result["token_entropy"], torch.distributions.Categorical(logits=logits).entropy())
    assert set(get_response_log_probs(policy, input_ids[:, :-1], input_ids[:, 1:], False)) == {"log_probs"}


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_ids_beyond_the_vocabulary_have_no_probability(chunk_size: int) -> None:
    """Against the plain head cut to the vocabulary, forward and backward, in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(8, (7,), generator=generator)
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            log_probs, entropy = chunked_log_probs(h, w, labels, 0.7, chunk_size, True, vocabulary_size=8)
        else:
            logits = (h @ w.T)[:, :8] / 0.7
            log_probs, entropy = logits.log_softmax(-1)[torch.arange(7), labels], compute_entropy(logits.detach())
        log_probs.square().sum().backward()
        results.append((log_probs.detach(), entropy, h.grad, w.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert torch.equal(results[0][3][8:], torch.zeros(3, 5, dtype=torch.float64))


def test_the_one_pass_of_cuda_rounds_as_two_do() -> None:
    values, factor = torch.rand(7, 301, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 2, 7)[:, None]
    two = _rounded_product(values.clone(), factor, torch.bfloat16, on_cuda=False)
    assert torch.equal(_rounded_product(values, factor, torch.bfloat16, on_cuda=True), two)
