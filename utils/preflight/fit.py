"""Fit a config to the card of this machine: what `derive` needs, gathered from data, model and driver."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

from configs.defaults import Config
from utils.engines import choose_engine
from utils.log.files import CONFIG_FILE
from utils.preflight.config import load_config
from utils.preflight.derive import Card, derive, fields_to_derive
from utils.preflight.hub import fetch_small_file
from utils.preflight.machine import engine_card, this_card
from utils.preflight.memory_estimate import estimate_peak_memory
from utils.preflight.model_files import is_local, model_config
from utils.preflight.prompt_lengths import longest_prompt


def fit_to_card(
    config: Config, given: Collection[str], resume: bool = False, fetch: bool = False
) -> tuple[Config, list[str]]:
    """The config with what follows from this machine's card, and a line for each field that does.

    `given` names the fields that are set. A resumed run keeps the values that it began with, if they still fit. With
    `fetch`, a model's config.json that is not here yet is brought from the hub.
    """
    wanted = fields_to_derive(config, given)
    if not wanted:
        return config, []
    try:
        if fetch and not is_local(config.paths.model_path):
            fetch_small_file(config.paths.model_path, "config.json")
        sizes, uses_vllm = model_config(config.paths.model_path), choose_engine(config) == "vllm"
        length = longest_prompt(config).tokens + config.training.max_tokens
        card, engines = this_card(config.training.device), engine_card(config)
        earlier = _as_it_began(config, wanted) if resume else None
        if sizes is not None and earlier is not None and _fits(earlier, sizes, length, card, uses_vllm, engines):
            return earlier, [f"{name}: as the run began" for name in wanted]
        fitted, derived = derive(config, given, sizes, length, card, uses_vllm, engines)
    except (ValueError, OSError):  # an obstacle, or loading the model, tells what is wrong
        fitted, derived = derive(config, given, None, 1, Card(0, 0), uses_vllm=False)
    return fitted, [str(line) for line in derived]


def _as_it_began(config: Config, wanted: Collection[str]) -> Config | None:
    """The config with what was derived for the run that is in its folder; None if nothing was."""
    path = Path(config.paths.output_dir) / CONFIG_FILE
    if not path.is_file():
        return None
    saved, config = load_config([path]), copy.deepcopy(config)
    if not saved.training.device.startswith("cuda") or saved.vllm.gpu_memory_utilization is None:
        return None
    for section, name in (key.split(".") for key in wanted):
        setattr(getattr(config, section), name, getattr(getattr(saved, section), name))
    return config


def _fits(config: Config, sizes: dict, length: int, card: Card, uses_vllm: bool, engines: Card | None) -> bool:
    if config.vllm.gpu_memory_utilization is None:
        return False
    parts = estimate_peak_memory(sizes, config, length, card.total, uses_vllm, engines and engines.total)
    if engines is not None and parts["vllm_awake"] > engines.free:
        return False
    return max(parts["rollout_peak"], parts["training_peak"]) <= card.free
