"""The losses of GRPO and its relatives: tensors in, tensors out. Nothing here moves, logs, or changes what it is given.

Read `objective` first, at the end: it is the whole objective of an optimizer step in one function. The training loop
computes the same number piece by piece, and a test holds the two equal.

A loss is a function of `LossInputs` (log-probs (B, T), rewards and advantages (B,)). It returns what each token adds to
the loss, (B, T), and a dict of tensors (B, T) to be measured. r is pi / pi_old, mu the sampler's probability, A the
advantage; sg stops the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.defaults import Training
from utils.algorithm.advantages import compute_advantages
from utils.algorithm.aggregation import aggregate_loss, length_denominators
from utils.algorithm.corrections import reference_kl, sampler_weights
from utils.algorithm.loss_inputs import LossInputs
from utils.own_code import is_own, load_own, place_of, told_with_file_and_line

PerToken = tuple[Tensor, dict[str, Tensor]]


def no_baseline(inputs: LossInputs, training: Training) -> PerToken:
    """-R log pi, with the raw reward: REINFORCE (Williams 1992)."""
    return -inputs.rewards[:, None] * inputs.policy_log_probs, {}


def reinforce_with_baseline(inputs: LossInputs, training: Training) -> PerToken:
    """-A log pi: REINFORCE with a baseline, which is part of the advantage."""
    return -inputs.advantages[:, None] * inputs.policy_log_probs, {}


def clipped_surrogate(ratio: Tensor, inputs: LossInputs, training: Training) -> PerToken:
    """-min(r A, clip(r, 1 - `cliprange`, 1 + `cliprange_high`) A), PPO equation 7 (arXiv:1707.06347).

    With `dual_clip` c, the loss of a token with A < 0 is at most -c A: a bad token that has become likely pulls no
    harder than that (arXiv:1912.09729). `clipped` is True where clipping changed the objective: not where the ratio
    left the interval on the side on which the minimum keeps r A.
    """
    advantages = inputs.advantages[:, None]
    high = training.cliprange if training.cliprange_high is None else training.cliprange_high
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - training.cliprange, 1.0 + high) * advantages
    surrogate, changed = torch.minimum(unclipped, clipped), clipped < unclipped
    if training.dual_clip is not None:
        bound = training.dual_clip * advantages
        beyond = (advantages < 0) & (surrogate < bound)
        surrogate, changed = torch.where(beyond, bound, surrogate), changed | beyond
    return -surrogate, {"clipped": changed.detach()}


def grpo_clip(inputs: LossInputs, training: Training) -> PerToken:
    """The clipped surrogate with each token's ratio: DeepSeekMath equation 3, DAPO equation 8 (`cliprange_high`)."""
    return clipped_surrogate(inputs.ratio, inputs, training)


def grpo_no_clip(inputs: LossInputs, training: Training) -> PerToken:
    """-r A: the surrogate without its clip."""
    return -inputs.ratio * inputs.advantages[:, None], {}


def gspo(inputs: LossInputs, training: Training) -> PerToken:
    """The clipped surrogate with the ratio of the sequence, s = exp(mean over t of log r): GSPO (arXiv:2507.18071).

    Each token has sg(s) pi / sg(pi), whose value is s and whose gradient is s times that of log pi: equation 14.
    """
    log_ratio = inputs.policy_log_probs.detach() - inputs.trainer_old_log_probs
    sequence_ratio = torch.exp(inputs.sequence_mean(log_ratio))[:, None]
    own = torch.exp(inputs.policy_log_probs - inputs.policy_log_probs.detach())
    return clipped_surrogate(sequence_ratio * own, inputs, training)


def cispo(inputs: LossInputs, training: Training) -> PerToken:
    """-sg(min(r, `cispo_max_ratio`)) A log pi: the ratio is clipped, no token loses its gradient (arXiv:2506.13585)."""
    ratio = inputs.ratio.detach()
    weight = ratio.clamp(max=training.cispo_max_ratio)
    return -weight * inputs.advantages[:, None] * inputs.policy_log_probs, {"clipped": ratio > weight}


