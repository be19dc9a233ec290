"""Make the tiny world of the quickstart: a model of 0.4 M parameters that can add, but not reliably.

    python play-scripts/make_tiny.py

writes data/tiny/: train.jsonl and validation.jsonl, sums of two numbers up to 49, where no pair of numbers is on both
sides; demonstrations.jsonl, responses to the training problems, many of them wrong or malformed on purpose; and model/,
a checkpoint that SFT warmed up on these demonstrations, from random weights. Validation problems are in none of them.
It takes about a minute on one core. The same options give the same files on the same machine; if they already
exist, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train_sft import run_command, save_checkpoint, with_progress

from configs.defaults import Training
from utils import tiny
from utils.log.files import whole_folder
from utils.problems import load_demonstrations, load_template, save_problems
from utils.records import Problem

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

OPTIONS_FILE = "options.json"
TEMPLATE = Path(__file__).parents[1] / "data" / "tiny.prompt"


def make(options: argparse.Namespace) -> None:
    """Build the folder, unless it exists; a folder of that name is always whole."""
    check_options(options)
    output = Path(options.output)
    if is_there(output, recipe(options), options.force):
        print(f"{output} is already there; --force makes it again")
        return
    training_problems, validation_problems = tiny.make_problems(options.validation_pairs, options.seed)
    demonstrations = tiny.make_demonstrations(
        training_problems,
        load_template(TEMPLATE),
        options.demonstrations_each,
        options.share_wrong,
        options.share_malformed,
        options.seed,
    )
    write_world(options, training_problems, validation_problems, demonstrations, tiny.build_model, max_tokens=64)


def write_world(
    options: argparse.Namespace,
    training_problems: Sequence[Problem],
    validation_problems: Sequence[Problem],
    demonstrations: Sequence[dict[str, str]],
    build_model: Callable[[int], Qwen2ForCausalLM],
    max_tokens: int,
    n_microbatches: int = 1,
) -> None:
    """Write the problems and demonstrations, and the model warmed up on those of up to `max_tokens` tokens."""
    output = Path(options.output)
    with whole_folder(output) as unfinished:
        save_problems(unfinished / "train.jsonl", training_problems)
        save_problems(unfinished / "validation.jsonl", validation_problems)
        rows = "".join(json.dumps(row) + "\n" for row in demonstrations)
        (unfinished / "demonstrations.jsonl").write_text(rows)
        warm_start(unfinished, options, build_model, max_tokens, n_microbatches)
        (unfinished / OPTIONS_FILE).write_text(json.dumps(recipe(options), indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
    print(
        f"wrote {output}: {len(training_problems)} training and {len(validation_problems)} validation problems, model/"
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that can't be, with what would be right."""
    for name in ("steps", "demonstrations_each"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} should be 1 or more")
    for name in ("share_wrong", "share_malformed"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} should be from 0 to 1")
    n_operands = tiny.LARGEST_OPERAND + 1
    most = n_operands * (n_operands + 1) // 2 - 1  # one pair at least is left to train on
    if not 1 <= options.validation_pairs <= most:
        raise ValueError(f"--validation-pairs {options.validation_pairs} should be from 1 to {most}")
    check_save_at(options)


def check_save_at(options: argparse.Namespace) -> None:
    """Raise ValueError for a --save-at that is none of the SFT steps."""
    for step in options.save_at:
        if not 1 <= step <= options.steps:
            raise ValueError(f"--save-at {step} is not one of the {options.steps} --steps")


def recipe(options: argparse.Namespace) -> dict:
    """The options that what is made depends on."""
    return {name: value for name, value in vars(options).items() if name not in ("output", "force")}


def is_there(output: Path, wanted: dict, force: bool) -> bool:
    """Whether there is nothing to do. Raises ValueError for a folder that must not be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / OPTIONS_FILE).is_file():
        raise ValueError(f"{output} holds something that this script did not make; choose another --output")
    if force:
        return False
    made_with = json.loads((output / OPTIONS_FILE).read_text())
    if made_with != wanted:
        different = sorted(name for name in wanted if wanted[name] != made_with.get(name))
        raise ValueError(f"{output} was made with other options ({', '.join(different)}); --force makes it again")
    return True


def warm_start(
    folder: Path,
    options: argparse.Namespace,
    build_model: Callable[[int], Qwen2ForCausalLM],
    max_tokens: int,
    n_microbatches: int,
) -> None:
    """Train a random model on the folder's demonstrations and save it to model/, on the way also to sft_step_N/.

    `build_model` makes it from the seed. Demonstrations of more than `max_tokens` tokens, prompt included, are left
    out.
    """
    import torch
    from transformers.utils import logging

    from utils.algorithm import sft

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small to share, and idle threads that spin slow it down
    tokenizer, policy = tiny.build_tokenizer(), build_model(options.seed)
    demonstrations, _ = load_demonstrations(folder / "demonstrations.jsonl", tokenizer, max_tokens)
    training = Training(
        seed=options.seed,
        device="cpu",
        dtype="float32",
        learning_rate=3e-3,
        train_batch_size=64,
        gradient_accumulation_steps=n_microbatches,
        use_bnb_adamw8bit=False,
    )
    steps = sft.train(policy.train(), demonstrations, training, options.steps, schedule="linear", warmup_steps=20)
    for row in with_progress(steps, options.steps, print_every=50):
        if row["step"] in options.save_at:
            save_checkpoint(folder / f"sft_step_{row['step']}", policy, tokenizer)
    save_checkpoint(folder / "model", policy, tokenizer)


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of_a_world(__doc__, output="data/tiny", steps=420)
    add = parser.add_argument
    add("--share-wrong", type=float, default=0.35, help="share of demonstrations with a wrong answer (0.35)")
    add("--share-malformed", type=float, default=0.25, help="share of demonstrations with a broken format (0.25)")
    add("--demonstrations-each", type=int, default=8, help="demonstrations per training problem (8)")
    add("--validation-pairs", type=int, default=150, help="pairs of numbers held out, in either order (150)")
    return parser


def parser_of_a_world(description: str, output: str, steps: int) -> argparse.ArgumentParser:
    """The options that every world with a warm start has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", default=output, help=f"folder to write ({output})")
    add("--force", action="store_true", help="replace what an earlier call made")
    add("--seed", type=int, default=1337, help="seed of problems, demonstrations, weights and training order (1337)")
    add(
        "--steps",
        type=int,
        default=steps,
        help=f"SFT steps of 64 demonstrations; more make a more able model ({steps})",
    )
    add(
        "--save-at", type=int, nargs="+", default=[], metavar="STEP", help="also save sft_step_N/ after these SFT steps"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), make))
