"""Does a checkpoint fit on the disk? Computed from the model's config.json, before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.defaults import Config, Training
from utils.preflight.memory_estimate import optimizer_state_bytes, trained_parameters


def checkpoint_bytes(model_config: dict[str, Any], training: Training) -> int:
    """What one checkpoint takes: what is trained, and the optimizer's two moments of it.

    Raises ValueError if a size is missing.
    """
    n_trained, bytes_each = trained_parameters(model_config, training)
    return n_trained * bytes_each + optimizer_state_bytes(n_trained, bytes_each, training)


def too_little_space(config: Config, model_config: dict[str, Any] | None) -> Iterator[str]:
    """Why no checkpoint can be saved, if the disk has less space than one takes. `model_config` None is unknown."""
    try:
        needed = checkpoint_bytes(model_config or {}, config.training)
    except ValueError:
        return  # a model of another kind, or one that is not on this machine yet: its size is unknown
    folder = Path(config.paths.output_dir)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        yield (
            f"paths.output_dir = {config.paths.output_dir!r}: a checkpoint takes about {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free there; free some space, or give a folder on another disk"
        )
