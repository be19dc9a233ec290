"""One stage of bench/gpu_report.py in a process of its own; its last line is the stage's figures as JSON.

    python play-scripts/bench/gpu_stages.py STAGE FOLDER STEPS -- <options of train_grpo.py>

`run` is no stage: it is train_grpo.py with drawn rewards and response lengths, which the stages start.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import hardware, wait_for
from gpu_world import config_of, response_length

import train_grpo
from configs.defaults import Config
from utils.algorithm.advantages import compute_advantages
from utils.algorithm.batch import TrainBatch, make_train_batch, microbatches
from utils.algorithm.policy import build_optimizer, load_policy, load_tokenizer
from utils.engines import build_engine
from utils.preflight.machine import this_card
from utils.preflight.memory_estimate import count_parameters, estimate_peak_memory
from utils.preflight.model_files import model_config
from utils.records import Problem, Prompt, Reward, Rollout
from utils.rewards.functions import RewardScorer
from utils.run.build import load_prompts
from utils.run.engine_check import EngineOutOfStep, compare_log_probs
from utils.run.memory_tracker import MemoryTracker
from utils.run.trial import try_longest_microbatch

N_PUSHES = 20
PATIENCE = 1800  # seconds that a run may take


def update(config: Config, steps: int) -> dict[str, Any]:
    """The inner loop alone, on random rollouts: seconds, FLOPs, tokens, and peak memory beside estimate and trial."""
    t, device = config.training, torch.device(config.training.device)
    policy, memory = load_policy(config.paths.model_path, t), MemoryTracker(config.training.device)
    longest_prompt = 20 if t.max_tokens < 100 else 300
    memory.start()
    try_longest_microbatch(policy, t, longest_prompt)
    peaks, seconds = {"trial": memory.mark("trial")}, []
    optimizer = build_optimizer(policy, t)
    for step in range(steps + 1):  # the first warms up
        batch = random_batch(config, longest_prompt, step, policy.config.vocab_size)
        memory.start()
        wait_for(device)
        started = time.perf_counter()
        train_grpo.update_policy(policy, optimizer, batch, t, step)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    peaks["update"] = memory.mark("update")
    sizes, rows = model_config(config.paths.model_path), torch.arange(len(batch.rewards))
    pieces = list(microbatches(policy, batch, rows, t))
    packed = sum(len(piece.packing.token_ids) for piece in pieces if piece.packing is not None)
    padded = sum(piece.input_ids.numel() for piece in pieces)
    longest = longest_prompt + t.max_tokens
    on_gpu = device.type == "cuda"
    estimate = estimate_peak_memory(sizes, config, longest, this_card().total if on_gpu else None, uses_vllm=False)
    tensors = estimate["training_peak"] - estimate["allowance"]
    flops = {name: model_flops(sizes, batch, n) for name, n in {"packed": packed, "padded": padded}.items()}
    return {
        "seconds_per_update": fmean(seconds[1:]),
        "microbatches": len(pieces),
        "tokens": {"packed": packed, "padded": padded, "real": int(batch.sequence_lengths.sum())},
        "tflops_per_second": {name: each / fmean(seconds[1:]) / 1e12 for name, each in flops.items()},
        "peak_gb": {name: peak / 1e9 for name, peak in peaks.items()} | {"estimate of tensors": tensors / 1e9},
    }


def random_batch(config: Config, longest_prompt: int, step: int, n_ids: int) -> TrainBatch:
    """Random ids of lengths drawn like the published ones, half of the rewards 1."""
    t, rng, rollouts = config.training, random.Random(step), []
    for i in range(t.rollout_batch_size // t.group_size):
        ids = tuple(rng.choices(range(n_ids), k=rng.randint(longest_prompt // 3, longest_prompt)))
        prompt = Prompt(Problem("", "0"), "", ids)
        for j in range(t.group_size):
            n = response_length(t.max_tokens, step, i, j)
            rollouts.append(Rollout(prompt, "", tuple(rng.choices(range(n_ids), k=n)), (-1.0,) * n, "stop"))
    rewards = torch.tensor([float(i % 2) for i in range(len(rollouts))])
    return make_train_batch(rollouts, rewards, compute_advantages(rewards, t), pad_id=0)


def model_flops(sizes: dict[str, Any], batch: TrainBatch, n_tokens: int) -> float:
    """Forward and backward, without what checkpointing computes again: six per weight and token, and attention."""
    head = 6 * sizes["vocab_size"] * sizes["hidden_size"] * int(batch.response_mask.sum())
    squares = batch.sequence_lengths.double().square().sum().item()
    attention = 6 * sizes["num_hidden_layers"] * sizes["hidden_size"] * squares
    return 6 * count_parameters(sizes)["layers"] * n_tokens + head + attention


def train(folder: Path, options: list[str], steps: int) -> dict[str, Any]:
    """GRPO steps as train_grpo.py takes them, an evaluation and saves: the means of a step's figures."""
    finish(start_run([*options, f"training.n_grpo_steps={steps}", "training.eval_interval=1000"]))
    rows = read_rows(folder)
    trained = [row for row in rows if "train/step_dt" in row]
    warm = trained[1:] or trained
    names = [name for name in warm[-1] if name.endswith(("_dt", "_gb", "tokens_per_second", "_diff"))]
    figures = {name.removeprefix("train/"): fmean(row.get(name, 0.0) for row in warm) for name in names}
    evaluated = [row["train/eval_dt"] for row in rows if "train/eval_dt" in row]
    return {"steps": len(trained), "means": figures, "evaluation_seconds": evaluated}


