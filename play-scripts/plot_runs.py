"""Draw any runs: one panel per metric, the mean over seeds with a band, published curves beside ours.

    python play-scripts/plot_runs.py runs/lr_sweep --published published/lr_sweep.csv

A source is a run folder, a folder of run folders (`<run>/` or `<run>/seed_<n>/`), a long CSV (run_name, metric, step,
value), or runs on a tracker: `wandb:entity/project`, `trackio:project`, `tensorboard:folder`. Pictures are skipped.
What is missing or damaged is named, and the rest is drawn.
Without --out the figure goes beside the runs: into the run folder, or the folder that holds all sources.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from utils.log.trackers import FETCH
from utils.plots.figures import AXES, DEFAULT_METRICS, draw_figure, save_figure
from utils.plots.history import PICTURES, TRACKED, load_runs

DEFAULT_NAME = "curves"
MOST_NAMED = 3  # sources in a title


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="what to draw")
    parser.add_argument("--published", nargs="+", default=[], metavar="SOURCE", help="drawn beside these")
    parser.add_argument("--metrics", nargs="+", default=[], help=f"panels; default: {' '.join(DEFAULT_METRICS)}")
    parser.add_argument("--x", choices=AXES, default="grpo_step", help="x axis; default: grpo_step")
    parser.add_argument("--smooth", type=int, default=5, metavar="N", help="median of N steps; default: 5")
    parser.add_argument("--label", nargs="+", default=[], metavar="RUN=TEXT", help="what to call a run")
    parser.add_argument("--title", help="default: the names of the sources")
    parser.add_argument("--out", type=Path, metavar="FILE", help="name, to which .png and .svg are added, or a folder")
    arguments = parser.parse_args()
    if arguments.smooth < 1:
        parser.error(f"--smooth {arguments.smooth}: at least 1")
    for label in arguments.label:
        if "=" not in label:
            parser.error(f"--label {label}: expected RUN=TEXT")
    return arguments


def place_of_figure(out: Path | None, sources: Sequence[str]) -> Path:
    """The PNG to write: as asked for, or `curves.png` in the folder that is, or holds, all local sources."""
    if out is None:
        local = [Path(source) for source in sources if Path(source).exists()]
        folders = [path if path.is_dir() else path.parent for path in local]
        if any(folder.is_absolute() for folder in folders):
            folders = [folder.absolute() for folder in folders]
        out = Path(os.path.commonpath(folders)) if folders else Path()
    if out.is_dir():
        out /= DEFAULT_NAME
    return out.with_suffix(".png") if out.suffix in (".png", ".svg") else out.with_name(out.name + ".png")


def title_of(sources: Sequence[str], published: Sequence[str]) -> str:
    """The names of the sources, and of the published ones after them."""
    names = [*dict.fromkeys(name_of(source) for source in sources if not source.endswith(PICTURES))]
    text = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    return f"{text}; published: {title_of(published, ())}" if published else text


def name_of(source: str) -> str:
    """runs/lr_sweep is lr_sweep, runs/lr_sweep/1e-4/seed_0 is 1e-4/seed_0, results/lr_sweep/metrics.csv is lr_sweep."""
    if source.startswith(TRACKED):
        return source
    path = Path(source).resolve()
    path = path.parent if path.name == "metrics.csv" else path.with_suffix("") if path.suffix == ".csv" else path
    return "/".join(path.parts[-2:]) if path.name.startswith("seed_") else path.name


def main() -> int:
    arguments = parse_arguments()
    ours, complaints = load_runs(arguments.sources, FETCH)
    published, missing = load_runs(arguments.published, FETCH)
    complaints += missing
    labels = dict(label.split("=", 1) for label in arguments.label)
    title = title_of(arguments.sources, arguments.published) if arguments.title is None else arguments.title
    options = {"axis": arguments.x, "window": arguments.smooth, "labels": labels, "title": title}
    logged = {metric for run in ours + published for metric in run.curves}
    for metric in arguments.metrics:
        if metric not in logged and (near := get_close_matches(metric, logged, n=1)):
            complaints.append(f"--metrics {metric}: did you mean {near[0]}?")
    figure = None
    try:
        figure, undrawn = draw_figure({"ours": ours, "published": published}, arguments.metrics, **options)
        complaints += undrawn
    except ValueError as error:
        complaints.append(str(error))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if figure is None:
        return 2
    place = place_of_figure(arguments.out, arguments.sources)
    replaced = place.exists()
    try:
        written = save_figure(figure, place)
    except OSError as error:
        print(f"{place}: cannot be written ({error.strerror}); give another --out", file=sys.stderr)
        return 2
    for path in written:
        print(f"{'replaced' if replaced else 'wrote'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
