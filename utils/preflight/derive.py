"""What depends on the card, derived from its memory where neither a YAML nor the command line sets it. No torch.

A field that was set keeps its value. On the CPU nothing is derived, and the defaults' figures stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from configs.defaults import Config, default_of
from utils.preflight.config_rules import fields
from utils.preflight.memory_estimate import (
    BYTES,
    VLLM_OVERHEAD,
    count_parameters,
    estimate_peak_memory,
    kv_cache_bytes_per_token,
    kv_cache_tokens,
)

UTILIZATION, BUDGET = "vllm.gpu_memory_utilization", "training.max_tokens_per_microbatch"
CUTS = (BUDGET, "training.gradient_accumulation_steps")  # whoever sets one of these has said how microbatches are cut
MARGIN = 0.1  # of the card, kept free: for the allocator's gaps, and since no estimate is exact
MOST_TOKENS = 16_384  # per microbatch: more of them are no faster
GB = 1e9


@dataclass(frozen=True)
class Card:
    """A GPU's memory in bytes: what it has, and what no other process held when it was asked."""

    total: int
    free: int
    whose: str = "that the GPU has"


@dataclass(frozen=True)
class Derived:
    """A field's derived value, and why it is that one."""

    field: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value}: {self.reason}"


def fields_to_derive(config: Config, given: Collection[str]) -> list[str]:
    """The fields that nobody has set (or set to null, where that asks for it), on a GPU."""
    if not config.training.device.startswith("cuda"):
        return []
    share_is_open = UTILIZATION not in given or config.vllm.gpu_memory_utilization is None
    cut_is_open = not any(name in given for name in CUTS)
    return [name for name, is_open in ((UTILIZATION, share_is_open), (BUDGET, cut_is_open)) if is_open]


def derive(
    config: Config,
    given: Collection[str],
    sizes: dict[str, Any] | None,
    longest_sequence: int,
    card: Card,
    uses_vllm: bool,
    engine_card: Card | None = None,
) -> tuple[Config, list[Derived]]:
    """A copy of the config with what follows from the card, and a line for each such field.

    Args:
        config: the merged config; `vllm.gpu_memory_utilization` may be None.
        given: dotted names of the fields that a YAML or the command line sets.
        sizes: the model's config.json; None if it isn't known, and then the defaults stay.
        longest_sequence: tokens of the longest prompt and response together.
        card: the GPU that the policy trains on.
        uses_vllm: whether the rollout engine is vLLM.
        engine_card: the GPU that vLLM has to itself, with `vllm.device`.
    """
    wanted = fields_to_derive(config, given)
    config, derived = copy.deepcopy(config), []
    if config.vllm.gpu_memory_utilization is None:
        config.vllm.gpu_memory_utilization = default_of(fields()[UTILIZATION])
    if sizes is None:
        return config, derived
    if uses_vllm and UTILIZATION in wanted:
        derived.append(_share(config, sizes, longest_sequence, card, BUDGET in wanted, engine_card))
        config.vllm.gpu_memory_utilization = derived[-1].value
    if BUDGET in wanted:
        derived.append(_budget(config, sizes, longest_sequence, card, uses_vllm))
        config.training.max_tokens_per_microbatch = derived[-1].value
    return config, derived


def _share(
    config: Config,
    sizes: dict[str, Any],
    longest_sequence: int,
    card: Card,
    budget_follows: bool,
    engine_card: Card | None,
) -> Derived:
    """What all sequences at their longest would need, or else what the trainer leaves, or what its own card has.

    Where the token budget is derived afterwards, one sequence per microbatch is what training needs at least.
    """
    t, n_sequences = config.training, config.vllm.max_num_seqs
    weights = count_parameters(sizes)["total"] * BYTES[config.vllm.dtype]
    wanted = weights + VLLM_OVERHEAD + n_sequences * longest_sequence * kv_cache_bytes_per_token(sizes, config)
    least = replace(config, training=replace(t, max_tokens_per_microbatch=longest_sequence))
    parts = estimate_peak_memory(
        sizes, least if budget_follows else config, longest_sequence, card.total, uses_vllm=False
    )
    # While vLLM is awake, the self-check computes log-probs of a few rollouts; without sleep all of training comes.
    awake = parts["rollout_peak"] - parts["sampling"] + parts["log_probs"]
    beside = awake if t.use_vllm_sleep_mode else parts["training_peak"]
    if engine_card is not None:
        card, beside = engine_card, 0
    left = card.free - MARGIN * card.total - beside
    share = max(0.01, math.floor(100 * min(wanted, left) / card.total) / 100)
    shared = replace(config, vllm=replace(config.vllm, gpu_memory_utilization=share))
    n_tokens = kv_cache_tokens(sizes, shared, card.total)
    goal = f"{n_sequences} sequences of {longest_sequence:,} tokens"
    room = "training leaves" if engine_card is None else "on a GPU of its own vLLM can have"
    return Derived(
        UTILIZATION,
        share,
        f"{share * card.total / GB:.1f} of the {card.total / GB:.1f} GB {card.whose}; {room} "
        f"{left / GB:.1f} GB, and {goal} want {wanted / GB:.1f} GB; the KV cache holds about {n_tokens:,} tokens",
    )


def _budget(config: Config, sizes: dict[str, Any], longest_sequence: int, card: Card, uses_vllm: bool) -> Derived:
    """As many of the longest sequences as fit, up to a group of them."""
    limit = card.free - MARGIN * card.total
    most = max(1, min(config.training.group_size, config.training.train_batch_size, MOST_TOKENS // longest_sequence))
    for n_sequences in range(most, 0, -1):
        budget = n_sequences * longest_sequence
        cut = replace(config, training=replace(config.training, max_tokens_per_microbatch=budget))
        peak = estimate_peak_memory(sizes, cut, longest_sequence, card.total, uses_vllm)["training_peak"]
        if peak <= limit:
            break
    return Derived(
        BUDGET,
        budget,
        f"{n_sequences} of the longest sequences ({longest_sequence:,} tokens) at once; training then takes about "
        f"{peak / GB:.1f} of the {card.free / GB:.1f} GB that are free",
    )


def usual_length(longest_sequence: int) -> int:
    """Tokens of a usual prompt and response, taken as half of the longest: few come near that."""
    return longest_sequence // 2
