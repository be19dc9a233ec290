"""Supervised fine-tuning (SFT): teach a causal language model to give the responses of a JSONL file.

Each row holds two texts, `prompt` (complete, as the model will see it) and `response`; the end token is added to every
response. The loss is the negative log-likelihood of the response tokens, averaged over the whole batch; prompts are
read, not learnt.

    python play-scripts/train_sft.py --model data/tiny/model --data data/tiny/demonstrations.jsonl \\
        --output runs/sft --steps 200 --batch-size 128 --learning-rate 1e-3 --save-at 50 100

writes runs/sft/step_50, runs/sft/step_100 and runs/sft/final, each an ordinary checkpoint with its tokenizer that
GRPO can start from (`paths.model_path=runs/sft/step_50`), beside options.json and metrics.jsonl. With --lora-rank an
adapter is trained in place of the weights, and the checkpoints are adapters; --model may itself be one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from configs.defaults import Training
from utils.adapter_files import is_in_4bit, other_adapter
from utils.log.files import METRICS_FILE, encode_row, whole_folder
from utils.log.output import unwritable
from utils.log.progress import ProgressBar
from utils.preflight.adapter_checks import unusable_base
from utils.preflight.hub import unavailable
from utils.preflight.machine import has_gpu
from utils.preflight.model_files import is_local
from utils.preflight.obstacles import refuse
from utils.problems import load_demonstrations
from utils.run.ending import Status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = TypeVar("Loaded")
SCHEDULES = ("constant", "linear", "cosine")
TARGETS = ("all-linear", "attention")


def with_progress(steps: Iterator[dict], n_steps: int, print_every: int) -> Iterator[dict]:
    """Pass the steps on, with a progress bar, and a line per `print_every` steps."""
    with ProgressBar("SFT", n_steps) as bar:
        for metrics in steps:
            bar.advance()
            if metrics["step"] % print_every == 0 or metrics["step"] == n_steps:
                bar.line(
                    f"step {metrics['step']}/{n_steps}  loss {metrics['loss']:.4f} nats/token  "
                    f"grad norm {metrics['grad_norm']:.3g}  learning rate {metrics['learning_rate']:.3g}"
                )
            yield metrics


def save_checkpoint(folder: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A checkpoint that `load_policy` loads; a folder of this name is always whole."""
    from utils.algorithm.policy import save_policy

    with whole_folder(folder) as unfinished:
        save_policy(policy, unfinished)
        tokenizer.save_pretrained(unfinished)


