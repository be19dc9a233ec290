"""Combinations that mean nothing are refused by name."""

from __future__ import annotations

import pytest

from utils.preflight.config import load_config
from utils.preflight.config_rules import ConfigError

REFUSED = [
    (("dual_clip=3", "loss_type=cispo"), "dual_clip", "no clip"),
    (("cliprange_high=0.3", "loss_type=reinforce_with_baseline"), "cliprange_high", "null"),
    (("dual_clip=0.9",), "dual_clip", "more than 1"),
    (("advantage=rloo",), "use_std_normalization", "false"),
    (("advantage=maxrl", "use_std_normalization=false", "overlong_buffer=20"), "overlong_buffer", "null"),
    (("advantage=maxrl", "use_std_normalization=false", "extra_rewards={gsm8k: 0.5}"), "extra_rewards", "empty"),
    (("advantage=rloo", "use_std_normalization=false", "loss_type=no_baseline"), "advantage", "raw rewards"),
    (("std_scope=batch", "use_std_normalization=false"), "std_scope", "group"),
    (("icepop_low=6",), "icepop_low", "exchange"),
    (("geo_low=1.5",), "geo_high", "exchange"),
    (("loss_type=dppo", "sampler_correction=tis"), "sampler_correction", "already"),
    (("sampler_correction=tis", "top_p=0.9"), "top_p", "set top_p to 1"),
    (("loss_type=dppo", "top_p=0.9"), "top_p", "set top_p to 1"),
    (("reference_path=some/model",), "reference_path", "kl_coef"),
    (("refill_groups=true", "reward_fn=end_token_penalty"), "refill_groups", "right and wrong"),
    (("retire_pass_rate=0.9", "reward_fn=end_token_penalty"), "retire_pass_rate", "right and wrong"),
    (("overlong_buffer=2000",), "overlong_buffer", "lower"),
    (("warmup_steps=10",), "warmup_steps", "lower"),
    (("lr_schedule=linaer",), "lr_schedule", "linear"),
]


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"), REFUSED, ids=[" ".join(overrides) for overrides, *_ in REFUSED]
)
def test_what_means_nothing_is_refused(overrides: tuple[str, ...], key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config([], [f"training.{override}" for override in overrides])
    assert f"training.{key}" in str(refused.value)
    assert remedy in str(refused.value)
