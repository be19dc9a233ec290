"""The optimizers that `training.optimizer` names: AdamW in the weights' dtype, in 8 bits, or in 8 bits on masters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fused_adamw(parameters: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """torch's AdamW; its two moments have the weights' dtype."""
    return torch.optim.AdamW(parameters, fused=True, **options)


def adamw_8bit(parameters: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv:2110.02861)."""
    return _bitsandbytes().optim.AdamW8bit(parameters, **options)


def adamw_8bit_master(parameters: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit on float32 masters of bfloat16 weights, for two bytes per weight more.

    A weight is its master rounded to bfloat16. The state holds the 16 bits that this takes away, so that master
    and weight together are 32 bits. A step puts a tensor's masters together, lets bitsandbytes update them as it
    updates float32 weights, and takes them apart again. So no update is lost, nothing is random, and the numbers are
    those of float32 weights under AdamW8bit.

    `play-scripts/bench/small_updates.py` compares it with torchao's and torch-optimi's ways.
    """
    base = _bitsandbytes().optim.AdamW8bit

    class AdamW8bitMaster(base):
        """Overrides the two methods that bitsandbytes' base class leaves to its optimizers."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # else loading a state would cast them to the weights' dtype
            self.non_castable_tensor_keys = self.non_castable_tensor_keys | {LOW_BITS}

        @torch.no_grad()
        def init_state(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
            super().init_state(group, p, gindex, pindex)
            if p.dtype == torch.bfloat16:
                self.state[p][LOW_BITS] = torch.zeros_like(p, dtype=torch.int16)  # the weights as loaded are exact

        @torch.no_grad()
        def update_step(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
            state = self.state[p]
            if LOW_BITS not in state:
                super().update_step(group, p, gindex, pindex)
                return
            master = torch.nn.Parameter(join(p.data, state[LOW_BITS]))
            master.grad = p.grad.float()
            self.state[master] = state
            super().update_step(group, master, gindex, pindex)
            del self.state[master]
            master.grad = None
            split_(master.data, p.data, state[LOW_BITS])

    return AdamW8bitMaster(parameters, **options)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": fused_adamw,
    "adamw8bit": adamw_8bit,
    "adamw8bit_master": adamw_8bit_master,
}

LOST_ABOVE = 512  # times the learning rate: bfloat16 rounds an AdamW step away from a weight of this size or more


def share_that_can_move(parameters: list[torch.nn.Parameter], learning_rate: float) -> float:
    """The share of these bfloat16 weights that a step of the size of the learning rate can change, without masters.

    A bfloat16 has 8 significant bits, so a step is lost where it is below |weight| / 512, and depending on the weight
    already below |weight| / 256. AdamW's steps are about as large as the learning rate at most.
    """
    small = sum((parameter.detach().abs() < LOST_ABOVE * learning_rate).sum() for parameter in parameters)
    return float(small) / sum(parameter.numel() for parameter in parameters)


LOW_BITS = "low_bits"  # the name in the state of a parameter


def join(weight: Tensor, low_bits: Tensor) -> Tensor:
    """bfloat16 weights and what rounding took away (int16) -> their float32 masters, to the last bit.

    As integers, a master's 32 bits are those of its weight, moved up by 16, plus the signed low bits. Worked example,
    in hexadecimal: the master 3F80C000 rounds to the weight 3F81 and leaves -4000; 3F810000 - 4000 = 3F80C000.
    """
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low_bits)
    return bits.view(torch.float32)


def split_(master: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """The inverse of `join`, into `weight` and `low_bits`; overwrites `master`. A tie is rounded away from zero."""
    bits = master.view(torch.int32)
    high = bits.add(0x8000).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(high)
    low_bits.copy_(bits.sub_(high.bitwise_left_shift_(16)))


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "this training.optimizer needs bitsandbytes: pip install bitsandbytes, or set training.optimizer=adamw"
        ) from error
    return bitsandbytes
