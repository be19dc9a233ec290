"""Rollout tokens per second of both engines, and on CUDA what pushing weights and sleeping take.

    python play-scripts/bench/engines.py --sequences 64 256
    python play-scripts/bench/engines.py --shape qwen2.5-1.5b --device cuda:0 --dtype bfloat16 --new-tokens 512

The model is randomly initialised and every response has the same length, so that engines do the same work. Writes
throughput.csv and, with the hardware and the command, throughput.md into --output.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from common import SHAPES, hardware
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from configs.defaults import Config
from utils.engines import build_engine, installed_vllm
from utils.records import Problem, Prompt, RolloutEngine
from utils.tiny import build_model, build_tokenizer

GROUP_SIZE = 8
REPEATS = 5


def main() -> None:
    arguments = parse_arguments()
    config = config_of(arguments)
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        config.paths.model_path = folder
        policy, tokenizer = random_policy(arguments.shape, config)
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in arguments.engines:
            config.training.rollout_engine = name
            for level in (1, 2) if name == "vllm" and policy.device.type == "cuda" else (2,):
                config.vllm.sleep_level = level
                engine = build_engine(config, policy, tokenizer, arguments.prompt_tokens)
                figures = push_and_sleep(engine, policy, level)
                for count in arguments.sequences:
                    rows.append(row_of(engine, arguments, count) | figures)
                    print(rows[-1], flush=True)
                engine.close()
    write(rows, load, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, both = parser.add_argument, ["transformers", "vllm"]
    add("--sequences", type=int, nargs="+", default=[64, 256], help="sequences a call (64 256)")
    add("--engines", nargs="+", default=both, choices=both, help="engines to measure (both)")
    add("--shape", default="tiny", choices=["tiny", "qwen2.5-1.5b"], help="shape of the model (tiny)")
    add("--device", default="cpu", help="cpu or cuda:0 (cpu)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of model and engine (float32)")
    add("--prompt-tokens", type=int, default=48, help="tokens per prompt (48)")
    add("--new-tokens", type=int, default=64, help="tokens per response (64)")
    add("--batch-size", type=int, default=256, help="sequences that transformers samples at once (256)")
    add("--gpu-memory-utilization", type=float, default=0.4, help="share of the GPU for vLLM (0.4)")
    add("--output", type=Path, default=Path("runs/bench/engines"), help="folder to write (runs/bench/engines)")
    arguments = parser.parse_args()
    counts = {"--prompt-tokens": arguments.prompt_tokens, "--new-tokens": arguments.new_tokens}
    counts |= {"--batch-size": arguments.batch_size, "--sequences": min(arguments.sequences)}
    for option, count in counts.items():
        if count < 1:
            parser.error(f"{option} {count}: at least 1")
    if wrong := [count for count in arguments.sequences if count % GROUP_SIZE]:
        parser.error(f"--sequences {wrong[0]} is not a multiple of the group size {GROUP_SIZE}")
    return arguments


def config_of(arguments: argparse.Namespace) -> Config:
    config = Config()
    training = config.training
    training.device, training.dtype, config.vllm.dtype = arguments.device, arguments.dtype, arguments.dtype
    training.min_tokens = training.max_tokens = arguments.new_tokens  # so that no response ends early
    training.stop = []
    training.generation_batch_size = arguments.batch_size
    training.use_vllm_sleep_mode = arguments.device != "cpu"
    config.vllm.gpu_memory_utilization = arguments.gpu_memory_utilization
    return config


def random_policy(shape: str, config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of this shape and a tokenizer for it, whose vocabulary is filled up to the shape's size."""
    dtype = getattr(torch, config.training.dtype)
    if shape == "tiny":
        return build_model(seed=0).to(config.training.device, dtype), build_tokenizer()
    n_ids = SHAPES[shape]["vocab_size"]
    vocabulary = {token: i for token, i in build_tokenizer().get_vocab().items() if len(token) == 1}
    letters = sorted(vocabulary) + [f"filler{i}" for i in range(n_ids - len(vocabulary) - 2)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(letters)}, merges=[], eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    model_config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(config.training.device):
        return Qwen2ForCausalLM(model_config).to(dtype), tokenizer


def push_and_sleep(engine: RolloutEngine, policy: PreTrainedModel, level: int) -> dict[str, float]:
    """The second push of an engine, whose first warms up, after a sleep where there is one."""
    engine.update_weights(policy)
    slept = engine.sleep()
    pushed = engine.update_weights(policy)
    figures = {name: round(value, 4) for name, value in (slept | pushed).items()}
    return figures | ({"sleep_level": level} if slept else {})


def row_of(engine: RolloutEngine, arguments: argparse.Namespace, count: int) -> dict[str, object]:
    """Seconds of the fastest of a few calls after one to warm up: what else the machine does only ever slows it."""
    prompts = [
        Prompt(Problem("", "0"), "", tuple((7 * i + 11 * j) % 200 for j in range(arguments.prompt_tokens)))
        for i in range(count // GROUP_SIZE)
    ]
    seconds = []
    for k in range(1 + REPEATS):
        start = time.perf_counter()
        rollouts = engine.generate(prompts, n=GROUP_SIZE, seed=k)
        seconds.append(time.perf_counter() - start)
    assert all(len(rollout.response_ids) == arguments.new_tokens for rollout in rollouts)
    fastest = min(seconds[1:])
    return {
        "engine": engine.name,
        "sequences": count,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "seconds": round(fastest, 3),
        "tokens_per_second": round(count * arguments.new_tokens / fastest),
    }


def write(rows: list[dict[str, object]], load: float, arguments: argparse.Namespace) -> None:
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (output / "throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    versions = ", ".join(f"{p} {version(p)}" for p in ("transformers", installed_vllm()) if p)
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    table += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    text = f"Hardware: {hardware(arguments.device)}; load average before the run: {load:.1f}. Versions: {versions}.\n"
    text += f"Groups of {GROUP_SIZE}, fastest of {REPEATS} calls.\n\n"
    text += f"    python {' '.join(sys.argv)}\n\n" + "\n".join(table) + "\n"
    (output / "throughput.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
