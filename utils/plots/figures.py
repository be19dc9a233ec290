"""Figures of runs: the mean over seeds with a band, a panel a metric, published curves in a column beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.plots.direct_labels import Label, draw_labels
from utils.plots.history import Aggregate, Run, aggregate, load_run, position
from utils.plots.style import STYLE, Look, in_order, looks, short_names

AXES = {"grpo_step": "GRPO steps", "optimizer_step": "optimizer steps", "time": "wall-clock"}
DEFAULT_METRICS = ("eval/reward", "train/mean_response_length", "train/entropy", "train/grad_norm")
SMOOTHED_FROM = 8  # windows in a curve: in a shorter one the average would hide what happens
MOST_MARKED = 60  # curves of more points have no markers
LEGEND_LETTER, LEGEND_HANDLE = 5.5, 45  # points: the width of a letter, and of all else of an entry
BY_DECADES = ("grad_norm", "sampler_kl")
MARKED_ENDINGS = ("collapsed",)  # a cross where the curve stops


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` points, fewer at the ends; NaN stays NaN and enters no average."""
    before = window // 2
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - before) : i - before + window] if not math.isnan(v)]
        result.append(math.nan if math.isnan(values[i]) else fmean(near))
    return result


def draw_figure(
    columns: dict[str, Sequence[Run]],
    metrics: Sequence[str] = (),
    *,
    axis: str = "grpo_step",
    window: int = 5,
    labels: dict[str, str] | None = None,
    title: str = "",
) -> tuple[Figure, list[str]]:
    """A figure of runs, and a complaint for each curve that can't be drawn.

    `columns` maps a heading to runs: one column of panels each ("ours", "published"), or a grid where there is one.
    `metrics` are the panels, by default those of DEFAULT_METRICS that were logged. `window` smooths `train/*` curves.
    `labels` renames runs. Settings of the same (short) name look the same in every column. Raises ValueError where
    nothing can be drawn.
    """
    if axis not in AXES:
        raise ValueError(f"x axis {axis!r} is none of {', '.join(AXES)}")
    complaints = []
    placed = {heading: [run for run in runs if _has_axis(run, axis)] for heading, runs in columns.items()}
    for heading, runs in columns.items():
        complaints += [f"{run.name} has no {AXES[axis]}: left out" for run in runs if run not in placed[heading]]
    columns = {heading: runs for heading, runs in placed.items() if runs}
    logged = {metric for runs in columns.values() for run in runs for metric in run.curves}
    metrics = list(metrics) or [m for m in DEFAULT_METRICS if m in logged] or sorted(logged)
    complaints += [f"no run has {metric}" for metric in metrics if metric not in logged]
    metrics = [metric for metric in metrics if metric in logged]
    if not metrics:
        raise ValueError(f"nothing to draw: {'; '.join(complaints) or 'no run'}")
    names = {}
    for runs in columns.values():
        renamed = {run.name: (labels or {}).get(run.name, "") for run in runs}
        names |= {n: renamed[n] or short for n, short in short_names(list(renamed)).items()}
    look = looks(in_order(names[run.name] for runs in columns.values() for run in runs))
    with matplotlib.rc_context(STYLE):
        figure, said = _draw(columns, metrics, names, look, axis, window, title)
    if not any(axes.lines for axes in figure.axes):
        raise ValueError(f"nothing to draw: {'; '.join(complaints + said)}")
    return figure, complaints + said


def _has_axis(run: Run, axis: str) -> bool:
    return any(position(s, p, axis) is not None for curve in run.curves.values() for s, p in curve.items())


