"""Write the tables of config fields and of metrics in docs/ from the code.

python play-scripts/write_docs_tables.py
python play-scripts/write_docs_tables.py --check    writes nothing; exit status 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from configs.defaults import default_of
from utils.log.metrics import metrics_table
from utils.preflight.config_rules import sections
from utils.preflight.field_docs import describe_rules
from utils.preflight.yaml_values import to_yaml_value

DOCS = Path(__file__).parents[1] / "docs"


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
    """A page with what is between its markers replaced."""
    for name, table in {"config": config_tables(), "metrics": metrics_table()}.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are up to date")
    options = parser.parse_args()
    pages = {page: page.read_text(encoding="utf-8") for page in (DOCS / "config.md", DOCS / "metrics.md")}
    outdated = {page: with_tables(text) for page, text in pages.items() if with_tables(text) != text}
    for page, text in outdated.items():
        if options.check:
            print(f"docs/{page.name} is out of date; run: python play-scripts/write_docs_tables.py", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
            print(f"docs/{page.name}: table written")
    if not outdated:
        print("the tables are up to date")
    return int(bool(outdated) and options.check)


if __name__ == "__main__":
    sys.exit(main())
