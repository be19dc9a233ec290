"""One panel of a figure: the curves of several settings in one metric, and their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from utils.plots.aggregate import Aggregate, aggregate, position, running_median
from utils.plots.history import Run
from utils.plots.style import Look

AXES = {"grpo_step": "GRPO steps", "optimizer_step": "optimizer steps", "time": "wall-clock"}
SMOOTHED_FROM = 8  # windows in a curve: in a shorter one a median would hide what happens
MOST_MARKED = 60  # curves of more points have no markers
BY_DECADES = ("grad_norm", "sampler_kl")
MARKED_ENDINGS = ("collapsed",)  # a cross at the curve's end
LEAST_SPAN = 0.2  # of the curves' level, that a scale shows
NOISE_SPAN = 3
NOISE_SHARE = 90  # per cent of the values as logged that lie within the noise


@dataclass(frozen=True)
class Setting:
    """The seeds of one setting, its name in the legend, and how it is drawn in every panel."""

    name: str
    runs: Sequence[Run]
    look: Look


@dataclass(frozen=True)
class XAxis:
    """One of AXES, with its label, and what its values are divided by."""

    name: str
    label: str
    scale: float = 1.0


def x_axis(name: str, runs: Sequence[Run]) -> XAxis:
    """The axis with a unit of time that suits the longest run."""
    if name != "time":
        return XAxis(name, AXES[name])
    longest = max((run.seconds or 0.0 for run in runs), default=0.0)
    unit, scale = ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)
    return XAxis(name, f"{AXES[name]}, {unit}", scale)


@dataclass
class Drawn:
    """What a panel holds: where each setting's curve ends, and the values that its scale depends on."""

    ends: dict[str, float]
    levels: list[float]  # all values of the curves, smoothed
    noise: float  # the widest of the curves' noises


def draw_panel(
    axes: Axes, settings: Sequence[Setting], metric: str, x: XAxis, window: int = 1
) -> tuple[dict[str, float], list[str]]:
    """Draw one metric. Returns the last value of each setting that was drawn, and a complaint for each missing curve.

    `train/*` curves have a running median over `window` points, with the values as logged faint behind it.
    """
    runs = [run for setting in settings for run in setting.runs]
    if not any(run.curves.get(metric) for run in runs):
        return {}, [f"{', '.join(sorted({run.origin for run in runs}))}: no run has {metric}"]
    drawn, complaints = Drawn({}, [], 0.0), []
    for setting in settings:
        with_it = [run for run in setting.runs if run.curves.get(metric)]
        complaints += [f"{run.place}: {run.name} has no {metric}" for run in setting.runs if run not in with_it]
        data = aggregate([run.curves[metric] for run in with_it], x.name)
        _draw_setting(axes, data, setting, x.scale, window if metric.startswith("train/") else 1, drawn)
        if setting.name in drawn.ends:
            for run in with_it:
                _mark_end(axes, run, metric, x, setting.look)
        elif with_it:
            complaints.append(f"{with_it[0].name} has no finite {metric} to draw over {AXES[x.name]}")
    axes.set_xlabel(x.label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=x.name != "time", steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    _choose_scale(axes, metric, drawn)
    return drawn.ends, complaints


def _draw_setting(axes: Axes, data: Aggregate, setting: Setting, scale: float, window: int, drawn: Drawn) -> None:
    """Draw mean, band and tails, and add them to `drawn`."""
    look = setting.look
    curves = [(data.x, data.mean)] if data.x else []
    points: list[tuple[float, float]] = []
    for x, values in curves + data.tails:
        is_mean = values is data.mean
        width = window_for(values, window)
        x, smooth = [v / scale for v in x], running_median(values, width)
        if width > 1:
            axes.plot(x, values, color=look.colour, linewidth=0.6, alpha=0.45)
        options = {"color": look.colour, "linestyle": look.dashes, "linewidth": 1.5 if is_mean else 0.7}
        if is_mean and len(x) <= MOST_MARKED:
            options |= {"marker": look.marker, "markersize": 4, "markevery": max(1, len(x) // 8)}
        axes.plot(x, smooth, label=setting.name if is_mean or not data.x else "", **options)
        points += [(a, b) for a, b in zip(x, smooth, strict=True) if not math.isnan(b)]
    if data.n_seeds > 1:
        low, high = (running_median(edge, window_for(edge, window)) for edge in (data.low, data.high))
        axes.fill_between([v / scale for v in data.x], low, high, color=look.colour, alpha=0.15, linewidth=0)
    if points:
        drawn.ends[setting.name] = max(points)[1]
        drawn.levels += [value for _, value in points]
        drawn.noise = max(drawn.noise, noise_of(data, window))


def window_for(values: Sequence[float], window: int) -> int:
    """The window of a curve's running median: 1, which changes nothing, if the curve is short."""
    return window if len(values) >= SMOOTHED_FROM * window else 1


def noise_of(data: Aggregate, window: int) -> float:
    """The width within which 90 % of the values lie: between seeds, or of one seed about its running median."""
    if data.n_seeds > 1:
        widths = np.subtract(data.high, data.low)
    else:
        widths = 2 * np.abs(np.subtract(data.mean, running_median(data.mean, window_for(data.mean, window))))
    widths = widths[~np.isnan(widths)]
    return float(np.percentile(widths, NOISE_SHARE)) if widths.size else 0.0


def _mark_end(axes: Axes, run: Run, metric: str, x: XAxis, look: Look) -> None:
    if run.ending not in MARKED_ENDINGS:
        return
    curve = run.curves[metric]
    step = max(curve)
    place = position(step, curve[step], x.name)
    if place is not None:
        options = {"marker": "x", "markersize": 7, "markeredgewidth": 1.8, "color": look.colour, "clip_on": False}
        axes.plot([place / x.scale], [curve[step].value], **options)


def _choose_scale(axes: Axes, metric: str, drawn: Drawn) -> None:
    """By decades if a BY_DECADES metric spans several; from 0 for rewards and for what comes near 0, if none is below.

    Every other scale spans LEAST_SPAN of the curves' level. If the curves, over all steps, differ by less than their
    noise, it also spans NOISE_SPAN times the noise: a close fit would make the noise look like a difference.
    """
    if not drawn.levels:
        return
    low, high = min(drawn.levels), max(drawn.levels)
    bottom, top = axes.dataLim.y0, axes.dataLim.y1
    middle, span = (bottom + top) / 2, max(1.1 * (top - bottom), LEAST_SPAN * abs(low + high) / 2) or 1.0
    if high - low < drawn.noise:
        span = max(span, NOISE_SPAN * drawn.noise)
    near_zero = metric.endswith("reward") or low < high / 2 or middle < span / 2
    if metric.endswith(BY_DECADES) and low > 0 and high > 30 * low:
        axes.set_yscale("log")
    elif bottom >= 0 and near_zero:
        axes.set_ylim(0, 1.05 * top or 1)
    else:
        axes.set_ylim(middle - span / 2, middle + span / 2)