def _draw(
    columns: dict[str, Sequence[Run]],
    metrics: Sequence[str],
    names: dict[str, str],
    look: dict[str, Look],
    axis: str,
    window: int,
    title: str,
) -> tuple[Figure, list[str]]:
    side_by_side = len(columns) > 1
    n_columns = len(columns) if side_by_side else 3 if len(metrics) in (3, 5, 6) else min(2, len(metrics))
    n_rows = math.ceil(len(metrics) * len(columns) / n_columns)
    figure = Figure(figsize=(min(5.6 * n_columns, 14), 2.7 * n_rows + 0.3))
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    contents = [(metric, heading) for metric in metrics for heading in columns]
    complaints: list[str] = []
    ends: list[tuple[Axes, list[Label]]] = []
    for axes, (metric, heading) in zip(panels.flat, contents, strict=False):
        labels, said = draw_panel(axes, columns[heading], metric, names, look, axis=axis, window=window)
        panel_title = f"{metric} · {heading}" if side_by_side else metric
        if labels:
            axes.set_title(panel_title, loc="left", fontsize=9.5, fontweight="bold")
        else:
            axes.set_axis_off()
            axes.set_title(f"no {panel_title}", loc="left", fontsize=9.5, color="#888888")
        complaints += said
        ends.append((axes, labels))
    for axes in panels.flat[len(contents) :]:
        axes.remove()
    if side_by_side:
        _share_reward_scales(panels, metrics)
    if title:
        figure.suptitle(title, fontsize=11)
    caption = _caption(columns, metrics, window)
    footer = figure.supxlabel(caption, fontsize=7.5, color="#555555", x=0.01, ha="left")
    if not draw_labels(figure, ends):
        footer.remove()
        _draw_legend(figure, look, caption)
    return figure, list(dict.fromkeys(complaints))


def _share_reward_scales(panels: Sequence[Sequence[Axes]], metrics: Sequence[str]) -> None:
    """Rewards in one row of panels are read off the same scale."""
    for row, metric in zip(panels, metrics, strict=True):
        limits = [axes.get_ylim() for axes in row if axes.axison]
        if metric.endswith("reward") and limits:
            for axes in row:
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def draw_panel(
    axes: Axes,
    runs: Sequence[Run],
    metric: str,
    names: dict[str, str],
    look: dict[str, Look],
    *,
    axis: str = "grpo_step",
    window: int = 1,
) -> tuple[list[Label], list[str]]:
    """Draw one metric of several settings; returns the labels of their ends, and a complaint for each curve missing."""
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.name, []).append(run)
    if not any(run.curves.get(metric) for run in runs):
        return [], [f"{', '.join(sorted({run.origin for run in runs}))}: no run has {metric}"]
    unit, scale = _unit(runs, axis)
    window = window if metric.startswith("train/") else 1
    labels, complaints = [], []
    for name in in_order(settings):
        with_it = [run for run in settings[name] if run.curves.get(metric)]
        complaints += [f"{run.place}: {run.name} has no {metric}" for run in settings[name] if run not in with_it]
        data = aggregate([run.curves[metric] for run in with_it], axis)
        style = look[names[name]]
        end = _draw_setting(axes, data, names[name], style, scale, window)
        if end is None:
            complaints += [f"{name} has no finite {metric} to draw over {AXES[axis]}"] if with_it else []
            continue
        labels.append(Label(names[name], *end, style.colour))
        for run in with_it:
            if run.ending in MARKED_ENDINGS:
                _mark_end(axes, run, metric, axis, scale, style)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=axis != "time", steps=[1, 2, 5, 10]))
    _choose_scale(axes, metric)
    axes.margins(x=0.01)
    return labels, complaints


