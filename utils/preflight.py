"""What follows from a config, and where this machine falls short of it: told before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.config import ConfigError, to_dict, to_yaml_value
from utils.engines import choose_engine
from utils.memory import estimate_peak_memory

# One of these is there wherever the NVIDIA driver is; asking torch would take seconds to import it. dxg is WSL's.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg")

ASSUMED_GPU = 24 * 10**9  # bytes, where there is no card to ask
ASSUMED_PROMPT = 512  # tokens, where training.max_prompt_tokens does not say
REMEDY = (
    ": lower vllm.gpu_memory_utilization, take smaller microbatches (more gradient_accumulation_steps or fewer "
    "max_tokens_per_microbatch), set use_gradient_checkpointing and use_bnb_adamw8bit, or lower max_tokens"
)


def describe_run(config: Config) -> str:
    """The text of `--dry-run`: the resolved config, what follows from it, and where this machine falls short."""
    missing = [f"  - {line}" for line in shortfalls(config)] or ["  nothing"]
    return "\n".join(
        [
            "# resolved config",
            *_config_lines(config),
            "",
            "# what follows",
            *(f"  {name}: {value}" for name, value in consequences(config)),
            "",
            "# peak memory, estimated",
            *(f"  {line}" for line in memory_lines(config)),
            "",
            "# files",
            *(f"  {line}" for line in _files(config)),
            "",
            "# what this machine lacks for it",
            *missing,
        ]
    )


def check_machine(config: Config) -> None:
    """Raise ConfigError with all that is missing here, a line each."""
    missing = list(shortfalls(config))
    if missing:
        raise ConfigError("\n       ".join(missing))


def consequences(config: Config) -> Iterator[tuple[str, str]]:
    """(name, value) of the sizes that follow from the config."""
    t = config.training
    optimizer_steps = t.epochs_per_rollout_batch * t.rollout_batch_size // t.train_batch_size
    yield "prompts a GRPO step", f"{t.rollout_batch_size // t.group_size} (groups of {t.group_size})"
    yield "rollouts in all", f"{t.n_grpo_steps * t.rollout_batch_size:,}"
    policy = "on-policy" if optimizer_steps == 1 else "off-policy"
    yield "optimizer steps a GRPO step", f"{optimizer_steps} ({policy})"
    yield "optimizer steps in all", f"{t.n_grpo_steps * optimizer_steps:,}"
    if t.max_tokens_per_microbatch is None:
        yield "microbatch", f"{t.train_batch_size // t.gradient_accumulation_steps} rollouts"
    else:
        yield "microbatch", f"as many rollouts as fit into {t.max_tokens_per_microbatch:,} tokens"
    yield "evaluations", _how_often(t.eval_interval, t.n_grpo_steps, "before training and after every {} steps")
    yield "checkpoints", _how_often(t.checkpoint_interval, t.n_grpo_steps, "every {} steps, at a new best")
    if t.top_p < 1.0:
        yield (
            "note",
            "the trainer's log-probs know nothing of top_p below 1: train/sampler_kl shows how far they are off",
        )
    if optimizer_steps > 1 and t.loss_type in ("no_baseline", "reinforce_with_baseline"):
        yield "note", f"{t.loss_type} does not correct for off-policy steps"


def shortfalls(config: Config) -> Iterator[str]:
    """What this machine lacks for the config, each with its remedy. Imports neither torch nor vLLM."""
    p, t = config.paths, config.training
    hints = {
        "data/tiny": "make it: python play-scripts/make_tiny.py",
        "data/math": "make it: python data/prepare_math.py",
        "data/gsm8k": "make it: python data/prepare_gsm8k.py",
    }
    for name in ("train_data_file", "val_data_file", "prompt_template_file"):
        path = getattr(p, name)
        if not Path(path).is_file():
            hint = next((hint for folder, hint in hints.items() if path.startswith(folder)), "give another path")
            yield f"paths.{name} = {path!r}: no such file; {hint}"
    if is_local(p.model_path) and not (Path(p.model_path) / "config.json").is_file():
        hint = hints["data/tiny"] if p.model_path.startswith("data/tiny") else "give a checkpoint folder or a hub name"
        yield f"paths.model_path = {p.model_path!r}: no config.json there; {hint}"
    if t.device.startswith("cuda") and not any(map(Path.exists, map(Path, GPU_FILES))):
        yield f"training.device = {t.device!r}: no NVIDIA GPU here; set training.device=cpu"
    try:
        choose_engine(config)
    except ValueError as error:
        yield str(error)
    packages = [
        ("bitsandbytes", t.use_bnb_adamw8bit, "training.use_bnb_adamw8bit = true", "or set it to false"),
        ("flash_attn", t.attention_type == "flash_attention_2", "attention_type flash_attention_2", "or take sdpa"),
        (
            "flash_attn_interface",
            t.attention_type == "flash_attention_3",
            "attention_type flash_attention_3",
            "or sdpa",
        ),
        ("wandb", bool(t.wandb_project), "training.wandb_project", "or empty it"),
    ]
    for package, needed, what, remedy in packages:
        if needed and importlib.util.find_spec(package) is None:
            yield f"{what} needs the package {package}, which is missing: {_install(package)}, {remedy}"


def is_local(model_path: str) -> bool:
    """Whether a model path means a folder here: a hub name is `name` or `owner/name`, and no folder of that name is."""
    return model_path.startswith((".", "/", "~")) or model_path.count("/") > 1 or Path(model_path).exists()


def model_config(model_path: str) -> dict | None:
    """The model's config.json, from its folder or from what the hub's client has kept; None where neither has it."""
    file = Path(model_path) / "config.json"
    if not is_local(model_path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model_path, "config.json")
        file = Path(cached) if isinstance(cached, str) else file
    return json.loads(file.read_text()) if file.is_file() else None


def memory_lines(config: Config) -> Iterator[str]:
    """The estimate by part, and whether the GPU has it. Nothing is loaded but the model's config.json."""
    try:
        parts = estimated_memory(config)
    except ValueError as error:
        yield f"unknown: {error}"
        return
    for name, size in parts.items():
        yield f"{name.replace('_', ' '):15} {size / 1e9:8.2f} GB"
    longest_prompt = config.training.max_prompt_tokens or ASSUMED_PROMPT
    yield f"for sequences of {longest_prompt + config.training.max_tokens:,} tokens, {longest_prompt:,} of them prompt"
    if config.training.device.startswith("cuda"):
        memory, peak = gpu_memory() or ASSUMED_GPU, max(parts["rollout_peak"], parts["training_peak"])
        card = f"{memory / 1e9:.1f} GB " + ("that the GPU has" if gpu_memory() else "assumed, as there is no GPU here")
        yield f"{'fits into' if peak <= memory else 'DOES NOT FIT into'} the {card}" + (
            "" if peak <= memory else REMEDY
        )


