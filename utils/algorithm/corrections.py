"""What is added to any loss: weights for a sampler that is a different program from the trainer, and a KL term.

rho_s = pi_old / mu is the trainer's probability of a token over the engine's when it sampled the token. It differs from
1 because kernels and precision differ. All weights are detached. Shapes: B responses of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from configs.defaults import Training
from utils.algorithm.loss_inputs import LossInputs


def truncated(log_ratio: Tensor, inputs: LossInputs, training: Training) -> Tensor:
    """min(rho_s, `tis_cap`) per token: truncated importance sampling."""
    return torch.exp(log_ratio.clamp(max=math.log(training.tis_cap)))


def icepop(log_ratio: Tensor, inputs: LossInputs, training: Training) -> Tensor:
    """rho_s per token where it is in [`icepop_low`, `icepop_high`], else 0: the token is left out."""
    low, high = math.log(training.icepop_low), math.log(training.icepop_high)
    return torch.where((log_ratio >= low) & (log_ratio <= high), torch.exp(log_ratio.clamp(low, high)), 0.0)


def masked_sequence(log_ratio: Tensor, inputs: LossInputs, training: Training) -> Tensor:
    """The whole response's ratio exp(sum of log rho_s), or 0 above `mis_cap`: long responses are left out sooner."""
    total, cap = torch.where(inputs.response_mask, log_ratio, 0.0).sum(dim=1), math.log(training.mis_cap)
    weight = torch.where(total <= cap, torch.exp(total.clamp(max=cap)), 0.0)
    return weight[:, None].expand_as(log_ratio)


def geometric(log_ratio: Tensor, inputs: LossInputs, training: Training) -> Tensor:
    """1, or 0 for a response whose mean log rho_s is outside [log `geo_low`, log `geo_high`]."""
    mean = inputs.sequence_mean(log_ratio)
    kept = (mean >= math.log(training.geo_low)) & (mean <= math.log(training.geo_high))
    return kept.to(log_ratio.dtype)[:, None].expand_as(log_ratio)


SAMPLER_CORRECTIONS: dict[str, Callable[[Tensor, LossInputs, Training], Tensor]] = {
    "tis": truncated,
    "icepop": icepop,
    "mis": masked_sequence,
    "geo": geometric,
}


def sampler_weights(inputs: LossInputs, training: Training) -> Tensor | None:
    """(B, T) what `sampler_correction` and `negative_mask` multiply each token's loss by; None if both are off.

    `negative_mask` leaves out a response with A < 0 whose mean of log mu - log pi is above it: the sampler found the
    response likely and the policy does not (DeepSeek-V3.2).
    """
    if training.sampler_correction is None and training.negative_mask is None:
        return None
    weights = torch.ones_like(inputs.policy_log_probs)
    if training.sampler_correction is not None:
        log_ratio = (inputs.trainer_old_log_probs - inputs.sampler_log_probs).to(weights.dtype)
        weights = SAMPLER_CORRECTIONS[training.sampler_correction](log_ratio, inputs, training)
    if training.negative_mask is not None:
        distance = inputs.sequence_mean(inputs.sampler_log_probs - inputs.policy_log_probs.detach())
        dropped = (inputs.advantages < 0) & (distance > training.negative_mask)
        weights = torch.where(dropped[:, None], 0.0, weights)
    return weights.detach()


def k1(log_ratio: Tensor) -> Tensor:
    """-d: unbiased, and often negative."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """d^2 / 2: low variance, biased."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - d - 1: unbiased, and never negative."""
    return torch.expm1(log_ratio) - log_ratio


# d = log pi_ref - log pi (B, T) -> an estimate of KL(pi || pi_ref) per token (Schulman 2020, "Approximating KL")
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def reference_kl(inputs: LossInputs, training: Training) -> Tensor:
    """(B, T) the estimate of KL(pi || pi_ref) per token: DeepSeekMath equation 4 with k3."""
    return KL_ESTIMATORS[training.kl_estimator](inputs.reference_log_probs - inputs.policy_log_probs)
