"""Make a plain checkpoint of a LoRA adapter: its base with the adapter merged in, which any program loads.

    python play-scripts/merge_lora.py runs/lora/checkpoints/best --output runs/lora/merged

Each weight is W + lora_alpha / lora_rank x B A, summed in float32 and rounded once to --dtype. An adapter
of a base in 4 bits (`load_in_4bit`) is merged into what the 4 bits stand for, and that needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train_sft import check_device, default_device, run_command, save_checkpoint

from configs.defaults import Training
from utils.adapter_files import base_of, is_in_4bit, saved_adapter
from utils.log.output import unwritable
from utils.preflight.adapter_checks import unusable_base
from utils.preflight.model_files import model_config
from utils.preflight.obstacles import refuse

DTYPES = ("bfloat16", "float16", "float32")


def merge(options: argparse.Namespace) -> None:
    """Write the merged model. Raises ValueError for a user's mistake."""
    check_options(options)
    import torch
    from transformers import AutoModelForCausalLM

    from utils.algorithm.adapters import describe, plain_config
    from utils.algorithm.policy import full_weights, load_policy, load_tokenizer

    in_four_bits = is_in_4bit(options.checkpoint)
    device = options.device or (default_device() if in_four_bits else "cpu")
    if in_four_bits and not device.startswith("cuda"):
        raise ValueError(f"--device {device}: the adapter's base is kept in 4 bits, which needs a GPU: give cuda:0")
    base_dtype = dtype_of_base(options.checkpoint)
    dtype = options.dtype or base_dtype
    training = Training(
        device=device, dtype=base_dtype, load_in_4bit=in_four_bits, use_packing=False, use_gradient_checkpointing=False
    )
    policy = load_policy(options.checkpoint, training)
    print(describe(policy))
    wanted = getattr(torch, dtype)
    weights = {name: tensor.to("cpu", wanted) for name, tensor in full_weights(policy, wanted)}
    with torch.device("meta"):
        merged = AutoModelForCausalLM.from_config(plain_config(policy.config), dtype=wanted)
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    merged.generation_config = policy.generation_config
    save_checkpoint(Path(options.output), merged, load_tokenizer(options.checkpoint))
    print(f"wrote {options.output}: {base_of(options.checkpoint)} with the adapter merged in, {dtype}")


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that can't be, with what would be right."""
    reason = unwritable(Path(options.output), is_new=True)
    if reason is not None:
        raise ValueError(f"--output {options.output}: {reason}")
    if saved_adapter(options.checkpoint) is None:
        whole = (Path(options.checkpoint) / "config.json").is_file()
        raise ValueError(
            f"{options.checkpoint} is {'a whole model already' if whole else 'no checkpoint'}: it holds no "
            "adapter_config.json; give a checkpoint of a run with training.lora_rank"
        )
    check_device(options.device)
    refuse(unusable_base(options.checkpoint))


def dtype_of_base(checkpoint: str) -> str:
    """The dtype that the base was saved in."""
    sizes = model_config(checkpoint) or {}
    dtype = sizes.get("dtype") or sizes.get("torch_dtype")
    return dtype if dtype in DTYPES else "float32"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder of a run with an adapter")
    parser.add_argument("--output", required=True, help="folder to write; one that already holds something is refused")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights; without it the base's own")
    parser.add_argument("--device", help="to merge on; without it the CPU, or the GPU for a base in 4 bits")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), merge))
