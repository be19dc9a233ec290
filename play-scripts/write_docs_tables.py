"""Write the tables of config fields, of metrics, of adapters' memory and of scale in docs/ from the code.

python play-scripts/write_docs_tables.py
python play-scripts/write_docs_tables.py --check    writes nothing; exit status 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass
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

WEIGHTS_1_5B, MOST_TOKENS = 1_543_714_304, 1024  # Qwen2.5-Math-1.5B, and the longest response of configs/math.yaml
LINKS = {  # bytes per second that a card sends, while it receives as many
    "NVLink 4": 450e9,  # NVIDIA's H100 datasheet: 900 GB/s both ways together
    "PCIe 5 x16": 32e9 * 16 * 128 / 130 / 8,  # PCI-SIG: 32 GT/s per lane, 128 of 130 bits
    "PCIe 4 x16": 16e9 * 16 * 128 / 130 / 8,
}
COUNTS = (2, 4, 8)  # of cards


@dataclass(frozen=True)
class StepOnOneCard:
    """Seconds of the table "A step, in seconds" of docs/limits.md, and bytes per second of the card's memory."""

    card: str
    link: str
    bandwidth: float
    rollout: float
    update: float
    evaluation: float  # a fourth of it
    sync: float = 0.5
    save: float = 0.3

    @property
    def total(self) -> float:
        return self.rollout + self.update + self.evaluation + self.sync + self.save


STEPS = (
    StepOnOneCard("H100", "NVLink 4", 3.35e12, rollout=2.8, update=2.2, evaluation=2.0),
    StepOnOneCard("H100", "PCIe 5 x16", 3.35e12, rollout=2.8, update=2.2, evaluation=2.0),
    StepOnOneCard("RTX 4090", "PCIe 4 x16", 1.01e12, rollout=7.3, update=8.5, evaluation=6.0),
)


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


def all_reduce_bytes(n_bytes: float, n_cards: int) -> float:
    """What each card sends, and receives, to sum so many bytes around a ring: all but its own Nth, twice."""
    return 2 * (n_cards - 1) / n_cards * n_bytes


def step_on_cards(step: StepOnOneCard, n_cards: int, gradient_bytes: int = 4) -> float:
    """Seconds of a step whose batch is shared by so many cards, with one optimizer step and nothing overlapped.

    Gradients are summed in float32, 4 bytes each.

    Reading the weights for each token takes as long for a share of the sequences as for all: that part of sampling
    does not shrink. An evaluation has four rollout batches, one after another, until four cards take one each.
    """
    reading = MOST_TOKENS * 2 * WEIGHTS_1_5B / step.bandwidth
    rollout = reading + (step.rollout - reading) / n_cards
    evaluation = reading * max(1, 4 / n_cards) / 4 + (step.evaluation - reading) / n_cards
    summing = all_reduce_bytes(gradient_bytes * WEIGHTS_1_5B, n_cards) / LINKS[step.link]
    return rollout + evaluation + step.update / n_cards + summing + step.sync + step.save


def scale_tables() -> str:
    """Bytes and seconds of summing the 1.5 B model's gradients, and what a step then takes; Markdown."""
    rows = [f"| cards | gradients | sent by each card | {' | '.join(LINKS)} |", "|---|---|---|---|---|---|"]
    for n_cards in COUNTS:
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            sent = all_reduce_bytes(size * WEIGHTS_1_5B, n_cards)
            seconds = (f"{1000 * sent / speed:.0f} ms" for speed in LINKS.values())
            rows.append(f"| {n_cards} | {dtype} | {sent / 1e9:.2f} GB | {' | '.join(seconds)} |")
    rows += ["", "| card | link | 1 card | 2 cards | 4 cards | 8 cards |", "|---|---|---|---|---|---|"]
    for step in STEPS:
        times = {n_cards: step_on_cards(step, n_cards) for n_cards in COUNTS}
        cells = (f"{seconds:.1f} s, {100 * step.total / n / seconds:.0f} %" for n, seconds in times.items())
        rows.append(f"| {step.card} | {step.link} | {step.total:.1f} s | {' | '.join(cells)} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """A page with what is between its markers replaced."""
    tables = {"config": config_tables(), "metrics": metrics_table(), "lora": lora_table(), "scale": scale_tables()}
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are up to date")
    options = parser.parse_args()
    paths = (DOCS / f"{name}.md" for name in ("config", "metrics", "lora", "limits"))
    pages = {page: page.read_text(encoding="utf-8") for page in paths}
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
