"""A LoRA adapter as files, in peft's format, with the base model that it was trained on named beside it. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from configs.defaults import Config, Training

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
ORIGIN_FILE = "base_model.json"  # ours: what the base was, by its content
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ORIGIN_FILE)
PLAIN = {  # what peft saves of an adapter whose whole effect is W + s B A on matrices
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
}
N_BLOCKS, BLOCK = 64, 4096  # of each weights file, that its fingerprint reads


def saved_adapter(model_path: str) -> dict[str, Any] | None:
    """adapter_config.json of a checkpoint folder, None if it holds a whole model. Raises ValueError if it is broken."""
    return _read(Path(model_path) / ADAPTER_CONFIG)


def saved_origin(adapter: str) -> dict[str, Any]:
    """What `origin` said of the base when the adapter was saved; empty if another program saved it."""
    return _read(Path(adapter) / ORIGIN_FILE) or {}


def is_in_4bit(model_path: str) -> bool:
    """Whether a model path is an adapter that was trained beside weights in 4 bits."""
    return saved_origin(model_path).get("load_in_4bit", False)


def beyond_lora(adapter: str) -> str | None:
    """What a saved adapter does beyond plain LoRA, which nothing here knows; None if nothing."""
    saved = saved_adapter(adapter)
    for name, plain in PLAIN.items():
        value = saved.get(name) or plain
        if value != plain:
            return (
                f"{adapter} has {name} = {value!r} in its {ADAPTER_CONFIG}, and only plain LoRA is known here; merge "
                "it into its base with the program that made it"
            )
    return None


def base_of(model_path: str) -> str:
    """The base model of an adapter's folder; any other model is its own."""
    adapter = saved_adapter(model_path)
    if adapter is None:
        return model_path
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{model_path}/{ADAPTER_CONFIG} names no base_model_name_or_path; write the base's path there")
    return base


def origin(base_folder: Path, training: Training) -> dict[str, Any]:
    """What is saved beside an adapter: its base's fingerprint, and how the base was used."""
    return {
        "fingerprint": fingerprint(base_folder),
        "lora_target": training.lora_target,
        "load_in_4bit": training.load_in_4bit,
    }


def fingerprint(base_folder: Path) -> str:
    """A hash of a model's weights files: their names, sizes and headers, and blocks spread evenly over each.

    Reading 15 GB whole would take longer than loading them. Whoever trains a model changes nearly every block of it.
    """
    digest = hashlib.sha256()
    for path in sorted(base_folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(size, int.from_bytes(file.read(8), "little"))))  # the header, by its length
            for block in range(N_BLOCKS):
                file.seek(max(0, size - BLOCK) * block // (N_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def other_base(adapter: str, base_folder: Path) -> str | None:
    """Why the model in `base_folder` is not the one that the adapter was trained on; None if it is, as far as known."""
    expected = saved_origin(adapter).get("fingerprint")
    if expected is None or not any(base_folder.glob("*.safetensors")) or fingerprint(base_folder) == expected:
        return None
    return (
        f"{adapter} is an adapter of another base: the weights of {base_of(adapter)!r} are not those it was trained "
        "on; put that model back, or begin a new run"
    )


def other_adapter(model_path: str, training: Training) -> str | None:
    """Why training cannot go on from a model path with these settings; None if it can, or it is no adapter."""
    adapter = saved_adapter(model_path)
    if adapter is None:
        return None
    rank = adapter.get("r")
    if training.lora_rank is None:
        return (
            f"{model_path} is an adapter of rank {rank}, and training.lora_rank is null: set it to {rank} to train the "
            "adapter further, or make a whole model of it with play-scripts/merge_lora.py"
        )
    saved = {"lora_rank": rank, "lora_alpha": adapter.get("lora_alpha"), **saved_origin(model_path)}
    for name in ("lora_rank", "lora_alpha", "lora_target", "load_in_4bit"):
        asked = getattr(training, name)
        if name in saved and saved[name] != asked:
            return f"training.{name} = {asked!r}, but {model_path} is an adapter with {saved[name]!r}; give that"
    return None


def is_own_reference(config: Config) -> bool:
    """Whether the policy without its adapter is what a KL term measures from, so that no second model is needed."""
    t = config.training
    return t.lora_rank is not None and t.reference_path is None and saved_adapter(config.paths.model_path) is None


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
