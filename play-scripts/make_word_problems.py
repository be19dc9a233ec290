"""Two-step word problems with small numbers, on which a small pretrained model learns to reason.

    make smollm2-reasoning

runs this with the tokenizer of data/smollm2/model, whose chat template the prompts of the demonstrations are in. It
writes data/word_problems/: train.jsonl and validation.jsonl, in which no problem of a kind has the same numbers on both
sides; and demonstrations.jsonl, the reasoning of the first training problems, one calculation per line, with which
train_sft.py shows the model the format. If the folder already exists, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from make_tiny import OPTIONS_FILE, is_there, recipe
from train_sft import load, run_command

from utils.log.files import whole_folder
from utils.problems import build_prompts, load_template, save_problems
from utils.records import Problem
from utils.seeding import derive_seed

TEMPLATE = Path(__file__).parents[1] / "data" / "question_only.prompt"
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Ida", "Jack")
THINGS = ("apples", "marbles", "stickers", "shells", "pencils", "cookies", "stamps", "buttons")
OPERANDS = range(2, 10)
MOST_TOKENS = 512  # of a prompt; the longest has about 80


def bags(a: int, b: int, c: int) -> tuple[str, tuple[str, str], int]:
    question = "{name} has {a} {things} and buys {b} bags with {c} {things} each. How many {things} are there now?"
    return question, (f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"), a + b * c


def boxes(a: int, b: int, c: int) -> tuple[str, tuple[str, str], int]:
    question = "{name} has {a} boxes with {b} {things} each. {name} gives {c} {things} away. How many are left?"
    return question, (f"{a} * {b} = {a * b}", f"{a * b} - {c} = {a * b - c}"), a * b - c


def days(a: int, b: int, c: int) -> tuple[str, tuple[str, str], int]:
    question = "{name} finds {a} {things} on Monday, {b} on Tuesday and loses {c}. How many {things} are left?"
    return question, (f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"), a + b - c


def shop(a: int, b: int, c: int) -> tuple[str, tuple[str, str], int]:
    question = "A book costs {a} coins and a pen {b} coins. {name} buys one book and {c} pens. What does {name} pay?"
    return question, (f"{c} * {b} = {b * c}", f"{a} + {b * c} = {a + b * c}"), a + b * c


def times(a: int, b: int, c: int) -> tuple[str, tuple[str, str], int]:
    question = "{name} has {a} {things}. Kim had {b} times as many and got {c} more. How many does Kim have?"
    return question, (f"{b} * {a} = {a * b}", f"{a * b} + {c} = {a * b + c}"), a * b + c


def friends(a: int, b: int, c: int) -> tuple[str, tuple[str, str], int]:
    question = (
        "{name} has {a} {things}, Kim has {b} more than {name}, and Lee has {c} more than Kim. "
        "How many {things} does Lee have?"
    )
    return question, (f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"), a + b + c


KINDS: tuple[Callable[[int, int, int], tuple[str, tuple[str, str], int]], ...] = (
    bags, boxes, days, shop, times, friends,
)  # fmt: skip


def word_problems(n: int, seed: int) -> list[tuple[Problem, str]]:
    """n (problem, reasoning) pairs; no two are of one kind with the same numbers. Answers are 1 or more."""
    cases = [(kind, a, b, c) for kind in KINDS for a in OPERANDS for b in OPERANDS for c in OPERANDS]
    cases = [case for case in cases if case[0](*case[1:])[2] > 0]
    rng = random.Random(derive_seed(seed, "word_problems"))
    rng.shuffle(cases)
    pairs = []
    for kind, a, b, c in cases[:n]:
        question, steps, answer = kind(a, b, c)
        text = question.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b, c=c)
        pairs.append((Problem(text, str(answer)), "\n".join([*steps, f"#### {answer}"])))
    return pairs


def demonstrations(pairs: Sequence[tuple[Problem, str]], model: str) -> list[dict[str, str]]:
    """Rows for train_sft.py: the prompts as training will see them, in the model's chat template."""
    from utils.algorithm.policy import load_tokenizer

    problems = [problem for problem, _ in pairs]
    prompts, _ = build_prompts(
        problems, load_template(TEMPLATE), load(load_tokenizer, model), MOST_TOKENS, use_chat_template=True
    )
    return [
        {"prompt": prompt.text, "response": reasoning} for prompt, (_, reasoning) in zip(prompts, pairs, strict=True)
    ]


def make(options: argparse.Namespace) -> None:
    """Build the folder, unless it exists; a folder of that name is always whole."""
    output = Path(options.output)
    if is_there(output, recipe(options), options.force):
        print(f"{output} is already there; --force makes it again")
        return
    if not (Path(options.model) / "config.json").is_file():
        raise ValueError(f"--model {options.model}: no config.json there; make smollm2 makes data/smollm2/model")
    for name, most in (("demonstrations", options.training), ("training", 2000), ("validation", 500)):
        if not 1 <= getattr(options, name) <= most:
            raise ValueError(f"--{name} {getattr(options, name)} should be from 1 to {most}")
    pairs = word_problems(options.training + options.validation, options.seed)
    training, validation = pairs[: options.training], pairs[options.training :]
    rows = demonstrations(training[: options.demonstrations], options.model)
    with whole_folder(output) as unfinished:
        save_problems(unfinished / "train.jsonl", [problem for problem, _ in training])
        save_problems(unfinished / "validation.jsonl", [problem for problem, _ in validation])
        (unfinished / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (unfinished / OPTIONS_FILE).write_text(json.dumps(recipe(options), indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
    sizes = f"{len(training)} training and {len(validation)} validation problems, {len(rows)} demonstrations"
    print(f"wrote {output}: {sizes}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", default="data/word_problems", help="folder to write (data/word_problems)")
    add("--model", default="data/smollm2/model", help="checkpoint with the chat template (data/smollm2/model)")
    add("--seed", type=int, default=1337, help="seed of the problems (1337)")
    add("--training", type=int, default=1000, help="training problems (1000)")
    add("--validation", type=int, default=96, help="validation problems (96)")
    add("--demonstrations", type=int, default=64, help="training problems with their reasoning (64)")
    add("--force", action="store_true", help="replace what an earlier call made")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), make))