def _draw_setting(
    axes: Axes, data: Aggregate, name: str, style: Look, scale: float, window: int
) -> tuple[float, float] | None:
    """Draw mean, band and tails; returns where the curve ends, None where no value is finite."""
    window = window if len(data.x) >= SMOOTHED_FROM * window else 1
    x, mean = [v / scale for v in data.x], smooth(data.mean, window)
    places = [*zip(x, mean, strict=True)]
    if x:
        if window > 1:
            axes.plot(x, data.mean, color=style.colour, linewidth=0.5, alpha=0.35)
        options = {"color": style.colour, "linestyle": style.dashes, "linewidth": 1.5, "label": name}
        if len(x) <= MOST_MARKED:
            options |= {"marker": style.marker, "markersize": 4, "markevery": max(1, len(x) // 8)}
        axes.plot(x, mean, **options)
    if data.n_seeds > 1:
        low, high = smooth(data.low, window), smooth(data.high, window)
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
    for tail_x, tail_y in data.tails:
        tail = [*zip([v / scale for v in tail_x], smooth(tail_y, window), strict=True)]
        options = {"color": style.colour, "linestyle": style.dashes, "linewidth": 0.7, "label": "" if x else name}
        axes.plot(*zip(*tail, strict=True), **options)
        places += tail
    return max((place for place in places if not math.isnan(place[1])), default=None)


def _mark_end(axes: Axes, run: Run, metric: str, axis: str, scale: float, style: Look) -> None:
    curve = run.curves[metric]
    step = max(curve)
    x = position(step, curve[step], axis)
    if x is not None:
        axes.plot([x / scale], [curve[step].value], marker="x", markersize=7, markeredgewidth=1.8, color=style.colour)


def _unit(runs: Sequence[Run], axis: str) -> tuple[str, float]:
    """The x axis's name, and what to divide by: seconds, minutes or hours."""
    if axis != "time":
        return AXES[axis], 1.0
    longest = max((run.seconds or 0.0 for run in runs), default=0.0)
    name, scale = ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)
    return f"{AXES[axis]}, {name}", scale


def _choose_scale(axes: Axes, metric: str) -> None:
    """By decades where the means of a BY_DECADES metric span several; else rewards from 0, and what gets near it."""
    curves = [line for line in axes.get_lines() if line.get_alpha() is None]  # those as logged are faint
    values = [v for line in curves for v in line.get_ydata() if not math.isnan(v)]
    if metric.endswith(BY_DECADES) and values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    elif values and min(values) >= 0 and (metric.endswith("reward") or min(values) < max(values) / 2):
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)


def _draw_legend(figure: Figure, look: dict[str, Look], caption: str) -> None:
    """All names below the panels, for panels that have no room for them."""
    lines = {line.get_label(): line for axes in reversed(figure.axes) for line in axes.get_lines()}
    drawn = [name for name in look if name in lines]
    entry = max(map(len, drawn)) * LEGEND_LETTER + LEGEND_HANDLE
    n_columns = max(1, min(4, int(figure.get_figwidth() * 72 / entry)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(drawn) / n_columns))
    options = {"ncols": n_columns, "frameon": False, "title": caption, "title_fontsize": 7.5}
    figure.legend([lines[name] for name in drawn], drawn, loc="outside lower center", **options)


def _caption(columns: dict[str, Sequence[Run]], metrics: Sequence[str], window: int) -> str:
    runs = [run for column in columns.values() for run in column]
    parts = []
    settings = [(run.name, run.origin) for run in runs]
    if len(set(settings)) < len(runs):
        parts.append("mean over seeds, band from lowest to highest")
    if len({*zip(settings, (run.last_step for run in runs), strict=True)}) > len(set(settings)):
        parts.append("thin: single seeds, where others have ended")
    if window > 1 and any(metric.startswith("train/") for metric in metrics):
        parts.append(f"train/* of {SMOOTHED_FROM * window} points or more averaged over {window}, faint as logged")
    if any(run.ending in MARKED_ENDINGS for run in runs):
        parts.append("× last value of a run stopped as collapsed")
    return "; ".join(parts)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write the figure as PNG and SVG beside each other; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def reward_curve(run_dir: Path) -> Path:
    """Draw `eval/reward` and `train/reward` of one run over GRPO steps; returns the PNG, in the run's folder.

    Raises ValueError where the run has neither.
    """
    run, _ = load_run(Path(run_dir))
    curves = {metric: run.curves[metric] for metric in ("eval/reward", "train/reward") if metric in run.curves}
    if not curves:
        raise ValueError(f"{run_dir}: neither eval/reward nor train/reward to draw")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4))
        axes = figure.subplots()
        labels = []
        for metric, name, look in (
            ("train/reward", "rollouts", Look("#E69F00", "-", "")),
            ("eval/reward", "held-out problems", Look("#0072B2", "-", "o")),
        ):
            if metric in curves:
                end = _draw_setting(axes, aggregate([curves[metric]]), name, look, 1.0, 1)
                labels += [Label(name, *end, look.colour)] if end else []
        axes.set(xlabel=AXES["grpo_step"], ylabel="mean reward")
        _choose_scale(axes, "eval/reward")
        axes.margins(x=0.01)
        draw_labels(figure, [(axes, labels)])
        path = Path(run_dir) / "reward_curve.png"
        figure.savefig(path)
    return path
