"""Draw any runs: one panel a metric, the mean over seeds with a band, published curves beside ours.

    python play-scripts/plot_runs.py runs/lr_sweep --published published/lr_sweep.csv --out figure

A source is a run folder, a folder of run folders (`<run>/` or `<run>/seed_<n>/`), a long CSV (run_name, metric, step,
value), or `wandb:entity/project`. What is missing or damaged is named, and the rest is drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.history import load_runs
from utils.plotting import AXES, DEFAULT_METRICS, draw_figure, save_figure
from utils.run_log import fetch_wandb_runs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="what to draw")
    parser.add_argument("--published", nargs="+", default=[], metavar="SOURCE", help="drawn in a column of its own")
    parser.add_argument("--metrics", nargs="+", default=[], help=f"panels; default: {' '.join(DEFAULT_METRICS)}")
    parser.add_argument("--x", choices=AXES, default="grpo_step", help="x axis; default: grpo_step")
    parser.add_argument("--smooth", type=int, default=5, metavar="N", help="average train/* over N steps; default: 5")
    parser.add_argument("--label", nargs="+", default=[], metavar="RUN=TEXT", help="what to call a run")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path, default=Path("figure"), help="file name; .png and .svg are written")
    arguments = parser.parse_args()
    if arguments.smooth < 1:
        parser.error(f"--smooth {arguments.smooth}: at least 1")
    for label in arguments.label:
        if "=" not in label:
            parser.error(f"--label {label}: expected RUN=TEXT")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    ours, complaints = load_runs(arguments.sources, fetch_wandb_runs)
    published, said = load_runs(arguments.published, fetch_wandb_runs)
    complaints += said
    labels = dict(label.split("=", 1) for label in arguments.label)
    options = {"axis": arguments.x, "window": arguments.smooth, "labels": labels, "title": arguments.title}
    figure = None
    try:
        figure, said = draw_figure({"ours": ours, "published": published}, arguments.metrics, **options)
        complaints += said
    except ValueError as error:
        complaints.append(str(error))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if figure is None:
        return 2
    print(*save_figure(figure, arguments.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
