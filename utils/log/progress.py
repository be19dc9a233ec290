"""A progress bar for generation, shown only where it takes longer than a moment and somebody looks at a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

DELAY = 2.0  # seconds without a bar


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`, to be told of every count of the total that is done; the bar vanishes at the end."""
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, transient=True, console=get_console(), disable=not get_console().is_terminal)
    task = progress.add_task(label, total=total)
    start, started = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal started
        progress.advance(task, count)
        if not started and time.monotonic() - start > DELAY:
            progress.start()
            started = True

    try:
        yield advance
    finally:
        progress.stop()
