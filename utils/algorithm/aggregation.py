"""From losses of tokens to one number. Every mode counts over the whole optimizer batch, before it is cut.

A mode gives what each sequence's summed loss is divided by, (B,); the quotients are summed and divided by B. So a
microbatch adds its part of the same number however the batch is cut (`microbatch` is the exception, by definition).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from configs.defaults import Training


def own_length(lengths: Tensor, groups: Tensor, training: Training) -> Tensor:
    """The mean over a sequence's own tokens, then over sequences: DeepSeekMath equation 3."""
    return lengths.clamp(min=1)


def constant_length(lengths: Tensor, groups: Tensor, training: Training) -> Tensor:
    """The same number for all, such as the longest response allowed: Dr. GRPO (arXiv:2503.20783)."""
    return torch.full_like(lengths, training.normalize_constant)


def longest_of_microbatch(lengths: Tensor, groups: Tensor, training: Training) -> Tensor:
    """The longest among each `microbatch_size` in a row: the one mode whose result depends on how a batch is cut."""
    chunks = lengths.clamp(min=1).split(training.microbatch_size)
    return torch.cat([chunk.max().expand(len(chunk)) for chunk in chunks])


def all_tokens(lengths: Tensor, groups: Tensor, training: Training) -> Tensor:
    """The mean over all tokens of the batch, so that every token weighs the same: DAPO (arXiv:2503.14476)."""
    return (lengths.sum().clamp(min=1) / len(lengths)).expand(len(lengths))


def tokens_of_prompt(lengths: Tensor, groups: Tensor, training: Training) -> Tensor:
    """The mean over all tokens of a prompt's responses, then over prompts: ScaleRL (arXiv:2510.13786).

    Off-policy a batch holds some of a prompt's responses; the mean is over those.
    """
    _, group = groups.unique(return_inverse=True)
    n_groups = int(group.max()) + 1
    tokens = torch.zeros(n_groups, dtype=lengths.dtype).index_add(0, group, lengths)
    return tokens.clamp(min=1)[group] * n_groups / len(lengths)


DENOMINATORS: dict[str, Callable[[Tensor, Tensor, Training], Tensor]] = {
    "mean": own_length,
    "constant": constant_length,
    "microbatch": longest_of_microbatch,
    "token": all_tokens,
    "prompt": tokens_of_prompt,
}


def length_denominators(response_mask: Tensor, groups: Tensor, training: Training) -> Tensor:
    """(B, T) of a whole optimizer batch, (B,) which prompt each row has -> (B,) float64, as `normalize_mode` says.

    A response without a trained token is divided by at least 1: its sum is 0 whatever it is divided by.
    """
    if training.normalize_mode not in DENOMINATORS:
        choices = ", ".join(DENOMINATORS)
        raise ValueError(f"unknown normalize_mode {training.normalize_mode!r}; choose one of: {choices}")
    return DENOMINATORS[training.normalize_mode](response_mask.sum(dim=1).double(), groups, training)


def aggregate_loss(per_token: Tensor, response_mask: Tensor, denominators: Tensor, n_sequences: int) -> Tensor:
    """Sum over each sequence's response tokens / its denominator, summed over sequences / n_sequences: a scalar.

    (B, T), (B, T) bool, (B,), int -> (). `n_sequences` and `denominators` are those of the whole optimizer batch.
    """
    sums = torch.where(response_mask, per_token, 0.0).sum(dim=1)
    return (sums / denominators.to(sums.dtype)).sum() / n_sequences
