"""The step's benchmark: its options, its variants, its config."""

from __future__ import annotations

import argparse
from pathlib import Path

from common import SHAPES, TRL, TRL_OUR_KERNELS

from configs.defaults import Config
from utils.preflight.config import load_config

ROOT = Path(__file__).parents[2]
AS_SHIPPED, EQUAL_WORK, EVERYTHING_OFF = "as shipped", "zero advantages trained on", "everything off"
MKL = "products by MKL"
SWITCHED_OFF = (
    EQUAL_WORK,
    "padding, prompts repeated",
    "the same, with a padding mask",
    MKL,
    "full logits",
    "old log-probs recomputed",
    "microbatches in order of arrival",
)
VARIANTS = (AS_SHIPPED, *SWITCHED_OFF, EVERYTHING_OFF)


def parse_arguments(description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", action="append", default=[], help="config file; given again, later files win")
    add("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, help="a randomly initialised model of this shape, and no sampling")
    model.add_argument("--model", help="this checkpoint with four-shot prompts (configs/smollm2/sums.yaml)")
    add("--response-tokens", type=int, default=32, help="tokens per response (32); with --shape on average")
    add("--reward", type=float, default=0.8, help="mean of the drawn rewards (0.8)")
    add("--steps", type=int, default=5, help="timed steps a measurement (5)")
    add("--rounds", type=int, default=3, help="turns (3)")
    add(
        "--only",
        nargs="+",
        choices=[*VARIANTS, TRL, TRL_OUR_KERNELS],
        help="these variants alone; the first is the base of the ratios",
    )
    add("--profile", action="store_true", help="show what one more step of the first variant spends its time on")
    add("--output", type=Path, help="write OUTPUT.json and OUTPUT.png")
    add("--variant", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def resolve_config(args: argparse.Namespace) -> Config:
    """The quickstart's config (with --model that of its sums, with --shape the defaults), the files and overrides, and
    what the benchmark fixes."""
    base = [] if args.shape else [ROOT / "configs" / ("smollm2/sums.yaml" if args.model else "quickstart.yaml")]
    fixed = []
    if args.model:
        fixed = [f"paths.model_path={args.model}", "training.gradient_accumulation_steps=1"]
        fixed += [f"training.{name}_batch_size=64" for name in ("rollout", "train")]
    if args.shape:
        fixed = [f"paths.model_path={ROOT / 'runs' / 'bench' / args.shape}"]
    else:
        fixed += [f"training.{name}_tokens={args.response_tokens}" for name in ("min", "max")] + ["training.stop=[]"]
    return load_config([*base, *args.config], [*fixed, *args.overrides])
