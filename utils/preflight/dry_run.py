"""The text of `--dry-run`: whether a config could start here, and what it comes to, without loading anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.defaults import Config
from utils.engines import choose_engine
from utils.log.files import CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, RUN_INFO_FILE, STATUS_FILE, WARNINGS_FILE
from utils.own_code import file_and_function
from utils.preflight.adapter_checks import adapter_notes
from utils.preflight.config import to_dict
from utils.preflight.config_rules import own_code
from utils.preflight.derive import usual_length
from utils.preflight.hub import is_cached
from utils.preflight.loss_rules import LOSSES_WITHOUT_RATIO
from utils.preflight.machine import (
    ASSUMED_GPU,
    engine_card,
    estimated_memory,
    gpu_memory,
    host_memory,
    machine_notes,
    this_card,
)
from utils.preflight.memory_estimate import kv_cache_tokens
from utils.preflight.model_files import bytes_to_fetch, is_local, model_config
from utils.preflight.obstacles import obstacles
from utils.preflight.parallel_checks import shares
from utils.preflight.prompt_lengths import LongestPrompt, longest_prompt
from utils.preflight.yaml_values import to_yaml_value
from utils.problems import notes_on_data, read_problems
from utils.ranks import launched

LESS_MEMORY = (
    "lower vllm.gpu_memory_utilization, take smaller microbatches (more gradient_accumulation_steps or fewer "
    "max_tokens_per_microbatch), set use_gradient_checkpointing, set optimizer to adamw8bit, or lower max_tokens"
)
GB = 1e9


def show_dry_run(config: Config, resume: bool, allow_changes: bool, full: bool, derived: Sequence[str] = ()) -> bool:
    """Print what `--dry-run` has to say; True if nothing that it can see keeps the run from starting."""
    in_the_way = list(obstacles(config, resume, allow_changes))
    print(describe_run(config, in_the_way, full, derived))
    return not in_the_way


def describe_run(
    config: Config, in_the_way: Sequence[str] = (), full: bool = False, derived: Sequence[str] = ()
) -> str:
    """The text of `--dry-run`: the obstacles in the way, what is worth knowing, the config, and what follows from it.

    Only fields that differ from their defaults are shown, unless `full`. `derived` tells what follows from the card.
    """
    prompt = longest_prompt(config)
    which = "every field" if full else "what differs from the defaults (--full shows every field)"
    parts = {
        "what keeps it from starting here": [f"- {line}" for line in in_the_way] or ["nothing"],
        "worth knowing": [f"- {note}" for note in notes(config, prompt)],
        f"config: {which}": list(_config_lines(config, full)) or ["nothing"],
        "derived from the card, as nothing sets it": derived,
        "what follows": [f"{name}: {value}" for name, value in consequences(config, prompt)],
        "peak memory, estimated": list(memory_lines(config, prompt)),
        "files": list(_files(config)),
    }
    return "\n\n".join(
        f"# {title}\n" + "\n".join(f"  {line}" for line in part) for title, part in parts.items() if part
    )


def notes(config: Config, prompt: LongestPrompt) -> Iterator[str]:
    """What is allowed but may not be what the user meant."""
    t, model_path = config.training, config.paths.model_path
    if t.top_p < 1.0:
        yield "the trainer's log-probs ignore top_p, unlike the sampler's: train/sampler_kl shows the difference"
    if _optimizer_steps(config) > 1 and t.loss_type in LOSSES_WITHOUT_RATIO:
        yield f"{t.loss_type} does not correct for off-policy steps"
    try:
        train, _ = read_problems(config.paths.train_data_file)
        validation, _ = read_problems(config.paths.val_data_file)
        yield from notes_on_data(train, validation, t.rollout_batch_size // t.group_size)
    except (ValueError, OSError):
        pass  # an obstacle says so
    if not is_local(model_path) and not is_cached(model_path):
        size = bytes_to_fetch(model_path)
        amount = "an unknown amount" if size is None else f"about {size / GB:.1f} GB"
        yield f"{model_path} is not on this machine yet: {amount} to fetch from the hub"
    yield from machine_notes(config)
    yield from adapter_notes(config)
    yield from _memory_notes(config, prompt)


def _memory_notes(config: Config, prompt: LongestPrompt) -> Iterator[str]:
    try:
        parts = estimated_memory(config, prompt.tokens)
    except ValueError:
        return  # `memory_lines` says why
    peak, (memory, whose) = _peak(parts), _memory(config)
    cache = _cache(config, prompt)
    if cache is not None and cache[0] == 0:
        yield (
            "vLLM's share of the GPU DOES NOT HOLD its own copy of the weights; raise vllm.gpu_memory_utilization, or "
            "let the policy itself sample: training.rollout_engine=transformers"
        )
    elif cache is not None and cache[0] < cache[1]:
        yield (
            f"vLLM's KV cache holds about {cache[0]:,} tokens, fewer than the {cache[1]:,} of the sequences that are "
            "sampled at once, so it computes some of them twice; raise vllm.gpu_memory_utilization, or set it to null"
        )
    if peak > memory:
        yield f"it DOES NOT FIT: about {peak / GB:.1f} GB are needed of the {memory / GB:.1f} GB {whose}; {LESS_MEMORY}"
    engines = engine_card(config)
    if engines is not None and parts["vllm_awake"] > engines.free:
        yield (
            f"vLLM's share of its own GPU DOES NOT FIT: {parts['vllm_awake'] / GB:.1f} GB of the "
            f"{engines.free / GB:.1f} GB that are free; lower vllm.gpu_memory_utilization, or set it to null"
        )


def consequences(config: Config, prompt: LongestPrompt) -> Iterator[tuple[str, str]]:
    """(name, value) of the sizes that follow from the config."""
    t = config.training
    optimizer_steps = _optimizer_steps(config)
    yield "prompts per GRPO step", f"{t.rollout_batch_size // t.group_size} (groups of {t.group_size})"
    if launched().n_ranks > 1:
        yield "ranks", shares(config)
    yield "rollouts in all", f"{t.n_grpo_steps * t.rollout_batch_size:,}"
    policy = "on-policy" if optimizer_steps == 1 else "off-policy"
    yield "optimizer steps per GRPO step", f"{optimizer_steps} ({policy})"
    yield "optimizer steps in all", f"{t.n_grpo_steps * optimizer_steps:,}"
    if t.max_tokens_per_microbatch is None:
        yield "microbatch", f"{t.microbatch_size} rollouts"
    else:
        longest = t.max_tokens + prompt.tokens
        fit = max(1, min(t.train_batch_size, t.max_tokens_per_microbatch // longest))
        size = f"up to {t.max_tokens_per_microbatch:,} tokens"
        yield "microbatch", f"{size}: {fit} rollouts of {longest:,}, more if they are shorter"
    yield "longest prompt", prompt.how
    yield "rollouts by", _engine(config)
    cache = _cache(config, prompt)
    if cache is not None:
        yield "KV cache", f"about {cache[0]:,} tokens; the sequences sampled at once usually have {cache[1]:,}"
    yield "evaluations", _how_often(t.eval_interval, "never", "before training and after every {} steps")
    best = "at a new best"
    yield "checkpoints", _how_often(t.checkpoint_interval, f"{best} and at the end", f"every {{}} steps, {best}")


def _optimizer_steps(config: Config) -> int:
    t = config.training
    return t.epochs_per_rollout_batch * t.rollout_batch_size // t.train_batch_size


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


def memory_lines(config: Config, prompt: LongestPrompt) -> Iterator[str]:
    """The estimate by part, and whether this machine has that much. Only the model's config.json is read."""
    try:
        parts = estimated_memory(config, prompt.tokens)
    except ValueError as error:
        yield f"unknown: {error}"
        return
    for name, size in parts.items():
        yield f"{name.replace('_', ' '):15} {size / GB:8.2f} GB"
    yield f"for sequences of {prompt.tokens + config.training.max_tokens:,} tokens, {prompt.tokens:,} of them prompt"
    memory, whose = _memory(config)
    verdict = "fits into" if _peak(parts) <= memory else "DOES NOT FIT into"
    yield f"{verdict} the {memory / GB:.1f} GB {whose}"
    engines = engine_card(config)
    if engines is not None:
        yield (
            f"those peaks are of {config.training.device}; vLLM keeps its {parts['vllm_awake'] / GB:.1f} GB on "
            f"{config.vllm.device}, of the {engines.total / GB:.1f} GB {engines.whose}"
        )


