"""Make the tiny world of the ablations: sums of several numbers, in which thinking costs tokens.

    python play-scripts/make_chains.py

writes data/chains/: train.jsonl and validation.jsonl, sums of 3 to 6 numbers up to 9, of which none is on both sides
in another order; demonstrations.jsonl, responses to the training problems that write out every step, or the totals
alone, or no step, or ramble, some of them wrong or malformed on purpose, and a share under a second prompt that wants a
boxed answer and no reasoning; and model/, a checkpoint of 0.6 M parameters that SFT warmed up on these demonstrations,
from random weights. It takes about three minutes on one core. The same options give the same files on the same machine;
if they already exist, nothing is done.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from make_tiny import TEMPLATE, check_save_at, is_there, parser_of_a_world, recipe, write_world
from train_sft import run_command

from utils import chains, tiny
from utils.problems import load_template

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

BOXED_TEMPLATE = TEMPLATE.with_name("question_only.prompt")
LONGEST = 128  # tokens of prompt and response; a demonstration that rambles further is left out
SHARES = ("share_wrong_steps", "share_wrong_guesses", "share_malformed", "share_boxed")


def make(options: argparse.Namespace) -> None:
    """Build the folder, unless it exists; a folder of that name is always whole."""
    check_options(options)
    output = Path(options.output)
    if is_there(output, recipe(options), options.force):
        print(f"{output} is already there; --force makes it again")
        return
    training_problems, validation_problems = chains.make_problems(
        options.training_problems, options.validation_problems, options.seed
    )
    templates = load_template(TEMPLATE), load_template(BOXED_TEMPLATE)
    demonstrations = chains.make_demonstrations(
        training_problems, templates, options.demonstrations_each, mixture(options), options.seed
    )
    write_world(options, training_problems, validation_problems, demonstrations, build_model, LONGEST, n_microbatches=4)


def build_model(seed: int) -> Qwen2ForCausalLM:
    """0.6 M parameters, with the attention that is the quickest on so short sequences."""
    policy = tiny.build_model(seed, n_layers=3)
    policy.set_attn_implementation("eager")
    return policy


def mixture(options: argparse.Namespace) -> chains.Mixture:
    return chains.Mixture(
        styles=tuple(options.styles),
        **{name.removeprefix("share_"): getattr(options, name) for name in SHARES},
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that can't be, with what would be right."""
    for name in ("steps", "demonstrations_each", "training_problems", "validation_problems"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} should be 1 or more")
    for name in SHARES:
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} should be from 0 to 1")
    shares = " ".join(map(str, options.styles))
    if not (all(share >= 0 for share in options.styles) and math.isclose(sum(options.styles), 1)):
        raise ValueError(f"--styles {shares} should be {len(chains.STYLES)} shares of 0 or more that add up to 1")
    chains.check_sizes(options.training_problems, options.validation_problems)
    check_save_at(options)


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of_a_world(__doc__, output="data/chains", steps=500)
    add, usual = parser.add_argument, chains.Mixture()
    add("--training-problems", type=int, default=500, help="training problems per number of terms (500)")
    add("--validation-problems", type=int, default=32, help="held-out problems per number of terms (32)")
    add("--demonstrations-each", type=int, default=12, help="demonstrations per training problem (12)")
    add(
        "--styles",
        type=float,
        nargs=len(chains.STYLES),
        default=list(usual.styles),
        metavar=tuple(style.upper() for style in chains.STYLES),
        help=f"shares of the styles ({' '.join(map(str, usual.styles))})",
    )
    for name, meaning in (
        ("share_wrong_steps", "written steps that are wrong"),
        ("share_wrong_guesses", "answers without a step that are wrong"),
        ("share_malformed", "demonstrations with a broken format"),
        ("share_boxed", "demonstrations under the prompt that wants a boxed answer"),
    ):
        value = getattr(usual, name.removeprefix("share_"))
        add(f"--{name.replace('_', '-')}", type=float, default=value, help=f"share of {meaning} ({value})")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), make))
