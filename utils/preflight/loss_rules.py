"""Combinations of losses, corrections and filters that mean nothing, refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from configs.defaults import Training

Rule = tuple[tuple[str, ...], bool, str]  # fields, whether they contradict each other, the remedy

# Of utils/algorithm/losses.py, which imports torch; a test holds them equal.
CLIPPED_LOSSES = ("grpo_clip", "gspo")
LOSSES_WITHOUT_BASELINE = ("no_baseline",)
LOSSES_WITHOUT_RATIO = ("no_baseline", "reinforce_with_baseline")  # to old or to sampled probabilities


def loss_rules(t: Training) -> Iterator[Rule]:
    """What an advantage or a loss cannot be combined with."""
    for name in ("cliprange_high", "dual_clip"):
        yield (
            (f"training.{name}", "training.loss_type"),
            getattr(t, name) is not None and t.loss_type not in CLIPPED_LOSSES,
            f"that loss has no clip; set {name} to null, or loss_type to {' or '.join(CLIPPED_LOSSES)}",
        )
    yield (
        ("training.advantage", "training.use_std_normalization"),
        t.advantage != "group" and t.use_std_normalization,
        "rloo and maxrl are not divided by a standard deviation; set use_std_normalization to false",
    )
    yield (
        ("training.advantage", "training.loss_type"),
        t.advantage != "group" and t.loss_type in LOSSES_WITHOUT_BASELINE,
        "that loss reads raw rewards and no advantages; set advantage to group, or another loss_type",
    )
    yield (
        ("training.std_scope", "training.use_std_normalization"),
        t.std_scope != "group" and not t.use_std_normalization,
        "nothing is divided by a standard deviation; set use_std_normalization to true, or std_scope to group",
    )
    yield (
        ("training.advantage", "training.overlong_buffer"),
        t.advantage == "maxrl" and t.overlong_buffer is not None,
        "maxrl divides by the mean reward, which a penalty makes negative; set overlong_buffer to null",
    )
    yield (
        ("training.advantage", "training.extra_rewards"),
        t.advantage == "maxrl" and bool(t.extra_rewards),
        "maxrl divides by the mean reward, which added rewards may make negative; empty extra_rewards",
    )


def correction_rules(t: Training) -> Iterator[Rule]:
    """What corrections for the sampler and the KL term cannot be combined with."""
    for name in ("icepop", "geo"):
        yield (
            (f"training.{name}_low", f"training.{name}_high"),
            getattr(t, f"{name}_low") >= getattr(t, f"{name}_high"),
            "the lowest weight kept is not below the highest; exchange them",
        )
    yield (
        ("training.loss_type", "training.sampler_correction"),
        t.loss_type == "dppo" and t.sampler_correction is not None,
        "dppo already weighs each token by the policy's probability over the sampler's; set sampler_correction to null",
    )
    yield (
        ("training.top_p", "training.sampler_correction"),
        t.top_p < 1.0 and t.sampler_correction is not None,
        "the sampler's probabilities are those of the cut distribution, the trainer's are not; set top_p to 1",
    )
    yield (
        ("training.top_p", "training.loss_type"),
        t.top_p < 1.0 and t.loss_type == "dppo",
        "dppo compares with the sampler's probabilities, which are those of the cut distribution; set top_p to 1",
    )
    yield (
        ("training.reference_path", "training.kl_coef"),
        t.reference_path is not None and t.kl_coef == 0,
        "nothing is measured from the reference; set kl_coef above 0, or reference_path to null",
    )


def shaping_rules(t: Training) -> Iterator[Rule]:
    """What filtering, length penalties and the schedule cannot be combined with."""
    for name, is_set in (("refill_groups", t.refill_groups), ("retire_pass_rate", t.retire_pass_rate is not None)):
        yield (
            (f"training.{name}", "training.reward_fn"),
            is_set and t.reward_fn == "end_token_penalty",
            "that reward has no right and wrong answers to choose by; choose another reward_fn",
        )
    yield (
        ("training.refill_groups", "training.group_size"),
        t.refill_groups and t.group_size == 1,
        "a group of one is never right in part; raise group_size, or set refill_groups to false",
    )
    yield (
        ("training.overlong_buffer", "training.max_tokens"),
        t.overlong_buffer is not None and t.overlong_buffer > t.max_tokens,
        "the penalty would begin before the first token; lower overlong_buffer",
    )
    yield (
        ("training.warmup_steps", "training.n_grpo_steps"),
        t.warmup_steps > 0 and t.warmup_steps >= t.n_grpo_steps,
        "the run ends before its warm-up; lower warmup_steps",
    )
