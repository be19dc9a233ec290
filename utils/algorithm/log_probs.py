"""Log-probabilities and entropy of response tokens, without ever holding the full logits.

The language-model head turns N hidden states (H) into N x V logits. With a vocabulary of 151,936 these are the largest
tensors of a training step, and most of their rows (prompt, padding) are thrown away. `response_log_probs` runs the head
on response positions only, a chunk at a time, forward and backward; `get_response_log_probs` is the plain version that
it must agree with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from configs.defaults import Training
from utils.algorithm.batch import Microbatch
from utils.algorithm.head import Head, head_of, operands, wide, wide_product
from utils.algorithm.packing import Packing, is_packable, pack, packed_hidden_states
from utils.algorithm.policy import autocast

# These backbones take a mask per layer type. Giving them "no mask" spares the check for packed sequences that
# transformers makes on every forward pass, which waits for the device.
TAKES_MASK_BY_LAYER_TYPE = {"qwen2", "qwen3"}
# With these, no mask means causal; eager attention without a mask looks at the future.
CAUSAL_WITHOUT_MASK = {"sdpa", "flash_attention_2", "flash_attention_3", "packed_sdpa", "packed_eager"}


def policy_log_probs(
    policy: nn.Module, microbatch: Microbatch, training: Training, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(M, t-1) log-probs of the response tokens as they were sampled (temperature applied), and their entropy."""
    with autocast(policy, training.autocast_dtype):
        return response_log_probs(
            policy,
            microbatch.input_ids,
            microbatch.response_mask,
            temperature=training.temperature,
            chunk_size=training.log_prob_chunk_size,
            with_entropy=with_entropy,
            response_index=microbatch.response_index,
            packing=microbatch.packing,
            vocabulary_size=microbatch.vocabulary_size,
            head_dtype=training.head_dtype,
        )


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits): (..., V) -> (...), in nats. H = logsumexp(z) - sum p z, safe for large logits."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    # p log p is 0 where p is 0, also for a logit of minus infinity
    weighted = torch.where(shifted == -torch.inf, 0.0, shifted.softmax(dim=-1) * shifted)
    return shifted.logsumexp(dim=-1) - weighted.sum(dim=-1)


def get_response_log_probs(
    model: nn.Module, input_ids: Tensor, labels: Tensor, return_token_entropy: bool
) -> dict[str, Tensor]:
    """The plain version: log-probs of `labels` under full (B, T, V) logits, in nats.

    Args:
        model: a causal language model, called as `model(input_ids).logits`.
        input_ids: (B, T) int64.
        labels: (B, T) int64, the token that follows each input token.
        return_token_entropy: whether to return the entropy too.

    Returns:
        `log_probs` (B, T) float32; if asked, `token_entropy` (B, T) float32, of the next-token distribution.
    """
    logits = model(input_ids).logits
    logits = logits.to(wide(logits.dtype))
    log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    result = {"log_probs": log_probs}
    if return_token_entropy:
        result["token_entropy"] = compute_entropy(logits)
    return result


