"""How a language model turns its last hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """What a model makes of x, the head's matrix product: x * scale, and with a cap c then c tanh(x * scale / c)."""

    scale: float = 1.0
    cap: float | None = None

    def logits_(self, products: Tensor) -> Tensor:
        """The logits of products, in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap is not None:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d products, from the logits: with a cap c, 1 - tanh^2 = 1 - (logits / c)^2."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


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


def proposed_head(policy: nn.Module) -> Head:
    """Scale and cap, by their names in model configs: Gemma caps, Granite divides, Cohere multiplies."""
    config = policy.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(scale / divisor, getattr(config, "final_logit_softcapping", None) or None)
