"""Checkpoints that are whole or absent, with everything that a run needs to continue as if it had never stopped.

A checkpoint is a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, with the trainer's own state beside the
model: `trainer_state.json` and `optimizer.pt`. It is written under another name, flushed to the disk and renamed, so a
kill at any instant leaves the checkpoints that were there before.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from utils.log.checkpoints import OPTIMIZER_FILE, STATE_FILE, DamagedCheckpoint, read_state, saved_checkpoints
from utils.log.files import UNFINISHED, flush, whole_folder, write_atomically
from utils.seeding import capture_random_state, restore_random_state

REMOVING, LINKING = ".removing-", ".linking-"  # with UNFINISHED, what a killed save may leave behind


@dataclass(frozen=True)
class TrainState:
    """Where a run is between two GRPO steps: all but weights and optimizer. It is JSON-able.

    Rollouts, evaluation and minibatch order draw from seeds derived from the step, so they need no state here;
    `random`, the global generators that library code draws from, is captured when the state is made.
    """

    steps_done: int = 0  # GRPO steps completed
    optimizer_step: int = 0  # optimizer steps taken
    skipped_in_a_row: int = 0  # optimizer steps skipped since the last one taken (NaN or infinity)
    problem_stream: dict = field(default_factory=dict)
    evaluated_step: int | None = None  # the GRPO step last evaluated at
    best_reward: float | None = None  # best eval/reward so far
    best_step: int | None = None  # and the GRPO step it was reached at
    guard: dict = field(default_factory=dict)
    advisor: dict = field(default_factory=dict)
    tracker_id: str | None = None
    random: dict = field(default_factory=capture_random_state)


@dataclass(frozen=True)
class SaveFailure:
    """A save that failed. The earlier checkpoints are still there; `newest` is the newest of them."""

    grpo_step: int
    reason: str
    needed_bytes: int
    free_bytes: int
    newest: Path | None
    disk_full: bool

    def __str__(self) -> str:
        needed, free = self.needed_bytes / 2**20, self.free_bytes / 2**20
        kept = f"{self.newest} is kept" if self.newest else "No checkpoint was saved before"
        remedy = "; free some space, or lower checkpoint_keep" if self.disk_full else ""
        return (
            f"the checkpoint of GRPO step {self.grpo_step} was not saved: {self.reason}. It needs about {needed:,.1f} "
            f"MiB; {free:,.1f} MiB are free. {kept}{remedy}"
        )


class Checkpoints:
    """The checkpoints of one run: `folder/step_000040`, and links `best` and `last` to two of them.

    Keeps the `keep` newest, the best and the last. `failure` is the last save's, None if it succeeded, so that the loop
    can repeat a save until it succeeds.
    """

    def __init__(self, folder: Path | str, keep: int) -> None:
        """Read which checkpoints there are, and change nothing. Raises DamagedCheckpoint if a state cannot be read."""
        self.folder, self.keep = Path(folder), keep
        self.failure: SaveFailure | None = None
        self._best_names = {path.name for path in self.steps() if read_state(path).get("is_best")}

    def tidy(self) -> None:
        """Remove what a killed process left, and mend the links. Only the process that writes there may do this."""
        if self.folder.is_dir():
            self._remove_leftovers()
            self._update_links()

    def steps(self) -> list[Path]:
        """All checkpoints, oldest first. Each is whole, unless something else has damaged it."""
        return saved_checkpoints(self.folder)

    def newest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return next(reversed(self.steps()), None)

    def best(self) -> Path | None:
        """The newest checkpoint that was the best so far when it was saved, or None."""
        return next((path for path in reversed(self.steps()) if path.name in self._best_names), None)

    def save(
        self,
        state: TrainState,
        policy: torch.nn.Module,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        is_best: bool = False,
    ) -> SaveFailure | None:
        """Save, then remove older checkpoints beyond `keep`; returns the failure if the disk refused, else None.

        If the step has a checkpoint already, it has the same weights. Then only its state file is written anew, with
        what an evaluation has added since.
        """
        final = self.folder / f"step_{state.steps_done:06d}"
        needed = _tensor_bytes([policy.state_dict(), optimizer.state_dict()])
        self.failure = None
        try:
            if final.is_dir():
                _write_state(final, state, is_best)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                flush(self.folder.parent)
                if needed > shutil.disk_usage(self.folder).free:
                    raise OSError(errno.ENOSPC, "not enough space on the disk")
                with whole_folder(final) as unfinished:
                    _write(unfinished, state, policy, tokenizer, optimizer, is_best)
            self._best_names = self._best_names - {final.name} | ({final.name} if is_best else set())
            self._update_links()
            self._remove_old()
        except (OSError, SafetensorError) as error:
            self._remove_leftovers()
            existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            self.failure = SaveFailure(
                state.steps_done, str(error), needed, free, newest=self.newest(), disk_full=_means_full_disk(error)
            )
        return self.failure

    def load(self, path: Path, optimizer: torch.optim.Optimizer) -> TrainState:
        """Put the optimizer's state and the global random generators back; returns the rest.

        Weights come from `from_pretrained(path)`, tokenizer too. The optimizer keeps its own hyperparameters, which
        come from the config. Call this last, as building the other parts draws random numbers. Raises
        DamagedCheckpoint.
        """
        entries = read_state(path)
        wanted = {"is_best", *TrainState.__dataclass_fields__}
        if entries.keys() != wanted:
            odd = ", ".join(sorted(entries.keys() ^ wanted))
            raise DamagedCheckpoint(path, f"{STATE_FILE} is not of this version: {odd}")
        _load_optimizer(path, optimizer)
        del entries["is_best"]
        restore_random_state(entries["random"])
        return TrainState(**entries)

    def _update_links(self) -> None:
        """Links follow from the folders alone, so a kill between a rename and its link is mended at the next start."""
        for name, target in (("last", self.newest()), ("best", self.best())):
            if target is not None:
                link = self.folder / f"{LINKING}{name}"
                link.unlink(missing_ok=True)
                link.symlink_to(target.name, target_is_directory=True)
                link.replace(self.folder / name)
        flush(self.folder)

    def _remove_old(self) -> None:
        """Rename before removing: a folder with a checkpoint's name is whole at every instant."""
        for path in self.steps()[: -self.keep]:
            if path != self.best():
                path.rename(self.folder / f"{REMOVING}{path.name}")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for path in [*self.folder.glob(".*"), *self.folder.glob(f"step_*/{UNFINISHED}*")]:
            if not path.name.startswith((UNFINISHED, REMOVING, LINKING)):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _write(folder: Path, state: TrainState, policy: Any, tokenizer: Any, optimizer: Any, is_best: bool) -> None:
    """Write all files of a checkpoint."""
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_state(folder, state, is_best)
    try:
        with (folder / OPTIMIZER_FILE).open("wb") as file:
            torch.save(optimizer.state_dict(), file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's zip writer stumbles over a refused write, and hides it
            cause = error.__context__
            raise OSError(cause.errno, f"{OPTIMIZER_FILE}: {cause.strerror or cause}") from error
        raise


def _load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's saved state, except its hyperparameters. Raises DamagedCheckpoint."""
    try:
        saved = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # torch's own message may advise to load it with weights_only=False, which would run code in the file
        raise DamagedCheckpoint(checkpoint, f"{OPTIMIZER_FILE} cannot be read as tensors") from error
    try:
        for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            saved_group.update({name: value for name, value in group.items() if name != "params"})
        optimizer.load_state_dict(saved)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(checkpoint, f"{OPTIMIZER_FILE} does not fit the model") from error


def _means_full_disk(error: OSError | SafetensorError) -> bool:
    """Whether the disk, or the user's quota, is full. A safetensors error has the number only in its text."""
    return any(
        getattr(error, "errno", None) == number or f"(os error {number})" in str(error)
        for number in (errno.ENOSPC, errno.EDQUOT)
    )


def _write_state(folder: Path, state: TrainState, is_best: bool) -> None:
    write_atomically(folder / STATE_FILE, json.dumps(asdict(state) | {"is_best": is_best}))


def _tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists; a tensor that appears twice (tied weights) counts once."""

    def tensors(node: Any) -> Iterable[torch.Tensor]:
        if isinstance(node, torch.Tensor):
            yield node
        elif isinstance(node, dict | list | tuple):
            for child in node.values() if isinstance(node, dict) else node:
                yield from tensors(child)

    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors(tree)}.values())
