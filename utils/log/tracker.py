"""What the trackers have in common: what each is told about a run, what it must do, and rollouts as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from utils.log.files import Row

PROGRESS_FILE = ".{}.json"  # of a tracker's name: how many rows of each file it has been shown
PATIENCE = 20.0  # seconds that a tracker gives its server to answer; `followers.LAST_WAIT` bounds all of them together

# What a row holds beside metrics, as curves. The names come last in a dashboard's alphabet.
OF_A_STEP = {"time": "written_at/seconds", "optimizer_step": "written_at/optimizer_step"}
OF_AN_EVALUATION = {"time": "written_at/eval_seconds"}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows beside the rows. `run_id` is the same after a resume, and for every tracker."""

    folder: str
    project: str
    name: str
    run_id: str
    tags: Sequence[str] = ()
    config: dict[str, Any] | None = None
    resume_at: int | None = None  # GRPO steps that were done before; None for a new run
    patience: float = PATIENCE


class Tracker(Protocol):
    """One run on one dashboard. It is made and called in a process of its own (`follow.py`).

    So it may wait, print, raise and draw random numbers as its library likes.
    """

    warning: str  # what keeps it from its server; empty if nothing does
    hint: str  # how to see the run, or to send it, for the end of the run

    def __init__(self, run: TrackedRun) -> None: ...

    def log(self, row: Row) -> None:
        """Show a row of metrics.jsonl, with `grpo_step` or `eval_step` as its axis."""

    def log_rollouts(self, split: str, grpo_step: int, rows: Sequence[Row]) -> None:
        """Show rows of rollouts.jsonl as a table."""

    def close(self, status: str) -> None:
        """Say how the run ended, and hand over what has not been sent."""


def default_name(folder: Path) -> str:
    """runs/lr_sweep/1e-4/seed_1 -> 1e-4/seed_1."""
    return "/".join(folder.parts[-2:])


def as_curves(row: Row) -> tuple[int, Row]:
    """A row of metrics.jsonl for a tracker that knows one axis: its step, and the rest as curves."""
    other = OF_AN_EVALUATION if "eval_step" in row else OF_A_STEP
    curves = {other.get(name, name): value for name, value in row.items() if name not in ("grpo_step", "eval_step")}
    return row.get("eval_step", row.get("grpo_step")), curves


def as_row(step: int, curves: Row) -> Row:
    """The row that `as_curves` was given. Curves of other programs count if they are called train/* or eval/*."""
    is_evaluation = any(is_of_evaluation(name) for name in curves)
    names = {written: name for name, written in (OF_AN_EVALUATION if is_evaluation else OF_A_STEP).items()}
    row = {"eval_step" if is_evaluation else "grpo_step": step} | {names.get(k, k): v for k, v in curves.items()}
    return row | ({"optimizer_step": int(row["optimizer_step"])} if "optimizer_step" in row else {})


def is_of_evaluation(curve: str) -> bool:
    """Whether a curve's values are of evaluations; one of them is called train/*."""
    return curve.startswith("eval/") or curve in ("train/eval_dt", *OF_AN_EVALUATION.values())


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells. A truth of several answers is written as one text, and every text can be encoded."""
    truths = [row["truth"] if isinstance(row["truth"], str) else " or ".join(row["truth"]) for row in rows]
    cells = [list((row | {"truth": truth}).values()) for row, truth in zip(rows, truths, strict=True)]
    return list(rows[0]), [[_encodable(cell) for cell in row] for row in cells]


def _encodable(cell: Any) -> Any:
    """A model may write half of a surrogate pair, which is no UTF-8."""
    return cell.encode(errors="replace").decode() if isinstance(cell, str) else cell


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [""])[0]


def describe(error: BaseException) -> str:
    """An error of a tracker in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def missing_package(name: str) -> ValueError:
    """What reading a tracker's runs raises if its package is not installed."""
    return ValueError(f'needs the package {name}, which is missing: pip install -e ".[trackers]"')
