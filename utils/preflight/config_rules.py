"""The names of the config's fields, and the values that they may take: one by one, and together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from configs.defaults import Config, Paths, Training
from utils.own_code import is_own
from utils.preflight.loss_rules import (
    LOSSES_WITHOUT_BASELINE,
    Rule,
    correction_rules,
    loss_rules,
    shaping_rules,
)
from utils.preflight.two_cards import card_rules
from utils.rewards.functions import REWARD_FNS


class ConfigError(ValueError):
    """A mistake in a config file or an override, described in one line."""


def sections() -> dict[str, type]:
    """The config's sections and their dataclasses, in order."""
    return {field.name: field.default_factory for field in dataclasses.fields(Config)}


def fields() -> dict[str, dataclasses.Field]:
    """Every config field by its dotted name, `training.learning_rate`."""
    return {f"{name}.{field.name}": field for name, cls in sections().items() for field in dataclasses.fields(cls)}


# Fields of older versions, which people's saved config.yaml files still hold, and what became of them.
REMOVED = dict.fromkeys(
    [
        "guard.repeat_interval",
        "guard.runaway_share",
        "guard.ended_share",
        "guard.shrunk_share",
        "guard.vanished_share",
        "guard.kept_share",
        "guard.noise_std_errors",
        "guard.fallen_evaluations",
        "guard.truncated_warning",
        "guard.high_format_reward",
        "guard.sampler_kl_growth",
        "guard.sampler_kl_floor",
    ],
    "a constant in utils/run/guard.py now",
)

REFUSED = {  # fields that other programs have
    "training.lora_dropout": "with dropout, the ratio of the policy to the one that sampled would be noise",
}

LEAST_LIKENESS = 0.6  # of two names; below it a suggestion would be no help


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known name most like `key`, None if none is like it. Names are compared first without their sections."""

    def likeness(name: str) -> tuple[float, float]:
        last, known_last = (text.rpartition(".")[2] for text in (key, name))
        whole = difflib.SequenceMatcher(None, key, name).ratio()
        alike = difflib.SequenceMatcher(None, last, known_last).ratio()
        if len(last) > 1 and last == "".join(word[:1] for word in known_last.split("_")):
            alike = whole = 1.0  # lr is learning_rate, and not lora_rank, which comes after it
        return (alike if "." in key else max(alike, whole)), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= LEAST_LIKENESS else None


def check_config(config: Config, origins: Mapping[str, str] | None = None) -> None:
    """Check every field's own rules, then the rules between fields. Raises ConfigError at the first fault."""

    def named(key: str) -> str:
        section, name = key.split(".")
        origin = (origins or {}).get(key, "default")
        return f"{key} = {getattr(getattr(config, section), name)!r} ({origin})"

    for key, field in fields().items():
        section, name = key.split(".")
        complaint = _broken_rule(getattr(getattr(config, section), name), field.metadata)
        if complaint:
            raise ConfigError(f"{named(key)}: {complaint}{_what_null_is(field)}")
    for keys, wrong, remedy in _rules_between(config):
        if wrong:
            raise ConfigError(f"{' and '.join(named(key) for key in keys)}: {remedy}")


