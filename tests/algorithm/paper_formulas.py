"""The papers' losses, written token by token and independently of utils/algorithm: what tests compare with."""

from __future__ import annotations

import math

import torch

from configs.defaults import Training
from utils.algorithm.loss_inputs import LossInputs


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + (-x).exp())


def token_loss(inputs: LossInputs, training: Training, i: int, t: int) -> torch.Tensor:
    """One token's loss, before any correction."""
    log_pi, old = inputs.policy_log_probs[i, t], inputs.old_log_probs[i, t]
    mu, A, R = inputs.sampler_log_probs[i, t], inputs.advantages[i].item(), inputs.rewards[i].item()
    ratio = (log_pi - old).exp()
    low, high = 1 - training.cliprange, 1 + (training.cliprange_high or training.cliprange)

    def ppo(r: torch.Tensor) -> torch.Tensor:
        surrogate = min(r * A, max(min(r, high), low) * A)
        if training.dual_clip and A < 0:
            surrogate = max(surrogate, torch.tensor(training.dual_clip * A, dtype=r.dtype))
        return -surrogate

    if training.loss_type == "no_baseline":
        return -R * log_pi
    if training.loss_type == "reinforce_with_baseline":
        return -A * log_pi
    if training.loss_type == "grpo_clip":
        return ppo(ratio)
    if training.loss_type == "grpo_no_clip":
        return -ratio * A
    if training.loss_type == "gspo":
        tokens = [u for u in range(inputs.response_mask.shape[1]) if inputs.response_mask[i, u]]
        gaps = [(inputs.policy_log_probs[i, u] - inputs.old_log_probs[i, u]).item() for u in tokens]
        sequence_ratio = math.exp(sum(gaps) / len(gaps))
        return ppo(sequence_ratio * (log_pi - log_pi.item()).exp())
    if training.loss_type == "cispo":
        return -min(ratio.item(), training.cispo_max_ratio) * A * log_pi
    if training.loss_type == "sapo":
        tau = training.sapo_tau_positive if A > 0 else training.sapo_tau_negative
        return -A * 4 / tau * sigmoid(tau * (ratio - 1))
    assert training.loss_type == "dppo"
    moved = math.exp(log_pi.item()) - math.exp(mu.item())
    if (A > 0 and moved > training.dppo_delta) or (A < 0 and moved < -training.dppo_delta):
        return 0 * log_pi
    return -min(math.exp(log_pi.item() - mu.item()), training.dppo_max_ratio) * A * log_pi


def sampler_weight(inputs: LossInputs, training: Training, i: int, t: int) -> float:
    """A number: corrections are detached."""
    tokens = [u for u in range(inputs.response_mask.shape[1]) if inputs.response_mask[i, u]]
    gaps = {u: (inputs.old_log_probs[i, u] - inputs.sampler_log_probs[i, u]).item() for u in tokens}
    kind, weight = training.sampler_correction, 1.0
    if kind == "tis":
        weight = min(math.exp(gaps[t]), training.tis_cap)
    elif kind == "icepop":
        weight = math.exp(gaps[t])
        weight = weight if training.icepop_low <= weight <= training.icepop_high else 0.0
    elif kind == "mis":
        weight = math.exp(sum(gaps.values()))
        weight = weight if weight <= training.mis_cap else 0.0
    elif kind == "geo":
        mean = math.exp(sum(gaps.values()) / len(gaps))
        weight = 1.0 if training.geo_low <= mean <= training.geo_high else 0.0
    if training.negative_mask is not None and inputs.advantages[i] < 0:
        distances = [(inputs.sampler_log_probs[i, u] - inputs.policy_log_probs[i, u]).item() for u in tokens]
        if sum(distances) / len(distances) > training.negative_mask:
            weight = 0.0
    return weight


def kl_term(inputs: LossInputs, training: Training, i: int, t: int) -> torch.Tensor | float:
    if not training.kl_coef:
        return 0.0
    log_pi = inputs.policy_log_probs[i, t]
    d = inputs.reference_log_probs[i, t] - log_pi
    estimate = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[training.kl_estimator]
    return training.kl_coef * (log_pi - inputs.old_log_probs[i, t]).exp() * estimate


def slow_objective(inputs: LossInputs, training: Training, prompts: list[int] | None = None) -> torch.Tensor:
    """The whole loss of B rollouts, token by token. `prompts` is each row's; None: those of one are side by side."""
    lengths = inputs.response_mask.sum(dim=1).tolist()
    n = len(lengths)
    prompts = [i // training.group_size for i in range(n)] if prompts is None else prompts
    cut = [lengths[j : j + training.microbatch_size] for j in range(0, n, training.microbatch_size)]
    total = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(lengths):
        group = [lengths[j] for j in range(n) if prompts[j] == prompts[i]]
        share = {
            "mean": 1 / max(length, 1) / n,
            "constant": 1 / training.normalize_constant / n,
            "microbatch": 1 / max(1, *cut[i // training.microbatch_size]) / n,
            "token": 1 / sum(lengths),
            "prompt": 1 / max(sum(group), 1) / len(set(prompts)),
        }[training.normalize_mode]
        for t in range(inputs.response_mask.shape[1]):
            if inputs.response_mask[i, t]:
                value = token_loss(inputs, training, i, t) * sampler_weight(inputs, training, i, t)
                total = total + share * (value + kl_term(inputs, training, i, t))
    return total
