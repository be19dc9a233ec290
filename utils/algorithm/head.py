"""How a language model turns its last hidden states into logits, and whether they may predict the next token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """What a model makes of x, the head's matrix product: x * scale, and with a cap c then c tanh(x * scale / c).

    The product is rounded to its operands' dtype, as the model's own head does it, unless `in_float32`: then its sums
    stay as they are, in float32, and so does the gradient that comes back.
    """

    scale: float = 1.0
    cap: float | None = None
    in_float32: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether logits are the products themselves."""
        return self.scale == 1.0 and self.cap is None

    def products(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(n, H), (V, H) of one dtype -> a fresh (n, V), float32 at least."""
        if self.in_float32:
            return wide_product(hidden, weight.T)
        return (hidden @ weight.T).to(wide(hidden.dtype))

    def logits_(self, products: Tensor) -> Tensor:
        """The logits of products, in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap is not None:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products

    def slope_(self, logits: Tensor) -> Tensor:
        """d logits / d products, in the place of the logits: with a cap c, scale (1 - tanh^2), tanh = logits / c."""
        if self.cap is None:
            return logits.fill_(self.scale)
        return logits.div_(self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What log-probs are computed in: float32, or float64 for a model in float64."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """(n, k), (k, m) -> (n, m) whose sums are not rounded below float32; the operands are taken as they are.

    A product of two 16-bit numbers is exact in float32. So on the CPU the operands are widened; on CUDA, where that
    would cost the speed of 16-bit kernels, the kernel is asked for its float32 sums.
    """
    with torch.autocast(left.device.type, enabled=False):  # it would narrow them again
        if left.is_cuda and left.dtype == right.dtype != wide(left.dtype):
            return torch.mm(left, right, out_dtype=wide(left.dtype))
        return left.to(wide(left.dtype)) @ right.to(wide(right.dtype))


def operands(values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A float32 left operand for `wide_product` with a right one of `dtype`; overwrites `values`.

    On the CPU it is itself. CUDA's 16-bit kernels take it in two halves, whose sum is off by 2^-17 of it at most.
    """
    if values.is_cuda and dtype != values.dtype:
        yield from halves(values, dtype)
    else:
        yield values


def halves(values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """float32 values rounded to a 16-bit dtype, then what that rounding took away, rounded too."""
    high = values.to(dtype)
    yield high
    yield values.sub_(high).to(dtype)


@torch.no_grad()
def find_head(policy: nn.Module) -> Head | None:
    """What the policy does to its last hidden states; None if it is more than a matrix product, a scale and a cap.

    The config proposes scale and cap, and a forward pass shows whether that is all: what goes into the head is compared
    with the hidden states, and the head's output is replaced by known values that must come back as `Head` turns them
    into logits. Found once per policy and remembered.
    """
    if policy not in _heads:
        matrix, head = policy.get_output_embeddings(), proposed_head(policy)
        ids = torch.zeros(1, 2, dtype=torch.long, device=matrix.weight.device)
        seen = {}

        def replace_output(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            seen["input"] = inputs[0]
            seen["output"] = torch.linspace(-100, 100, output.numel()).to(output).view_as(output)
            return seen["output"].clone()  # a model may scale in place

        training = policy.training
        policy.eval()  # with dropout no two passes are the same
        with torch.compiler.set_stance("force_eager"):
            with matrix.register_forward_hook(replace_output):
                logits = policy(ids, use_cache=False).logits
            hidden = policy.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        policy.train(training)
        known = (
            type(matrix) is nn.Linear
            and matrix.bias is None
            and torch.allclose(logits, head.logits_(seen["output"]).to(logits), rtol=8 * torch.finfo(logits.dtype).eps)
            and torch.allclose(seen["input"], hidden)
        )
        _heads[policy] = head if known else None
    return _heads[policy]


def head_of(policy: nn.Module, head_dtype: str | None) -> Head | None:
    """`find_head`, with its products kept in float32 if `head_dtype` says so; that needs a head that is known."""
    head = find_head(policy)
    if head_dtype is None:
        return head
    if head is None:
        raise ValueError(
            f"training.head_dtype = {head_dtype!r}: {type(policy).__name__} does more to its logits than a matrix "
            "product, a scale and a cap, so its head can't be computed apart; set it to null"
        )
    return replace(head, in_float32=True)


def next_token_logits(policy: nn.Module, head: Head, **inputs: Any) -> tuple[Tensor, Any]:
    """A policy's forward pass that ends in `head`: logits (B, V) after the last column, and the grown cache."""
    output = policy.get_decoder()(**inputs)
    hidden, weight = output.last_hidden_state[:, -1], policy.get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return head.logits_(head.products(hidden, weight.to(hidden.dtype))), output.past_key_values


def proposed_head(policy: nn.Module) -> Head:
    """Scale and cap, by their names in model configs: Gemma caps, Granite divides, Cohere multiplies."""
    config = policy.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(scale / divisor, getattr(config, "final_logit_softcapping", None) or None)


@torch.no_grad()
def sees_the_future(policy: nn.Module) -> bool:
    """Whether the last of four tokens changes what the model makes of the first three, as in BERT, which transformers
    loads with a head for text generation."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=policy.device)
    one, other = policy.eval()(input_ids=ids, use_cache=False).logits[:, :3].double()
    return bool((one - other).norm() > 10 * torch.finfo(policy.dtype).eps * one.norm())