def estimated_memory(config: Config) -> dict[str, int]:
    """`utils.memory.estimate_peak_memory` on this machine, bytes by part. Raises ValueError where it cannot be told."""
    t, sizes = config.training, model_config(config.paths.model_path)
    if sizes is None:
        raise ValueError(f"{config.paths.model_path} is not on this machine, so its config.json cannot be read")
    on_gpu = t.device.startswith("cuda")
    longest = t.max_tokens + (t.max_prompt_tokens or ASSUMED_PROMPT)
    device_memory = (gpu_memory() or ASSUMED_GPU) if on_gpu else None
    return estimate_peak_memory(sizes, config, longest, device_memory, choose_engine(config) == "vllm")


def gpu_memory() -> int | None:
    """Bytes that the first GPU has in all, as the driver's tool says; None where there is neither."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return int(listed.splitlines()[0]) * 2**20


def _install(package: str) -> str:
    return {
        "bitsandbytes": "pip install bitsandbytes",
        "flash_attn": "pip install flash-attn --no-build-isolation",
        "flash_attn_interface": "build FlashAttention 3 from its repository",
        "wandb": "pip install wandb",
    }[package]


def _files(config: Config) -> Iterator[str]:
    p = config.paths
    for path in (p.train_data_file, p.val_data_file, p.prompt_template_file, p.model_path):
        yield f"reads  {path}"
    for name in (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "warnings.jsonl",
        "status.json",
        "checkpoints/",
        "reward_curve.png",
    ):
        yield f"writes {Path(p.output_dir) / name}"


def _how_often(interval: int | None, n_steps: int, text: str) -> str:
    if interval is None:
        return "never" if "before" in text else "only at the end"
    return text.format(interval) + " and at the end"


def _config_lines(config: Config) -> Iterator[str]:
    for section, values in to_dict(config).items():
        yield f"{section}:"
        for name, value in values.items():
            yield f"  {name}: {to_yaml_value(value)}"