def response_log_probs(
    policy: nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 2048,
    with_entropy: bool = False,
    response_index: Tensor | None = None,
    packing: Packing | None = None,
    vocabulary_size: int | None = None,
    head_dtype: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of response tokens under softmax(logits / temperature), and that distribution's entropy, in nats.

    A policy with packing enabled sees no padding, and each prompt once for all its responses. For others, sequences are
    padded on the right, so with causal attention no real token sees padding and no mask is needed.

    Args:
        policy: a Hugging Face causal language model. To compile it, compile its backbone in place
            (`policy.get_decoder().compile()`).
        input_ids: (B, T) int64.
        response_mask: (B, T-1) bool, true where the label `input_ids[:, 1:]` is a response token.
        temperature: the one that the responses were sampled with.
        chunk_size: tokens that go through the head at once; memory grows with chunk_size * V.
        with_entropy: whether to compute the entropy in the same pass; it carries no gradient.
        response_index: (N,) int64, `response_mask.flatten().nonzero()`, if it was computed before: finding it on an
            accelerator makes the host wait for the device.
        packing: `pack(input_ids, response_mask)`, if it was computed before, for the same reason.
        vocabulary_size: ids from this one on have probability 0; None: no such limit. Models pad their vocabulary
            beyond the tokenizer's, and no engine samples such an id.
        head_dtype: "float32" to keep the head's products in float32, see `Head`. Raises ValueError if the policy's head
            is not known.

    Returns:
        log_probs (B, T-1) float32, with gradient, and entropy (B, T-1) float32 or None; both 0 outside the mask.
    """
    assert not hasattr(policy, "_orig_mod"), "a wholly compiled policy hides its backbone: compile get_decoder()"
    if response_index is None:
        response_index = response_mask.flatten().nonzero().squeeze(-1)
    # A row has T hidden states but T - 1 labels: every earlier row moves the index on by one.
    hidden_index = response_index + response_index // response_mask.shape[1]
    labels = input_ids.flatten().index_select(0, hidden_index + 1)

    head = head_of(policy, head_dtype)
    if head is not None:
        if is_packable(policy) and len(response_index):
            if packing is None:
                packing = pack(input_ids.cpu(), response_mask.cpu()).to(input_ids.device)
            hidden = packed_hidden_states(policy, packing)
        else:
            hidden = _hidden_states(policy, input_ids).flatten(0, 1).index_select(0, hidden_index)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        weight = policy.get_output_embeddings().weight
        log_probs, entropy = chunked_log_probs(
            hidden, weight, labels, temperature, chunk_size, with_entropy, vocabulary_size, head
        )
    else:
        logits = policy(input_ids, use_cache=False).logits.flatten(0, 1).index_select(0, hidden_index)
        logits = logits[:, :vocabulary_size]
        logits = logits.to(wide(logits.dtype)) / temperature
        log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = compute_entropy(logits.detach()) if with_entropy else None

    def spread(values: Tensor) -> Tensor:
        grid = torch.zeros(response_mask.numel(), dtype=values.dtype, device=values.device)
        return grid.index_copy(0, response_index, values).view(response_mask.shape)

    return spread(log_probs), spread(entropy) if with_entropy else None


def _hidden_states(policy: nn.Module, input_ids: Tensor) -> Tensor:
    """What the head sees, (B, T, H)."""
    config = policy.config.get_text_config()
    mask = None
    if (
        config.model_type in TAKES_MASK_BY_LAYER_TYPE
        and config._attn_implementation in CAUSAL_WITHOUT_MASK
        and set(config.layer_types) == {"full_attention"}
    ):
        mask = {"full_attention": None}
    return policy.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 2048,
    with_entropy: bool = False,
    vocabulary_size: int | None = None,
    head: Head | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (N, H), head weight (V, H), labels (N,) -> log-probs (N,) and entropy (N,) or None, float32, nats.

    Both are of softmax(logits / temperature) over the first `vocabulary_size` ids (None: all), where logits are
    hidden @ weight.T, scaled and capped if `head` says so; gradients flow only through the log-probs. The weight is
    taken in the dtype of the hidden states.
    """
    return _ChunkedHead.apply(
        hidden, weight, labels, temperature, chunk_size, with_entropy, vocabulary_size, head or Head()
    )


class _ChunkedHead(torch.autograd.Function):
    """`chunked_log_probs`, with its derivative written by hand.

    At most `chunk_size` rows of logits exist at a time. Backward computes a chunk's logits again instead of keeping
    them. Only the last chunk is kept: backward begins there, so keeping it does not raise the peak, and a microbatch
    that fits into one chunk needs no second product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        with_entropy: bool,
        vocabulary_size: int | None,
        head: Head,
    ) -> tuple[Tensor, Tensor | None]:
        known = weight[:vocabulary_size].to(hidden.dtype)  # inside, so that no gradient of a slice has to be put back
        log_probs = torch.empty(len(labels), dtype=wide(hidden.dtype), device=hidden.device)
        log_normalizers = torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if with_entropy else None
        log_softmax = None
        for start in range(0, len(labels), chunk_size):
            rows = slice(start, start + chunk_size)
            log_softmax = None  # freed before the next chunk is made
            log_softmax = _scaled_logits(hidden[rows], known, temperature, head)
            log_normalizers[rows] = log_softmax.logsumexp(-1)
            log_softmax.sub_(log_normalizers[rows, None])
            log_probs[rows] = log_softmax.gather(-1, labels[rows, None]).squeeze(-1)
            if entropy is not None:
                entropy[rows] = log_softmax.exp().mul_(log_softmax).sum(-1).neg_()
        ctx.save_for_backward(hidden, known, labels, log_normalizers)
        ctx.temperature, ctx.chunk_size, ctx.head, ctx.last_log_softmax = temperature, chunk_size, head, log_softmax
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, _grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, known, labels, log_normalizers = ctx.saved_tensors
        dtype = wide(hidden.dtype) if ctx.head.in_float32 else hidden.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=dtype)
        grad_weight = grad_known = None
        if ctx.needs_input_grad[1]:  # a weight that is not trained has no gradient
            grad_weight = torch.zeros(ctx.weight_shape, dtype=dtype, device=hidden.device)
            grad_known = grad_weight[: len(known)]
        for start in reversed(range(0, len(labels), ctx.chunk_size)):
            rows = slice(start, start + ctx.chunk_size)
            log_softmax, ctx.last_log_softmax = ctx.last_log_softmax, None
            if log_softmax is None:
                log_softmax = _scaled_logits(hidden[rows], known, ctx.temperature, ctx.head)
                log_softmax.sub_(log_normalizers[rows, None])
            slope = None
            if not ctx.head.is_plain:  # else it is 1
                slope = ctx.head.slope_((log_softmax + log_normalizers[rows, None]).mul_(ctx.temperature))
            # d log p(label) / d logits = (onehot(label) - softmax) / temperature
            upstream = grad_log_probs[rows, None] / ctx.temperature
            softmax, label = log_softmax.exp_(), labels[rows, None]
            del log_softmax
            at_label = softmax.gather(-1, label).mul_(-upstream).add_(upstream)
            if slope is not None:
                at_label.mul_(slope.gather(-1, label))
                softmax.mul_(slope)
                del slope
            grad_logits = _rounded_product(softmax, -upstream, dtype, on_cuda=softmax.is_cuda)
            del softmax
            grad_logits.scatter_(-1, label, at_label.to(dtype))
            _add_products(grad_logits, hidden[rows], known, grad_hidden[rows], grad_known)
            del grad_logits
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None, None


def _add_products(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor, grad_weight: Tensor | None
) -> None:
    """Add (n, V) @ (V, H) to `grad_hidden`, which is 0, and (V, n) @ (n, H) to `grad_weight`, if there is one.

    With a float32 head the gradients are float32, and the operands have 16 bits. Overwrites `grad_logits`.
    """
    if grad_hidden.dtype == hidden.dtype:
        torch.mm(grad_logits, weight, out=grad_hidden)
        if grad_weight is not None:
            grad_weight.addmm_(grad_logits.T, hidden)
        return
    for part in operands(grad_logits, hidden.dtype):
        grad_hidden += wide_product(part, weight)
        if grad_weight is not None:
            grad_weight += wide_product(part.T, hidden)


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, head: Head) -> Tensor:
    """(n, H), (V, H) -> a fresh (n, V) float32: logits / temperature."""
    logits = head.logits_(head.products(hidden, weight))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _rounded_product(values: Tensor, factor: Tensor, dtype: torch.dtype, on_cuda: bool) -> Tensor:
    """(n, V), (n, 1) -> their product in `dtype`; `values` may be overwritten. On CUDA one pass multiplies and rounds;
    the CPU's kernel would hold a product in float32 besides."""
    if on_cuda and values.dtype != dtype:
        return torch.mul(values, factor, out=torch.empty_like(values, dtype=dtype))
    return values.mul_(factor).to(dtype)
