"""The metrics of runs, read back from run folders, long CSV files or a tracker, whole or damaged."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from utils.log.files import METRICS_FILE, RUN_INFO_FILE, STATUS_FILE, Row, read_rows

CSV_COLUMNS = ("run_name", "metric", "step", "value")  # what every long CSV has
OWN_CSV_COLUMNS = ("run_name", "seed", "metric", "step", "optimizer_step", "time", "value")  # what write_csv writes
ENDINGS_FILE = "endings.csv"  # beside a metrics.csv: how its runs ended
ENDINGS_COLUMNS = ("run_name", "seed", "ending", "same_as")
PICTURES = (".png", ".svg")  # lie beside runs, so that `runs/*` names them too
TRACKED = ("wandb:", "trackio:", "tensorboard:")  # begin sources that are read from a tracker
UNKNOWN_ENDING = "unknown"
UNFINISHED = "unfinished"


class Point(NamedTuple):
    """A metric's value at a GRPO step, NaN if it was not finite. Unknown axes are None."""

    value: float
    optimizer_step: int | None = None
    time: float | None = None  # seconds


@dataclass
class Run:
    """What one run logged: `curves[metric][grpo_step]`. Runs of one name are seeds of the same setting."""

    name: str
    origin: str  # the setting's folder, the file or the project; the seeds of a setting share it
    place: str  # where exactly the run was read from
    seed: int | None = None
    ending: str = UNKNOWN_ENDING
    same_as: str = ""  # the setting of another ablation that this is a copy of
    curves: dict[str, dict[int, Point]] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((max(curve) for curve in self.curves.values() if curve), default=0)

    @property
    def seconds(self) -> float | None:
        return max(
            (p.time for curve in self.curves.values() for p in curve.values() if p.time is not None), default=None
        )


def load_runs(
    sources: Iterable[str | Path], fetch: Mapping[str, Callable[[str], list[Row]]] | None = None
) -> tuple[list[Run], list[str]]:
    """Every run in the sources, and a complaint for each thing that is missing, damaged or ambiguous.

    A source is a run folder, a folder of them (run/ or run/seed_n/), a long CSV file, or what is on a tracker,
    `wandb:entity/project`, which `fetch["wandb"]` turns into rows of name, id, seed, ending and history
    (`trackers.FETCH`). Pictures are skipped.
    """
    runs: list[Run] = []
    complaints: list[str] = []
    for source in map(str, sources):
        try:
            loaded, damage = _load(source, fetch or {})
        except (ValueError, OverflowError, csv.Error) as error:
            loaded, damage = [], [f"{source}: can't be read ({error})"]
        runs += loaded
        complaints += damage
    runs, renamed = tell_apart(runs)
    return runs, complaints + renamed


def _load(source: str, fetch: Mapping[str, Callable[[str], list[Row]]]) -> tuple[list[Run], list[str]]:
    if source.startswith(TRACKED):
        tracker, _, place = source.partition(":")
        return [run_from_tracker(source, row) for row in fetch[tracker](place)], []
    if Path(source).is_dir():
        return load_folder(Path(source))
    if Path(source).is_file():
        return ([], []) if Path(source).suffix in PICTURES else load_csv(Path(source))
    return [], [f"{source}: no such file or folder"]


