"""A loss of your own: TOPR, tapered off-policy REINFORCE (Le Roux et al. 2025, arXiv:2503.14286).

training.loss_type=docs/examples/loss.py:topr
"""

import torch


def topr(inputs, training):
    """-w A log pi: w is 1 where A >= 0, and else the response's probability over its old one, at most 1.

    A response that did worse than its group is pushed down less and less as its probability falls.
    """
    log_ratio = inputs.policy_log_probs.detach() - inputs.trainer_old_log_probs
    log_ratio = torch.where(inputs.response_mask, log_ratio, 0.0).sum(dim=1)
    weights = torch.where(inputs.advantages >= 0, 1.0, torch.exp(log_ratio).clamp(max=1.0))
    return -(weights * inputs.advantages)[:, None] * inputs.policy_log_probs


topr.weighs_by = "advantages"  # rollouts whose advantage is 0 have no gradient, so they may be left out
