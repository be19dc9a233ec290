"""Models by their names on the Hugging Face hub: which files are already here, and whether the rest can be fetched."""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from utils.problems import parse_json

ENDPOINT = "https://huggingface.co"
PATIENCE = 5  # seconds that the hub has for its first answer; its own client tries for nearly a minute
ON = {"1", "ON", "YES", "TRUE"}  # values that the hub's client takes as "set"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def cached_file(model_path: str, name: str) -> Path | None:
    """A file of a model on the hub as the hub's client has kept it, None if it has not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model_path, name)
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(cached) if isinstance(cached, str) else None


def is_cached(model_path: str) -> bool:
    """True if the config and all the weights of a model on the hub are already on this machine."""
    if cached_file(model_path, "config.json") is None:
        return False
    for name in WEIGHTS:
        if cached_file(model_path, name):
            return True
        index = cached_file(model_path, f"{name}.index.json")
        if index is not None:
            shards = set(parse_json(index.read_bytes(), str(index)).get("weight_map", {}).values())
            return bool(shards) and all(cached_file(model_path, shard) for shard in shards)
    return False


def unavailable(model_path: str) -> str | None:
    """Why a model on the hub is neither cached nor can be fetched, and the remedy; None if the hub answers.

    What the hub answers is left to its client, which knows the user's login.
    """
    if is_cached(model_path):
        return None
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ON:
            return f"it is not on this machine, and {name} is set; unset that, or give a checkpoint folder"
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT)
    if answers(f"{endpoint}/{model_path}/resolve/main/config.json"):
        return None
    return (
        f"it is not on this machine, and {endpoint} does not answer within {PATIENCE} seconds; check the network, or "
        "give a checkpoint folder"
    )


@functools.cache
def answers(url: str) -> bool:
    """True if anything but silence comes back. Asked in a thread, as looking up the name has no time limit."""
    answered = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answered.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def fetch_small_file(model_path: str, name: str) -> None:
    """Have the hub's client fetch and keep a file of a model, if it is not here yet. Raises OSError or ValueError."""
    if cached_file(model_path, name) is None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(model_path, name)
