"""What follows from a config, and where this machine falls short of it: told before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.config import ConfigError, to_dict, to_yaml_value

# One of these is there wherever the NVIDIA driver is; asking torch would take seconds to import it. dxg is WSL's.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg")


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
    packages = [
        ("bitsandbytes", t.use_bnb_adamw8bit, "training.use_bnb_adamw8bit = true", "or set it to false"),
        ("vllm", t.rollout_engine == "vllm", "training.rollout_engine = 'vllm'", "or set it to transformers"),
        (
            "flash_attn",
            t.attention_type == "flash_attention_2",
            "attention_type flash_attention_2",
            "or set it to sdpa",
        ),
        ("wandb", bool(t.wandb_project), "training.wandb_project", "or empty it"),
    ]
    for package, needed, what, remedy in packages:
        if needed and importlib.util.find_spec(package) is None:
            yield f"{what} needs the package {package}, which is missing: {_install(package)}, {remedy}"


def is_local(model_path: str) -> bool:
    """Whether a model path means a folder here: a hub name is `name` or `owner/name`, and no folder of that name is."""
    return model_path.startswith((".", "/", "~")) or model_path.count("/") > 1 or Path(model_path).exists()


def model_config(config: Config) -> dict | None:
    """The model's config.json, or None where it is not on this machine."""
    file = Path(config.paths.model_path) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _install(package: str) -> str:
    return {
        "vllm": 'pip install -e ".[gpu]", or ".[cpu]" without a GPU',
        "bitsandbytes": "pip install bitsandbytes",
        "flash_attn": "pip install flash-attn --no-build-isolation",
        "wandb": "pip install wandb",
    }[package]


def _files(config: Config) -> Iterator[str]:
    p = config.paths
    for path in (p.train_data_file, p.val_data_file, p.prompt_template_file, p.model_path):
        yield f"reads  {path}"
    for name in ("config.yaml", "run.json", "metrics.jsonl", "rollouts.jsonl", "status.json", "checkpoints/"):
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
