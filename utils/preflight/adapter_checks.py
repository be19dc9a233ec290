"""What keeps a run with a LoRA adapter from starting, and what is worth knowing about its settings. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.adapter_files import base_of, beyond_lora, other_adapter, other_base, saved_adapter
from utils.log.checkpoints import CHECKPOINTS_FOLDER, saved_checkpoints
from utils.preflight.hub import unavailable
from utils.preflight.memory_estimate import adapted_matrices
from utils.preflight.model_files import base_folder, is_local, model_config

LOW_RATE = 1e-5


def adapter_obstacles(config: Config, resume: bool = False) -> Iterator[str]:
    """Why no adapter can be trained here, or the saved one not be trained further."""
    t, places = config.training, [config.paths.model_path]
    if resume:
        newest = saved_checkpoints(Path(config.paths.output_dir) / CHECKPOINTS_FOLDER)[-1:]
        places += map(str, newest)
        if t.lora_rank is not None and newest and saved_adapter(str(newest[0])) is None:
            yield (
                f"training.lora_rank = {t.lora_rank}, but the run in {config.paths.output_dir!r} trains all weights: "
                f"set it to null, or begin a new run with paths.model_path={newest[0]}"
            )
    for place in places:
        yield from (reason for reason in (other_adapter(place, t), *unusable_base(place)) if reason is not None)
    sizes = model_config(config.paths.model_path)
    if t.lora_rank is None or sizes is None:
        return
    try:
        matrices = adapted_matrices(sizes, t.lora_target)
    except ValueError:
        return  # a family of its own: loading it tells
    smallest = min(map(min, matrices))
    if t.lora_rank > smallest:
        yield (
            f"training.lora_rank = {t.lora_rank} is above {smallest}, the smallest dimension of the matrices that it "
            f"adapts; give {smallest} or less"
        )


def unusable_base(adapter: str) -> Iterator[str]:
    """Why a saved adapter or its base cannot serve, as far as the files here show it; nothing for a whole model."""
    if saved_adapter(adapter) is None:
        return
    if (reason := beyond_lora(adapter)) is not None:
        yield reason
    base = base_of(adapter)
    folder = base_folder(adapter)
    if folder is not None:
        reason = other_base(adapter, folder)
        if reason is not None:
            yield reason
    elif is_local(base):
        yield f"{adapter} is an adapter of {base!r}, where there is no config.json; put that model there"
    elif (reason := unavailable(base)) is not None:
        yield f"{adapter} is an adapter of {base!r}: {reason}"


def adapter_notes(config: Config) -> Iterator[str]:
    """What is allowed with LoRA but may not be what the user meant."""
    t = config.training
    if t.lora_rank is not None and t.learning_rate < LOW_RATE:
        yield (
            f"training.learning_rate = {t.learning_rate:g} with training.lora_rank: an adapter needs about 10 x full "
            "fine-tuning's rate, and learns next to nothing below that"
        )
    if t.lora_rank is not None and t.optimizer_name == "adamw8bit_master":
        yield "training.optimizer = adamw8bit_master with training.lora_rank: an adapter is float32, so it is adamw8bit"
