"""What several ranks ask of a config and of this machine, and what comes to each of them. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from configs.defaults import Config
from utils.preflight.machine import n_visible_gpus
from utils.ranks import launched


def parallel_obstacles(config: Config) -> Iterator[str]:
    """What keeps the config from running on as many ranks as torchrun has started."""
    t, launch = config.training, launched()
    if launch.n_ranks == 1:
        return
    n_prompts = t.rollout_batch_size // t.group_size
    if n_prompts % launch.n_ranks:
        yield (
            f"training.rollout_batch_size = {t.rollout_batch_size}: its {n_prompts} prompts do not divide among "
            f"{launch.n_ranks} ranks; make them a multiple, or change --nproc-per-node"
        )
    if t.train_batch_size % launch.n_ranks:
        yield (
            f"training.train_batch_size = {t.train_batch_size} does not divide among {launch.n_ranks} ranks; make it a "
            "multiple, or change --nproc-per-node"
        )
    if not t.device.startswith("cuda"):
        return
    if t.device not in ("cuda", "cuda:0"):
        yield f"training.device = {t.device!r}: under torchrun each rank takes a card of its own; set it to cuda:0"
    cards = n_visible_gpus()
    if cards is not None and 0 < cards < launch.n_local:
        yield (
            f"torchrun has started {launch.n_local} ranks here, and there are {cards} cards: set --nproc-per-node to "
            f"{cards} or less"
        )


def shares(config: Config) -> str:
    """What each rank does of a step, for people."""
    t, n_ranks = config.training, launched().n_ranks
    n_prompts = t.rollout_batch_size // t.group_size // n_ranks
    return (
        f"{n_ranks}; each samples and scores {n_prompts} prompts ({n_prompts * t.group_size} rollouts) per GRPO step, "
        f"and trains on about {t.train_batch_size // n_ranks} rollouts per optimizer step"
    )
