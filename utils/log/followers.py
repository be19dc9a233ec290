"""The processes that show a run to its trackers. The run never waits for them before its end, and then not for long."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from utils.log.files import METRICS_FILE
from utils.log.tracker import PROGRESS_FILE, TrackedRun

LAST_WAIT = 1.5  # times a tracker's patience with its server: how long a run's end waits for all trackers together
POLL_SECONDS = 0.02
LOG_FILE = "{}.log"  # of a tracker's name: what its library printed, and why it failed


def new_run_id() -> str:
    """A name that no other run has, in letters that every tracker takes."""
    return secrets.token_hex(8)


class Followers:
    """One process per tracker. A tracker that hangs, prints or crashes does so over there."""

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._processes: list[FollowerProcess] = []
        self._unstarted: list[str] = []  # why
        for name in names:
            try:
                self._processes.append(FollowerProcess(name, run))
            except OSError as error:
                self._unstarted.append(f"{name} does not show this run: its process cannot be started: {error}")
        self._patience = run.patience

    def messages(self) -> Iterator[tuple[str, str]]:
        """("warning" or "note", text) of what the processes have had to say since the last call."""
        while self._unstarted:
            yield "warning", self._unstarted.pop(0)
        for process in self._processes:
            yield from process.messages()
        for process in [process for process in self._processes if process.has_ended]:
            self._processes.remove(process)
            yield "warning", process.failure()

    def close(self, status: str) -> Iterator[tuple[str, str]]:
        """Let the processes hand over the rest, and end those that do not get it done. Yields what they say."""
        yield from self.messages()
        deadline = time.monotonic() + LAST_WAIT * self._patience
        processes, self._processes = self._processes, []
        for process in processes:
            process.say_that_the_run_has_ended(status)
        try:
            while any(not process.has_ended for process in processes) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:
            late = [process for process in processes if not process.has_ended]
            for process in late:
                process.kill()
        for process in processes:
            yield from process.messages()
            if process in late:
                text = f"its server did not take everything within {LAST_WAIT * self._patience:.0f} seconds"
                yield "warning", f"{process.name}: {text}; {METRICS_FILE} has all of it, and --resume sends it again"
            elif process.has_failed:
                yield "warning", process.failure()
            process.let_go()


class FollowerProcess:
    """The process of one tracker, which runs `follow.py`."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name = name
        self._log = Path(run.folder) / LOG_FILE.format(name)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "utils.log.follow"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the run
                bufsize=0,
            )
        os.set_blocking(self._process.stdout.fileno(), False)
        self._unread = b""
        self._send({"tracker": name, "run": asdict(replace(run, folder=str(Path(run.folder).resolve())))})

    def _send(self, content: Any) -> None:
        line = content if isinstance(content, str) else json.dumps(content)
        with contextlib.suppress(BrokenPipeError):  # it has failed, which `failure` reports
            self._process.stdin.write(line.encode() + b"\n")

    def messages(self) -> Iterator[tuple[str, str]]:
        with contextlib.suppress(BlockingIOError):
            while piece := self._process.stdout.read(65536):
                self._unread += piece
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            yield from json.loads(line).items()

    def say_that_the_run_has_ended(self, status: str) -> None:
        self._send(status)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def has_failed(self) -> bool:
        return self._process.returncode not in (0, None)

    def failure(self) -> str:
        """Why the process ended before the run, in one line: the last that it wrote."""
        lines = self._log.read_text(errors="replace").strip().splitlines() or [f"exit {self._process.returncode}"]
        self.let_go()
        return f"{self.name} failed, {METRICS_FILE} goes on without it: {lines[-1].strip()} (more in {self._log})"

    def kill(self) -> None:
        """End it, and what its library has started. What it held is lost, so its progress is forgotten."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.with_name(PROGRESS_FILE.format(self.name)).unlink(missing_ok=True)

    def let_go(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
