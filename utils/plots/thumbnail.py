"""A small picture of one metric, for a table of many ablations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from utils.plots.figures import settings_of
from utils.plots.history import Run
from utils.plots.panels import draw_panel, x_axis
from utils.plots.style import STYLE

SIZE = (3.4, 1.7)  # inches
SMALL = {"font.size": 6, "savefig.dpi": 140}
THINNER = 0.55  # than the lines and markers of a figure
MOST_NAMED = 6  # settings, highest first; more would hide the curves


def save_thumbnail(runs: Sequence[Run], metric: str, path: Path) -> bool:
    """Draw one metric of the runs to a PNG, with the settings that end highest named; False if no run has it."""
    (settings,) = settings_of({"": runs}, {}).values()
    with matplotlib.rc_context(STYLE | SMALL):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        ends, _ = draw_panel(axes, settings, metric, x_axis("grpo_step", runs))
        if not ends:
            return False
        for line in axes.get_lines():
            line.set_linewidth(line.get_linewidth() * THINNER)
            line.set_markersize(line.get_markersize() * THINNER)
            line.set_markeredgewidth(line.get_markeredgewidth() * THINNER)
        handles = {line.get_label(): line for line in axes.get_lines()}
        named = [name for name in sorted(ends, key=lambda name: -ends[name]) if name in handles][:MOST_NAMED]
        title = f"highest {len(named)} of {len(ends)}" if len(named) < len(ends) else None
        figure.legend([handles[name] for name in named], named, loc="outside right upper", frameon=False, title=title)
        axes.set_ylabel(metric)
        figure.savefig(path)
    return True
