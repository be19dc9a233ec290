"""The one progress bar: of a training run, of generation, of SFT. It is drawn only on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Self

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

LINE_INTERVAL = 60.0  # seconds between lines about generation where there is no terminal to draw a bar on
DELAY = 2.0  # seconds of generation without a bar: a shorter one would only flicker


class ProgressBar:
    """A labelled bar below the lines that are printed through it. Several at once are stacked.

    It appears after `delay` seconds, and vanishes when it is closed unless it `stays`. Output that cannot be written,
    because the terminal or a pipe's reader is gone, is lost and does no harm: a run that nobody watches goes on.
    """

    def __init__(self, label: str, total: int, completed: int = 0, delay: float = 0.0, stays: bool = False) -> None:
        self._console = get_console()  # the same for all bars, so that they stack
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=2,
            speed_estimate_period=3600,  # a step may take minutes
            transient=not stays,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=total, completed=completed)
        self._appears_at, self._started = time.monotonic() + delay, False
        self.advance(0)

    @property
    def is_drawn(self) -> bool:
        """Whether there is a terminal to draw the bar on."""
        return self._console.is_terminal

    def advance(self, count: int = 1) -> None:
        """Call it when `count` more are done."""
        self._progress.advance(self._task, count)
        if not self._started and time.monotonic() >= self._appears_at:
            self._started = True
            with contextlib.suppress(OSError):
                self._progress.start()

    def show(self, completed: int | None = None, label: str | None = None) -> None:
        """Set how many are done, or the label."""
        self._progress.update(self._task, completed=completed, description=label)

    def line(self, text: str, style: str = "") -> None:
        """Print a line above the bar. It is not wrapped, and nothing in it is read as markup."""
        with contextlib.suppress(OSError):
            self._console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields advance(n): call it when n more are done. The bar appears after `DELAY` and vanishes at the end.

    Without a terminal, as in a log, a line per `LINE_INTERVAL` shows the progress.
    """
    with ProgressBar(label, total, delay=DELAY) as bar:
        done, started = 0, time.monotonic()
        last_line = started

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.advance(count)
            now = time.monotonic()
            if not bar.is_drawn and done < total and now >= last_line + LINE_INTERVAL:
                last_line = now
                left = str(timedelta(seconds=round((now - started) / done * (total - done)))) if done else "unknown"
                bar.line(f"{label} {done:,} of {total:,}  left {left}")

        yield advance
