"""What a model's small files say of it, in its folder or in the hub's cache. No weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from utils.adapter_files import base_of
from utils.preflight.hub import cached_file
from utils.preflight.memory_estimate import BYTES, count_parameters
from utils.problems import parse_json

CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
CONTEXT_NAMES = ("max_position_embeddings", "n_positions")  # GPT-2 calls it n_positions
SHAPES = Path(__file__).parents[2] / "configs/shapes"  # config.json of models that are too large to fetch for a look
SIZE_IN_NAME = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)  # 1.5B, 360M


def is_local(model_path: str) -> bool:
    """True if the model path means a local folder. `owner/name` counts as a hub name unless a folder `owner` exists:
    then it is a mistyped folder, such as `data/tiny_modle`."""
    path = Path(model_path)
    beside_others = len(path.parts) == 2 and path.parent.is_dir()
    return model_path.startswith((".", "/", "~")) or model_path.count("/") > 1 or path.exists() or beside_others


def model_file(model_path: str, name: str) -> Path | None:
    """A file of the model, from its folder or from the hub's cache; None if it is in neither."""
    if not is_local(model_path):
        return cached_file(model_path, name)
    file = Path(model_path) / name
    return file if file.is_file() else None


def model_config(model_path: str) -> dict[str, Any] | None:
    """The model's config.json, or its shape in `configs/shapes`; an adapter's is its base's. None if unknown.

    Raises ValueError if it is not a JSON object.
    """
    base = base_of(model_path)
    known = SHAPES / f"{base}.json"
    found = model_file(base, "config.json") or model_file(model_path, "config.json")
    return _json_object(found or (known if known.is_file() and not is_local(base) else None))


def base_folder(model_path: str) -> Path | None:
    """Where the files of a model, or of an adapter's base, are on this machine; None if they are not."""
    config_file = model_file(base_of(model_path), "config.json")
    return config_file and config_file.parent


def context_of(model_config: dict[str, Any]) -> int | None:
    """Tokens that the model's positions allow, prompt and response together; None if its config does not say."""
    sizes = model_config.get("text_config") or model_config
    return next((sizes[name] for name in CONTEXT_NAMES if isinstance(sizes.get(name), int)), None)


def vocabulary_size(model_config: dict[str, Any]) -> int | None:
    """Rows of the model's embedding; None if its config does not say."""
    size = (model_config.get("text_config") or model_config).get("vocab_size")
    return size if isinstance(size, int) else None


def vocabulary(model_path: str) -> dict[str, int] | None:
    """The model's tokens and their ids by its tokenizer.json, None if that is not on this machine.

    Raises ValueError if the file is not what tokenizers write.
    """
    file = model_file(model_path, "tokenizer.json")
    if file is None:
        return None
    content = _json_object(file)
    try:
        tokens = content["model"]["vocab"]
        if isinstance(tokens, list):  # of a Unigram model: [token, score] in the order of their ids
            tokens = {token: i for i, (token, _) in enumerate(tokens)}
        return tokens | {added["content"]: added["id"] for added in content.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no vocabulary in it") from error


def lacks_chat_template(model_path: str) -> bool:
    """True if the model's tokenizer is on this machine and has no chat template. Raises ValueError for broken JSON."""
    tokenizer = _json_object(model_file(model_path, "tokenizer_config.json"))
    if tokenizer is None or tokenizer.get("chat_template"):
        return False
    return not any(model_file(model_path, name) for name in CHAT_TEMPLATE_FILES)


def bytes_to_fetch(model_path: str) -> int | None:
    """About how many bytes a hub model's weights have, by its config.json or else by its name; None if unknown."""
    sizes = model_config(model_path)
    if sizes is not None:
        try:
            dtype = sizes.get("dtype") or sizes.get("torch_dtype")
            return count_parameters(sizes)["total"] * BYTES.get(dtype, 2)
        except ValueError:
            return None
    in_name = SIZE_IN_NAME.search(model_path.rpartition("/")[2])
    if in_name is None:
        return None
    return int(float(in_name[1]) * {"b": 10**9, "m": 10**6}[in_name[2].lower()]) * 2  # nearly all are in 16 bits


def _json_object(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    content = parse_json(file.read_bytes(), str(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, not {type(content).__name__}")
    return content
