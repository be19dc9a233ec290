"""One measurement of TRL's GRPOTrainer for bench_step.py, in a process of its own, as one line of JSON.

Needs `trl`. The model, prompts, lengths, batch sizes, optimizer and drawn rewards are those of our step.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from bench_worker import ROOT, Clock, draw_rewards, prompt_texts
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from configs.defaults import Config
from utils.memory import MemoryTracker
from utils.policy import load_tokenizer


def measure(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Time `args.steps` steps after a first one; the reward function costs nothing."""
    t = config.training
    device = torch.device(t.device)
    memory, clocks = MemoryTracker(device), []

    class Laps(TrainerCallback):
        """A lap is from one step's end to the next one's, generation included; the first step warms up."""

        def on_step_end(self, *_args: Any, **_options: Any) -> None:
            if clocks:
                clocks[0].lap()
            else:
                memory.mark("warm-up")
                clocks.append(Clock(device))

    def reward(completions: list[str], **_options: Any) -> list[float]:
        return draw_rewards(len(completions), t.group_size, args.reward, len(clocks))

    settings = GRPOConfig(
        output_dir=str(ROOT / "runs" / "bench" / "trl"),
        use_cpu=t.device == "cpu",
        bf16=t.dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=args.steps + 1,
        per_device_train_batch_size=t.train_batch_size // t.gradient_accumulation_steps,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        gradient_checkpointing=t.use_gradient_checkpointing,
        num_generations=t.group_size,
        max_completion_length=t.max_tokens,
        generation_kwargs={"min_new_tokens": t.max_tokens},
        temperature=t.temperature,
        loss_type="grpo",
        learning_rate=t.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch_fused",
        seed=t.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(config.paths.model_path, dtype=getattr(torch, t.dtype))
    prompts = Dataset.from_list([{"prompt": text} for text in prompt_texts(config)])
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=settings,
        train_dataset=prompts,
        processing_class=load_tokenizer(config.paths.model_path),
        callbacks=[Laps()],
    )
    trainer.train()
    metrics = trainer.state.log_history[0]
    return {
        **clocks[0].laps(),
        "peak_bytes": memory.mark("step"),
        "phases": {},
        "metrics": {name: metrics[name] for name in ("completions/mean_length", "frac_reward_zero_std", "reward")},
    }


def main() -> None:
    from bench_step import parse_arguments, resolve_config

    args = parse_arguments()
    print("\n" + json.dumps(measure(args, resolve_config(args))))


if __name__ == "__main__":
    main()
