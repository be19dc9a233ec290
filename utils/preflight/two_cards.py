"""Where vLLM has a GPU of its own beside the policy's (`vllm.device`): what that asks of a config and of a machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from configs.defaults import Config
from utils.engines import card_index
from utils.preflight.loss_rules import Rule

ENGINES = "cuda:0"  # where vLLM runs in the training process: it takes the first GPU that the process sees


def card_rules(config: Config) -> list[Rule]:
    """What `vllm.device` can be, and beside what."""
    t, own = config.training, config.vllm.device
    return [
        (
            ("vllm.device",),
            own is not None and own != ENGINES,
            f"vLLM in the training process runs on the first GPU that the process sees; set it to {ENGINES} and "
            "training.device to cuda:1 (CUDA_VISIBLE_DEVICES=1,0 swaps the cards), or to null, for the policy's GPU",
        ),
        (
            ("vllm.device", "training.device"),
            own is not None and not card_index(t.device),
            "these are not two GPUs; set training.device to cuda:1, or vllm.device to null",
        ),
        (
            ("vllm.device", "training.rollout_engine"),
            own is not None and t.rollout_engine == "transformers",
            "the transformers engine samples from the policy itself, on its GPU; set rollout_engine to vllm, or "
            "vllm.device to null",
        ),
    ]


def card_obstacles(config: Config, n_visible: Callable[[], int | None]) -> Iterator[str]:
    """A GPU that the config names and this process does not see. `n_visible` is asked only if it matters."""
    index = card_index(config.training.device)
    if not index:
        return
    n_gpus = n_visible()
    if n_gpus is not None and index >= n_gpus:
        both = "" if config.vllm.device is None else " and vllm.device=null"
        yield (
            f"training.device = {config.training.device!r}: this process sees {n_gpus} GPU{'' if n_gpus == 1 else 's'} "
            f"(CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); make {index + 1} visible, "
            f"or set training.device=cuda:0{both}"
        )


def process_obstacles(config: Config) -> Iterator[str]:
    """torchrun gives each of its processes one GPU, which leaves none for an engine."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if config.vllm.device is not None and world_size != "1":
        yield (
            f"vllm.device = {config.vllm.device!r} beside torchrun (WORLD_SIZE = {world_size}): each of its processes "
            "has one GPU, for policy and engine; set vllm.device=null, or start train_grpo.py without torchrun"
        )
