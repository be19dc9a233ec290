"""Write the tables of config fields, of metrics and of adapters' memory in docs/ from the code.

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
from utils.preflight.config import load_config_and_origins
from utils.preflight.config_rules import sections
from utils.preflight.derive import Card, derive
from utils.preflight.field_docs import describe_rules
from utils.preflight.machine import ASSUMED_PROMPT
from utils.preflight.memory_estimate import BYTES, VLLM_OVERHEAD, count_parameters, estimate_peak_memory
from utils.preflight.model_files import model_config
from utils.preflight.yaml_values import to_yaml_value

DOCS, CONFIGS = (Path(__file__).parents[1] / name for name in ("docs", "configs"))
LORA_RUNS = [  # of configs/lora, on a card of so many GB, with this engine
    ("qwen2.5_7b", 80, "vllm"),
    ("qwen2.5_7b", 24, "vllm"),
    ("qwen2.5_7b_24gb", 24, "transformers"),
    ("qwen2.5_7b_4bit", 24, "transformers"),
    ("qwen2.5_7b_4bit", 24, "vllm"),
]


def config_tables() -> str:
    """A table for each section of the config, Markdown."""
    parts = []
    for section, cls in sections().items():
        rows = [f"**`{section}`**: {cls.__doc__.strip()}", "", "| field | default | meaning |", "|---|---|---|"]
        for field in dataclasses.fields(cls):
            rows.append(f"| `{field.name}` | `{to_yaml_value(default_of(field))}` | {describe_rules(field)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def lora_table() -> str:
    """The estimated memory of Qwen2.5-7B's adapter runs on cards of 24 and 80 GB, nothing else on them; Markdown."""
    rows = ["| config | card | engine | frozen and trained weights | training peak | sampling peak | fits |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, card_gb, engine in LORA_RUNS:
        engine_set = f"training.rollout_engine={engine}"
        config, origins = load_config_and_origins([CONFIGS / f"lora/{name}.yaml"], [engine_set])
        sizes, card = model_config(config.paths.model_path), Card(card_gb * 10**9, card_gb * 10**9)
        uses_vllm, longest = engine == "vllm", ASSUMED_PROMPT + config.training.max_tokens
        config, _ = derive(config, origins, sizes, longest, card, uses_vllm)
        parts = estimate_peak_memory(sizes, config, longest, card.total, uses_vllm)
        sampling = parts["rollout_peak"]
        if uses_vllm:  # its share of the card may be less than its own copy of the weights
            least = count_parameters(sizes)["total"] * BYTES[config.vllm.dtype] + VLLM_OVERHEAD
            sampling += max(0, least - parts["vllm_awake"])
        numbers = [parts["weights"], parts["training_peak"], sampling]
        fits = "yes" if max(numbers) <= card.total else "**no**"
        cells = [f"`{name}.yaml`", f"{card_gb} GB", engine, *(f"{n / 1e9:.1f} GB" for n in numbers), fits]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """A page with what is between its markers replaced."""
    for name, table in {"config": config_tables(), "metrics": metrics_table(), "lora": lora_table()}.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are up to date")
    options = parser.parse_args()
    pages = {
        page: page.read_text(encoding="utf-8") for page in (DOCS / "config.md", DOCS / "metrics.md", DOCS / "lora.md")
    }
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
