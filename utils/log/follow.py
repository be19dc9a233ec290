"""Follow the files of a run and show them to one tracker: a process of its own, which `followers.py` starts.

Its stdin is a line of JSON, {"tracker": name, "run": fields of TrackedRun}, and when the run has ended a second line,
its status. If the process that trains is killed, stdin ends without one. Its stdout is a line of JSON per message for
the console, {"warning": text} or {"note": text}. What the tracker's library prints goes to stderr, which is a file in
the run's folder. An error ends this process: nothing waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.log.files import METRICS_FILE, ROLLOUTS_FILE, Row
from utils.log.tracker import PROGRESS_FILE, TrackedRun, Tracker
from utils.log.trackers import TRACKERS

POLL_SECONDS = 0.5
KILLED = "killed"


class NewRows:
    """The rows of a JSONL file that are not shown yet. A row that is being written is left for the next time."""

    def __init__(self, path: Path, n_shown: int) -> None:
        self._file = path.open("rb")
        self._n_read, self._n_shown = 0, n_shown
        self.n_taken = n_shown

    def __iter__(self) -> Iterator[Row]:
        while line := self._file.readline():
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            self._n_read += 1
            if self._n_read > self._n_shown:
                self.n_taken = self._n_read
                yield as_measured(json.loads(line))


def as_measured(row: Row) -> Row:
    """The row with the NaN and infinity that strict JSON has no words for."""
    nonfinite = row.pop("nonfinite", {})
    return row | {name: float(text) for name, text in nonfinite.items()}


class Follower:
    """Shows new rows to a tracker, and notes how many are shown, so that a resumed run goes on behind them."""

    def __init__(self, folder: Path, name: str, tracker: Tracker) -> None:
        self._tracker = tracker
        self._progress = folder / PROGRESS_FILE.format(name)
        shown: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):  # none yet, or cut off: then all rows are shown once more
            shown = json.loads(self._progress.read_text())
        self._metrics, self._rollouts = (
            NewRows(folder / file, min(shown.get(file, 0), _n_rows(folder / file)))
            for file in (METRICS_FILE, ROLLOUTS_FILE)
        )
        self._group: list[Row] = []  # of one split and step, which become one table

    def show_new(self, is_last: bool = False) -> None:
        """Show what has been written since the last call. Rollouts wait until no more of their table are coming."""
        for row in self._metrics:
            self._tracker.log(row)
        is_growing = False
        for row in self._rollouts:
            if self._group and _table(row) != _table(self._group[0]):
                self._show_group()
            self._group.append(row)
            is_growing = True
        if self._group and (is_last or not is_growing):
            self._show_group()
        n_shown = {METRICS_FILE: self._metrics.n_taken, ROLLOUTS_FILE: self._rollouts.n_taken - len(self._group)}
        self._progress.write_text(json.dumps(n_shown))

    def _show_group(self) -> None:
        group, self._group = self._group, []
        self._tracker.log_rollouts(*_table(group[0]), group)


def _table(row: Row) -> tuple[str, int]:
    return row["split"], row["grpo_step"]


def _n_rows(path: Path) -> int:
    """Whole rows in a file, which a resume may have cut."""
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def main() -> None:
    # A signal to the whole job asks the run to end; this process ends after it. No-ops, not SIG_IGN: the helpers that a
    # tracker's library starts would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    to_run = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    trains, stdin = os.getppid(), os.fdopen(0, "rb", buffering=0)
    job = json.loads(stdin.readline())
    run = TrackedRun(**job["run"])

    def tell(kind: str, text: str) -> None:
        with contextlib.suppress(OSError):  # the run is gone
            to_run.write(json.dumps({kind: text}) + "\n")

    tracker = TRACKERS[job["tracker"]](run)
    if tracker.warning:
        tell("warning", f"{job['tracker']}: {tracker.warning}")
    follower = Follower(Path(run.folder), job["tracker"], tracker)
    while not select.select([stdin], [], [], POLL_SECONDS)[0] and os.getppid() == trains:
        follower.show_new()
    is_alive = os.getppid() == trains  # else another process may hold the pipe open, and stdin would never end
    status = stdin.readline().decode().strip() if is_alive else ""
    follower.show_new(is_last=True)
    tracker.close(status or KILLED)
    if tracker.hint:
        tell("note", f"{job['tracker']} {tracker.hint}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
