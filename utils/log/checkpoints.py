"""The checkpoints of a run as files: which there are, and whether one is damaged. Nothing is loaded, so no torch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from utils.adapter_files import ADAPTER_FILES
from utils.log.files import replace_link

CHECKPOINTS_FOLDER = "checkpoints"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
NEEDED = (STATE_FILE, OPTIMIZER_FILE, "config.json", "tokenizer_config.json")  # beside the weights
WEIGHTS = "*.safetensors"


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or cannot be read; says what, and what --resume does without the checkpoint."""

    def __init__(self, checkpoint: Path, reason: str) -> None:
        others = [path for path in saved_checkpoints(checkpoint.parent) if path != checkpoint]
        then = f"goes on from {others[-1]}" if others else "begins anew"
        super().__init__(f"the checkpoint {checkpoint} is damaged ({reason}); delete that folder, and --resume {then}")


def saved_checkpoints(folder: Path) -> list[Path]:
    """The folders step_<n> in `folder`, lowest step first."""
    named = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal() and path.is_dir()]
    return sorted(named, key=step_of_checkpoint)


def step_of_checkpoint(checkpoint: Path) -> int:
    """GRPO steps completed when it was saved, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def link_checkpoints(folder: Path) -> None:
    """Let `last` and `best` lead to the checkpoints that are so, in a copy that came without its links."""
    saved = saved_checkpoints(folder)
    for name, chosen in (("last", saved), ("best", [path for path in saved if read_state(path).get("is_best")])):
        if chosen:
            replace_link(folder / name, chosen[-1].name)


def check_checkpoints(folder: Path) -> None:
    """Raise DamagedCheckpoint if the newest checkpoint cannot be loaded, or the state of an older one be read."""
    *older, newest = saved_checkpoints(folder) or [None]
    for checkpoint in older:
        read_state(checkpoint)
    if newest is not None:
        check_checkpoint(newest)


def check_checkpoint(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint for a file that is missing, cut off or empty, as far as names and sizes show."""
    is_adapter = any((checkpoint / name).is_file() for name in ADAPTER_FILES)
    needed = (*NEEDED, *ADAPTER_FILES) if is_adapter else NEEDED
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not is_adapter and not any(checkpoint.glob(WEIGHTS)):
        missing.append("model.safetensors")
    if missing:
        raise DamagedCheckpoint(checkpoint, f"without {', '.join(missing)}")
    read_state(checkpoint)
    for path in sorted(checkpoint.glob("*.json")):
        read_json(checkpoint, path.name)
    for index in sorted(checkpoint.glob("*.safetensors.index.json")):
        shards = set(read_json(checkpoint, index.name).get("weight_map", {}).values())
        absent = sorted(name for name in shards if not (checkpoint / name).is_file())
        if absent:
            raise DamagedCheckpoint(checkpoint, f"without {', '.join(absent)}")
    for path in sorted(checkpoint.glob(WEIGHTS)):
        if not _is_whole_safetensors(path):
            raise DamagedCheckpoint(checkpoint, f"{path.name} is cut off or no safetensors file")
    if not zipfile.is_zipfile(checkpoint / OPTIMIZER_FILE):  # what torch.save writes; its list of parts is at the end
        raise DamagedCheckpoint(checkpoint, f"{OPTIMIZER_FILE} is cut off or was not written by torch.save")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state, as it was saved. Raises DamagedCheckpoint."""
    state = read_json(checkpoint, STATE_FILE)
    if "grpo_step" in state:  # what `steps_done` was called in older checkpoints
        state["steps_done"] = state.pop("grpo_step")
    return state


def read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    """A file that holds one JSON object. Raises DamagedCheckpoint."""
    try:
        content = json.loads((checkpoint / name).read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(checkpoint, f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedCheckpoint(checkpoint, f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(checkpoint, f"{name} holds no JSON object")
    return content


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says: 8 bytes with the header's length, the header, the tensors."""
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        n_bytes = path.stat().st_size
        if not 0 < n_header <= n_bytes - 8:
            return False
        try:
            header = json.loads(file.read(n_header))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + n_header + max(ends, default=0) == n_bytes
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return False
