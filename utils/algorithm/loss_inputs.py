"""What a loss may look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """B responses, padded to T tokens. Log-probs are in nats."""

    policy_log_probs: Tensor  # (B, T) under the current weights, with gradient
    response_mask: Tensor  # (B, T) bool: the tokens that are trained on
    rewards: Tensor  # (B,) raw
    advantages: Tensor | None = None  # (B,)
    old_log_probs: Tensor | None = None  # (B, T) under the weights that sampled; None: the current ones
    sampler_log_probs: Tensor | None = None  # (B, T) as the engine reported them while it sampled
    reference_log_probs: Tensor | None = None  # (B, T) under a frozen reference policy

    @property
    def trainer_old_log_probs(self) -> Tensor:
        """(B, T) the trainer's own log-probs under the weights that sampled, without gradient."""
        return self.policy_log_probs.detach() if self.old_log_probs is None else self.old_log_probs

    @property
    def ratio(self) -> Tensor:
        """(B, T) pi / pi_old. Without old log-probs it is 1, and still has the gradient of log pi."""
        return torch.exp(self.policy_log_probs - self.trainer_old_log_probs)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """(B, T) -> (B,): the mean over a response's trained tokens; 0 if it has none."""
        lengths = self.response_mask.sum(dim=1).clamp(min=1)
        return torch.where(self.response_mask, values, 0.0).sum(dim=1) / lengths
