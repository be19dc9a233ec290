"""A table of any runs: best and last-five mean of eval/reward with its standard error over seeds, and how they ended.

    python play-scripts/summarize_runs.py runs/lr_sweep

A source is a run folder, a folder of run folders (`<run>/` or `<run>/seed_<n>/`), a long CSV (run_name, metric, step,
value), or runs on a tracker: `wandb:entity/project`, `trackio:project`, `tensorboard:folder`. Pictures are skipped.
What is missing or damaged is named, and the rest is shown. `×` marks settings with a seed that collapsed: it counts
with its last evaluation alone.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from utils.log.trackers import FETCH
from utils.plots.history import load_runs
from utils.plots.summary import HEADER, markdown_table, summarize

WIDEST = 10_000  # characters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="the runs")
    parser.add_argument("--metric", default="eval/reward", help="default: eval/reward")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    runs, complaints = load_runs(arguments.sources, FETCH)
    known = sorted({metric for run in runs for metric in run.curves})
    if known and arguments.metric not in known:
        complaints.append(f"--metric {arguments.metric}: no run has it; they have {', '.join(known)}")
        runs = []
    summaries, missing = summarize(runs, arguments.metric)
    if not summaries and not complaints:
        complaints = [f"no run in {', '.join(arguments.sources)}"]
    for complaint in complaints + missing:
        print(complaint, file=sys.stderr)
    if arguments.markdown:
        print(markdown_table(summaries))
    elif summaries:
        table = Table(*HEADER, title=arguments.metric)
        for summary in summaries:
            table.add_row(*summary.cells())
        # a file or a pipe is not cut off at its edge
        Console(highlight=False, width=None if sys.stdout.isatty() else WIDEST).print(table)
    return 0 if summaries else 2


if __name__ == "__main__":
    sys.exit(main())
