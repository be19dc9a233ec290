"""The text of `--dry-run`: what a config comes to, told without loading anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.engines import choose_engine
from utils.log.files import CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, RUN_INFO_FILE, STATUS_FILE, WARNINGS_FILE
from utils.preflight.config import to_dict
from utils.preflight.obstacles import ASSUMED_GPU, ASSUMED_PROMPT, estimated_memory, gpu_memory, obstacles
from utils.preflight.yaml_values import to_yaml_value
from utils.problems import notes_on_data, read_problems

REMEDY = (
    ": lower vllm.gpu_memory_utilization, take smaller microbatches (more gradient_accumulation_steps or fewer "
    "max_tokens_per_microbatch), set use_gradient_checkpointing and use_bnb_adamw8bit, or lower max_tokens"
)


def describe_run(config: Config, resume: bool = False, allow_changes: bool = False) -> str:
    """The text of `--dry-run`: the resolved config, what follows from it, and why it could not start as it is."""
    missing = [f"  - {line}" for line in obstacles(config, resume, allow_changes)] or ["  nothing"]
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
            "# what keeps it from starting here",
            *missing,
        ]
    )


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
        yield "microbatch", f"{t.microbatch_size} rollouts"
    else:
        longest = t.max_tokens + (t.max_prompt_tokens or ASSUMED_PROMPT)
        fit = max(1, min(t.train_batch_size, t.max_tokens_per_microbatch // longest))
        yield (
            "microbatch",
            f"up to {t.max_tokens_per_microbatch:,} tokens: {fit} rollouts of {longest:,}, more if shorter",
        )
    yield "rollouts by", _engine(config)
    yield "evaluations", _how_often(t.eval_interval, t.n_grpo_steps, "before training and after every {} steps")
    yield "checkpoints", _how_often(t.checkpoint_interval, t.n_grpo_steps, "every {} steps, at a new best")
    if t.top_p < 1.0:
        yield (
            "note",
            "the trainer's log-probs know nothing of top_p below 1: train/sampler_kl shows how far they are off",
        )
    if optimizer_steps > 1 and t.loss_type in ("no_baseline", "reinforce_with_baseline"):
        yield "note", f"{t.loss_type} does not correct for off-policy steps"
    for note in _notes_on_data(config):
        yield "note", note


def _notes_on_data(config: Config) -> list[str]:
    """What is worth knowing of the data files. Empty if they cannot be read, which is told elsewhere."""
    try:
        train, validation = (
            read_problems(path)[0] for path in (config.paths.train_data_file, config.paths.val_data_file)
        )
    except (ValueError, OSError):
        return []
    return notes_on_data(train, validation, config.training.rollout_batch_size // config.training.group_size)


def _engine(config: Config) -> str:
    """The engine that the config comes to on this machine, and why."""
    try:
        engine = choose_engine(config)
    except ValueError:
        return "none that can be used here"
    if config.training.rollout_engine != "auto":
        return engine
    if engine == "vllm":
        return "vllm (auto: it is installed, and the policy is on a GPU)"
    reason = "vLLM for GPUs is not installed" if config.training.device.startswith("cuda") else "no GPU is asked for"
    return f"transformers (auto: {reason})"


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


def _files(config: Config) -> Iterator[str]:
    p = config.paths
    for path in (p.train_data_file, p.val_data_file, p.prompt_template_file, p.model_path):
        yield f"reads  {path}"
    for name in (
        CONFIG_FILE,
        RUN_INFO_FILE,
        METRICS_FILE,
        ROLLOUTS_FILE,
        WARNINGS_FILE,
        STATUS_FILE,
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
