"""What a GRPO step's update did, summed over response tokens on the device and read once, at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.algorithm.batch import Microbatch


@dataclass
class StepSums:
    """Sums over response tokens, kept on the device and read once, at the end of the GRPO step."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)  # one an optimizer step
    grad_norms: list[Tensor] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    @property
    def weights_untouched(self) -> bool:
        """Whether the weights are still those that sampled: no optimizer step has been taken."""
        return not self.losses

    def metrics(self, max_grad_norm: float) -> dict[str, float]:
        """Means over response tokens, and over optimizer steps. A quantity that nothing was trained on is left out."""
        sums = {name: value.item() for name, value in self.sums.items()}
        compared = {name: sums.pop(name, 0.0) for name in ("compared_tokens", "sampler_kl", "sampler_max_diff")}
        tokens = sums.pop("tokens", 0.0)
        metrics = {name: value / tokens for name, value in sums.items()} if tokens else {}
        if compared["compared_tokens"]:
            metrics["sampler_kl"] = compared["sampler_kl"] / compared["compared_tokens"]
            metrics["sampler_max_diff"] = compared["sampler_max_diff"]
        norms = torch.stack(self.grad_norms).double().cpu() if self.grad_norms else torch.empty(0)
        if len(norms):
            metrics["loss"] = torch.stack(self.losses).double().mean().item()
            metrics["grad_norm"] = norms.mean().item()
            metrics["frac_grad_clipped"] = (norms > max_grad_norm).double().mean().item()
        metrics["trained_tokens"] = tokens
        return metrics


def add_statistics(
    sums: StepSums, mask: Tensor, ratio: Tensor | None, entropy: Tensor, metadata: dict[str, Tensor]
) -> None:
    """Add a microbatch's response tokens to the step's sums; `mask`, `ratio` and `entropy` are (M, t-1)."""
    sums.add("tokens", mask.sum())
    values = {"entropy": entropy, "clip_fraction": metadata.get("clipped", torch.zeros_like(mask))}
    if ratio is not None:
        values["mean_ratio"] = ratio
    for name, value in values.items():
        sums.add(name, torch.where(mask, value.float(), 0.0).sum())


def add_sampler_gap(sums: StepSums, microbatch: Microbatch, log_probs: Tensor) -> None:
    """Add how far the sampler's log-probs lie from the trainer's (M, t-1) under the weights that sampled."""
    mask = microbatch.response_mask
    difference = torch.where(mask, log_probs - microbatch.sampler_log_probs, 0.0)
    sums.add("compared_tokens", mask.sum())
    # KL(sampler || trainer) by the estimator r - 1 - log r, which is never negative (Schulman 2020)
    sums.add("sampler_kl", (torch.expm1(difference) - difference).sum())
    largest = difference.abs().max().double()
    sums.sums["sampler_max_diff"] = torch.maximum(sums.sums.get("sampler_max_diff", largest), largest)
