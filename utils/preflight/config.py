"""YAML files and overrides -> validated dataclasses. Every complaint says what, where and how to mend it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.defaults import Config, default_of
from utils.log.files import write_atomically
from utils.preflight.config_rules import REMOVED, ConfigError, check_config, fields, nearest, sections


def load_config(config_files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Merge YAML files in order, each after the file its `base:` names, then `key=value` overrides; then validate.

    Raises ConfigError (a ValueError) naming the value, the file and line, and what would be right.
    """
    merged = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    layers = [leaf for path in config_files for leaf in _file_leaves(Path(path), ())]
    leaves = [*layers, *_override_leaves(overrides)]
    _refuse_removed(leaves)
    for key, value, origin in leaves:
        _check_name(key, origin)
        try:
            OmegaConf.update(merged, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {key} = {value!r} has the wrong type; {_right_type(key, value)}") from error
        origins[key] = origin
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        origin = f"{origins[error.full_key]}: {error.full_key}: " if error.full_key in origins else ""
        raise ConfigError(origin + str(error).splitlines()[0]) from error
    check_config(config, origins)
    return config


def _right_type(key: str, value: Any) -> str:
    """The type that a field takes, with an example where it is written in brackets or braces."""
    wanted = str(fields()[key].type)
    values = value if isinstance(value, dict) else {}
    unspaced = [name for name in values if ":" in str(name) and values[name] is None]
    if unspaced:
        name, _, weight = unspaced[0].partition(":")
        return f"YAML needs a space after the colon, for example {key}='{{{name}: {weight}}}'"
    if wanted.startswith("list"):
        return f"it takes {wanted}, for example {key}='[{value if isinstance(value, str) else 'foo'}]'"
    if wanted.startswith("dict"):
        return f"it takes {wanted}, for example {key}='{{gsm8k: 0.5}}'"
    return f"it takes {wanted}"


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
    write_atomically(path, yaml.dump(to_dict(config), Dumper=_QuotingDumper, sort_keys=False))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts."""
    return dataclasses.asdict(config)


def _file_leaves(path: Path, chain: tuple[Path, ...]) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, "file:line") of a YAML file, after those of the file that its `base:` names."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its base leads back to itself; break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named_by = f", named as base by {chain[-1].name}" if chain else ""
        raise ConfigError(f"{path}: no such config file ({error.strerror}){named_by}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    top_level = _read_yaml(text, path)
    base, _, origin = top_level.pop("base", (None, None, ""))
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{origin}: base = {base!r}: give the path of a YAML file")
    if base is not None:
        yield from _file_leaves(path.parent / base, (*chain, path.resolve()))
    for section, (value, node, origin) in top_level.items():
        if section in sections() and isinstance(node, yaml.MappingNode):
            for key, (leaf, _, line) in _entries(node, value, path).items():
                yield f"{section}.{key}", leaf, line
        elif section not in sections() or value is not None:  # a section may have nothing in it
            yield section, value, origin


Entries = dict[str, tuple[Any, yaml.Node, str]]  # key: its value, that value's node, "file:line" of the key


def _read_yaml(text: str, path: Path) -> Entries:
    """What stands at the top level of a YAML text."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is None:
            return {}
        if not isinstance(tree, yaml.MappingNode):
            line = tree.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: holds no sections; write, say, `training: {{learning_rate: 1e-5}}`")
        values = OmegaConf.to_container(OmegaConf.create(text))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return _entries(tree, values, path)


def _entries(tree: yaml.MappingNode, values: Mapping[Any, Any], path: Path) -> Entries:
    entries = {}
    for key_node, node in tree.value:
        key, origin = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
        if key not in values:  # YAML reads it as a number or the like, or it is the merge key `<<`
            raise ConfigError(f"{origin}: {key!r} is no name of a section or a field")
        entries[key] = (values[key], node, origin)
    return entries


def _override_leaves(overrides: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            remedy = f"write --config {text}" if text.endswith((".yaml", ".yml")) else "write section.field=value"
            raise ConfigError(f"command line: {text!r} is no override; {remedy}")
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {raw}"))["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"command line: {text!r}: {raw!r} is not valid YAML") from error
        yield key.strip(), value, "command line"


def _refuse_removed(leaves: Iterable[tuple[str, Any, str]]) -> None:
    """Raise ConfigError for all fields of an older version at once: a saved config.yaml holds every one of them."""
    removed = [(key, origin) for key, _, origin in leaves if key in REMOVED]
    if removed:
        keys, (_, first) = dict(removed), removed[0]
        lines = "the line" if len(keys) == 1 else "the lines"
        raise ConfigError(f"{first}: {', '.join(keys)}: {REMOVED[removed[0][0]]}; delete {lines}")


def _check_name(key: str, origin: str) -> None:
    known = fields()
    if key in known:
        return
    if key in sections():
        example = next(name for name in known if name.startswith(f"{key}."))
        raise ConfigError(f"{origin}: {key} is a section; give its fields, for example {example}")
    like = nearest(key, known)
    remedy = f"did you mean {like!r}?" if like else "--help lists the keys"
    raise ConfigError(f"{origin}: unknown key {key!r}; {remedy}")


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
