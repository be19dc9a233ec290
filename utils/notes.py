"""A line for people: what was decided on its own and is worth knowing. Warnings of a run go through its log instead."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """Print `note: text`, above a progress bar if there is one."""
    print(f"note: {text}", file=sys.stderr, flush=True)
