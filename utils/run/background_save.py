"""Checkpoints written in the background: the step goes on while a copy in host memory goes to the disk."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import torch

from utils.algorithm.policy import save_policy, saved_weights
from utils.run.checkpoint import Checkpoints, SaveFailure, TrainState


class HeldPolicy:
    """What a checkpoint holds of a policy as it was, in host memory, as `Checkpoints.save` asks for it."""

    def __init__(self, policy: torch.nn.Module) -> None:
        self._policy = policy
        self._weights = to_host(saved_weights(policy))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights

    def save_pretrained(self, folder: Any) -> None:
        """`PreTrainedModel.save_pretrained`, of the copy."""
        save_policy(self._policy, folder, self._weights)


class HeldOptimizer:
    """An optimizer's state as it was, in host memory."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._state = to_host(optimizer.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return self._state


def to_host(tree: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU; equal tensors (tied weights) stay one."""
    copies: dict[tuple[int, tuple, tuple], torch.Tensor] = {}

    def copied(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            key = (node.data_ptr(), tuple(node.shape), node.stride())
            if node.numel() == 0 or key not in copies:
                copies[key] = node.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(node, dict):
            return type(node)((name, copied(child)) for name, child in node.items())
        if isinstance(node, list | tuple):
            return type(node)(copied(child) for child in node)
        return copy.deepcopy(node)

    return copied(tree)


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread; a save that begins first waits for the one before.

    How `Checkpoints` writes does not change, so every checkpoint is whole after a kill at any instant.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.seconds: float | None = None  # of the last save that ended, writing included
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        state: TrainState,
        policy: torch.nn.Module,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        is_best: bool,
    ) -> None:
        """Copy what is to be saved, and begin to write it."""
        self.wait()
        held_policy, held_optimizer = HeldPolicy(policy), HeldOptimizer(optimizer)

        def write() -> None:
            started = time.perf_counter()
            try:
                self.checkpoints.save(state, held_policy, tokenizer, held_optimizer, is_best)
            except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
                self._error = error
            self.seconds = time.perf_counter() - started

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> SaveFailure | None:
        """`settle`, then return how the last save failed, or None. Raises any other exception of the save."""
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.checkpoints.failure


class IdleSaver(BackgroundSaver):
    """Of a rank whose state rank 0 saves: all ranks have the same."""

    def begin(self, *arguments: Any, **options: Any) -> None:
        pass
