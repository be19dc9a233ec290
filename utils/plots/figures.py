"""Figures of runs: the mean over seeds with a band, one panel per metric, one legend outside the panels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plots.aggregate import position
from utils.plots.history import Run, load_run
from utils.plots.panels import AXES, MARKED_ENDINGS, SMOOTHED_FROM, Setting, draw_panel, x_axis
from utils.plots.style import HEADING_COLOURS, STYLE, Look, in_order, looks, short_names

DEFAULT_METRICS = ("eval/reward", "train/reward", "train/mean_response_length", "train/entropy", "train/grad_norm")
MOST_TOGETHER = 3  # settings per heading that are drawn in the same panels as those of another heading
PANEL = (4.2, 2.7)  # inches
WIDEST = 15.0  # inches, without the legend
TITLE_SIZE, CAPTION_SIZE = 11, 7.5
LETTER = 0.56  # of the size: the mean width of a letter


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

    `columns` maps a heading to runs ("ours", "published"). Two headings of few settings share panels, a colour per
    heading; with more settings each heading has its own column, and settings of the same (short) name look the same.
    `metrics` are the panels, by default those in DEFAULT_METRICS that every heading has. `window` is that of
    `train/*` curves' running median, in points. `labels` renames runs. Raises ValueError if nothing can be drawn.
    """
    if axis not in AXES:
        raise ValueError(f"x axis {axis!r} is none of {', '.join(AXES)}")
    placed = {heading: [run for run in runs if _has_axis(run, axis)] for heading, runs in columns.items()}
    complaints = [
        f"{run.name} has no {AXES[axis]}: left out"
        for heading, runs in columns.items()
        for run in runs
        if run not in placed[heading]
    ]
    columns = {heading: runs for heading, runs in placed.items() if runs}
    by_heading = [{metric for run in runs for metric in run.curves} for runs in columns.values()]
    logged = set().union(*by_heading)
    shared = set.intersection(*by_heading) if by_heading else set()
    metrics = list(metrics) or [m for m in DEFAULT_METRICS if m in (shared or logged)] or sorted(shared or logged)
    complaints += [f"no run has {metric}" for metric in metrics if metric not in logged]
    metrics = [metric for metric in metrics if metric in logged]
    if not metrics:
        raise ValueError(f"nothing to draw: {'; '.join(complaints) or 'no run'}")
    settings = settings_of(columns, labels or {})
    with matplotlib.rc_context(STYLE):
        figure, undrawn = _draw(settings, metrics, axis, window, title)
    if not any(axes.lines for axes in figure.axes):
        raise ValueError(f"nothing to draw: {'; '.join(complaints + undrawn)}")
    return figure, complaints + undrawn


def _has_axis(run: Run, axis: str) -> bool:
    return any(position(s, p, axis) is not None for curve in run.curves.values() for s, p in curve.items())


def settings_of(columns: dict[str, Sequence[Run]], labels: dict[str, str]) -> dict[str, list[Setting]]:
    """The settings of each column of panels, with their names and looks. "" is the heading of the only column."""
    grouped: dict[str, dict[str, list[Run]]] = {}
    for heading, runs in columns.items():
        short = short_names([*dict.fromkeys(run.name for run in runs)])
        for run in runs:
            name = labels.get(run.name) or short[run.name]
            grouped.setdefault(heading, {}).setdefault(name, []).append(run)
    look = looks(in_order(name for settings in grouped.values() for name in settings))
    result = {
        heading: [Setting(name, settings[name], look[name]) for name in in_order(settings)]
        for heading, settings in grouped.items()
    }
    if len(result) == 1:
        (only,) = result.values()
        return {"": only}
    if max(map(len, result.values())) <= MOST_TOGETHER:
        coloured = zip(result.items(), HEADING_COLOURS, strict=False)
        return {
            "": [
                Setting(f"{setting.name}, {heading}", setting.runs, replace(setting.look, colour=colour))
                for (heading, settings), colour in coloured
                for setting in settings
            ]
        }
    return result


def _draw(
    columns: dict[str, list[Setting]], metrics: Sequence[str], axis: str, window: int, title: str
) -> tuple[Figure, list[str]]:
    runs = [run for settings in columns.values() for setting in settings for run in setting.runs]
    n_panels, x = len(metrics) * len(columns), x_axis(axis, runs)
    n_columns = len(columns) if len(columns) > 1 else {4: 2, 7: 4, 8: 4}.get(n_panels, min(3, n_panels))
    n_rows = math.ceil(n_panels / n_columns)
    figure = Figure(figsize=(min(PANEL[0] * n_columns, WIDEST), PANEL[1] * n_rows + 0.5))
    panels = figure.subplots(n_rows, n_columns, squeeze=False)
    complaints: list[str] = []
    names: list[str] = []
    contents = [(metric, heading) for metric in metrics for heading in columns]
    for axes, (metric, heading) in zip(panels.flat, contents, strict=False):
        ends, undrawn = draw_panel(axes, columns[heading], metric, x, window)
        complaints += undrawn
        names += [name for name in sorted(ends, key=lambda name: -ends[name]) if name not in names]
        _head(axes, metric, heading, [*columns].index(heading), bool(ends))
    _share_scale([axes for axes, (metric, _) in zip(panels.flat, contents, strict=False) if metric.endswith("reward")])
    free = list(panels.flat[n_panels:])
    for axes in free[1:]:
        axes.remove()
    _write_around(figure, title, _caption(runs, metrics, window))
    _draw_legend(figure, names, free[0] if free else None)
    return figure, list(dict.fromkeys(complaints))


