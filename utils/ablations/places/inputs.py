"""What a run reads, as a place without this machine's files must get it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.own_code import file_and_function
from utils.preflight.config_rules import own_code
from utils.preflight.model_files import is_local
from utils.preflight.obstacles import INPUTS, missing_inputs, unusable_files, unusable_functions


def input_files(config: Config) -> dict[str, Path]:
    """Every file or folder that a run reads, by the field that names it. A model on the hub is none."""
    found = {f"paths.{name}": Path(getattr(config.paths, name)) for name in INPUTS}
    if is_local(config.paths.model_path):
        found["paths.model_path"] = Path(config.paths.model_path)
    for field, names in own_code(config).items():
        found |= {f"{field} ({name})": file_and_function(name)[0] for name in names}
    return found


def bad_inputs(config: Config) -> Iterator[str]:
    """What is missing or wrong in the files that a run reads; what the machine lacks is another question."""
    yield from missing_inputs(config, INPUTS)
    yield from unusable_functions(config)
    yield from unusable_files(config)
    if is_local(config.paths.model_path) and not Path(config.paths.model_path, "config.json").is_file():
        yield f"paths.model_path = {config.paths.model_path!r}: no config.json there"


def is_inside(path: Path, folder: str = ".") -> bool:
    """Whether a path is relative and leads into a folder, so that it means the same on another machine."""
    return not path.is_absolute() and Path(os.path.normpath(path)).is_relative_to(folder) and ".." not in path.parts
