"""What a config becomes for another trainer, and what became of each of its fields: nothing is left out in silence."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from configs.defaults import Config
from utils.preflight.config_rules import fields

WIDTH = 116
# Fields of the section `training` whose feature is off if they are null, false, 0 or empty.
OFF_IF_EMPTY = """dual_clip negative_mask retire_pass_rate overlong_buffer max_hours sampler_correction head_dtype
    wandb_tags extra_rewards lora_rank load_in_4bit refill_groups mask_truncated max_tokens_per_microbatch"""


@dataclass
class Translation:
    """A config on its way to `target`. Every field ends in exactly one of `translated`, `not_needed` and `missing`.

    `values` is the other trainer's config, by dotted names; `beside` is what it takes elsewhere. `off` names the fields
    that do nothing under this config, and why: whatever is said of them later, they are not needed.
    """

    target: str
    config: Config
    n_gpus: int
    values: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    translated: dict[str, str] = field(default_factory=dict)  # our field -> where it went
    differences: dict[str, str] = field(default_factory=dict)  # of those translated: what is not quite the same
    not_needed: dict[str, str] = field(default_factory=dict)  # our field -> why
    missing: dict[str, str] = field(default_factory=dict)  # our field -> what happens instead

    def translate(self, names: str, values: dict[str, Any], difference: str = "", beside: bool = False) -> None:
        """Put values that follow from our fields (`names`, parted by spaces) into the other trainer's config."""
        (self.beside if beside else self.values).update(values)
        for name in self._untold(names):
            self.translated[name] = ", ".join(values)
            if difference:
                self.differences[name] = difference

    def skip(self, names: str, why: str) -> None:
        """These fields change no number of a run, or belong to a part that stays here."""
        self.not_needed |= dict.fromkeys(self._untold(names), why)

    def lack(self, names: str, instead: str) -> None:
        """The other trainer cannot do what these fields ask for."""
        self.missing |= dict.fromkeys(self._untold(names), instead)

    def value_of(self, name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(self.config, section), key)

    def _untold(self, names: str) -> Iterator[str]:
        """Full names of the fields that have not been found to be off: `seed` is training.seed."""
        for word in names.split():
            name = word if "." in word else f"training.{word}"
            assert name in fields(), f"no field {name}"
            assert name not in self.translated | self.missing, f"{name} is told twice"
            if name not in self.not_needed:
                yield name

    def check_complete(self) -> Translation:
        told = [*self.translated, *self.not_needed, *self.missing]
        assert sorted(told) == sorted(fields()), set(told) ^ set(fields())
        return self


def off_fields(config: Config, uses_vllm: bool) -> dict[str, str]:
    """The fields that do nothing under this config, each with the field that says so."""
    t, off = config.training, {}
    read_by = {
        f"loss_type {t.loss_type}": {
            "cliprange cliprange_high dual_clip": t.loss_type in ("grpo_clip", "gspo"),
            "cispo_max_ratio": t.loss_type == "cispo",
            "sapo_tau_positive sapo_tau_negative": t.loss_type == "sapo",
            "dppo_delta dppo_max_ratio": t.loss_type == "dppo",
            "advantage use_std_normalization std_scope advantage_eps": t.loss_type != "no_baseline",
        },
        f"normalize_mode {t.normalize_mode}": {"normalize_constant": t.normalize_mode == "constant"},
        f"advantage {t.advantage}": {"advantage_eps": t.use_std_normalization or t.advantage == "maxrl"},
        "use_std_normalization is false": {"std_scope": t.use_std_normalization},
        f"sampler_correction {t.sampler_correction or 'null'}": {
            "tis_cap": t.sampler_correction == "tis",
            "icepop_low icepop_high": t.sampler_correction == "icepop",
            "mis_cap": t.sampler_correction == "mis",
            "geo_low geo_high": t.sampler_correction == "geo",
        },
        "kl_coef is 0": {"kl_estimator reference_path reference_dtype": t.kl_coef > 0},
        "lora_rank is null": {"lora_alpha lora_target": t.lora_rank is not None},
        "refill_groups is false": {"max_generation_rounds": t.refill_groups},
        f"optimizer is {t.optimizer}": {"use_bnb_adamw8bit": t.optimizer is None},
        "use_chat_template is false": {"system_prompt": t.use_chat_template},
        "vLLM samples": {"generation_batch_size": not uses_vllm},
        "the transformers engine samples": {
            " ".join(name for name in fields() if name.startswith("vllm.")): uses_vllm,
            "use_vllm_sleep_mode": uses_vllm,
        },
        "vLLM has a GPU of its own": {"use_vllm_sleep_mode": config.vllm.device is None},
    }
    for why, groups in read_by.items():
        for names, is_read in groups.items():
            for name in () if is_read else names.split():
                off.setdefault(name if "." in name else f"training.{name}", f"nothing reads it: {why}")
    for name in OFF_IF_EMPTY.split():
        if not getattr(t, name):
            off.setdefault(f"training.{name}", "it is off")
    return off


def skip_alike(to: Translation) -> None:
    """What neither trainer needs: how this project computes, watches and grades."""
    faster = "speed and memory alone; the numbers are the same to rounding"
    to.skip(
        "cpu_threads use_onednn use_liger_kernel skip_zero_advantage log_prob_chunk_size "
        "try_longest_microbatch generation_batch_size vllm.cpu_kv_cache_mb vllm.sleep_level",
        faster,
    )
    to.skip("track_peak_memory vllm.check_interval vllm.check_tolerance", "it only watches a run")
    to.skip("grader.workers grader.time_limit grader.memory_limit_mb", "it belongs to the reward function")
    to.skip(" ".join(name for name in fields() if name.startswith("elsewhere.")), "where a run of this project runs")
    if to.config.guard.action == "stop":
        to.lack("guard.action guard.patience", "a collapsed run goes on")
    else:
        to.skip("guard.action guard.patience", "it only watches a run")
    to.lack("max_nonfinite_steps", "a step that is not finite is neither skipped nor ends the run")
    to.lack("max_hours", "nothing ends a run after a time")
    to.lack("retire_pass_rate", "solved problems stay")


def render(to: Translation, heading: str) -> str:
    """The YAML text: what it is for, the values, and as comments what is not in them."""
    lines = [*_comment(heading), "", yaml.safe_dump(nested(to.values), sort_keys=False, width=WIDTH).rstrip()]
    for title, entries in told(to).items():
        lines += ["", *_comment(title), *(line for entry in entries for line in _comment(f"- {entry}", "  "))]
    return "\n".join(lines) + "\n"


def told(to: Translation) -> dict[str, list[str]]:
    """What a reader must know beside the values: title -> a line per field or per reason."""
    parts = {
        f"Without counterpart in {to.target}:": _by_reason(to.missing),
        f"Translated, but {to.target} differs:": _by_reason(to.differences),
        "Not needed there:": _by_reason(to.not_needed),
    }
    return {title: lines for title, lines in parts.items() if lines}


def _by_reason(reasons: dict[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(fields_)}: {reason}" for reason, fields_ in names.items()]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *folders, last = name.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = value
    return tree


def _comment(text: str, indent: str = "") -> list[str]:
    return [
        f"# {line}".rstrip()
        for paragraph in text.split("\n")
        for line in textwrap.wrap(paragraph, WIDTH - 2, subsequent_indent=indent, break_on_hyphens=False) or [""]
    ]