def load_folder(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder, which may itself be a run."""
    names = (METRICS_FILE, RUN_INFO_FILE, STATUS_FILE)
    run_folders = sorted({path.parent for name in names for path in folder.rglob(name)})
    if not run_folders:
        return [], [f"{folder}: no run in it (no {METRICS_FILE})"]
    runs, complaints = [], []
    for run_folder in run_folders:
        if (run_folder / METRICS_FILE).exists():
            run, damage = load_run(run_folder)
            runs.append(run)
            complaints += damage
        else:
            complaints.append(f"{run_folder}: a run that has logged nothing (no {METRICS_FILE}), left out")
    return runs, complaints


def load_run(folder: Path) -> tuple[Run, list[str]]:
    """One run from its metrics.jsonl and status.json."""
    rows, complaints = read_rows(folder / METRICS_FILE)
    folder = folder.resolve()  # "." has no name
    seed = re.fullmatch(r"seed_(\d+)", folder.name)
    setting = folder.parent if seed else folder
    run = Run(setting.name, str(setting), str(folder), int(seed[1]) if seed else None)
    run.curves = curves_from_rows(rows)
    path = folder / STATUS_FILE
    try:
        status = json.loads(path.read_text())
        run.ending, run.same_as = str(status["status"]), status.get("same_as", "")
    except FileNotFoundError:
        run.ending = UNFINISHED
        complaints.append(f"{folder}: not finished, shown up to GRPO step {run.last_step}")
    except (ValueError, KeyError, TypeError) as error:
        complaints.append(f"{path}: can't be read ({type(error).__name__}: {error})")
    return run, complaints


def curves_from_rows(rows: Iterable[Row]) -> dict[str, dict[int, Point]]:
    """Rows of metrics.jsonl as curves. If a step was written twice, the later row counts."""
    curves: dict[str, dict[int, Point]] = {}
    optimizer_steps = {0: 0}
    for row in rows:
        step = row.get("grpo_step", row.get("eval_step"))
        if step is None:
            continue
        if row.get("optimizer_step") is not None:
            optimizer_steps[step] = row["optimizer_step"]
        for metric, value in row.items():
            known = value is not None or metric in row.get("nonfinite", ())
            if known and metric.startswith(("train/", "eval/")):
                point = Point(_finite(value), optimizer_steps.get(step), row.get("time"))
                curves.setdefault(metric, {})[int(step)] = point
    return curves


def _finite(value: float | str | None) -> float:
    """The number, or NaN for infinity and None."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def load_csv(path: Path) -> tuple[list[Run], list[str]]:
    """The runs of a long CSV (run_name, metric, step, value; perhaps seed, optimizer_step, time).

    Several values of a metric at one step, such as a tracker's one per optimizer step, are averaged. How the runs ended
    is read from the ENDINGS_FILE beside it, if there is one.
    """
    values: dict[tuple[str, int | None], dict[tuple[str, int], list[Point]]] = {}
    complaints = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            return [], [f"{path}: not a long CSV, no column {', '.join(missing)}"]
        for row in reader:
            try:
                point = Point(_finite(row["value"]), _number(row, "optimizer_step", int), _number(row, "time", float))
                place = (row["metric"], int(float(row["step"])))
                run_key = (row["run_name"], _number(row, "seed", int))
            except (TypeError, ValueError, OverflowError) as error:
                complaints.append(f"{path}, line {reader.line_num}: left out ({error})")
                continue
            values.setdefault(run_key, {}).setdefault(place, []).append(point)
    runs = []
    endings = load_endings(path.with_name(ENDINGS_FILE))
    for (name, seed), places in values.items():
        run = Run(name, str(path), str(path), seed, *endings.get((name, seed), ()))
        for (metric, step), points in places.items():
            run.curves.setdefault(metric, {})[step] = points[-1]._replace(value=fmean(p.value for p in points))
        runs.append(run)
    return runs, complaints


def _number(row: dict[str, str], column: str, kind: type[int] | type[float]) -> int | float | None:
    return kind(row[column]) if row.get(column) else None


def load_endings(path: Path) -> dict[tuple[str, int | None], tuple[str, str]]:
    """The ending and `same_as` of each run, by name and seed. Raises ValueError if the file is damaged."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != ENDINGS_COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(ENDINGS_COLUMNS)}")
        return {(row["run_name"], _number(row, "seed", int)): (row["ending"], row["same_as"]) for row in reader}


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """The runs as a long CSV, with their ENDINGS_FILE beside it, that load_csv reads back."""
    rows = (
        (run.name, run.seed, metric, step, point.optimizer_step, point.time, point.value)
        for run in runs
        for metric, curve in sorted(run.curves.items())
        for step, point in sorted(curve.items())
    )
    endings = ((run.name, run.seed, run.ending, run.same_as) for run in runs)
    for place, columns, lines in (
        (path, OWN_CSV_COLUMNS, rows),
        (path.with_name(ENDINGS_FILE), ENDINGS_COLUMNS, endings),
    ):
        with place.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *lines])


def run_from_tracker(origin: str, tracked: Row) -> Run:
    """A run from a tracker's name, id, seed, ending and history. `origin` is the source that it came from."""
    name = tracked["name"].removesuffix(f"/seed_{tracked['seed']}")  # as runs/<name>/seed_<n> is called there
    run = Run(name, origin, f"{origin}/{tracked['id']}", tracked["seed"], tracked["ending"])
    run.curves = curves_from_rows(tracked["history"])
    return run


def _short_origin(origin: str) -> str:
    """runs/lr/3e-5 -> lr, results/lr.csv -> lr, trackio:project -> trackio."""
    if origin.startswith(TRACKED):
        return origin.partition(":")[0]
    path = Path(origin)
    return path.stem if path.suffix else path.parent.name


def tell_apart(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Runs of one name that are not seeds of one setting get different names. A run given twice is kept once."""
    apart: list[Run] = []
    complaints = []
    owners: dict[str, str] = {}
    given: set[tuple[str, str, int | None]] = set()
    for run in runs:
        name = run.name
        if (name, run.place, run.seed) in given:
            complaints.append(f"{run.place}: {name} was given twice, shown once")
            continue
        given.add((name, run.place, run.seed))
        if owners.setdefault(run.name, run.origin) != run.origin:
            run.name = f"{_short_origin(run.origin)}/{name}"
        same = any((run.name, run.seed) == (other.name, other.seed) for other in apart)
        if same or owners.setdefault(run.name, run.origin) != run.origin:
            run.name = f"{run.place}/{name}"
        if run.name != name:
            complaints.append(f"two runs are called {name}: the one in {run.place} is shown as {run.name}")
        apart.append(run)
    return apart, complaints
