"""A loss of your own: GSPO (Zheng et al. 2025, arXiv:2507.18071), whose ratio is that of whole sequences.

training.loss_type=docs/examples/loss.py:gspo
"""

import torch


def gspo(inputs, training):
    """-min(s A, clip(s, 1 - `cliprange`, 1 + `cliprange`) A) on every token of a sequence: the paper's equation 5.

    s is the geometric mean of the sequence's token ratios, so its log is their log-ratios' mean.
    """
    mask, policy = inputs.response_mask, inputs.policy_log_probs
    old = policy.detach() if inputs.old_log_probs is None else inputs.old_log_probs
    log_ratio = torch.where(mask, policy - old, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    ratio, advantages = torch.exp(log_ratio)[:, None], inputs.advantages[:, None]
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - training.cliprange, 1 + training.cliprange) * advantages
    shape = policy.shape
    return -torch.minimum(unclipped, clipped).expand(shape), {"clipped": (clipped < unclipped).detach().expand(shape)}


gspo.weighs_by = "advantages"  # rollouts whose advantage is 0 have no gradient, so they may be left out
