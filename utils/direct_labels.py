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
LEADER = 6  # the room for leader lines

LEADER_FROM = 0.8  # a name moved by more than this many line heights gets a leader line
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


def draw_labels(figure: Figure, axes: Axes, labels: Sequence[Label]) -> bool:
    """Write the names to the right of the curves' ends; False, and nothing drawn, where there is no room for them.

    Curves that end early have their names inside the axes, those that reach the end to the right of it.
    """
    figure.draw_without_rendering()  # the scales are final after a layout
    box, points = axes.get_window_extent(), figure.dpi / 72
    height = HEIGHT * points
    columns: dict[int, list[Label]] = {}
    for label in labels:
        x, _ = axes.transData.transform((label.x, label.y))
        columns.setdefault(round(x / box.width * 8), []).append(label)
    placed = []
    for column in columns.values():
        if max(len(label.text) for label in column) * LETTER * points > box.width * WIDEST:
            return False
        wanted = [min(max(axes.transData.transform((label.x, label.y))[1], box.y0), box.y1) for label in column]
        places = spread(wanted, height, box.y0, box.y1)
        if places is None:
            return False
        moves = [(place - want) / points for want, place in zip(wanted, places, strict=True)]
        indent = LEADER if any(abs(moved) > LEADER_FROM * HEIGHT for moved in moves) else 0.0
        right = max(label.x for label in column)
        placed += [(label, right, indent, moved) for label, moved in zip(column, moves, strict=True)]
    for label, right, indent, moved in placed:
        beside = offset_copy(axes.transData, figure, x=GAP + indent, y=moved, units="points")
        leader = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(right, label.y),
            textcoords=beside,
            va="center",
            color=label.colour,
            fontsize=8,
            annotation_clip=False,
            arrowprops=leader if abs(moved) > LEADER_FROM * HEIGHT else None,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )
    return True
