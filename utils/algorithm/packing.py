"""A forward pass without padding, in which a prompt is computed once for all its responses.

The tokens of a microbatch stand in one row: each distinct prompt once, each response once. Embedding, projections,
norms, MLP and head treat tokens one by one, so they run on that row; this is nearly all of the work. Attention alone
must know which tokens make a sequence. It looks them up (a prompt's tokens for each of its responses), runs on padded
sequences as usual, and each token's result goes back to its place in the row.

The numbers are those of the padded pass: a token's result depends on the tokens before it alone, and these are the
same in every copy of a prompt. Gradients of the copies add up where they are looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Their layers hand unknown arguments on to attention, take a mask per layer type, and attend to the past and no more
PACKABLE_MODELS = {"qwen2", "qwen3"}
KERNELS = {"sdpa": "packed_sdpa", "eager": "packed_eager"}  # attention_type -> the name of its packed version


@dataclass(frozen=True)
class Packing:
    """M sequences of up to t tokens as one row of N tokens, which predict L labels."""

    token_ids: Tensor  # (N,)
    positions: Tensor  # (N,) in their sequences
    tokens_of: Tensor  # (M, t) index into the packed row; padding points to the sequence's own first token
    place_of: Tensor  # (N,) index into the flattened (M, t): where a token's own result is
    predicts: Tensor  # (L,) the token of the row that predicts each label

    def to(self, device: torch.device) -> Packing:
        """Copied to a device, without waiting for it."""
        if device.type != "cuda":
            return self
        return Packing(*(getattr(self, f.name).pin_memory().to(device, non_blocking=True) for f in fields(self)))


def pack(input_ids: Tensor, response_mask: Tensor) -> Packing:
    """Pack sequences padded on the right, on the CPU; at least one of them has a response token.

    `input_ids` (M, T); `response_mask` (M, T-1), true where the label `input_ids[:, 1:]` is a response token. What
    predicts none of these (a sequence's last token, a prompt without response) is left out.

    Two responses, 7 8 and 9, to the prompt 5 6; the last tokens 8 and 9 predict nothing:
        token_ids  5 6 7              the prompt once
        positions  0 1 2
        tokens_of  0 1 2 | 0 1 0      the second sequence has the same two tokens, then padding
        place_of   0 1 2              all three are computed in the first sequence
        predicts   1 2 1              6 predicts 7, 7 predicts 8, and 6 predicts 9
    """
    n_rows, n_labels = response_mask.shape
    column = torch.arange(n_labels)
    end = (response_mask * (column + 1)).amax(1)  # of what predicts something: 0 for an empty response
    prompt_length = torch.where(response_mask, column, n_labels).amin(1).clamp(max=n_labels - 1) + 1
    width = int(end.max())
    column, ids = column[:width], input_ids[:, :width]
    real, in_prompt = column < end[:, None], column < prompt_length[:, None]

    # every prompt belongs to the first row that has it
    _, prompt = torch.where(real & in_prompt, ids, -1).unique(dim=0, return_inverse=True)
    first_row = torch.full_like(prompt, n_rows).scatter_reduce(0, prompt, torch.arange(n_rows), "amin")
    row = torch.arange(n_rows)[:, None]
    owner = torch.where(in_prompt, first_row[prompt][:, None], row)

    place_of = (real & (owner == row)).flatten().nonzero().squeeze(1)
    number = torch.zeros(n_rows * width, dtype=torch.int64)
    number[place_of] = torch.arange(len(place_of))
    # padding is never seen but by itself; it must be the row's own, for in attention 0 times another's NaN is NaN
    tokens_of = number[torch.where(real, owner * width + column, owner[:, :1] * width)]
    return Packing(
        token_ids=ids.flatten()[place_of],
        positions=place_of % width,
        tokens_of=tokens_of,
        place_of=place_of,
        predicts=tokens_of[response_mask[:, :width]],
    )


def enable_packing(policy: PreTrainedModel) -> bool:
    """Give a policy the attention that `packed_hidden_states` needs; False, and nothing changed, if its attention is
    of another kind. Padded batches then go through torch's kernel."""
    config = policy.config
    plain = config.model_type in PACKABLE_MODELS and set(config.layer_types) == {"full_attention"}
    if not plain or config.attention_dropout or config._attn_implementation not in KERNELS:
        return False
    policy.set_attn_implementation(KERNELS[config._attn_implementation])
    return True


def is_packable(policy: PreTrainedModel) -> bool:
    """Whether `enable_packing` has prepared this policy."""
    return policy.config._attn_implementation in KERNELS.values()


def packed_hidden_states(policy: PreTrainedModel, packing: Packing) -> Tensor:
    """What the head sees where it predicts labels, (L, H)."""
    output = policy.get_decoder()(
        input_ids=packing.token_ids[None],
        position_ids=packing.positions[None],
        attention_mask={"full_attention": None},
        use_cache=False,
        tokens_of=packing.tokens_of,
        place_of=packing.place_of,
    )
    return embedding(packing.predicts, output.last_hidden_state[0])


def packed_attention(
    kernel: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tokens_of: Tensor | None = None,
    place_of: Tensor | None = None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: queries (B, heads, T, D), keys and values (B, fewer heads, S, D), a mask
    (B, 1, T, S) -> (B, T, heads, D), None.

    With `tokens_of` and `place_of` these are one row, B is 1, T and S are N, and `kernel` computes its sequences;
    padded batches, as in sampling, go to `_sdpa`.
    """
    if tokens_of is None:
        return _sdpa(module, query, key, value, attention_mask, scaling).contiguous(), None
    query, key, value = (_look_up(states, tokens_of) for states in (query, key, value))
    return _put_back(kernel(module, query, key, value, None, scaling), place_of), None


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """(B, T, heads, D) by torch's kernel, causal where there is no mask."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
    # Under a mask transformers copies keys and values for each query head; the CPU's kernel needs no copies.
    is_causal = query.shape[2] > 1 and mask is None
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def _eager(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, scaling: float | None) -> Tensor:
    """Causal attention (M, t, heads, D) by two products and a softmax: faster where sequences are short."""
    (n_rows, n_heads, length, _), n_groups = query.shape, key.shape[1]
    # the query heads that share a key head one after another, so that one product serves them all
    query = query.reshape(n_rows * n_groups, -1, query.shape[-1])
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    future = future.repeat(n_heads // n_groups, 1)
    scores = torch.baddbmm(future, query, key.transpose(1, 2), alpha=scaling)
    output = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value
    return output.view(n_rows, n_heads, length, -1).transpose(1, 2)


def _look_up(states: Tensor, tokens_of: Tensor) -> Tensor:
    """(1, heads, N, D), (M, t) -> (M, heads, t, D). The gradients of a token's copies add up."""
    n_heads = states.shape[1]
    return embedding(tokens_of, states.transpose(1, 2).flatten(2)[0]).unflatten(2, (n_heads, -1)).transpose(1, 2)


def _put_back(output: Tensor, place_of: Tensor) -> Tensor:
    """(M, t, heads, D), (N,) -> (1, N, heads, D): each token's own result."""
    return embedding(place_of, output.flatten(2).flatten(0, 1)).unflatten(1, output.shape[2:])[None]


for _name, _kernel in {"packed_sdpa": _sdpa, "packed_eager": _eager}.items():
    AttentionInterface.register(_name, partial(packed_attention, _kernel))
    AttentionMaskInterface.register(_name, sdpa_mask)
