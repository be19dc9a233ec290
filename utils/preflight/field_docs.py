"""The config's fields as text, for `--help-config` and the documentation."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

from configs.defaults import default_of
from utils.preflight.config_rules import sections
from utils.preflight.yaml_values import to_yaml_value

WIDTH = 110


def describe_fields(word: str = "") -> str:
    """The fields whose name or doc holds the word, each with its default and doc, under their headings."""
    lines: list[str] = []
    section_shown = None
    for section, heading, fields in _groups():
        chosen = [
            field for field in fields if word.lower() in f"{section}.{field.name} {describe_rules(field)}".lower()
        ]
        if chosen and section != section_shown:
            lines += ["", f"{section}: {sections()[section].__doc__}"]
            section_shown = section
        if chosen and heading:
            lines += ["", f"  {heading}"]
        for field in chosen:
            lines.append(f"    {section}.{field.name} = {to_yaml_value(default_of(field))}")
            lines += textwrap.wrap(describe_rules(field), WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines[1:])


def describe_rules(field: dataclasses.Field) -> str:
    """A field's doc, with the values it may take if they are listed."""
    choices = field.metadata.get("choices")
    own_code = "; also path/to/file.py:function" if field.metadata.get("own_code") else ""
    return field.metadata["doc"] + (f" ({', '.join(map(str, choices))})" if choices else "") + own_code


def _groups() -> Iterator[tuple[str, str, list[dataclasses.Field]]]:
    """(section, heading, fields): a field with a heading begins a group, which holds all up to the next such field."""
    for section, cls in sections().items():
        heading, group = "", []
        for field in dataclasses.fields(cls):
            if "heading" in field.metadata:
                yield section, heading, group
                heading, group = field.metadata["heading"], []
            group.append(field)
        yield section, heading, group
