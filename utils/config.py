"""YAML files and overrides -> validated dataclasses. Every complaint says what, where and how to mend it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.defaults import Config, default_of


class ConfigError(ValueError):
    """A mistake in a config file or an override, told in one line."""


def sections() -> dict[str, type]:
    """The config's sections and their dataclasses, in order."""
    return {field.name: field.default_factory for field in dataclasses.fields(Config)}


def fields() -> dict[str, dataclasses.Field]:
    """Every config field by its dotted name, `training.learning_rate`."""
    return {f"{name}.{field.name}": field for name, cls in sections().items() for field in dataclasses.fields(cls)}


def load_config(config_files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Merge YAML files in order, each after the file its `base:` names, then `key=value` overrides; then validate.

    Raises ConfigError (a ValueError) naming the value, the file and line, and what would be right.
    """
    merged = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    layers = [leaf for path in config_files for leaf in _file_leaves(Path(path), ())]
    for key, value, origin in [*layers, *_override_leaves(overrides)]:
        _check_name(key, origin)
        try:
            OmegaConf.update(merged, key, value, merge=False)
        except OmegaConfBaseException as error:
            wanted = fields()[key].type
            raise ConfigError(f"{origin}: {key} = {value!r} has the wrong type; it takes {wanted}") from error
        origins[key] = origin
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    check_config(config, origins)
    return config


class _QuotingDumper(yaml.SafeDumper):
    """Quotes every text that might be read as a number: OmegaConf takes `0E0` for one, which PyYAML does not."""


_QuotingDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if text[:1] in {*"+-.0123456789"} else None
    ),
)


def save_config(config: Config, path: Path) -> None:
    """Write every field, so that `load_config([path])` gives the same config whatever the defaults become."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(yaml.dump(to_dict(config), Dumper=_QuotingDumper, sort_keys=False))
    unfinished.replace(path)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts."""
    return dataclasses.asdict(config)


def _file_leaves(path: Path, chain: tuple[Path, ...]) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, "file:line") of a YAML file, after those of the file that its `base:` names."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its base leads back to itself; break the circle")
    try:
        text = path.read_text()
        tree, values = yaml.compose(text, Loader=yaml.SafeLoader), OmegaConf.create(text)
    except OSError as error:
        named_by = f", named as base by {chain[-1].name}" if chain else ""
        raise ConfigError(f"{path}: no such config file ({error.strerror}){named_by}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no sections; write for example\ntraining:\n  learning_rate: 1e-5")
    data = OmegaConf.to_container(values)
    if "base" in data:
        base = data.pop("base")
        yield from _file_leaves(path.parent / str(base), (*chain, path.resolve()))
    for section_node, body in tree.value:
        section, origin = section_node.value, f"{path}:{section_node.start_mark.line + 1}"
        if section not in data:
            continue
        if section in sections() and isinstance(body, yaml.MappingNode):
            for key_node, _ in body.value:
                key = key_node.value
                yield f"{section}.{key}", data[section][key], f"{path}:{key_node.start_mark.line + 1}"
        elif section in sections() and data[section] is None:
            continue  # a section with nothing in it
        else:
            yield section, data[section], origin


def _override_leaves(overrides: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"command line: {text!r} is no override; write section.field=value")
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {raw}"))["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"command line: {text!r}: {raw!r} is not valid YAML") from error
        yield key.strip(), value, "command line"


def _check_name(key: str, origin: str) -> None:
    known = fields()
    if key in known:
        return
    if key in sections():
        raise ConfigError(f"{origin}: {key} is a section; give its fields, for example {_nearest(key + '.', known)}")
    raise ConfigError(f"{origin}: unknown key {key!r}; did you mean {_nearest(key, known)!r}?")


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    """The known name most like `key`; one that differs in its section alone comes first."""
    last = key.rpartition(".")[2]
    same_field = [name for name in known if name.endswith(f".{last}")]
    if same_field:
        return same_field[0]
    return max(known, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())


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
            raise ConfigError(f"{named(key)}: {complaint}")
    for keys, wrong, remedy in _rules_between(config):
        if wrong:
            raise ConfigError(f"{' and '.join(named(key) for key in keys)}: {remedy}")


def _broken_rule(value: Any, rules: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if "choices" in rules and value not in rules["choices"]:
        return f"choose one of: {', '.join(map(str, rules['choices']))}"
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


def _rules_between(config: Config) -> list[tuple[tuple[str, ...], bool, str]]:
    """(fields, whether they are at odds, how to mend it)."""
    t = config.training
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
            t.group_size == 1 and t.loss_type != "no_baseline",
            "alone in its group every advantage is 0; take a group_size of 2 or more, or loss_type no_baseline",
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
        (
            ("training.attention_type", "training.dtype"),
            t.attention_type.startswith("flash") and t.dtype == "float32" and t.autocast_dtype is None,
            "flash attention computes in 16 bits; set autocast_dtype to bfloat16, or attention_type to sdpa",
        ),
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
            ("training.autocast_dtype", "training.dtype"),
            t.autocast_dtype is not None and t.dtype != "float32",
            "autocast is for float32 weights; set training.dtype to float32, or autocast_dtype to null",
        ),
        (
            ("training.system_prompt", "training.use_chat_template"),
            bool(t.system_prompt) and not t.use_chat_template,
            "a system prompt is only read with a chat template; set use_chat_template, or empty it",
        ),
        (
            ("training.device",),
            re.fullmatch(r"cpu|cuda(:\d+)?", t.device) is None,
            "must be cpu, cuda, or cuda:N",
        ),
    ]


def describe_fields() -> str:
    """Every field with its default and doc, by section: the body of `--help`."""
    lines = []
    for section, cls in sections().items():
        lines += ["", f"{section}: {(cls.__doc__ or '').strip()}"]
        for field in dataclasses.fields(cls):
            head = f"  {section}.{field.name} = {to_yaml_value(default_of(field))}"
            doc = textwrap.wrap(describe_rules(field), width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [head, *doc]
    return "\n".join(lines)


def describe_rules(field: dataclasses.Field) -> str:
    """A field's doc, with the values it may take where they are listed."""
    choices = field.metadata.get("choices")
    return field.metadata["doc"] + (f" ({', '.join(map(str, choices))})" if choices else "")


def to_yaml_value(value: Any) -> str:
    """A value as YAML writes it on one line: null, true, [a, b]."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
