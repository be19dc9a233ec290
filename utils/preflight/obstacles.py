"""What keeps a run from starting, as far as it can be told before anything is loaded, and what memory it takes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from configs.defaults import Config
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
from utils.preflight.config import ConfigError, load_config
from utils.preflight.memory_estimate import estimate_peak_memory
from utils.preflight.resume_rules import changed_fields
from utils.problems import load_template, read_problems

# One of these is there wherever the NVIDIA driver is; asking torch would take seconds to import it. dxg is WSL's.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg")

INPUTS = ("train_data_file", "val_data_file", "prompt_template_file")  # of the section `paths`
REPOSITORY = Path(__file__).parents[2]
MADE_BY = {
    "data/tiny/": "python play-scripts/make_tiny.py",
    "data/math/": "python data/prepare_math.py",
    "data/gsm8k/": "python data/prepare_gsm8k.py",
}
ASSUMED_GPU = 24 * 10**9  # bytes, where there is no card to ask
ASSUMED_PROMPT = 512  # tokens, where training.max_prompt_tokens does not say


def check_before_loading(config: Config, resume: bool, allow_changes: bool) -> None:
    """Raise ConfigError with all that keeps a run from starting and can be seen without torch."""
    refuse(obstacles(config, resume, allow_changes))


def refuse(obstacles: Iterable[str]) -> None:
    """Raise ConfigError where there are any, a line each."""
    told = list(obstacles)
    if told:
        raise ConfigError("\n       ".join(told))


def obstacles(config: Config, resume: bool, allow_changes: bool) -> Iterator[str]:
    """What keeps a run from starting: what the machine lacks, files that cannot be used, its output folder."""
    yield from shortfalls(config)
    yield from unusable_files(config)
    yield from output_obstacles(config, resume, allow_changes)


def unusable_files(config: Config, inputs: Sequence[str] = INPUTS) -> Iterator[str]:
    """What is wrong in the data files and the prompt template, where they are there."""
    for name in inputs:
        path = getattr(config.paths, name)
        try:
            if Path(path).is_file():
                (load_template if name == "prompt_template_file" else read_problems)(path)
        except (ValueError, OSError) as error:
            yield f"paths.{name} = {error}"


def output_obstacles(config: Config, resume: bool, allow_changes: bool) -> Iterator[str]:
    """What forbids a run to write to its output folder."""
    named, folder = f"paths.output_dir = {config.paths.output_dir!r}", Path(config.paths.output_dir)
    reason = unwritable(folder)
    if reason is not None:
        yield f"{named}: {reason}"
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
            f"{folder} has checkpoints but no {CONFIG_FILE}, so whether this config is theirs cannot be told; put the "
            "file back, or insist with --allow-changes"
        )


def shortfalls(config: Config, inputs: Sequence[str] = INPUTS) -> Iterator[str]:
    """What this machine lacks for the config, each with its remedy. Imports neither torch nor vLLM."""
    p, t = config.paths, config.training
    for name in inputs:
        path = getattr(p, name)
        if Path(path).is_dir():
            yield f"paths.{name} = {path!r} is a folder; give a file"
        elif not Path(path).is_file():
            yield f"paths.{name} = {path!r}: no such file; {_where_to_get(path, 'give another path')}"
    if is_local(p.model_path) and not (Path(p.model_path) / "config.json").is_file():
        hint = _where_to_get(p.model_path, "give a checkpoint folder or a hub name")
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


def _where_to_get(path: str, otherwise: str) -> str:
    if not Path(path).exists() and (REPOSITORY / path).exists():
        return "it is in the repository: start from the folder of train_grpo.py"
    command = next((command for folder, command in MADE_BY.items() if f"{path}/".startswith(folder)), None)
    return f"make it: {command}" if command else otherwise


def is_local(model_path: str) -> bool:
    """Whether a model path means a folder here: a hub name is `name` or `owner/name`, and no folder has the name, or
    the owner's: `data/nope` is a slip."""
    path = Path(model_path)
    beside_others = len(path.parts) == 2 and path.parent.is_dir()
    return model_path.startswith((".", "/", "~")) or model_path.count("/") > 1 or path.exists() or beside_others


def model_config(model_path: str) -> dict | None:
    """The model's config.json, from its folder or from what the hub's client has kept; None where neither has it.

    Raises ValueError where it is not JSON.
    """
    file = Path(model_path) / "config.json"
    if not is_local(model_path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model_path, "config.json")
        file = Path(cached) if isinstance(cached, str) else file
    try:
        return json.loads(file.read_bytes()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def estimated_memory(config: Config) -> dict[str, int]:
    """`estimate_peak_memory` on this machine, bytes by part. Raises ValueError where it cannot be told."""
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
