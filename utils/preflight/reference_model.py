"""What keeps a reference policy from being used, as far as that shows in its small files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.preflight.adapter_checks import unusable_base
from utils.preflight.hub import unavailable
from utils.preflight.model_files import is_local, model_config, vocabulary, vocabulary_size


def reference_obstacles(config: Config) -> Iterator[str]:
    """Why the KL divergence from `reference_path` cannot be measured; nothing if there is no such reference."""
    path, model_path = config.training.reference_path, config.paths.model_path
    if not config.training.kl_coef or path is None or path == model_path:
        return
    named = f"training.reference_path = {path!r}"
    if is_local(path) and not (Path(path) / "config.json").is_file():
        yield f"{named}: no config.json there; give a checkpoint folder or a hub name"
        return
    if not is_local(path) and (reason := unavailable(path)) is not None:
        yield f"{named}: {reason}"
        return
    try:
        yield from (f"{named}: {reason}" for reason in unusable_base(path))
        difference = _other_vocabulary(path, model_path)
    except (ValueError, OSError) as error:
        yield f"{named}: {error}"
        return
    if difference is not None:
        yield f"{named}: {difference}; give a checkpoint with the vocabulary of paths.model_path = {model_path!r}"


def _other_vocabulary(path: str, model_path: str) -> str | None:
    """How two models' tokens differ, None if they do not or if the files that say so are not on this machine."""
    configs = model_config(path), model_config(model_path)
    sizes = [None if config is None else vocabulary_size(config) for config in configs]
    if None not in sizes and sizes[0] != sizes[1]:
        return f"its vocabulary has {sizes[0]} tokens, the policy's has {sizes[1]}"
    theirs, ours = vocabulary(path), vocabulary(model_path)
    if theirs is None or ours is None:
        return None
    tokens = {i: token for token, i in ours.items()}
    for token, i in theirs.items():  # a token that one of them has added does no harm where the other has none
        if tokens.get(i, token) != token:
            return f"id {i} is the token {token!r} in its vocabulary and {tokens[i]!r} in the policy's"
    return None
