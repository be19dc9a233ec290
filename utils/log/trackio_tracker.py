"""trackio: runs go to a database on this machine, or to the server that TRACKIO_SERVER_URL or TRACKIO_SPACE_ID names.

Only this file imports trackio.
"""

from __future__ import annotations

import shlex
import sqlite3
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from utils.log.files import Row
from utils.log.tracker import TrackedRun, as_curves, as_row, describe, missing_package, table_of

OWN = ("step", "timestamp")  # what trackio adds to a row
ENDING = "run "  # begins the title of the alert that says how the run ended
LEVELS = {"finished": "info", "collapsed": "warn", "interrupted": "warn", "time_limit": "warn"}  # else error


class TrackioTracker:
    """A trackio run. What its server does not take stays in the local database, and trackio sends it later."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._run = trackio.init(
                run.project,
                name=run.name,
                config={**(run.config or {}), "tags": list(run.tags)},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # trackio resumes by name, and takes the newest run that has it; two runs may share a name, but no id
        self._run.id = run.run_id
        failures = [str(warning.message) for warning in caught if str(warning.message).startswith("trackio.init()")]
        self.warning = failures[0] if failures else ""
        self.hint = f"shows this run with\n  trackio show --project {shlex.quote(run.project)}"

    def log(self, row: Row) -> None:
        step, curves = as_curves(row)
        self._run.log(curves, step=step)

    def log_rollouts(self, split: str, grpo_step: int, rows: Sequence[Row]) -> None:
        import trackio

        columns, cells = table_of(rows)
        self._run.log({f"rollouts/{split}": trackio.Table(columns=columns, data=cells)}, step=grpo_step)

    def close(self, status: str) -> None:
        """An alert says how the run ended: trackio's runs have no status. A webhook, if one is set, hears of it too."""
        import trackio

        level = trackio.AlertLevel(LEVELS.get(status, "error"))
        self._run.alert(title=ENDING + status, text=f"{self._run.name}: {status}", level=level)
        self._run.finish()


def fetch_trackio_runs(source: str) -> list[Row]:
    """The runs of `project`, or the one of `project/run`, from this machine's database: see `fetch_wandb_runs`.

    Raises ValueError if there are none.
    """
    try:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage
    except ImportError as error:
        raise missing_package("trackio") from error
    project, _, wanted = source.partition("/")
    try:
        return [
            {
                "name": run.name,
                "id": run.id,
                "seed": ((run.config or {}).get("training") or {}).get("seed"),
                "ending": _ending(run.alerts()),
                "history": [_as_row(row) for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id)],
            }
            for run in _chosen(trackio.Api().runs(project), wanted)
        ]
    except (OSError, sqlite3.Error) as error:
        raise ValueError(describe(error)) from error


def _chosen(runs: Iterable[Any], wanted: str) -> list[Any]:
    chosen = [run for run in runs if wanted in ("", run.name, run.id)]
    if not chosen:
        raise ValueError(f"no run of that name or id; the project has {', '.join(run.name for run in runs) or 'none'}")
    return chosen


def _as_row(logged: Row) -> Row:
    """Tables have a row of their own there, which becomes one without metrics."""
    curves = {name: v for name, v in logged.items() if name not in OWN and not isinstance(v, dict | list)}
    return as_row(logged["step"], curves)


def _ending(alerts: Sequence[Row]) -> str:
    """How the run ended last; a resumed run has an alert for each of its parts."""
    endings = sorted((alert["timestamp"], alert["title"]) for alert in alerts if alert["title"].startswith(ENDING))
    return endings[-1][1].removeprefix(ENDING) if endings else "unfinished"