def _head(axes: Axes, metric: str, heading: str, column: int, has_curves: bool) -> None:
    """The panel's title; a panel without curves says so and has no axes."""
    text = f"{metric} · {heading}" if heading else metric
    style = {"color": HEADING_COLOURS[column]} if heading else {}
    if has_curves:
        axes.set_title(text, loc="left", fontsize=9.5, fontweight="bold", **style)
    else:
        axes.set_axis_off()
        axes.set_title(f"no {text}", loc="left", fontsize=9.5, color="#888888")


def _share_scale(panels: Sequence[Axes]) -> None:
    """Rewards are read off the same scale, whoever measured them."""
    limits = [axes.get_ylim() for axes in panels if axes.axison]
    for axes in panels if limits else []:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _draw_legend(figure: Figure, names: Sequence[str], free: Axes | None) -> None:
    """All names outside the panels.

    They go into a place of the grid that no panel needs if they fit there, else to the right of all panels.
    """
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            handles.setdefault(line.get_label(), line)
    entries, style = ([handles[name] for name in names], names), {"frameon": False, "handlelength": 3.6}
    if free is not None:
        free.set_axis_off()
        legend = free.legend(*entries, loc="upper left", borderaxespad=0, **style)
        legend.set_in_layout(False)
        figure.draw_without_rendering()
        box, cell = legend.get_window_extent(), free.get_window_extent()
        if box.width <= cell.width and box.height <= cell.height:
            return
        free.remove()
    legend = figure.legend(*entries, loc="outside right upper", **style)
    width, height = legend.get_window_extent().size / figure.dpi
    figure.set_figwidth(figure.get_figwidth() + width)
    figure.set_figheight(max(figure.get_figheight(), height + 0.5))


def _caption(runs: Sequence[Run], metrics: Sequence[str], window: int) -> str:
    parts = []
    settings = [(run.name, run.origin) for run in runs]
    if len(set(settings)) < len(runs):
        parts.append("mean over seeds, band from lowest to highest")
    if len({*zip(settings, (run.last_step for run in runs), strict=True)}) > len(set(settings)):
        parts.append("thin: single seeds after the others have ended")
    if window > 1 and any(metric.startswith("train/") for metric in metrics):
        parts.append(f"train/* of {SMOOTHED_FROM * window} points or more: running median of {window}, faint as logged")
    if any(run.ending in MARKED_ENDINGS for run in runs):
        parts.append("× last value of a run stopped as collapsed")
    return "; ".join(parts)


def _write_around(figure: Figure, title: str, caption: str) -> None:
    """The title above and the caption below the panels, in lines no wider than they are."""
    width = figure.get_figwidth() * 72
    if title:
        text = textwrap.fill(title, int(width / (TITLE_SIZE * LETTER)))
        figure.suptitle(text, fontsize=TITLE_SIZE, x=0.01, ha="left")
    text = textwrap.fill(caption, int(width / (CAPTION_SIZE * LETTER)))
    figure.supxlabel(text, fontsize=CAPTION_SIZE, color="#555555", x=0.01, ha="left")


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write the figure as PNG and SVG beside each other; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def reward_curve(run_dir: Path, window: int = 5) -> Path:
    """Draw `eval/reward` and `train/reward` of one run over GRPO steps; returns the PNG, in the run's folder.

    Raises ValueError if the run has neither.
    """
    run, _ = load_run(Path(run_dir))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.6))
        axes = figure.subplots()
        ends: dict[str, float] = {}
        for metric, name, look in (
            ("train/reward", "rollouts", Look("#E69F00", "-", "")),
            ("eval/reward", "held-out problems", Look("#0072B2", "-", "o")),
        ):
            setting = Setting(f"{name}\n({metric})", [run], look)
            ends |= draw_panel(axes, [setting], metric, x_axis("grpo_step", [run]), window)[0]
        if not ends:
            raise ValueError(f"{run_dir}: neither eval/reward nor train/reward to draw")
        axes.set_ylim(0 if min(ends.values()) >= 0 else None)
        axes.set_ylabel("mean reward")
        seed = "" if run.seed is None else f", seed {run.seed}"
        _write_around(figure, f"{run.name}{seed}: mean reward", _caption([run], list(run.curves), window))
        _draw_legend(figure, sorted(ends, key=lambda name: -ends[name]), None)
        path = Path(run_dir) / "reward_curve.png"
        figure.savefig(path)
    return path
