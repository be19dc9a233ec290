"""One measurement of TRL's GRPOTrainer for bench/step.py, in a process of its own, as one line of JSON.

`bench/step.py` starts this file where `trl` is installed; its options are described there. The model, prompts, lengths,
batch sizes, optimizer and drawn rewards are those of our step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from common import TRL_OUR_KERNELS, Clock
from options import ROOT, parse_arguments, resolve_config
from step_ours import draw_rewards, prompt_texts
from transformers import AutoModelForCausalLM, TrainerCallback

from configs.defaults import Config
from utils.algorithm.policy import choose_cpu_products, load_tokenizer
from utils.run.memory_tracker import MemoryTracker

if TYPE_CHECKING:
    from trl import GRPOConfig


class Laps(TrainerCallback):
    """A lap is from one step's end to the next one's, generation included; the first step warms up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.memory, self.clock = device, MemoryTracker(device), None

    def on_step_end(self, *_args: Any, **_options: Any) -> None:
        if self.clock is None:
            self.memory.mark("warm-up")
            self.clock = Clock(self.device)
        else:
            self.clock.lap()


def same_settings(args: argparse.Namespace, config: Config) -> GRPOConfig:
    """TRL's names for what our config says."""
    from trl import GRPOConfig

    t = config.training
    return GRPOConfig(
        output_dir=str(ROOT / "runs" / "bench" / "trl"),
        use_cpu=t.device == "cpu",
        bf16=t.dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=args.steps + 1,
        per_device_train_batch_size=t.microbatch_size,
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


def measure(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Time `args.steps` steps after a first one; the reward function costs nothing."""
    from datasets import Dataset
    from trl import GRPOTrainer

    t = config.training
    laps = Laps(torch.device(t.device))

    def reward(completions: list[str], **_options: Any) -> list[float]:
        return draw_rewards(len(completions), t.group_size, args.reward, step=int(laps.clock is not None))

    kernels = {}
    if args.variant == TRL_OUR_KERNELS:
        kernels["attn_implementation"] = t.attention_type
        choose_cpu_products(t.use_onednn)
    model = AutoModelForCausalLM.from_pretrained(
        config.paths.model_path, trust_remote_code=False, dtype=getattr(torch, t.dtype), **kernels
    )
    prompts = Dataset.from_list([{"prompt": text} for text in prompt_texts(config, args.model)])
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=same_settings(args, config),
        train_dataset=prompts,
        processing_class=load_tokenizer(config.paths.model_path),
        callbacks=[laps],
    )
    trainer.train()
    metrics = trainer.state.log_history[0]
    return {
        **laps.clock.laps(),
        "peak_bytes": laps.memory.mark("step"),
        "phases": {},
        "metrics": {name: metrics[name] for name in ("completions/mean_length", "frac_reward_zero_std", "reward")},
    }


def main() -> None:
    args = parse_arguments()
    if importlib.util.find_spec("trl") is None:
        sys.exit("bench/step_trl.py needs TRL: pip install trl")
    print("\n" + json.dumps(measure(args, resolve_config(args))))


if __name__ == "__main__":
    main()
