"""Write a config for another trainer: TRL's GRPOTrainer, or verl. For what is too large for one node's GPUs.

    python play-scripts/export_config.py --to trl --config configs/math.yaml --config configs/recipes/dapo.yaml
    python play-scripts/export_config.py --to verl --config configs/lora/qwen2.5_7b.yaml --gpus 8 --output grpo_7b.yaml
    python play-scripts/export_config.py --to trl --config configs/math.yaml training.learning_rate=1e-6

The YAML goes to --output, or is printed. For TRL it holds the arguments of GRPOConfig; for verl what differs from
its own defaults, with which it composes. Its comments say how to start it.

Every field of the config is translated, or has no counterpart, or is not needed there. What has no counterpart, and
where the other trainer differs, is printed on stderr and stands as comments at the end of the YAML: read both before
you compare runs. Data, prompt template and reward function are code and files, and never in the YAML.

Written for TRL 1.16 and verl 0.9; neither has to be installed. Exit status 2 for a mistake in the command or config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.export.translation import Translation, told
from utils.export.trl import to_trl, trl_text
from utils.export.verl import to_verl, verl_text
from utils.preflight.config import load_config_and_origins
from utils.preflight.derive import UTILIZATION

TARGETS = {"trl": (to_trl, trl_text), "verl": (to_verl, verl_text)}


def export(options: argparse.Namespace) -> Translation:
    """Write or print the translated config. Raises ValueError for a user's mistake."""
    if options.gpus < 1:
        raise ValueError(f"--gpus {options.gpus}: give 1 or more")
    if options.output is not None and options.output.exists():
        raise ValueError(f"--output {options.output} exists; give another name, or delete it")
    config, origins = load_config_and_origins(options.config, options.overrides)
    if UTILIZATION not in origins:
        config.vllm.gpu_memory_utilization = None  # a run here would derive it from the card
    translate, text_of = TARGETS[options.to]
    translation = translate(config, options.gpus)
    text = text_of(translation)
    if options.output is None:
        print(text, end="")
    else:
        try:
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--output {options.output}: {error.strerror}") from error
        print(f"wrote {options.output}", file=sys.stderr)
    return translation


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--to", required=True, choices=TARGETS, help="the trainer to write for")
    add("--config", action="append", default=[], metavar="FILE", help="YAML file; may be given several times")
    add("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    add("--gpus", type=int, default=1, help="GPUs that share each batch, one process each (1)")
    add("--output", type=Path, metavar="FILE", help="file to write; without it the YAML is printed")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        translation = export(options)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    for title, lines in list(told(translation).items())[:-1]:  # what is not needed is in the file alone
        print(title, *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
