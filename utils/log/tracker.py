"""The tracker, Weights & Biases: runs are sent to it and read back from it. Only this file imports wandb."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRACKER_TIMEOUT = 30.0  # seconds that a dead network may cost at the start of a run, and again at its end


class NullTracker:
    """Replaces a tracker that is off or has failed."""

    offline_because = ""
    is_offline = False

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, row: dict[str, Any]) -> None:
        pass

    def log_rollouts(self, split: str, grpo_step: int, rows: Sequence[dict[str, Any]]) -> None:
        pass

    def close(self, status: str) -> None:
        pass


class WandbTracker:
    """A Weights & Biases run. Without login or network it is kept offline, in the run's folder."""

    def __init__(
        self,
        output_dir: Path,
        project: str,
        name: str | None,
        tags: Sequence[str],
        config: dict[str, Any] | None,
        run_id: str | None,
    ) -> None:
        import wandb

        wandb_settings = wandb.Settings(
            console="off", silent=True, init_timeout=TRACKER_TIMEOUT, finish_timeout=TRACKER_TIMEOUT
        )
        # offline runs have no name of their own, and the folder's says more than the one wandb would draw
        name = name or "/".join(output_dir.parts[-2:])
        options = {"project": project, "name": name, "tags": list(tags), "config": config, "dir": output_dir}
        options |= {"settings": wandb_settings} | ({"id": run_id, "resume": "allow"} if run_id else {})
        self.offline_because = ""
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            self.offline_because = "not logged in"  # wandb.init would ask for a key, and wait for it
            options["mode"] = "offline"
        try:
            self._run = wandb.init(**options)
        except wandb.errors.CommError as error:
            self.offline_because = f"no connection ({_first_line(error)})"
            self._run = wandb.init(**options, mode="offline")
        self.is_offline = bool(self.offline_because) or wandb.setup().settings.mode == "offline"
        self.run_id = self._run.id
        self._run.define_metric("grpo_step")
        self._run.define_metric("train/*", step_metric="grpo_step")
        self._run.define_metric("eval_step")
        self._run.define_metric("eval/*", step_metric="eval_step")
        self._run.define_metric("train/eval_dt", step_metric="eval_step")

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(row)

    def log_rollouts(self, split: str, grpo_step: int, rows: Sequence[dict[str, Any]]) -> None:
        """A table of rollouts, a row each. A truth of several answers is written as one text."""
        import wandb

        columns = list(rows[0])
        truths = [row["truth"] if isinstance(row["truth"], str) else " or ".join(row["truth"]) for row in rows]
        data = [list((row | {"truth": truth}).values()) for row, truth in zip(rows, truths, strict=True)]
        axis = "eval_step" if split == "eval" else "grpo_step"
        self._run.log({axis: grpo_step, f"rollouts/{split}": wandb.Table(columns=columns, data=data)})

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def fetch_wandb_runs(project: str) -> list[dict[str, Any]]:
    """The runs of `entity/project`, or the one of `entity/project/run_id`: name, id, seed, ending, and history as rows.

    Raises ValueError if they can't be fetched.
    """
    try:
        import wandb

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
    except tracker_errors() as error:
        raise ValueError(describe(error)) from error


def describe(error: Exception) -> str:
    """An error of the tracker in one line."""
    return f"{type(error).__name__}: {_first_line(error)}"


def tracker_errors() -> tuple[type[Exception], ...]:
    """What wandb raises when it fails: its own errors, once it is imported, and what the libraries under it raise."""
    own = [sys.modules["wandb"].Error] if hasattr(sys.modules.get("wandb"), "Error") else []
    below = [AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError]
    return (*own, *below)
