"""The head in float32 over 16-bit operands: values and gradients against float64, and on both sides of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from update_cases import ON_POLICY, assert_resumes_exactly

from utils.algorithm import head as head_module
from utils.algorithm.head import Head, find_head, halves, head_of, wide_product
from utils.algorithm.log_probs import chunked_log_probs, response_log_probs
from utils.algorithm.policy import autocast, load_policy, load_tokenizer
from utils.engines.transformers_engine import TransformersEngine
from utils.records import Problem, Prompt, Rollout, Sampling

N, H, V = 40, 64, 500


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def in_float64(head: Head, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Log-probs at temperature 0.7, and their sum's gradients, by autograd from the same 16-bit operands."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (h @ w.T) * head.scale
    logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
    log_probs = (logits / 0.7).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return [log_probs, *torch.autograd.grad(log_probs.sum(), [h, w])]


@pytest.mark.parametrize("head", [Head(), Head(scale=3.0, cap=1.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_that_of_float64(head: Head, dtype: torch.dtype) -> None:
    """Of float32 masters: the weight is narrowed to the hidden states' dtype, and its gradient stays wide."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(N, H).to(dtype), torch.randint(V, (N,))
    master = (0.3 * torch.randn(V, H)).requires_grad_()
    exact = in_float64(head, hidden, master.to(dtype), labels)
    distances = {}
    for in_float32 in (True, False):
        master.grad = None
        ours = replace(head, in_float32=in_float32)
        log_probs, _ = chunked_log_probs(hidden, master, labels, 0.7, chunk_size=16, head=ours)
        log_probs.sum().backward()
        distances[in_float32] = distance(log_probs, exact[0]), distance(master.grad, exact[2])
    assert max(distances[True]) < 1e-5
    assert max(distances[False]) > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_16_bit_kernels_is_that_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(N, H).to(dtype), torch.randint(V, (N,))
    master = 0.3 * torch.randn(V, H)
    exact = in_float64(Head(), hidden, master.to(dtype), labels)
    weight = master.cuda().requires_grad_()
    head = Head(in_float32=True)
    log_probs, _ = chunked_log_probs(hidden.cuda(), weight, labels.cuda(), 0.7, chunk_size=16, head=head)
    log_probs.sum().backward()
    assert max(distance(log_probs.cpu(), exact[0]), distance(weight.grad.cpu(), exact[2])) < 1e-5


def test_gradient_of_hidden_states_is_rounded_once() -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(N, H).bfloat16().requires_grad_(), torch.randint(V, (N,))
    weight = (0.3 * torch.randn(V, H)).bfloat16()
    chunked_log_probs(hidden, weight, labels, 0.7, chunk_size=16, head=Head(in_float32=True))[0].sum().backward()
    _, exact, _ = in_float64(Head(), hidden, weight, labels)
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad is None  # a head that is not trained has none
    torch.testing.assert_close(hidden.grad, exact.bfloat16(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_halves_are_as_good_as_float32(dtype: torch.dtype) -> None:
    """How CUDA's 16-bit kernels take a float32 gradient; a single half would be off by 1e-3."""
    torch.manual_seed(0)
    values, weight = torch.randn(N, V), torch.randn(V, H).to(dtype)
    exact = values.double() @ weight.double()
    high, low = (wide_product(part, weight) for part in halves(values.clone(), dtype))
    assert distance(high + low, exact) < 1e-5 < 1e-4 < distance(high, exact)


@pytest.mark.parametrize("autocast_dtype", [None, "bfloat16"])
def test_both_sides_or_neither(tiny_model_dir: Path, autocast_dtype: str | None) -> None:
    """Of one token after a prompt both sides have nearly the same hidden states, so that the heads alone differ."""
    training = replace(ON_POLICY, dtype="float32" if autocast_dtype else "bfloat16", autocast_dtype=autocast_dtype)
    policy, tokenizer = load_policy(str(tiny_model_dir), training), load_tokenizer(str(tiny_model_dir))
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(3)  # logits far apart, which bfloat16 rounds coarsely
    prompt = Prompt(Problem("", ""), "", tuple(tokenizer("What is 12 + 34?").input_ids))
    gaps = {}
    for ours in (None, "float32"):
        sampling = Sampling(1.0, 1.0, 0, 1, (), True)
        engine = TransformersEngine(policy, tokenizer, sampling, 32, autocast_dtype, head_dtype=ours)
        rollouts = engine.generate([prompt], n=32, seed=0)
        for theirs in (None, "float32"):
            gaps[ours, theirs] = median_gap(policy, rollouts, autocast_dtype, theirs)
    assert gaps["float32", "float32"] < 1e-5
    assert min(gaps[None, "float32"], gaps["float32", None]) > 1e-4


def median_gap(
    policy: torch.nn.Module, rollouts: list[Rollout], autocast_dtype: str | None, head_dtype: str | None
) -> float:
    gaps = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        mask = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
        mask[:, -1] = True
        with torch.no_grad(), autocast(policy, autocast_dtype):
            log_probs, _ = response_log_probs(policy, ids, mask, head_dtype=head_dtype)
        gaps.append((log_probs[mask] - torch.tensor(rollout.sampler_log_probs)).abs())
    return torch.cat(gaps).median().item()


def test_a_head_that_is_not_known_is_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(tiny_model_dir), ON_POLICY)
    assert head_of(policy, "float32") == replace(find_head(policy), in_float32=True)
    monkeypatch.setitem(head_module._heads, policy, None)
    assert head_of(policy, None) is None
    with pytest.raises(ValueError, match=r"training.head_dtype = 'float32': Qwen2.* set it to null"):
        head_of(policy, "float32")


def test_a_save_loses_no_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    training = replace(ON_POLICY, autocast_dtype="bfloat16", head_dtype="float32")
    assert_resumes_exactly(tiny_model_dir, tmp_path, training)
