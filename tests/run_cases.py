"""Training runs in processes of their own that tests disturb, and how two runs are compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked import write_to
from safetensors.torch import load_file

import train_grpo
from utils import tiny
from utils.run.checkpoint import OPTIMIZER_FILE, STATE_FILE

N_STEPS = 6
PROBLEMS = [{"problem": f"{i}", "answer": str(1 + i % 2)} for i in range(20)]


def make_world(folder: Path) -> None:
    """Data, a template, and a model that has learned the format and guesses the answer: 1 or 2."""
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    for name in ("train", "validation"):  # the same answer to every problem: something to learn in a few steps
        rows = [{"problem": f"{i}", "answer": "1"} for i in range(10)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt").write_text("{question}<think>")
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model(0, n_layers=1)
    texts = [f"{i}<think></think> <answer>{answer}</answer>" for i in range(10) for answer in (1, 2)]
    ids = torch.tensor([tokenizer(text).input_ids for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


# Two epochs of two minibatches of two microbatches: eight microbatches and four optimizer steps per GRPO step.
OPTIONS = f"""
training.device=cpu training.dtype=float32 training.rollout_engine=transformers training.use_bnb_adamw8bit=false
training.use_gradient_checkpointing=false training.use_vllm_sleep_mode=false training.try_longest_microbatch=false
training.learning_rate=3e-4 training.n_grpo_steps={N_STEPS} training.rollout_batch_size=16 training.group_size=4
training.train_batch_size=8 training.gradient_accumulation_steps=2 training.epochs_per_rollout_batch=2
training.skip_zero_advantage=false training.max_tokens=16 training.eval_interval=2 training.checkpoint_interval=1
training.max_val_examples=8 training.n_rollouts_to_log=3 grader.workers=1 vllm.dtype=float32
""".split()


def arguments(world: Path, output_dir: Path, *overrides: str) -> list[str]:
    """What the command is given: every step is saved, every second one evaluated."""
    return [
        f"paths.train_data_file={world}/problems.jsonl",
        f"paths.val_data_file={world}/problems.jsonl",
        f"paths.prompt_template_file={world}/prompt",
        f"paths.model_path={world}/model",
        f"paths.output_dir={output_dir}",
        *OPTIONS,
        *overrides,
    ]


def launch(options: list[str], before: Callable[[], None] | None = None) -> multiprocessing.Process:
    """Start training in a process of its own, forked so that nothing is imported again; it writes to <output>.txt."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(options, before))
    process.start()
    return process


def _train(options: list[str], before: Callable[[], None] | None) -> None:
    os.setsid()
    torch.set_num_threads(1)
    with printed_file(output_of(options)).open("a") as file:
        write_to(file, file)
    if before is not None:
        before()
    sys.exit(int(train_grpo.main(options)))


def output_of(options: list[str]) -> Path:
    return next(Path(option.split("=")[1]) for option in reversed(options) if option.startswith("paths.output_dir="))


def printed_file(output: Path) -> Path:
    return output.with_name(output.name + ".txt")


def finish(options: list[str], before: Callable[[], None] | None = None) -> int:
    """Train to the end; the exit status."""
    process = launch(options, before)
    process.join()
    return process.exitcode


def wait_for(process: multiprocessing.Process, happened: Callable[[], bool]) -> None:
    """Wait until something has happened, or the process has ended."""
    while process.is_alive() and not happened():
        time.sleep(0.002)


def rows_of(path: Path) -> list[dict]:
    """The whole lines of a file, which a process may be writing at this moment."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics_of(output: Path) -> list[dict]:
    """The rows of metrics.jsonl without what measures time or memory."""
    timed = ("time", "train/tokens_per_second")
    return [
        {k: v for k, v in row.items() if k not in timed and not k.endswith("_dt") and "memory" not in k}
        for row in rows_of(output / "metrics.jsonl")
    ]


def trained_steps(output: Path) -> list[int]:
    return [row["grpo_step"] for row in rows_of(output / "metrics.jsonl") if "grpo_step" in row]


def differing_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many bits of two tensors of the same shape differ."""
    changed = a.contiguous().view(torch.uint8).bitwise_xor(b.contiguous().view(torch.uint8))
    return sum(int(count) * bin(byte).count("1") for byte, count in enumerate(torch.bincount(changed.flatten())))


def assert_equal_runs(output: Path, reference: Path, but_for: str = "time") -> None:
    """Weights, optimizer, state, metrics and rollouts of two runs are the same, but for times and metrics `but_for`."""
    ends = [folder / "checkpoints" / "last" for folder in (output, reference)]
    weights, expected = (load_file(weights_file(end)) for end in ends)
    assert weights.keys() == expected.keys()
    assert sum(differing_bits(weights[name], expected[name]) for name in expected) == 0
    adam, expected_adam = (torch.load(end / OPTIMIZER_FILE, weights_only=True) for end in ends)
    assert is_same(adam["state"], expected_adam["state"])
    state, expected_state = (json.loads((end / STATE_FILE).read_text()) for end in ends)
    assert state == expected_state
    metrics, expected_metrics = (
        [{k: v for k, v in row.items() if but_for not in k} for row in metrics_of(folder)]
        for folder in (output, reference)
    )
    assert metrics == expected_metrics
    assert rows_of(output / "rollouts.jsonl") == rows_of(reference / "rollouts.jsonl")
    assert links_of(output) == links_of(reference)


def is_same(one: Any, other: Any) -> bool:
    """Whether two states of optimizers, nested dicts of tensors and numbers, are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def weights_file(checkpoint: Path) -> Path:
    """The one file that holds what was trained: all weights, or an adapter."""
    (path,) = checkpoint.glob("*.safetensors")
    return path


def links_of(output: Path) -> dict[str, str]:
    """The links `best` (where there is one) and `last`."""
    return {path.name: str(path.readlink()) for path in (output / "checkpoints").iterdir() if path.is_symlink()}
