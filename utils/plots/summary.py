"""Runs in a table, one line per setting: best and last rewards with standard errors over seeds, and how they ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from utils.plots.history import Run
from utils.plots.style import in_order

LAST = 5  # evaluations that the last mean is taken over
HEADER = ("run", "seeds", "best", f"last {LAST}", "steps", "time", "ended")
COLLAPSED = "collapsed"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, which is None with fewer than two seeds."""

    mean: float
    standard_error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.3f}")


@dataclass(frozen=True)
class Summary:
    """One setting, over its seeds. `best` and `last` are None if no seed has a finite value of the metric."""

    name: str
    n_seeds: int
    best: Estimate | None  # of each seed's highest value
    last: Estimate | None  # of each seed's `end_value`
    steps: int  # most GRPO steps of a seed
    seconds: float | None  # mean over the seeds; None if not logged
    endings: dict[str, int]

    def cells(self) -> tuple[str, ...]:
        """The row under HEADER, as text."""
        endings = ", ".join(f"{name} {n}" if self.n_seeds > 1 else name for name, n in sorted(self.endings.items()))
        best, last = ("–" if e is None else str(e) for e in (self.best, self.last))
        last += " ×" if self.last is not None and COLLAPSED in self.endings else ""
        return self.name, str(self.n_seeds), best, last, str(self.steps), format_time(self.seconds), endings


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error of one value per seed; None without values.

    The standard error is the sample's standard deviation over the root of the number of values.
    """
    if not values:
        return None
    return Estimate(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


def finite(run: Run, metric: str) -> list[float]:
    """The metric's values in the order of their steps, without those that were not finite."""
    return [point.value for _, point in sorted(run.curves.get(metric, {}).items()) if not math.isnan(point.value)]


def end_value(run: Run, metric: str) -> float:
    """Where an evaluated metric ended: the mean of the last evaluations, or the last alone of a collapsed run.

    A collapsed run was stopped soon after, so a mean would be of evaluations from before. Expects a finite value.
    """
    return fmean(finite(run, metric)[-1 if run.ending == COLLAPSED else -LAST :])


def summarize(runs: Sequence[Run], metric: str = "eval/reward") -> tuple[list[Summary], list[str]]:
    """A summary of each setting, in the order of `in_order`, and a complaint for each run without the metric."""
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.name, []).append(run)
    summaries, complaints = [], []
    for name in in_order(settings):
        seeds = settings[name]
        best, last = [], []
        for run in seeds:
            values = finite(run, metric)
            if not values:
                complaints.append(f"{run.place}: {run.name} has no {metric}")
                continue
            best.append(max(values))
            last.append(end_value(run, metric))
        times = [run.seconds for run in seeds if run.seconds is not None]
        endings = dict(Counter(run.ending for run in seeds))
        steps = max(run.last_step for run in seeds)
        time = fmean(times) if times else None
        summaries.append(Summary(name, len(seeds), estimate(best), estimate(last), steps, time, endings))
    return summaries, complaints


def format_time(seconds: float | None) -> str:
    """59 s, 12 min, 3.4 h; a dash if unknown."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table as Markdown."""
    return markdown_rows([HEADER, *(s.cells() for s in summaries)])


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
