"""Text that others wrote, made safe for a terminal. Standard library only."""

from __future__ import annotations


def visible(text: str) -> str:
    """Text with every character that a terminal might obey, or that can't be seen, written as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
