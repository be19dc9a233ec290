"""What keeps a run from starting, as far as that shows before anything is loaded: one line each, with its remedy."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from configs.defaults import Config, Training
from utils.engines import choose_engine
from utils.log.checkpoints import (
    CHECKPOINTS_FOLDER,
    DamagedCheckpoint,
    check_checkpoints,
    saved_checkpoints,
    step_of_checkpoint,
)
from utils.log.files import CONFIG_FILE, earlier_launches
from utils.log.output import holds_run, unwritable
from utils.own_code import digest, unusable_own
from utils.preflight.adapter_checks import adapter_obstacles
from utils.preflight.config import load_config
from utils.preflight.config_rules import ConfigError, own_code
from utils.preflight.disk import too_little_space
from utils.preflight.hub import unavailable
from utils.preflight.machine import has_gpu, n_visible_gpus
from utils.preflight.model_files import context_of, is_local, lacks_chat_template, model_config
from utils.preflight.parallel_checks import parallel_obstacles
from utils.preflight.reference_model import reference_obstacles
from utils.preflight.resume_rules import changed_fields
from utils.preflight.two_cards import card_obstacles, process_obstacles
from utils.problems import load_template, read_problems

INPUTS = ("train_data_file", "val_data_file", "prompt_template_file")  # of the section `paths`
REPOSITORY = Path(__file__).parents[2]
MADE_BY = {
    "data/tiny/": "python play-scripts/make_tiny.py",
    "data/chains/": "python play-scripts/make_chains.py",
    "data/math/": "python data/prepare_math.py",
    "data/gsm8k/": "python data/prepare_gsm8k.py",
}
HOW_TO_INSTALL = {
    "bitsandbytes": "pip install bitsandbytes",
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "flash_attn_interface": "build FlashAttention 3 from its repository",
    "peft": "pip install peft",
    "wandb": "pip install wandb",
    "trackio": 'pip install -e ".[trackers]"',
    "tensorboard": 'pip install -e ".[trackers]"',
}


def check_before_loading(config: Config, resume: bool, allow_changes: bool) -> None:
    """Raise ConfigError with everything that keeps the run from starting and can be seen without torch."""
    refuse(obstacles(config, resume, allow_changes))


def refuse(obstacles: Iterable[str]) -> None:
    """Raise ConfigError if there are any obstacles, one line each."""
    lines = list(obstacles)
    if lines:
        raise ConfigError("\n       ".join(lines))


def obstacles(config: Config, resume: bool, allow_changes: bool) -> Iterator[str]:
    """What keeps a run from starting: what this machine lacks, unusable files, and its output folder."""
    yield from shortfalls(config)
    yield from parallel_obstacles(config)
    yield from unusable_files(config)
    yield from output_obstacles(config, resume, allow_changes)
    with contextlib.suppress(ValueError):  # broken JSON: told above, or as the checkpoint is looked at
        yield from adapter_obstacles(config, resume)
    with contextlib.suppress(ValueError):  # a config.json that cannot be read: loading the model says so
        yield from too_little_space(config, model_config(config.paths.model_path))


def shortfalls(config: Config, inputs: Sequence[str] = INPUTS) -> Iterator[str]:
    """What this machine lacks for the config."""
    yield from missing_inputs(config, inputs)
    yield from unusable_functions(config)
    yield from _model_obstacles(config)
    yield from reference_obstacles(config)
    if config.training.device.startswith("cuda") and not has_gpu():
        own_card = "" if config.vllm.device is None else " and vllm.device=null"
        yield f"training.device = {config.training.device!r}: no NVIDIA GPU here; set training.device=cpu{own_card}"
    else:
        yield from card_obstacles(config, n_visible_gpus)
    yield from process_obstacles(config)
    try:
        choose_engine(config)
    except ValueError as error:
        yield str(error)
    yield from _missing_packages(config.training)


def unusable_functions(config: Config) -> Iterator[str]:
    """Which of the user's own functions cannot be used, as far as that shows without running their files."""
    for field, names in own_code(config).items():
        reasons = {name: unusable_own(name) for name in names}
        yield from (f"{field} = {name!r}: {reason}" for name, reason in reasons.items() if reason is not None)


def missing_inputs(config: Config, inputs: Sequence[str]) -> Iterator[str]:
    """Which of the files that a config names are not on this machine."""
    for name in inputs:
        path = getattr(config.paths, name)
        if Path(path).is_dir():
            yield f"paths.{name} = {path!r} is a folder; give a file"
        elif not Path(path).is_file():
            yield f"paths.{name} = {path!r}: no such file; {_where_to_get(path, 'give another path')}"


def _where_to_get(path: str, otherwise: str) -> str:
    if not Path(path).exists() and (REPOSITORY / path).exists():
        return "it is in the repository: start from the folder of train_grpo.py"
    command = next((command for folder, command in MADE_BY.items() if f"{path}/".startswith(folder)), None)
    return f"make it: {command}" if command else otherwise


