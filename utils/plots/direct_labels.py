"""Names written at the ends of curves, moved apart where they would overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

# In points:
HEIGHT = 9.5  # a line of text
LETTER = 4.6  # the mean width of a letter
GAP = 5  # between a curve's end and its name
LEADER = 12  # the room for leader lines

LEADER_FROM = 0.8  # a name moved by more than this many line heights gets a leader line
COLUMN = 1 / 8  # of the panel's width: curves that end nearer than this have their names below each other
WIDEST = 0.3  # of the panel's width, that a name may take


@dataclass(frozen=True)
class Label:
    """A name for the curve that ends at (x, y), in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def spread(wanted: Sequence[float], height: float, low: float, high: float) -> list[float] | None:
    """Places at least `height` apart, within low and high and near the wanted ones, in their order; None: no room.

    Names that would touch are joined to a block, which is centred on what its members want.
    """
    if len(wanted) * height > high - low:
        return None
    blocks: list[tuple[float, list[int]]] = []  # centre, members from low to high
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        members = [i]
        centre = _clamped(members, wanted, height, low, high)
        while blocks and centre - len(members) * height / 2 < blocks[-1][0] + len(blocks[-1][1]) * height / 2:
            members = blocks.pop()[1] + members
            centre = _clamped(members, wanted, height, low, high)
        blocks.append((centre, members))
    places = [0.0] * len(wanted)
    for centre, members in blocks:
        for rank, i in enumerate(members):
            places[i] = centre + (rank - (len(members) - 1) / 2) * height
    return places


def _clamped(members: Sequence[int], wanted: Sequence[float], height: float, low: float, high: float) -> float:
    half = len(members) * height / 2
    return min(max(sum(wanted[i] for i in members) / len(members), low + half), high - half)


@dataclass(frozen=True)
class Placed:
    """Where a name is written, in points from (right, its curve's y)."""

    label: Label
    right: float
    indent: float
    moved: float
    leader: bool


def draw_labels(figure: Figure, panels: Sequence[tuple[Axes, Sequence[Label]]]) -> bool:
    """Write the names to the right of the curves' ends; False, and nothing drawn, where a panel has no room for them.

    Curves that end early have their names inside the axes, those that reach the end to the right of it.
    """
    figure.draw_without_rendering()  # the scales are final after a layout
    placed = [(axes, _place(figure, axes, labels)) for axes, labels in panels]
    if any(names is None for _, names in placed):
        return False
    for axes, names in placed:
        for name in names:
            _write(figure, axes, name)
    return True


def _place(figure: Figure, axes: Axes, labels: Sequence[Label]) -> list[Placed] | None:
    box, points = axes.get_window_extent(), figure.dpi / 72
    height = HEIGHT * points
    ends = {label: axes.transData.transform((label.x, label.y)) for label in labels}
    columns: list[list[Label]] = []
    for label in sorted(labels, key=lambda label: label.x):
        if not columns or ends[label][0] - ends[columns[-1][-1]][0] > COLUMN * box.width:
            columns.append([])
        columns[-1].append(label)
    placed = []
    for column in columns:
        if max(len(label.text) for label in column) * LETTER * points > box.width * WIDEST:
            return None
        wanted = [min(max(ends[label][1], box.y0), box.y1) for label in column]
        places = spread(wanted, height, box.y0, box.y1)
        if places is None:
            return None
        moves = [(place - want) / points for want, place in zip(wanted, places, strict=True)]
        right = column[-1].x
        gaps = [ends[column[-1]][0] - ends[label][0] for label in column]
        led = [
            abs(moved) > LEADER_FROM * HEIGHT or gap > 2 * GAP * points for moved, gap in zip(moves, gaps, strict=True)
        ]
        indent = LEADER if any(led) else 0.0
        placed += [
            Placed(label, right, indent, moved, leader) for label, moved, leader in zip(column, moves, led, strict=True)
        ]
    return placed


def _write(figure: Figure, axes: Axes, name: Placed) -> None:
    label = name.label
    # from the left of the name, so that it crosses no other name
    leader = {
        "arrowstyle": "-",
        "color": label.colour,
        "linewidth": 0.6,
        "relpos": (0, 0.5),
        "shrinkA": 0,
        "shrinkB": 2,
    }
    axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(name.right, label.y),
        textcoords=offset_copy(axes.transData, figure, x=GAP + name.indent, y=name.moved, units="points"),
        va="center",
        color=label.colour,
        fontsize=8,
        annotation_clip=False,
        arrowprops=leader if name.leader else None,
        bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )
