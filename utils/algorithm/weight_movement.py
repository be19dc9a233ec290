"""What share of the weights a step moved: a bfloat16 weight stays where an update is below half its spacing."""

from __future__ import annotations

import torch

SAMPLES_PER_TENSOR = 65_536


class WeightMovement:
    """Remembers evenly spaced weights of every tensor, to see later which of them have changed.

    Up to `SAMPLES_PER_TENSOR` a tensor, so that no second copy of a large model is held; smaller ones are taken whole.
    """

    def __init__(self, policy: torch.nn.Module) -> None:
        self._parameters = list(policy.parameters())
        self._before = [sample.clone() for sample in map(_sample, self._parameters)]

    def share(self) -> float:
        """The share of all weights that differ from when this object was made, each tensor weighing as its size."""
        moved = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        for parameter, before in zip(self._parameters, self._before, strict=True):
            moved += (_sample(parameter) != before).double().mean() * parameter.numel()
        return moved.item() / sum(parameter.numel() for parameter in self._parameters)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().flatten()[:: -(-parameter.numel() // SAMPLES_PER_TENSOR)]
