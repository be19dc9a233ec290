"""How a run ends: its exit status, the signals that ask for an end, and the time limit. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Self

from utils.ranks import launched


class Status(IntEnum):
    """Exit statuses. A second signal ends the process by that signal, which a shell shows as 128 + its number."""

    FINISHED = 0
    ERROR = 1
    USER_MISTAKE = 2
    COLLAPSED = 3
    STOPPED_BY_SIGNAL = 4  # saved, can be resumed; while loading and before the first step there is nothing to save
    TIME_LIMIT = 5  # saved, can be resumed
    NONFINITE = 6


class SignalHandler:
    """Handles signals by `on_signal`. A context manager: at its end it restores the earlier handlers.

    SIGHUP, which a closed terminal sends, is left alone if it is ignored at the start: then `nohup` asked for that.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in self.SIGNALS}
        if self._previous[signal.SIGHUP] is signal.SIG_IGN:
            del self._previous[signal.SIGHUP]
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals over. Call it again after loading a library that may have installed its own handlers."""
        for number in self._previous:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StoppedWhileLoading(Exception):
    """A signal asked to stop before the run began: nothing is trained, so there is nothing to save."""


class StopRequest(SignalHandler):
    """Turns the first signal into a flag that the loops check; the second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if launched().n_ranks > 1:  # torchrun sends SIGTERM to the others once a rank has ended; all keep their status
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def install(self) -> None:
        if not self.requested:
            super().install()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def what(self) -> str:
        """What has asked to stop."""
        return "a signal to another rank" if self.signal is None else self.signal.name

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)  # the kernel's own, which ends even a process that is stuck in C code
        if self.signal == signal.SIGHUP:
            leave_lost_terminal()
        if not launched().is_first:
            return  # rank 0 says so at the end, once for all
        message = "ending after the work at hand, and a save of the steps done, if any; once more ends at once"
        with contextlib.suppress(OSError):
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{self.signal.name}: {message}\n".encode())

    def check_while_loading(self) -> None:
        """Raise StoppedWhileLoading if a signal has come."""
        if self.requested:
            raise StoppedWhileLoading(
                f"stopped by {self.signal.name} while loading: no step was taken, so nothing was saved"
            )


def leave_lost_terminal() -> None:
    """Replace a terminal that is gone by /dev/null: writing to it would fail, perhaps in the middle of a save."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


class TimeLimit:
    """Ends a run early enough for its last evaluation and save, judging by how long each took recently.

    Make it when the program starts, because loading counts.
    """

    RECENT = 3  # the longest of this many counts, so that one slow first step is forgotten
    MARGIN = 1.1  # because responses, and steps with them, may grow longer

    def __init__(self, max_hours: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_hours` None means no limit."""
        self._clock = clock
        self._deadline = None if max_hours is None else clock() + 3600 * max_hours
        self._recent: dict[str, deque[float]] = {}

    def record(self, **seconds: float) -> None:
        """Note how many seconds a `step`, an `evaluation` or a `save` took: `record(step=41.5, save=3.2)`."""
        for kind, duration in seconds.items():
            self._recent.setdefault(kind, deque(maxlen=self.RECENT)).append(duration)

    def allows_another_step(self, evaluates: bool = True) -> bool:
        """Whether a step, an evaluation (if the run `evaluates`) and a save still fit.

        A duration that was never measured counts as long as a step. Before the first step it counts as 0.
        """
        if self._deadline is None:
            return True
        step = max(self._recent.get("step", [0.0]))
        save = max(self._recent.get("save", [step]))
        evaluation = max(self._recent.get("evaluation", [step])) if evaluates else 0.0
        return self._clock() + self.MARGIN * (step + evaluation + save) <= self._deadline
