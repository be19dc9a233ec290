"""Weights & Biases: runs are sent to it and read back from it. Only this file imports wandb."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from utils.log.files import Row
from utils.log.tracker import TrackedRun, describe, first_line, missing_package, table_of


class WandbTracker:
    """A Weights & Biases run. Without login or network it is kept offline, in the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=run.patience,
            finish_timeout=run.patience,
            x_stats_pid=os.getppid(),  # the process that trains, not this one
        )
        options = {"project": run.project, "name": run.name, "tags": list(run.tags), "config": run.config}
        options |= {"dir": run.folder, "settings": settings, "id": run.run_id}
        options |= {} if run.resume_at is None else {"resume": "allow"}
        reason = ""
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            reason, options["mode"] = "not logged in", "offline"  # wandb.init would ask for a key, and wait for it
        try:
            self._run = wandb.init(**options)
        except wandb.errors.CommError as error:
            reason = f"no connection ({first_line(error)})"
            self._run = wandb.init(**options, mode="offline")
        sync = f"wandb sync {Path(run.folder)}/wandb/offline-*"
        self.warning = f"{reason}; kept offline, `{sync}` sends it later" if reason else ""
        is_offline = bool(reason) or wandb.setup().settings.mode == "offline"
        self.hint = f"kept this run offline; send it with\n  {sync}" if is_offline else ""
        self._run.define_metric("grpo_step")
        self._run.define_metric("train/*", step_metric="grpo_step")
        self._run.define_metric("eval_step")
        self._run.define_metric("eval/*", step_metric="eval_step")
        self._run.define_metric("train/eval_dt", step_metric="eval_step")

    def log(self, row: Row) -> None:
        self._run.log(row)

    def log_rollouts(self, split: str, grpo_step: int, rows: Sequence[Row]) -> None:
        import wandb

        columns, cells = table_of(rows)
        axis = "eval_step" if split == "eval" else "grpo_step"
        self._run.log({axis: grpo_step, f"rollouts/{split}": wandb.Table(columns=columns, data=cells)})

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status in ("failed", "killed")))


def fetch_wandb_runs(project: str) -> list[Row]:
    """The runs of `entity/project`, or the one of `entity/project/run_id`: name, id, seed, ending, and history as rows.

    Raises ValueError if they can't be fetched.
    """
    try:
        import wandb
    except ImportError as error:
        raise missing_package("wandb") from error
    # beside its own errors, wandb lets through what the libraries under it raise
    below = (AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    try:
        api = wandb.Api()
        runs = [api.run(project)] if project.count("/") == 2 else list(api.runs(project))
        return [
            {
                "name": run.name,
                "id": run.id,
                "seed": run.config.get("training", {}).get("seed"),
                "ending": run.summary.get("status", run.state),
                "history": list(run.scan_history()),
            }
            for run in runs
        ]
    except (wandb.Error, *below) as error:
        raise ValueError(describe(error)) from error
