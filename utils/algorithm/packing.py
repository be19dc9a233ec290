"""A forward pass without padding, in which a prompt is computed once for all its responses.

The tokens of a microbatch form one row: each distinct prompt once, each response once. Embedding, projections,
norms, MLP and head treat tokens one by one, so they run on that row; this is nearly all of the work. Only attention
must know which tokens make up a sequence. It looks them up (a prompt's tokens for each of its responses), runs on
padded sequences as usual, and each token's result goes back to its place in the row.

The numbers are those of the padded pass: a token's result depends only on the tokens before it, and these are the
same in every copy of a prompt. Gradients of the copies add up where they are looked up.

No model family is named here. Families differ in what surrounds attention, and that runs as it is; what attention
itself must know (scale, sliding window, soft cap) transformers hands to every attention function. `enable_packing`
tests whether a model follows this: it compares a short packed pass with the padded one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    """Give a policy the attention that `packed_hidden_states` needs; False, and nothing changed, if packing does not
    give the numbers of its padded pass, as with other kernels, recurrent layers or dropout. Padded batches then go
    through torch's kernel."""
    kernel = policy.config._attn_implementation
    if kernel not in KERNELS or not policy._can_set_attn_implementation():
        return False
    with torch.no_grad(), _short_windows(policy):
        agrees = _agrees_with_padded(policy, KERNELS[kernel])
    policy.set_attn_implementation(KERNELS[kernel] if agrees else kernel)
    return agrees


def is_packable(policy: PreTrainedModel) -> bool:
    """Whether `enable_packing` has prepared this policy."""
    return policy.config._attn_implementation in KERNELS.values()


def _agrees_with_padded(policy: PreTrainedModel, packed_kernel: str) -> bool:
    """Whether a packed pass over a few tokens gives what the model's own eager attention gives for padded sequences.

    In the mode that the policy is in, so that a model with dropout, which is random, does not agree. Leaves the
    policy's kernel changed.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8, 5, 0, 0], [2, 3, 4, 9, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    device = next(policy.parameters()).device
    packing = pack(ids, mask).to(device)
    try:
        policy.set_attn_implementation("eager")
        padded = policy.get_decoder()(input_ids=ids[:, :-1].to(device), use_cache=False).last_hidden_state
        padded = padded[mask.to(device)].float()
        policy.set_attn_implementation(packed_kernel)
        packed = packed_hidden_states(policy, packing).float()
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError):  # it does not know these arguments
        return False
    # half the digits that the weights have: attention that sees other tokens is further off than rounding is
    allowed = max(torch.finfo(policy.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    return bool(((packed - padded).norm(dim=-1) <= allowed * padded.norm(dim=-1)).all())


@contextlib.contextmanager
def _short_windows(policy: PreTrainedModel, length: int = 3) -> Iterator[None]:
    """Shorten sliding windows for a while, so that they show in a short sequence."""
    places = {id(place): place for module in policy.modules() for place in (module, getattr(module, "config", None))}
    changed = []
    for place in places.values():
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(place, name, None)
            if isinstance(window, int) and not isinstance(window, bool):
                changed.append((place, name, window))
                setattr(place, name, length)
    try:
        yield
    finally:
        for place, name, window in changed:
            setattr(place, name, window)


def packed_hidden_states(policy: PreTrainedModel, packing: Packing) -> Tensor:
    """What the head sees where it predicts labels, (L, H)."""
    output = policy.get_decoder()(
        input_ids=packing.token_ids[None],
        position_ids=packing.positions[None],
        # four dimensions: every family then takes it for finished and hands it to attention, where nothing reads it
        attention_mask=packing.token_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: queries (B, heads, T, D), keys and values (B, fewer heads, S, D), a mask
    (B, 1, T, S) -> (B, T, heads, D), None.

    With `tokens_of` and `place_of` these are one row, B is 1, T and S are N, and `kernel` computes its sequences;
    padded batches, as in sampling, go to `_sdpa`. torch's kernel knows no soft cap, and on the CPU it takes up to 50
    times as long for one query per sequence where oneDNN makes the products: both go to `_eager`.
    """
    if tokens_of is None:
        one_query = query.shape[2] == 1 and query.device.type == "cpu"
        kernel = _eager if one_query else _sdpa
        if softcap is not None:
            kernel = partial(_eager, softcap=softcap)
        return kernel(module, query, key, value, attention_mask, scaling).contiguous(), None
    if softcap is not None:
        kernel = partial(_eager, softcap=softcap)
    query, key, value = (_look_up(states, tokens_of) for states in (query, key, value))
    mask = _window_mask(query.shape[2], sliding_window, query.device)
    return _put_back(kernel(module, query, key, value, mask, scaling), place_of), None


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """(t, t) bool, true where a token sees another: itself and the `sliding_window` - 1 before it; None if it sees the
    whole past."""
    if sliding_window is None or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - sliding_window)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """(B, T, heads, D) by torch's kernel, causal if there is no mask."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
    # Under a mask transformers copies keys and values for each query head; the CPU's kernel needs no copies.
    is_causal = query.shape[2] > 1 and mask is None
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def _eager(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """(B, T, heads, D) by two products and a softmax, causal if there is no mask: faster for short sequences.

    The mask is (T, S) or (B, 1, T, S). With a soft cap c, scores s become c tanh(s / c): Gemma Team 2024,
    arXiv:2408.00118.
    """
    (n_rows, n_heads, length, dimension), n_groups = query.shape, key.shape[1]
    scaling = dimension**-0.5 if scaling is None else scaling
    # the query heads that share a key head one after another, so that one product serves them all
    query = query.reshape(n_rows * n_groups, -1, dimension)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    hidden = _hidden_from(query, key, length, mask)
    if hidden.ndim == 4:
        hidden = hidden[:, 0].repeat_interleave(n_groups, 0)
    hidden = hidden.repeat(*(1,) * (hidden.ndim - 2), n_heads // n_groups, 1)
    if softcap is None:
        scores = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=scaling)
    else:
        scores = (query @ key.transpose(1, 2) * (scaling / softcap)).tanh() * softcap + hidden
    output = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value
    return output.view(n_rows, n_heads, length, -1).transpose(1, 2)


def _hidden_from(query: Tensor, key: Tensor, length: int, mask: Tensor | None) -> Tensor:
    """What is added to scores so that the future, or all that a mask leaves out, gets no weight."""
    if mask is None:
        future = torch.full((length, key.shape[1]), -torch.inf, dtype=query.dtype, device=query.device)
        return future.triu(1 + key.shape[1] - length)  # of the last `length` tokens, the future of each
    # the lowest number and not minus infinity: a padding token sees nothing, and 0 / 0 would spread
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


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
