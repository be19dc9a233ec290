"""Run folders and lookups that several test files share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plots.history import Point, Run

PROJECT = Path(__file__).parents[2]
REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=f"no published curves in {REFERENCE}")


def write_run(folder: Path, rewards: list[float], ending: str | None = "finished", lengths: bool = True) -> None:
    """A run that was evaluated after 0, 2, 4, ... GRPO steps, with two optimizer steps and ten seconds per step."""
    folder.mkdir(parents=True)
    rows = [{"eval_step": 0, "time": 0.0, "eval/reward": rewards[0]}]
    for step in range(1, 2 * len(rewards) - 1):
        row = {"grpo_step": step, "time": 10.0 * step, "optimizer_step": 2 * step}
        rows.append(row | ({"train/mean_response_length": 100.0 + step} if lengths else {"train/loss": 0.0}))
        if step % 2 == 0:
            rows.append({"eval_step": step, "time": 10.0 * step, "eval/reward": rewards[step // 2]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ending:
        (folder / "status.json").write_text(json.dumps({"status": ending}))


def run_of(name: str, **curves: list[float]) -> Run:
    """A run with the curves of eval_reward=[...], at the GRPO steps 0, 1, 2, ..."""
    points = {
        metric.replace("_", "/", 1): {step: Point(value) for step, value in enumerate(values)}
        for metric, values in curves.items()
    }
    return Run(name, name, name, curves=points)


def panel(figure: Figure, title: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def line(figure: Figure, title: str, name: str) -> tuple[list[float], list[float]]:
    """The data of a curve, by its panel's title and its name."""
    (drawn,) = [drawn for drawn in panel(figure, title).get_lines() if drawn.get_label() == name]
    return list(drawn.get_xdata()), list(drawn.get_ydata())


def names_in_legend(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    (legend,) = legends
    return [text.get_text() for text in legend.get_texts()]


def boxes_of(figure: Figure) -> tuple[object, list[object]]:
    """Where the legend is, in pixels, and all else: panels with their labels, the title and the caption."""
    figure.draw_without_rendering()
    holders = [axes for axes in figure.axes if axes.get_legend()]
    legend = (holders[0].get_legend() if holders else figure.legends[0]).get_window_extent()
    others = [axes.get_tightbbox() for axes in figure.axes if axes not in holders]
    others += [text.get_window_extent() for text in (figure._suptitle, figure._supxlabel) if text and text.get_text()]
    return legend, others


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, PROJECT / "play-scripts" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
