"""YAML text to the values of config fields and back.

A field's type says how its text is read, and nothing in a text stands for anything else: `7` is the text "7" in a
text field and a number in a number's. YAML's tree is read here node by node because its own idea of types would turn
the name `1e5` into a number, and the number `1e-5` into a text.
"""

from __future__ import annotations

import re
import textwrap
import types
from typing import Any, get_args, get_origin

import yaml

Entries = dict[str, tuple[yaml.Node, int]]  # a mapping's keys, each with its value and the line of the key

NULL = "tag:yaml.org,2002:null"
# What YAML gives to values that carry no tag of their own. All others, such as `!!binary`, are refused.
USUAL_TAGS = {tag for kinds in yaml.SafeLoader.yaml_implicit_resolvers.values() for tag, _ in kinds} | {
    "tag:yaml.org,2002:str",
    "tag:yaml.org,2002:seq",
    "tag:yaml.org,2002:map",
}
BOOLEANS = {**yaml.SafeLoader.bool_values, "1": True, "0": False}  # yes, no, true, false, on, off
NOT_FINITE = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)


class NotYamlError(ValueError):
    """A text that is not YAML. `line` is where, counted from 1; None if that is unknown."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def parse_yaml(text: str) -> yaml.Node | None:
    """The tree of a YAML text, None if nothing is in it. Raises NotYamlError."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise NotYamlError(problem, error.problem_mark.line + 1 if error.problem_mark else None) from error
    except yaml.YAMLError as error:
        raise NotYamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise NotYamlError("lists or mappings are nested too deeply") from error


def entries(mapping: yaml.MappingNode) -> Entries:
    """The keys of a mapping, as texts. Raises NotYamlError for a key that is no text, and for one that comes twice."""
    by_key: Entries = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise NotYamlError(f"{source_of(key)} cannot be a key", line)
        if key.value in by_key:
            raise NotYamlError(f"duplicate key {key.value}", line)
        by_key[key.value] = value, line
    return by_key


def is_null(node: yaml.Node) -> bool:
    """True for `null`, `~` and nothing at all, but not for the text 'null' in quotes."""
    return isinstance(node, yaml.ScalarNode) and node.tag == NULL


def text_node(text: str) -> yaml.ScalarNode:
    """A node that holds exactly this text."""
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def to_value(node: yaml.Node, wanted: Any) -> Any:
    """The node's value as the type of a config field. Raises ValueError if it is of another type."""
    if node.tag not in USUAL_TAGS:
        raise ValueError(f"the tag {node.tag}")
    kind, inner = get_origin(wanted), get_args(wanted)
    if kind is types.UnionType:  # T | None
        return None if is_null(node) else to_value(node, inner[0])
    if kind is list and isinstance(node, yaml.SequenceNode):
        return [to_value(item, inner[0]) for item in node.value]
    if kind is dict and isinstance(node, yaml.MappingNode):
        return {key: to_value(value, inner[1]) for key, (value, _) in entries(node).items()}
    if kind is not None or is_null(node) or not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"not {wanted}")
    if wanted is bool:
        if node.value.lower() not in BOOLEANS:
            raise ValueError("neither true nor false")
        return BOOLEANS[node.value.lower()]
    return wanted(NOT_FINITE.sub(r"\1\2", node.value) if wanted is float else node.value)


def source_of(node: yaml.Node) -> str:
    """How the node is written in its file, on one line and shortened: for messages."""
    if node.start_mark is None:
        return textwrap.shorten(repr(node.value), width=80, placeholder=" ...")
    written = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
    return textwrap.shorten(written.strip() or "null", width=80, placeholder=" ...")


def dump(values: dict[str, Any]) -> str:
    """Nested plain values as YAML, in ASCII, one line per field."""
    return yaml.safe_dump(values, sort_keys=False, width=float("inf"))


def to_yaml_value(value: Any) -> str:
    """A value as YAML writes it on one line: null, true, [a, b]."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
