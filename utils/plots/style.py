"""How settings look in a figure: their colours, dashes and markers, their order and their short names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Okabe and Ito's colours (2008), told apart with any common colour blindness, dark before light, and a grey; the dashes
# and markers tell the same curves apart without colour.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
HEADING_COLOURS = (COLOURS[1], COLOURS[2])  # ours, and published
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (10, 2)), (0, (3, 1.5)), (0, (6, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "grpo",  # the same data give the same file
}


@dataclass(frozen=True)
class Look:
    """How one setting is drawn, in every panel."""

    colour: str
    dashes: str | tuple
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name: colours, dashes and markers repeat after 8, 7 and 9, so that no look comes twice."""
    return {
        name: Look(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the words that all begin or end with: lr_sweep_1e-6 and lr_sweep_3e-6 are 1e-6 and 3e-6.

    The last words stay if a name would otherwise be the beginning of another: clip and no_clip are not "" and "no".
    """
    words = {name: re.split(r"(?<=[_/])", name) for name in names}
    if len(words) < 2:
        return {name: name for name in names}
    shortest = min(len(parts) for parts in words.values()) - 1  # a name keeps one word at least
    front = _agreeing(list(words.values()), shortest)
    back = _agreeing([parts[::-1] for parts in words.values()], shortest - front)
    short = {name: "".join(parts[front : len(parts) - back]).rstrip("_/") for name, parts in words.items()}
    if any(a != b and b.startswith(a) for a in short.values() for b in short.values()):
        short = {name: "".join(parts[front:]) for name, parts in words.items()}
    return short


def _agreeing(lists: Sequence[Sequence[str]], most: int) -> int:
    """How many first words all lists have in common, up to a limit."""
    count = 0
    while count < most and len({parts[count] for parts in lists}) == 1:
        count += 1
    return count


def in_order(names: Iterable[str]) -> list[str]:
    """Numbers by size, then the other names as they come; names that differ only in a last number are sorted by it."""
    unique = list(dict.fromkeys(names))
    parts = {name: re.fullmatch(r"(.*?)(\d+(?:\.\d+)?(?:e[-+]?\d+)?)?", name, re.DOTALL).groups() for name in unique}
    stems = ["", *(stem for stem, _ in parts.values())]
    return sorted(unique, key=lambda name: (stems.index(parts[name][0]), float(parts[name][1] or 0)))
