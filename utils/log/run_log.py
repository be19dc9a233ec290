"""What a run writes while it trains: the console and the JSONL files, which trackers follow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.log.console import TrainingConsole
from utils.log.files import (
    METRICS_FILE,
    ROLLOUTS_FILE,
    STATUS_FILE,
    STATUSES,
    WARNINGS_FILE,
    CannotWrite,
    cut_rows,
    encode_row,
    write_atomically,
)
from utils.log.followers import Followers, new_run_id
from utils.log.metrics import written_names
from utils.log.rollout_rows import choose_groups, rollout_rows
from utils.log.tracker import PATIENCE, TrackedRun, default_name
from utils.records import Reward, Rollout


class RunLog:
    """The log of one run. `metrics.jsonl` is the source of truth; console and trackers show what it holds.

    `grpo_step` counts completed steps in every call: 1 after the first, 0 for the evaluation before training.
    Not-a-number and infinity are written as null, with a `nonfinite` entry in the row that says which it was.
    Use it as a context manager, or call `close`, so that the terminal is given back.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        n_grpo_steps: int,
        trackers: Sequence[str] = (),
        tracker_project: str = "",
        tracker_run_name: str = "",
        tracker_tags: Sequence[str] = (),
        tracker_patience: float = PATIENCE,
        config: dict[str, Any] | None = None,
        tracker_id: str | None = None,
        resume_at: int | None = None,
        evaluated_at: int | None = None,
    ) -> None:
        """Open the files of `output_dir`, which is made if it is absent.

        `resume_at=k` goes on after GRPO step k, last evaluated at step `evaluated_at` (-1: not yet; None: at k). Later
        rows and rollouts are cut, so that each step is there once; warnings stay. `tracker_id` is the `tracker_id` of
        the run that is resumed. `trackers` are names of `trackers.TRACKERS`; the other arguments about them are fields
        of `TrackedRun`. Raises FileExistsError if the folder has metrics although `resume_at` is None.
        """
        self._output_dir = Path(output_dir)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        self._grpo_step = resume_at or 0
        self.lost_evaluation = False  # whether the evaluation at `resume_at` has to be made again
        kept, complaints = self._prepare_files(resume_at, evaluated_at)
        already_run = max((row["time"] for row in kept if isinstance(row.get("time"), int | float)), default=0.0)
        self._started = time.monotonic() - already_run
        mode = "x" if resume_at is None else "a"  # two runs must not be mixed
        self._files = {METRICS_FILE: (self._output_dir / METRICS_FILE).open(mode)}
        self._files[ROLLOUTS_FILE] = (self._output_dir / ROLLOUTS_FILE).open("a")
        self._console = TrainingConsole(n_grpo_steps, self._grpo_step)
        for complaint in complaints:
            self.warn(complaint)
        self._tracker_id = tracker_id or (new_run_id() if trackers else None)
        name, tags = tracker_run_name or default_name(self._output_dir), list(tracker_tags)
        about = (str(self._output_dir), tracker_project, name, self._tracker_id or "", tags, config, resume_at)
        self._followers = Followers(trackers, TrackedRun(*about, tracker_patience))

    def _prepare_files(self, resume_at: int | None, evaluated_at: int | None) -> tuple[list[dict], list[str]]:
        if resume_at is None:
            return [], []
        metrics_file = self._output_dir / METRICS_FILE
        evaluated_at = resume_at if evaluated_at is None else evaluated_at
        complaints = []
        if resume_at > 0 and not metrics_file.exists():
            complaints.append(f"{metrics_file} is missing: what was measured up to GRPO step {resume_at} is lost")
        kept, damage = cut_rows(metrics_file, resume_at, evaluated_at)
        if evaluated_at == resume_at and not any(row.get("eval_step") == resume_at for row in kept):
            self.lost_evaluation, evaluated_at = True, resume_at - 1
            damage.append(f"{metrics_file}: the evaluation at GRPO step {resume_at} is missing, so it is made again")
        complaints += damage + cut_rows(self._output_dir / ROLLOUTS_FILE, resume_at, evaluated_at)[1]
        (self._output_dir / STATUS_FILE).unlink(missing_ok=True)
        return kept, complaints

    @property
    def tracker_id(self) -> str | None:
        """What a resumed run passes as `tracker_id`; None if there has been no tracker."""
        return self._tracker_id

    @property
    def time(self) -> float:
        """Seconds that this run has been running, over all its resumed parts."""
        return time.monotonic() - self._started

    def train_step(self, grpo_step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Log one GRPO step: metrics by bare names ("reward"), and `optimizer_step`. Returns them by written names."""
        written = written_names(metrics, "train/")
        self._grpo_step = grpo_step
        self._write_metrics({"grpo_step": grpo_step}, written)
        self._console.train_step(grpo_step, written)
        return written

    def evaluation(self, grpo_step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Log one evaluation after `grpo_step` completed steps: metrics and `eval_dt` by bare names, as above."""
        written = written_names(metrics, "eval/")
        self._write_metrics({"eval_step": grpo_step}, written)
        self._console.evaluation(grpo_step, written)
        return written

    def rollouts(
        self,
        split: str,
        grpo_step: int,
        rollouts: Sequence[Rollout],
        rewards: Sequence[Reward],
        advantages: Sequence[float] | None = None,
        *,
        n: int,
        group_size: int = 1,
    ) -> None:
        """Write whole groups of a split, as many as n rollouts fill: "train", "nonfinite", or "eval".

        Rollouts of one prompt are `group_size` side by side. `choose_groups` says which groups are taken.
        """
        chosen = choose_groups(split, grpo_step, len(rollouts), group_size, n)
        for row in rollout_rows(split, grpo_step, rollouts, rewards, advantages, group_size=group_size, chosen=chosen):
            self._write(ROLLOUTS_FILE, row)

    def note(self, text: str) -> None:
        """Print a line, above the progress bar."""
        self._console.line(text)

    def end_progress(self) -> None:
        """End the progress bar where it is; later lines come below it."""
        self._console.close()

    def warn(self, text: str) -> None:
        """Print a warning and keep it in warnings.jsonl; if the disk is full, it is only printed."""
        self._console.line(f"warning: {text}", style="yellow")
        row = {"grpo_step": self._grpo_step, "time": round(self.time, 3), "warning": text}
        with contextlib.suppress(OSError), (self._output_dir / WARNINGS_FILE).open("a") as file:
            file.write(encode_row(row) + "\n")

    def close(self, status: str, detail: str = "") -> None:
        """Write status.json and let go of terminal, files and trackers. Called again, it does nothing.

        `status` says how the run ended: finished, collapsed, interrupted, time_limit or failed. Raises CannotWrite
        if status.json cannot be written, after the rest is closed.
        """
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
        if not self._files:
            return
        row = {"status": status, "grpo_step": self._grpo_step, "time": round(self.time, 3), "detail": detail}
        files, self._files = self._files, {}
        try:
            write_atomically(self._output_dir / STATUS_FILE, encode_row(row) + "\n")
        finally:
            for file in files.values():
                with contextlib.suppress(OSError):  # what a full disk refused before is refused again
                    file.close()
            self._console.close()
            self._tell(self._followers.close(status))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        status = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        try:
            self.close(status, "" if error is None else f"{kind.__name__}: {error}")
        except CannotWrite:
            if error is None:
                raise

    def _write(self, file_name: str, row: dict[str, Any]) -> None:
        try:
            self._files[file_name].write(encode_row(row) + "\n")
            self._files[file_name].flush()
        except OSError as error:
            raise CannotWrite(self._output_dir / file_name, error) from error

    def _write_metrics(self, axis: dict[str, int], metrics: dict[str, float]) -> None:
        values = {name: int(v) if name == "optimizer_step" else float(v) for name, v in metrics.items()}
        row = {**axis, "time": round(self.time, 3), **values}
        self._write(METRICS_FILE, row)
        self._tell(self._followers.messages())

    def _tell(self, messages: Iterable[tuple[str, str]]) -> None:
        for kind, text in messages:
            (self.warn if kind == "warning" else self.note)(text)
