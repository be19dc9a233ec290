"""What there is to say about a run that is shared: its steps, checkpoints, versions and config, as metadata.json."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.adapter_files import base_of
from utils.log.checkpoints import CHECKPOINTS_FOLDER, check_checkpoint, step_of_checkpoint
from utils.log.files import CONFIG_FILE, METRICS_FILE, earlier_launches
from utils.plots.history import Run, load_run
from utils.preflight.config import load_config, to_dict
from utils.preflight.model_files import is_local

HEADLINE = "eval/reward"
FIGURES_FILE = "figures.json"  # what evaluate.py --output writes
LAST_FOLDER = "last"  # in the repository: the last checkpoint, if it is not the best one
NEEDED = {"started", "seed", "command"}  # of each launch in run.json


@dataclass
class SharedRun:
    """A run on this machine, and `place`, its folder in the repository: "." or "1e-4/seed_1"."""

    folder: Path
    place: str
    curves: Run
    config: dict[str, Any]
    launches: list[dict[str, Any]]
    best: Path | None  # checkpoints; None if there is none
    last: Path
    evaluations: dict[str, dict] = field(default_factory=dict)  # by "best" or "last": what evaluate.py measured

    @property
    def identity(self) -> str:
        """The same for every upload of this run, and for no other run."""
        return f"{self.launches[0]['started']} seed {self.launches[0]['seed']}"

    @property
    def base(self) -> str | None:
        """The model on the Hub that the checkpoints are adapters of; None if they are whole models."""
        base = base_of(str(self.last))
        return None if base == str(self.last) else base

    @property
    def command(self) -> str:
        """The command of the first launch, without the folders of this machine's Python."""
        words = shlex.split(self.launches[0]["command"])
        return shlex.join(["python", *words[1:]])

    def checkpoints(self) -> dict[str, tuple[Path, str]]:
        """{"best": (folder here, folder there)}: the best is where the run is, so that it loads without more words."""
        if self.best is None:
            return {"last": (self.last, self.place)}
        chosen = {"best": (self.best, self.place)}
        if self.last != self.best:
            chosen["last"] = (self.last, LAST_FOLDER if self.place == "." else f"{self.place}/{LAST_FOLDER}")
        return chosen

    def metadata(self) -> dict[str, Any]:
        first, newest = self.launches[0], self.launches[-1]
        rewards = self.curves.curves.get(HEADLINE, {})

        def about(name: str, there: str, step: int) -> dict[str, Any]:
            point = rewards.get(step)
            known = {"step": step, "folder": there, HEADLINE: None if point is None else point.value}
            return known | ({"evaluation": self.evaluations[name]} if name in self.evaluations else {})

        placed = self.checkpoints()
        saved = {name: about(name, there, step_of_checkpoint(here)) for name, (here, there) in placed.items()}
        if self.best is not None:
            saved.setdefault("last", saved["best"])
        return {
            "id": self.identity,
            "ended": self.curves.ending,
            "steps": self.curves.last_step,
            "seconds": self.curves.seconds,
            **saved,
            "command": self.command,
            "commit": newest.get("git", {}).get("commit"),
            "uncommitted_changes": newest.get("git", {}).get("dirty"),
            "launches": len(self.launches),
            "python": newest.get("python"),
            "packages": newest.get("packages"),
            "gpus": newest.get("gpus"),
            "seed": first["seed"],
            "config": self.config,
        }


def find_runs(folders: Sequence[Path]) -> list[SharedRun]:
    """The runs in the folders: one folder that is a run goes to the top of the repository, else each to its own place.

    Raises ValueError, one line, for a folder without runs, two runs for one place, and a run that cannot be shared.
    """
    if len(folders) == 1 and (folders[0] / METRICS_FILE).is_file():
        return [shared_run(folders[0], ".")]
    runs: dict[str, SharedRun] = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob(METRICS_FILE))
        if not found:
            raise ValueError(f"{folder}: no run in it (no {METRICS_FILE}); give a run's folder, or a folder of runs")
        for path in found:
            place = path.relative_to(folder).as_posix() if path != folder else path.resolve().name
            if place in runs:
                raise ValueError(f"{runs[place].folder} and {path} would both be {place} there; upload one at a time")
            runs[place] = shared_run(path, place)
    return list(runs.values())


def shared_run(folder: Path, place: str) -> SharedRun:
    """Read one run. Raises ValueError if a file that it needs is missing or damaged."""
    curves, _ = load_run(folder)
    launches = earlier_launches(folder)
    is_known = launches and all(isinstance(item, dict) and item.keys() >= NEEDED for item in launches)
    if not is_known or not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: no whole run.json or no {CONFIG_FILE}, so nobody could tell what the run was")
    links = {name: folder / CHECKPOINTS_FOLDER / name for name in ("best", "last")}
    saved = {name: link.resolve() for name, link in links.items() if link.is_dir()}
    if "last" not in saved:
        raise ValueError(f"{folder}: no checkpoint is saved; upload the run once {links['last']} is there")
    for checkpoint in saved.values():
        check_checkpoint(checkpoint)
        base = base_of(str(checkpoint))
        if base != str(checkpoint) and is_local(base):
            raise ValueError(
                f"{checkpoint} is an adapter of {base}, which nobody else has; merge the two with "
                "play-scripts/merge_lora.py, and share the result with `hf upload`"
            )
    config = to_dict(load_config([folder / CONFIG_FILE]))
    return SharedRun(folder, place, curves, config, launches, saved.get("best"), saved["last"])


def add_evaluations(runs: Sequence[SharedRun], folders: Sequence[Path]) -> None:
    """Attach what evaluate.py measured to the checkpoints. Raises ValueError if it is of none of them."""
    for folder in folders:
        try:
            figures = json.loads((folder / FIGURES_FILE).read_text())
            checkpoint = Path(figures["checkpoint"]).resolve()
            sets = figures["sets"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--evaluation {folder}: {FIGURES_FILE} cannot be read ({type(error).__name__}); give what "
                "evaluate.py --output wrote"
            ) from error
        of_it = [(run, name) for run in runs for name, (here, _) in run.checkpoints().items() if here == checkpoint]
        if not of_it:
            raise ValueError(
                f"--evaluation {folder}: it is of {figures['checkpoint']}, which is not the best or last checkpoint "
                "of these runs; evaluate one of those"
            )
        for run, name in of_it:
            run.evaluations[name] = sets
