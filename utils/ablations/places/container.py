"""A run in a rented container, which may be ended at its time limit or taken away. Standard library only."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils.ablations.places.worker import CONSOLE_FILE, SETTINGS_FILE, TRAIN, start_process
from utils.run.ending import Status

POLL_SECONDS = 2.0
COMMIT_SECONDS = 30.0  # between two times that what was written is made to last
GRACE_SECONDS = 25.0  # of the 30 that a container has after it was told to go
RESERVE_HOURS = 0.25  # for the last evaluation and save before the container's end


class TimeIsUp(Exception):
    """The container's time is over and the run has saved: it is to be resumed in a new container."""


def run_in_container(
    folder: Path,
    settings: str,
    hours: float,
    max_hours: float | None,
    env: dict[str, str],
    n_stops: Callable[[], int],
    commit: Callable[[], None],
) -> tuple[int, float]:
    """Start or continue the run in `folder`; returns its exit status and the seconds it took.

    The container lasts `hours`, the user asked for `max_hours`. `n_stops` says how often the run was asked to end, and
    `commit` makes what was written last. Raises TimeIsUp, and KeyboardInterrupt after a save if the container is taken
    away: in both cases Modal calls this again with the same arguments.
    """
    began, limit = time.monotonic(), hours - RESERVE_HOURS
    is_ours = max_hours is None or limit < max_hours
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / SETTINGS_FILE
    given.write_text(settings)
    command = [sys.executable, str(TRAIN), "--resume", f"--config={given}"]
    if is_ours:
        command.append(f"training.max_hours={limit}")
    process = start_process(command, folder, env, tied=True)
    try:
        _follow(process, folder / CONSOLE_FILE, n_stops, commit)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            _wait(process, GRACE_SECONDS)
        commit()
    if process.returncode == Status.TIME_LIMIT and is_ours:
        raise TimeIsUp(f"{folder}: saved at the container's time limit")
    return process.returncode, time.monotonic() - began


def _follow(process: subprocess.Popen, console: Path, n_stops: Callable[[], int], commit: Callable[[], None]) -> None:
    """Wait for the end; pass requests to stop on, and what the run prints."""
    n_sent, committed, shown = 0, time.monotonic(), console.stat().st_size
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        shown = _show(console, shown)
        while n_sent < n_stops():
            process.send_signal(signal.SIGINT)
            n_sent += 1
        if time.monotonic() - committed > COMMIT_SECONDS:
            commit()
            committed = time.monotonic()
    _show(console, shown)


def _show(console: Path, begin: int) -> int:
    """Print a file from a byte on; returns where it ends."""
    with console.open("rb") as file:
        file.seek(begin)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return begin + len(text)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
