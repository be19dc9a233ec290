"""The seeds of one setting as one curve, and the running median that is drawn over a noisy curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from utils.plots.history import Point


@dataclass
class Aggregate:
    """One metric of one setting: mean, lowest and highest over the seeds, at the steps that all of them logged.

    `tails` are the curves of single seeds after the other seeds have ended: a mean of the seeds left would mislead.
    """

    x: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    tails: list[tuple[list[float], list[float]]] = field(default_factory=list)
    n_seeds: int = 0


def position(step: int, point: Point, axis: str) -> float | None:
    """A point's place on an x axis; None if the run did not log that axis."""
    return {"grpo_step": step, "optimizer_step": point.optimizer_step, "time": point.time}[axis]


def aggregate(curves: Sequence[dict[int, Point]], axis: str = "grpo_step") -> Aggregate:
    """The seeds' curves of one metric as one. Values that were not finite stay NaN, a gap in the curve."""
    placed = [
        {step: (x, p.value) for step, p in sorted(c.items()) if (x := position(step, p, axis)) is not None}
        for c in curves
    ]
    placed = [curve for curve in placed if curve]
    result = Aggregate(n_seeds=len(placed))
    shared = sorted(set.intersection(*map(set, placed))) if placed else []
    for step in shared:
        xs, values = zip(*(curve[step] for curve in placed), strict=True)
        finite = not any(math.isnan(v) for v in values)
        result.x.append(fmean(xs))
        for series, of in ((result.mean, fmean), (result.low, min), (result.high, max)):
            series.append(of(values) if finite else math.nan)
    for curve in placed:
        beyond = [step for step in curve if not shared or step > shared[-1]]
        if beyond:
            steps = shared[-1:] + beyond
            result.tails.append(([curve[s][0] for s in steps], [curve[s][1] for s in steps]))
    return result


def running_median(values: Sequence[float], window: int) -> list[float]:
    """Centred median of `window` points, fewer at the ends. NaN stays NaN and enters no median.

    A spike shorter than half the window leaves no trace in it, so the values as logged are drawn beside it.
    """
    before = window // 2
    result = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - before) : i - before + window] if not math.isnan(v)]
        result.append(math.nan if math.isnan(value) else median(near))
    return result
