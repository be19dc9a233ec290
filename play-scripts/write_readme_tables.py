"""Write the README's tables of config fields and metrics from the code; --check only says whether they fit."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.defaults import default_of
from utils.config import describe_rules, sections, to_yaml_value
from utils.metrics_doc import metrics_table

README = Path(__file__).parents[1] / "README.md"


def config_tables() -> str:
    """A table for each section of the config, Markdown."""
    parts = []
    for section, cls in sections().items():
        rows = [f"**`{section}`**: {cls.__doc__.strip()}", "", "| field | default | meaning |", "|---|---|---|"]
        for field in dataclasses.fields(cls):
            rows.append(f"| `{field.name}` | `{to_yaml_value(default_of(field))}` | {describe_rules(field)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    """The README with what stands between its markers replaced."""
    for name, table in {"config": config_tables(), "metrics": metrics_table()}.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main(arguments: Sequence[str]) -> int:
    text = README.read_text()
    wanted = with_tables(text)
    if list(arguments) == ["--check"]:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