def resume(folder: Path, options: list[str], steps: int) -> dict[str, Any]:
    """A run that goes on is killed in the middle of a step, and goes on again from its last checkpoint."""
    options = [*options, f"training.n_grpo_steps={steps + 3}", "--resume"]
    process, before = start_run(options), len(read_rows(folder))
    deadline = time.monotonic() + PATIENCE
    while len(read_rows(folder)) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at_kill = [row["grpo_step"] for row in read_rows(folder) if "train/step_dt" in row][-1]
    finish(start_run(options))
    done = [row["grpo_step"] for row in read_rows(folder) if "train/step_dt" in row]
    assert done == list(range(1, steps + 4)), f"rows of steps {done}"
    return {"killed_after_step": at_kill, "steps_in_the_end": done[-1]}


def engine(config: Config) -> dict[str, Any]:
    """Generation beside bare vLLM on the same requests; pushes, and the sampler's log-probs against the trainer's."""
    t, tokenizer = config.training, load_tokenizer(config.paths.model_path)
    prompts, _ = load_prompts(config, config.paths.train_data_file, tokenizer)
    prompts, figures = prompts[: t.rollout_batch_size // t.group_size], {}
    policy = load_policy(config.paths.model_path, t)
    sampler = build_engine(config, policy, tokenizer, max(len(p.token_ids) for p in prompts))
    try:
        force_lengths(sampler, t.max_tokens)
        figures |= {"engine": sampler.name, "dtype": config.vllm.dtype}
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            rollouts = sampler.generate(prompts, n=t.group_size, seed=1)
            seconds = time.perf_counter() - started
        n_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        figures["tokens_per_second"] = n_tokens / seconds
        if sampler.name == "vllm":
            figures["bare_tokens_per_second"] = bare_throughput(sampler, prompts, t.group_size)
        figures |= pushes(sampler, policy, prompts, config)
    finally:
        sampler.close()
    return figures


def bare_throughput(sampler: Any, prompts: list[Prompt], n: int) -> float:
    """vLLM's own `generate` on the same requests, with nothing that training asks of it."""
    requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    params = [sampler._sampling_params(n, 1 + i * n, 1.0) for i in range(len(prompts))]
    for each in params:
        each.logprobs = each.seed = None
    started = time.perf_counter()
    outputs = sampler._llm.generate(requests, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return sum(len(choice.token_ids) for output in outputs for choice in output.outputs) / seconds


def pushes(sampler: Any, policy: torch.nn.Module, prompts: list[Prompt], config: Config) -> dict[str, Any]:
    """Sleep, a change of the weights, and a push, many times over: seconds, and the gap of log-probs after each."""
    seconds, gaps, out_of_step = [], [], []
    for k in range(N_PUSHES):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1 + 1e-3 * (-1) ** k)
        started = time.perf_counter()
        sampler.sleep()
        sampler.update_weights(policy)
        seconds.append(time.perf_counter() - started)
        rollouts = sampler.generate(prompts[:4], n=2, seed=k)
        try:
            gaps.append(compare_log_probs(sampler, policy, rollouts, config))
        except EngineOutOfStep as error:
            out_of_step.append(str(error))
    means, largest = ([gap[f"check_{name}_diff"] for gap in gaps] or [float("nan")] for name in ("mean", "max"))
    return {
        "pushes": len(seconds),
        "seconds_per_sleep_and_push": fmean(seconds),
        "gap_mean": fmean(means),
        "gap_max": max(largest),
        "out_of_step": out_of_step[:2],
    }


def force_lengths(sampler: Any, longest: int) -> None:
    """Have vLLM end each prompt's responses at a drawn length: a model with random weights ends none by itself."""
    if sampler.name != "vllm":
        return
    plain = sampler._sampling_params

    def forced(n: int, seed: int, temperature: float) -> Any:
        params = plain(n, seed, temperature)
        params.max_tokens = response_length(longest, seed)
        return params

    sampler._sampling_params = forced


def run(options: list[str]) -> int:
    """train_grpo.py with drawn rewards, and, by vLLM, drawn lengths."""
    from utils.run import build

    def drawn(_self: RewardScorer, rollouts: list[Rollout]) -> list[Reward]:
        return [Reward(1.0, float(i % 2), float(i % 2)) for i in range(len(rollouts))]

    plain: Callable[..., Any] = build.build_engine

    def build_engine_with_lengths(config: Config, *args: Any, **kwargs: Any) -> Any:
        built = plain(config, *args, **kwargs)
        force_lengths(built, config.training.max_tokens)
        return built

    RewardScorer.score, build.build_engine = drawn, build_engine_with_lengths
    return train_grpo.main(options)


def start_run(options: list[str]) -> subprocess.Popen:
    command = [sys.executable, __file__, "run", ".", "0", "--", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run. Raises RuntimeError with the end of what it printed if it failed."""
    printed, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise RuntimeError(f"train_grpo.py ended with status {process.returncode}:\n{printed[-3000:]}")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run/metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def main() -> None:
    stage, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    options = sys.argv[sys.argv.index("--") + 1 :]
    if stage == "run":
        sys.exit(run(options))
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": lambda: {"hardware": hardware(config_of(options).training.device)},
        "update": lambda: update(config_of(options), steps),
        "train": lambda: train(folder, options, steps),
        "resume": lambda: resume(folder, options, steps),
        "engine": lambda: engine(config_of(options)),
        "engine_float32": lambda: engine(config_of(options, "training.dtype=float32", "vllm.dtype=float32")),
    }
    print("\n" + json.dumps(stages[stage]()))


if __name__ == "__main__":
    main()