def _broken_rule(value: Any, rules: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    own_code = rules.get("own_code", False)
    items = value if isinstance(value, list) else [value]
    is_known = "choices" not in rules or all(item in rules["choices"] for item in items)
    if not is_known and not (own_code and is_own(value)):
        if isinstance(value, str) and value in rules.get("instead", {}):
            return rules["instead"][value]
        own = ", or path/to/file.py:function" if own_code else ""
        return f"choose one of: {', '.join(map(str, rules['choices']))}{own}"
    # written so that NaN breaks them
    if "low" in rules and not value >= rules["low"]:
        return f"must be at least {rules['low']}"
    if "high" in rules and not value <= rules["high"]:
        return f"must be at most {rules['high']}"
    if "above" in rules and not value > rules["above"]:
        return f"must be more than {rules['above']}"
    if "below" in rules and not value < rules["below"]:
        return f"must be less than {rules['below']}"
    numbers = value.values() if isinstance(value, dict) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        return "must be finite"
    return None


def _what_null_is(field: dataclasses.Field) -> str:
    """What a field's doc says about null, for the end of a complaint; empty if null is not allowed."""
    if "None" not in str(field.type):
        return ""
    meaning = re.search(r"null\b[^;,]*", field.metadata["doc"])
    return f"; {meaning[0] if meaning else 'null is off'}"


def own_code(config: Config) -> dict[str, list[str]]:
    """The functions of the user's own that a config names: {field: names}."""
    t = config.training
    named = {"training.reward_fn": [t.reward_fn], "training.extra_rewards": list(t.extra_rewards)}
    named["training.loss_type"] = [t.loss_type]
    return {field: [name for name in names if is_own(name)] for field, names in named.items()}


def _rules_between(config: Config) -> list[Rule]:
    return [
        *_size_rules(config.training),
        *_sampling_rules(config.training),
        *_machine_rules(config.training),
        *card_rules(config),
        *_adapter_rules(config.training),
        *_path_rules(config.paths),
        *_reward_rules("training.reward_fn", [config.training.reward_fn]),
        *_reward_rules("training.extra_rewards", config.training.extra_rewards),
        *_stop_rules(config.training),
        *_tracker_rules(config.training),
        *loss_rules(config.training),
        *correction_rules(config.training),
        *shaping_rules(config.training),
    ]


def _size_rules(t: Training) -> list[Rule]:
    return [
        (
            ("training.rollout_batch_size", "training.group_size"),
            t.rollout_batch_size % t.group_size != 0,
            "rollouts do not divide into groups; make the first a multiple of the second",
        ),
        (
            ("training.rollout_batch_size", "training.train_batch_size"),
            t.rollout_batch_size % t.train_batch_size != 0,
            "rollouts do not divide into train batches; make the first a multiple of the second",
        ),
        (
            ("training.train_batch_size", "training.gradient_accumulation_steps"),
            t.train_batch_size % t.gradient_accumulation_steps != 0,
            "a train batch does not divide into microbatches; make the first a multiple of the second",
        ),
        (
            ("training.group_size", "training.loss_type"),
            t.group_size == 1 and t.loss_type not in LOSSES_WITHOUT_BASELINE and not is_own(t.loss_type),
            "in a group of 1 every advantage is 0; set group_size to 2 or more, or loss_type to no_baseline",
        ),
        (
            ("training.group_size", "training.use_std_normalization"),
            t.group_size == 1 and t.use_std_normalization,
            "a group of 1 has no standard deviation; turn use_std_normalization off",
        ),
        (
            ("training.normalize_mode", "training.gradient_accumulation_steps"),
            t.normalize_mode == "microbatch" and t.gradient_accumulation_steps == t.train_batch_size,
            "a microbatch of one rollout makes this mode the same as mean; lower gradient_accumulation_steps",
        ),
    ]


def _sampling_rules(t: Training) -> list[Rule]:
    return [
        (
            ("training.stop",),
            "" in t.stop,
            "an empty stop string would end every response at once; leave it out",
        ),
        (
            ("training.min_tokens", "training.max_tokens"),
            t.min_tokens > t.max_tokens,
            "the shortest response is longer than the longest; lower min_tokens",
        ),
        (
            ("training.system_prompt", "training.use_chat_template"),
            bool(t.system_prompt) and not t.use_chat_template,
            "a system prompt is only read with a chat template; set use_chat_template, or empty it",
        ),
    ]


# The text that a reward function looks for at the end of a response.
CLOSING_TEXTS = {
    "r1_zero": "</answer>",
    "question_only": "}",
    "gsm8k": "</answer>",
}


def _stop_rules(t: Training) -> Iterator[Rule]:
    for reward in (t.reward_fn, *t.extra_rewards):
        closing = CLOSING_TEXTS.get(reward)
        for stop in t.stop:
            yield (
                ("training.include_stop_str_in_output", "training.stop"),
                not t.include_stop_str_in_output and closing is not None and (closing in stop or stop in closing),
                f"the stop string {stop!r} would be cut off, and the reward function {reward} looks for {closing!r}; "
                "set include_stop_str_in_output to true, or take that string out of stop",
            )


def _tracker_rules(t: Training) -> list[Rule]:
    return [
        (("training.trackers",), len(set(t.trackers)) < len(t.trackers), "name each tracker once"),
        (
            ("training.wandb_project",),
            re.fullmatch(r"[^/\\#?%:]{0,128}", t.wandb_project) is None,
            "a project's name has at most 128 letters, and none of / \\ # ? % :",
        ),
    ]


def _machine_rules(t: Training) -> list[Rule]:
    return [
        (
            ("training.attention_type", "training.dtype"),
            t.attention_type.startswith("flash") and t.dtype == "float32" and t.autocast_dtype is None,
            "flash attention computes in 16 bits; set autocast_dtype to bfloat16, or attention_type to sdpa",
        ),
        (
            ("training.autocast_dtype", "training.dtype"),
            t.autocast_dtype is not None and t.dtype != "float32",
            "autocast is for float32 weights; set training.dtype to float32, or autocast_dtype to null",
        ),
        (
            ("training.optimizer", "training.dtype"),
            t.optimizer == "adamw8bit_master" and t.dtype != "bfloat16",
            "it keeps masters of bfloat16 weights, and these need none; set optimizer to adamw8bit",
        ),
        (
            ("training.device",),
            re.fullmatch(r"cpu|cuda(:\d+)?", t.device) is None,
            "must be cpu, cuda, or cuda:N",
        ),
    ]


def _adapter_rules(t: Training) -> list[Rule]:
    return [
        (
            ("training.load_in_4bit", "training.lora_rank"),
            t.load_in_4bit and t.lora_rank is None,
            "weights in 4 bits cannot be trained; set lora_rank, or load_in_4bit to false",
        ),
        (
            ("training.load_in_4bit", "training.device"),
            t.load_in_4bit and not t.device.startswith("cuda"),
            "weights in 4 bits need a GPU; set device to cuda:0, or load_in_4bit to false",
        ),
    ]


def _path_rules(paths: Paths) -> Iterator[Rule]:
    yield ("paths.output_dir",), not paths.output_dir, "give the folder that the run will write"
    for name, path in vars(paths).items():
        yield (
            (f"paths.{name}",),
            path.startswith("~"),
            "~ is not replaced by the home folder; write the whole path",
        )


def _reward_rules(key: str, names: Iterable[str]) -> Iterator[Rule]:
    for name in names:
        similar = nearest(name, REWARD_FNS)
        guess = f"did you mean {similar!r}? There" if similar else "there"
        known = ", ".join(REWARD_FNS)
        remedy = f"no reward function {name!r}; {guess} are: {known}; or give path/to/file.py:function"
        yield (key,), name not in REWARD_FNS and not is_own(name), remedy