def sapo(inputs: LossInputs, training: Training) -> PerToken:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau `sapo_tau_positive` or, for A < 0, `sapo_tau_negative` (arXiv:2511.20347).

    A gate in place of a clip: at r = 1 its slope is 1, and it fades as r moves away.
    """
    advantages, ratio = inputs.advantages[:, None], inputs.ratio
    positive, negative = (ratio.new_full((), tau) for tau in (training.sapo_tau_positive, training.sapo_tau_negative))
    tau = torch.where(advantages > 0, positive, negative)
    return -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), {}


def dppo(inputs: LossInputs, training: Training) -> PerToken:
    """-sg(min(pi / mu, `dppo_max_ratio`)) A log pi, tokens left out whose probability moved too far (arXiv:2602.04879).

    That is pi - mu > `dppo_delta` for A > 0, pi - mu < -`dppo_delta` for A < 0. It compares with the sampler, so it
    needs no pass for old log-probs.
    """
    advantages, log_probs = inputs.advantages[:, None], inputs.policy_log_probs.detach()
    moved = torch.exp(log_probs) - torch.exp(inputs.sampler_log_probs)
    left_out = torch.where(advantages > 0, moved > training.dppo_delta, moved < -training.dppo_delta)
    weight = torch.exp(log_probs - inputs.sampler_log_probs).clamp(max=training.dppo_max_ratio)
    per_token = -weight * advantages * inputs.policy_log_probs
    return torch.where(left_out, 0.0, per_token), {"clipped": left_out}


@dataclass(frozen=True)
class Loss:
    """A per-token loss, and what the loop must know about it."""

    per_token: Callable[[LossInputs, Training], PerToken]
    weighs_by: str | None = "advantages"  # what multiplies a token's gradient; or "rewards", or None if unknown
    has_ratio: bool = False  # whether it needs old log-probs once the weights differ from those that sampled
    clips: bool = False  # whether it reads `cliprange`, `cliprange_high` and `dual_clip`

    def has_gradient(self, rewards: Tensor, advantages: Tensor, training: Training) -> Tensor:
        """(B,), (B,) -> (B,) bool: which rollouts can change the policy. The others need no forward pass."""
        if training.kl_coef or self.weighs_by is None:
            return torch.ones_like(rewards, dtype=torch.bool)
        return (rewards if self.weighs_by == "rewards" else advantages) != 0

    def needs_old_log_probs(self, training: Training) -> bool:
        """With one optimizer step per rollout batch the current weights are those that sampled: the ratio is 1."""
        compares = self.has_ratio or training.sampler_correction is not None or training.kl_coef > 0
        return compares and training.optimizer_steps_per_rollout_batch > 1


LOSSES: dict[str, Loss] = {
    "no_baseline": Loss(no_baseline, weighs_by="rewards"),
    "reinforce_with_baseline": Loss(reinforce_with_baseline),
    "grpo_clip": Loss(grpo_clip, has_ratio=True, clips=True),
    "grpo_no_clip": Loss(grpo_no_clip, has_ratio=True),
    "gspo": Loss(gspo, has_ratio=True, clips=True),
    "cispo": Loss(cispo, has_ratio=True),
    "sapo": Loss(sapo, has_ratio=True),
    "dppo": Loss(dppo),
}


def find_loss(name: str) -> Loss:
    """One of LOSSES, or the function that `path/to/file.py:function` names. Raises ValueError."""
    if is_own(name):
        return own_loss(name)
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; choose one of: {', '.join(LOSSES)}, or path/to/file.py:function")
    return LOSSES[name]


@functools.cache
def own_loss(name: str) -> Loss:
    """A loss from a file. It is tried on a small batch; raises ValueError with file and line if it does not fit."""
    function = load_own(name)

    def per_token(inputs: LossInputs, training: Training) -> PerToken:
        with told_with_file_and_line(name):
            returned = function(inputs, training)
        values, extras = returned if isinstance(returned, tuple) else (returned, {})
        if not isinstance(values, Tensor) or values.shape != inputs.policy_log_probs.shape or not values.requires_grad:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            wanted = tuple(inputs.policy_log_probs.shape)
            raise ValueError(
                f"{place_of(name)}: the loss returned {got}; return a tensor of shape {wanted}, the loss of "
                "each token, that has a gradient"
            )
        return values, extras

    log_probs = torch.tensor([[-0.5, -1.0, -0.1], [-2.0, -0.3, -0.7]], requires_grad=True)
    mask, ones = torch.tensor([[True, True, True], [True, True, False]]), torch.tensor([1.0, 0.0])
    given = log_probs.detach()
    sample = LossInputs(log_probs, mask, rewards=ones, advantages=2 * ones - 1, sampler_log_probs=given)
    for old_log_probs in (None, given):  # on-policy and off-policy
        per_token(replace(sample, old_log_probs=old_log_probs), Training())
    return Loss(per_token, getattr(function, "weighs_by", None), getattr(function, "has_ratio", True))


def per_token_loss(inputs: LossInputs, training: Training) -> PerToken:
    """(B, T) `loss_type`, weighted for the sampler, plus `kl_coef` times r times the KL to the reference.

    With the ratio r, whose gradient counts, the gradient of k1 and of k3 is unbiased per token, also for tokens that
    other weights have sampled. That of k2 is not.
    """
    per_token, extras = find_loss(training.loss_type).per_token(inputs, training)
    weights = sampler_weights(inputs, training)
    if weights is not None:
        per_token, extras = per_token * weights, extras | {"sampler_weight": weights}
    if training.kl_coef:
        kl = reference_kl(inputs, training)
        per_token, extras = per_token + training.kl_coef * inputs.ratio * kl, extras | {"reference_kl": kl.detach()}
    return per_token, extras


def objective(inputs: LossInputs, training: Training) -> Tensor:
    """The loss of one optimizer step over its B rollouts at once: what the training loop must agree with.

    If `advantages` is None they follow from the rewards and `group_size`. Rows of one prompt are side by side.
    """
    if inputs.advantages is None:
        inputs = replace(inputs, advantages=compute_advantages(inputs.rewards, training))
    per_token, _ = per_token_loss(inputs, training)
    groups = torch.arange(len(inputs.rewards)) // training.group_size
    denominators = length_denominators(inputs.response_mask, groups, training)
    return aggregate_loss(per_token, inputs.response_mask, denominators, len(inputs.rewards))