def _model_obstacles(config: Config) -> Iterator[str]:
    t, model_path = config.training, config.paths.model_path
    named = f"paths.model_path = {model_path!r}"
    if is_local(model_path):
        if not (Path(model_path) / "config.json").is_file():
            hint = _where_to_get(model_path, "give a checkpoint folder or a hub name")
            yield f"{named}: no config.json there; {hint}"
            return
    elif (reason := unavailable(model_path)) is not None:
        yield f"{named}: {reason}"
    try:
        sizes = model_config(model_path)
        context = None if sizes is None else context_of(sizes)
        if context is not None and t.max_tokens >= context:
            yield (
                f"training.max_tokens = {t.max_tokens} leaves no room for a prompt in the context of {model_path}, "
                f"{context} tokens; lower it"
            )
        if t.use_chat_template and lacks_chat_template(model_path):
            yield f"training.use_chat_template = True: {model_path} has no chat template; set it to false"
    except (ValueError, OSError) as error:
        yield f"{named}: {error}"


def _missing_packages(t: Training) -> Iterator[str]:
    needs = [
        (
            "bitsandbytes",
            t.optimizer_name.startswith("adamw8bit"),
            f"training.optimizer = {t.optimizer_name}",
            "or set it to adamw",
        ),
        ("bitsandbytes", t.load_in_4bit, "training.load_in_4bit = true", "or set it to false"),
        ("peft", t.lora_rank is not None, "training.lora_rank", "or set it to null"),
        ("flash_attn", t.attention_type == "flash_attention_2", "attention_type flash_attention_2", "or take sdpa"),
        (
            "flash_attn_interface",
            t.attention_type == "flash_attention_3",
            "attention_type flash_attention_3",
            "or sdpa",
        ),
        *((name, True, f"the tracker {name}", "or leave it out of training.trackers") for name in t.tracker_names),
    ]
    for package, is_needed, what, remedy in needs:
        if is_needed and importlib.util.find_spec(package) is None:
            yield f"{what} needs the package {package}, which is missing: {HOW_TO_INSTALL[package]}, {remedy}"


def unusable_files(config: Config, inputs: Sequence[str] = INPUTS) -> Iterator[str]:
    """What is wrong in the data files and the prompt template that exist."""
    for name in inputs:
        path = getattr(config.paths, name)
        try:
            if Path(path).is_file():
                (load_template if name == "prompt_template_file" else read_problems)(path)
        except (ValueError, OSError) as error:
            yield f"paths.{name} = {error}"


def output_obstacles(config: Config, resume: bool, allow_changes: bool) -> Iterator[str]:
    """What forbids the run to write to its output folder, or to go on with the run that is there."""
    named, folder = f"paths.output_dir = {config.paths.output_dir!r}", Path(config.paths.output_dir)
    reason = unwritable(folder)
    if reason is not None:
        yield f"{named}: {reason}"
    elif folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        yield f"{named}: it may not be read; give another folder"
    elif not resume and holds_run(folder):
        yield f"{named} already holds a run; continue it with --resume, or choose another folder"
    elif resume:
        try:
            earlier_launches(folder)
        except ValueError as damage:
            yield str(damage)
        yield from _unusable_checkpoints(config, folder / CHECKPOINTS_FOLDER)
        if not allow_changes:
            yield from _other_config(config, folder)
            yield from _other_code(config, folder)


def _unusable_checkpoints(config: Config, folder: Path) -> Iterator[str]:
    """Why --resume cannot go on from the newest checkpoint, if it cannot."""
    try:
        check_checkpoints(folder)
    except DamagedCheckpoint as damage:
        yield str(damage)
        return
    done, n_steps = max(map(step_of_checkpoint, saved_checkpoints(folder)), default=0), config.training.n_grpo_steps
    if done > n_steps:
        yield (
            f"training.n_grpo_steps = {n_steps}, but the run in {str(folder.parent)!r} has already done {done} steps; "
            f"give {done} or more, or another paths.output_dir"
        )


def _other_config(config: Config, folder: Path) -> Iterator[str]:
    """Why the run in the folder is not this config's, if it is not."""
    if (folder / CONFIG_FILE).exists():
        changed = changed_fields(load_config([folder / CONFIG_FILE]), config)
        if changed:
            yield (
                f"the run in {str(folder)!r} was begun with another config, and these fields may not change: "
                f"{'; '.join(changed)}. Give them the saved values, or insist with --allow-changes"
            )
    elif saved_checkpoints(folder / CHECKPOINTS_FOLDER):
        yield (
            f"{folder} has checkpoints but no {CONFIG_FILE}, so nobody can tell whether this config is theirs; put the "
            "file back, or insist with --allow-changes"
        )


def _other_code(config: Config, folder: Path) -> Iterator[str]:
    """Which of the user's own functions are in files that have changed since the run was last launched."""
    try:
        launches = earlier_launches(folder)
    except ValueError:
        return  # told above
    saved = launches[-1].get("own_code", {}) if launches and isinstance(launches[-1], dict) else {}
    for field, names in own_code(config).items():
        for name in names:
            if unusable_own(name) is None and saved.get(name, digest(name)) != digest(name):
                yield (
                    f"{field} = {name!r}: the file has changed since the run was begun; put it back as it was, or "
                    "insist with --allow-changes"
                )
