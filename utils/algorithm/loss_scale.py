"""The dynamic loss scale of float16, whose smallest number is 6e-8: gradients are computed large and then divided.

Its numbers are those of torch's GradScaler, which would check the gradients by itself and keep its state apart. Here an
optimizer step waits for the device once, and the scale is part of the optimizer's state, saved and loaded with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, LOWEST, GROWTH_STEPS = 2.0**16, 1.0, 2000
KEY = "loss_scale"  # in the optimizer's state, beside its parameters


def fit_loss_scale(optimizer: torch.optim.Optimizer, autocast_dtype: str | None) -> None:
    """Give the optimizer a loss scale for float16, if it has none; for other dtypes take away what a resume brought."""
    if autocast_dtype == "float16":
        optimizer.state.setdefault(KEY, {"scale": FIRST, "steps": 0})
    else:
        optimizer.state.pop(KEY, None)


def loss_scale(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """() float32, what the gradient of the loss begins with; None, which is 1, without a scale."""
    if KEY not in optimizer.state:
        return None
    return torch.full((), optimizer.state[KEY]["scale"], device=optimizer.param_groups[0]["params"][0].device)


def divide_by_loss_scale(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    """Undo the scale in the gradients, in place."""
    if KEY in optimizer.state:
        torch._foreach_mul_(gradients, 1.0 / optimizer.state[KEY]["scale"])


def adapt_loss_scale(optimizer: torch.optim.Optimizer, finite: bool) -> bool:
    """Halve the scale after a gradient that is not finite, double it after many that are.

    Returns whether the scale may have been the cause: there is one, and it was not yet the lowest.
    """
    if KEY not in optimizer.state:
        return False
    scale, steps = optimizer.state[KEY]["scale"], optimizer.state[KEY]["steps"]
    if not finite:
        optimizer.state[KEY] = {"scale": max(LOWEST, scale / 2), "steps": 0}
        return scale > LOWEST
    grows = steps + 1 == GROWTH_STEPS
    optimizer.state[KEY] = {"scale": 2 * scale if grows else scale, "steps": 0 if grows else steps + 1}
    return False


def loss_scale_metrics(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The scale of the next optimizer step, if there is one."""
    return {"loss_scale": optimizer.state[KEY]["scale"]} if KEY in optimizer.state else {}