def _cache(config: Config, prompt: LongestPrompt) -> tuple[int, int] | None:
    """Tokens that vLLM's KV cache holds on a GPU, and those of the sequences sampled at once at a usual length."""
    t = config.training
    if not t.device.startswith("cuda") or not _engine(config).startswith("vllm"):
        return None
    sizes = model_config(config.paths.model_path)
    if sizes is None or config.vllm.gpu_memory_utilization is None:
        return None
    at_once = min(t.rollout_batch_size // launched().n_ranks, config.vllm.max_num_seqs)
    usual = usual_length(prompt.tokens + t.max_tokens)
    return kv_cache_tokens(sizes, config, this_card(config.vllm.device or t.device).total), at_once * usual


def _peak(parts: dict[str, int]) -> int:
    return max(parts["rollout_peak"], parts["training_peak"])


def _memory(config: Config) -> tuple[int, str]:
    """Bytes of the memory that the policy trains in, and whose they are."""
    if not config.training.device.startswith("cuda"):
        n_local = launched().n_local
        return host_memory() // n_local, "that this machine has" if n_local == 1 else "that this machine has per rank"
    memory = gpu_memory(config.training.device)
    return (ASSUMED_GPU, "assumed, as there is no GPU here") if memory is None else (memory, "that the GPU has")


def _files(config: Config) -> Iterator[str]:
    p = config.paths
    functions = [str(file_and_function(name)[0]) for names in own_code(config).values() for name in names]
    for path in (p.train_data_file, p.val_data_file, p.prompt_template_file, p.model_path, *dict.fromkeys(functions)):
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


def _how_often(interval: int | None, without: str, text: str) -> str:
    return without if interval is None else text.format(interval) + " and at the end"


def _config_lines(config: Config, full: bool) -> Iterator[str]:
    defaults = to_dict(Config())
    for section, values in to_dict(config).items():
        shown = {name: value for name, value in values.items() if full or value != defaults[section][name]}
        if shown:
            yield f"{section}:"
        for name, value in shown.items():
            yield f"  {name}: {to_yaml_value(value)}"
