"""From YAML files and overrides to validated dataclasses. Every complaint says what is wrong, where, and the remedy."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from configs.defaults import Config
from utils.log.files import write_atomically
from utils.preflight.config_rules import REFUSED, REMOVED, ConfigError, check_config, fields, nearest, sections
from utils.preflight.yaml_values import (
    NotYamlError,
    dump,
    entries,
    is_null,
    parse_yaml,
    source_of,
    text_node,
    to_value,
)

Leaf = tuple[str, yaml.Node, str]  # a field's dotted name, its value, and where that is from


def load_config(config_files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Merge YAML files in order, each after the files its `base:` names, then `key=value` overrides; then validate.

    Raises ConfigError (a ValueError) with the value, the file and line, and the remedy.
    """
    return load_config_and_origins(config_files, overrides)[0]


def load_config_and_origins(
    config_files: Iterable[str | Path] = (), overrides: Iterable[str] = ()
) -> tuple[Config, dict[str, str]]:
    """`load_config`, and where each field that is set was set: `{"training.seed": "a.yaml:3"}`. Raises ConfigError."""
    config, origins = read_config(config_files, overrides)
    check_config(config, origins)
    return config, origins


def read_config(config_files: Iterable[str | Path], overrides: Iterable[str]) -> tuple[Config, dict[str, str]]:
    """The merged config before its values are checked, and where each field that is set was set."""
    config, origins, field_types = Config(), {}, _field_types()
    layers = [leaf for path in config_files for leaf in _file_leaves(Path(path), ())]
    leaves = [*layers, *_override_leaves(overrides)]
    _refuse_removed(leaves)
    for key, node, origin in leaves:
        _check_name(key, origin)
        try:
            value = to_value(node, field_types[key])
        except ValueError as error:
            remedy = _right_type(key, node)
            raise ConfigError(f"{origin}: {key} = {source_of(node)} has the wrong type; {remedy}") from error
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
        origins[key] = origin
    return config, origins


def _field_types() -> dict[str, Any]:
    hints = {section: typing.get_type_hints(cls) for section, cls in sections().items()}
    return {key: hints[section][name] for key in fields() for section, name in [key.split(".")]}


def _right_type(key: str, node: yaml.Node) -> str:
    """The type that a field takes, with an example if it is written in brackets or braces."""
    wanted = str(fields()[key].type)
    if isinstance(node, yaml.MappingNode):
        unspaced = [name.value for name, value in node.value if is_null(value) and ":" in str(name.value)]
        if unspaced:
            name, _, weight = unspaced[0].partition(":")
            return f"YAML needs a space after the colon, for example {key}='{{{name}: {weight}}}'"
    if wanted.startswith("list"):
        example = source_of(node) if isinstance(node, yaml.ScalarNode) and not is_null(node) else "foo"
        return f"it takes {wanted}, for example {key}='[{example}]'"
    if wanted.startswith("dict"):
        return f"it takes {wanted}, for example {key}='{{gsm8k: 0.5}}'"
    if wanted == "str" and is_null(node):
        return "it takes str: give '' for none, or put quotes around the word"
    return f"it takes {wanted}"


def save_config(config: Config, path: Path) -> None:
    """Write every field, so that `load_config([path])` gives the same config whatever the defaults become."""
    write_atomically(path, dump(to_dict(config)))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts."""
    return dataclasses.asdict(config)


def _file_leaves(path: Path, chain: tuple[Path, ...]) -> Iterator[Leaf]:
    """The fields of a YAML file, after those of the file, or the list of files, that its `base:` names."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: its base leads back to itself; break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named_by = f", named as base by {chain[-1].name}" if chain else ""
        raise ConfigError(f"{path}: no such config file ({error.strerror}){named_by}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    try:
        top_level = _top_level(text, path)
        base, line = top_level.pop("base", (None, 0))
        for name in [] if base is None else _base_names(base, f"{path}:{line}"):
            yield from _file_leaves(path.parent / name, (*chain, path.resolve()))
        for section, (node, line) in top_level.items():
            if section in sections() and isinstance(node, yaml.MappingNode):
                for key, (leaf, leaf_line) in entries(node).items():
                    yield f"{section}.{key}", leaf, f"{path}:{leaf_line}"
            elif section not in sections() or not is_null(node):  # a section may have nothing in it
                yield section, node, f"{path}:{line}"
    except NotYamlError as error:
        line = f":{error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error}") from error


def _top_level(text: str, path: Path) -> dict[str, tuple[yaml.Node, int]]:
    tree = parse_yaml(text)
    if tree is None:
        return {}
    if not isinstance(tree, yaml.MappingNode):
        line = tree.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: holds no sections; write, say, `training: {{learning_rate: 1e-5}}`")
    return entries(tree)


def _base_names(node: yaml.Node, origin: str) -> list[str]:
    try:
        return to_value(node, list[str]) if isinstance(node, yaml.SequenceNode) else [to_value(node, str)]
    except ValueError as error:
        remedy = "give the path of a YAML file, or a list of paths"
        raise ConfigError(f"{origin}: base = {source_of(node)}: {remedy}") from error


def _override_leaves(overrides: Iterable[str]) -> Iterator[Leaf]:
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            remedy = (
                f"write --config {override}" if override.endswith((".yaml", ".yml")) else "write section.field=value"
            )
            raise ConfigError(f"command line: {override!r} is no override; {remedy}")
        try:
            yield key.strip(), _override_value(key.strip(), raw), "command line"
        except NotYamlError as error:
            raise ConfigError(f"command line: {override!r}: {raw!r} is not valid YAML: {error}") from error


def _override_value(key: str, raw: str) -> yaml.Node:
    """The value after `key=`. A text field takes it as it is, unless YAML's quotes are around it or it is null."""
    if _field_types().get(key) is str and raw[:1] not in ("'", '"') and raw not in ("null", "~"):
        return text_node(raw)
    tree = parse_yaml(f"value: {raw}")
    if not isinstance(tree, yaml.MappingNode) or len(tree.value) != 1:
        raise NotYamlError("more than one value")
    return tree.value[0][1]


def _refuse_removed(leaves: Iterable[Leaf]) -> None:
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
    if key in REFUSED:
        raise ConfigError(f"{origin}: {key}: {REFUSED[key]}; leave it out")
    similar = nearest(key, known)
    remedy = f"did you mean {similar!r}?" if similar else "--help-config lists the fields"
    raise ConfigError(f"{origin}: unknown key {key!r}; {remedy}")
