"""How far vLLM's log-probs are from the trainer's, by the dtype that both compute in and by whose head is in float32.

    python play-scripts/bench/sampler_gap.py --config configs/quickstart.yaml --output results/precision

The config's model samples responses to its validation prompts, once per dtype and head of the engine. The trainer then
computes the log-probs of the same tokens with either head. In bfloat16 the trainer's weights have that dtype too;
float16 is computed over float32 weights. Tokens before min_tokens are left out. Needs vLLM.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # vLLM's threads spin
import torch
from common import hardware

from configs.defaults import Config
from utils.algorithm.batch import make_train_batch
from utils.algorithm.log_probs import response_log_probs
from utils.algorithm.policy import load_policy, load_tokenizer
from utils.engines import build_engine
from utils.engines.transformers_engine import sampling_mode
from utils.preflight.config import load_config
from utils.records import Prompt, Rollout
from utils.run.build import load_prompts

WAYS = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float32", "autocast_dtype": "float16"},
    "float32": {"dtype": "float32"},
}
SIDES = {(None, None): "neither", ("float32", None): "engine", (None, "float32"): "trainer"}


def measure(base: Config, prompts: list[Prompt], n: int) -> Iterator[dict[str, Any]]:
    """A row per dtype and pair of heads; in float32 there is one head alone."""
    tokenizer = load_tokenizer(base.paths.model_path)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    for name, settings in WAYS.items():
        for engine_head in (None, "float32") if name != "float32" else (None,):
            config = copy.deepcopy(base)
            config.training.rollout_engine, config.vllm.dtype = "vllm", name
            for field, value in {**settings, "head_dtype": engine_head}.items():
                setattr(config.training, field, value)
            policy = load_policy(config.paths.model_path, config.training)
            engine = build_engine(config, policy, tokenizer, longest_prompt=longest)
            rollouts = engine.generate(prompts, n=n, seed=config.training.seed)
            engine.close()
            for trainer_head in (None, "float32") if name != "float32" else (None,):
                sides = SIDES.get((engine_head, trainer_head), "both")
                yield {"dtype": name, "head in float32": sides, **gap(policy, rollouts, config, trainer_head)}


def gap(policy: torch.nn.Module, rollouts: list[Rollout], config: Config, head_dtype: str | None) -> dict[str, float]:
    """Differences of log-probs, trainer's less engine's, over the tokens of all rollouts."""
    found, t = [], config.training
    for start in range(0, len(rollouts), 64):
        piece = rollouts[start : start + 64]
        batch = make_train_batch(piece, torch.zeros(len(piece)), torch.zeros(len(piece)))
        mask = batch.response_mask & (batch.response_mask.cumsum(-1) > t.min_tokens)
        with sampling_mode(policy, t.autocast_dtype):
            log_probs, _ = response_log_probs(policy, batch.input_ids, batch.response_mask, head_dtype=head_dtype)
        found.append((log_probs - batch.sampler_log_probs)[mask].double())
    difference = torch.cat(found)
    return {
        "rms": difference.square().mean().sqrt().item(),
        "mean": difference.abs().mean().item(),
        "largest": difference.abs().max().item(),
        "kl": (difference.expm1() - difference).mean().item(),
        "tokens": len(difference),
    }


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The rows as a table, in Markdown."""
    lines = [
        "# Engine and trainer, by dtype and head",
        "",
        "Log-probs of sampled tokens, trainer's less engine's, in nats, and KL(engine || trainer) per token.",
        "",
        "| dtype | head in float32 | RMS | mean | largest | KL | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[name]:.2g}" for name in ("rms", "mean", "largest", "kl"))
        lines.append(f"| {row['dtype']} | {row['head in float32']} | {figures} | {row['tokens']:,} |")
    return "\n".join([*lines, "", f"On {hardware('cpu')}, by", "", f"```bash\n{command}\n```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/quickstart.yaml", help="whose model and prompts (the quickstart's)"
    )
    parser.add_argument("--prompts", type=int, default=128, help="how many prompts (128)")
    parser.add_argument("--n", type=int, default=8, help="responses per prompt (8)")
    parser.add_argument("--output", default="results/precision", help="folder to write (results/precision)")
    args = parser.parse_args()
    config = load_config([args.config])
    prompts, _ = load_prompts(config, config.paths.val_data_file, load_tokenizer(config.paths.model_path))
    rows = list(measure(config, prompts[: args.prompts], args.n))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sampler_gap.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    sizes = f"--prompts {args.prompts} --n {args.n}"
    text = page(rows, f"python play-scripts/bench/sampler_gap.py --config {args.config} {sizes}")
    (folder / "sampler_gap.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