def run(options: argparse.Namespace) -> None:
    """What the command line asks for. Raises ValueError for a user's mistake."""
    output = Path(options.output)
    check_options(options, output)
    training = training_of(options)
    refuse(
        as_options(reason)
        for reason in (*unusable_base(options.model), other_adapter(options.model, training))
        if reason
    )
    from utils.algorithm import sft
    from utils.algorithm.policy import load_policy, load_tokenizer

    tokenizer = load(load_tokenizer, options.model)
    demonstrations, n_left_out = load_demonstrations(options.data, tokenizer, options.max_tokens)
    if options.epochs is not None:
        options.steps = math.ceil(options.epochs * len(demonstrations) / options.batch_size)
    check_save_at(options)
    print(
        f"{len(demonstrations)} demonstrations ({n_left_out} longer than {options.max_tokens} tokens left out), "
        f"{options.steps} steps, {options.steps * options.batch_size / len(demonstrations):.2f} epochs"
    )
    policy = load(load_policy, options.model, training)
    output.mkdir(parents=True, exist_ok=True)
    (output / "options.json").write_text(json.dumps(vars(options), indent=2) + "\n")
    steps = sft.train(policy, demonstrations, training, options.steps, options.schedule, options.warmup_steps)
    with (output / METRICS_FILE).open("w") as metrics_file:
        for row in with_progress(steps, options.steps, print_every=max(1, options.steps // 20)):
            metrics_file.write(encode_row(row) + "\n")
            if row["step"] in options.save_at:
                save_checkpoint(output / f"step_{row['step']}", policy, tokenizer)
    save_checkpoint(output / "final", policy, tokenizer)
    print(f"wrote {', '.join(str(output / name) for name in [*(f'step_{n}' for n in options.save_at), 'final'])}")


def training_of(options: argparse.Namespace) -> Training:
    """The config's fields that the command line sets; an adapter's base is in 4 bits where it was trained so."""
    return Training(
        seed=options.seed,
        device=options.device or default_device(),
        dtype=options.dtype,
        train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        max_grad_norm=options.max_grad_norm,
        use_gradient_checkpointing=options.use_gradient_checkpointing,
        use_bnb_adamw8bit=False,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_target=options.lora_target,
        load_in_4bit=is_in_4bit(options.model),
    )


def load(loader: Callable[..., Loaded], model: str, *arguments: object) -> Loaded:
    """Load --model by a loader of `algorithm/policy.py`; its ValueErrors name the option in place of a config field."""
    try:
        return loader(model, *arguments)
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error


def as_options(line: str) -> str:
    """A complaint about a config's fields, with this program's options in their place."""
    return re.sub(r"training\.lora_(\w+)(?: =)?", r"--lora-\1", line.replace("paths.model_path = ", "--model "))


def check_options(options: argparse.Namespace, output: Path) -> None:
    """Raise ValueError for options that can't be, with what would be right."""
    reason = unwritable(output, is_new=True)
    if reason is not None:
        raise ValueError(f"--output {output}: {reason}")
    if is_local(options.model) and not (Path(options.model) / "config.json").is_file():
        raise ValueError(f"--model {options.model}: no config.json there; give a checkpoint folder or a hub name")
    if not is_local(options.model) and (reason := unavailable(options.model)) is not None:
        raise ValueError(f"--model {options.model}: {reason}")
    check_device(options.device)
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "max_tokens", "lora_rank", "lora_alpha"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} should be 1 or more")
    for name in ("epochs", "learning_rate", "max_grad_norm"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} should be above 0")
    if options.batch_size % options.gradient_accumulation_steps:
        raise ValueError(
            f"--batch-size {options.batch_size} does not divide into "
            f"--gradient-accumulation-steps {options.gradient_accumulation_steps} equal microbatches"
        )


def check_save_at(options: argparse.Namespace) -> None:
    """Raise ValueError for a --save-at step that is not one of the run's; their number may depend on the data."""
    for step in options.save_at:
        if not 1 <= step <= options.steps:
            raise ValueError(f"--save-at {step} is not one of the {options.steps} steps")


def check_device(device: str | None) -> None:
    """Raise ValueError for a --device that torch does not know, or that is not here."""
    if device is not None and re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ValueError(f"--device {device}: must be cpu, cuda, or cuda:N")
    if device not in (None, "cpu") and not has_gpu():
        raise ValueError(f"--device {device}: no NVIDIA GPU here; give cpu")


def default_device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder, or a model's name on the Hugging Face hub")
    add("--data", required=True, help="demonstrations: JSONL with `prompt` and `response`")
    add("--output", required=True, help="folder to write; one that already holds something is refused")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps, the last of which is saved as `final`")
    length.add_argument("--epochs", type=float, help="passes over the demonstrations, rounded up to whole steps")
    add("--save-at", type=int, nargs="+", default=[], metavar="STEP", help="also save after these steps")
    add("--batch-size", type=int, default=64, help="demonstrations per optimizer step (64)")
    add("--gradient-accumulation-steps", type=int, default=1, help="microbatches per step; more take less memory (1)")
    add("--learning-rate", type=float, default=1e-5, help="AdamW's learning rate, at its highest (1e-5)")
    add("--schedule", choices=SCHEDULES, default="constant", help="the learning rate after its warm-up (constant)")
    add("--warmup-steps", type=int, default=0, help="steps in which the learning rate rises from 0 (0)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the total gradient norm to this (1.0)")
    add("--max-tokens", type=int, default=2048, help="leave out, and count, longer demonstrations (2048)")
    add("--seed", type=int, default=1337, help="seed of the order of the demonstrations (1337)")
    add("--device", help="cuda:0, cpu, ...; without it the first GPU, or the CPU if there is no GPU")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of weights and optimizer (float32)")
    add("--lora-rank", type=int, help="train a LoRA adapter of this rank in place of the weights")
    add("--lora-alpha", type=int, default=32, help="an adapted weight is W + lora-alpha / lora-rank x B A (32)")
    add("--lora-target", choices=TARGETS, default="all-linear", help="which matrices get an adapter (all-linear)")
    add("--use-gradient-checkpointing", action="store_true", help="recompute activations, which saves memory")
    return parser


def run_command(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> Status:
    """Do what the command line asks for; a user's mistake is one line and its own exit status."""
    try:
        command(parser.parse_args())
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return Status.USER_MISTAKE
    return Status.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
