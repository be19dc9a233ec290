"""The caller's end of the grading server: start it, feed it, restart it when it dies."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

READY = "ready"
CRASH = "crash"
START_LIMIT = 120.0  # seconds; a loaded machine may take many to import sympy
WALL_LIMIT = 60.0  # seconds by the clock that an answer may take besides 20 times its processor time
SILENCE_MARGIN = 10.0  # seconds beyond an answer's two attempts after which a silent server counts as dead
END_LIMIT = 2.0  # seconds for the server to end by itself
WINDOW_BYTES = 48_000  # sent and not yet answered: less than a pipe holds, so that writing never blocks
MAX_ATTEMPTS = 2


class ServerDiedError(RuntimeError):
    """The server has ended, or is silent."""


class GradingClient:
    """One running server. Not for several threads at once.

    `time_limit` is seconds of processor time per answer. By the clock an answer may take far longer: a machine that is
    busy or frozen must not make it wrong.
    """

    def __init__(self, workers: int, time_limit: float, memory_limit_mb: int):
        self.wall_limit = WALL_LIMIT + 20 * time_limit
        self.settings = (workers, time_limit, memory_limit_mb, self.wall_limit)
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = os.getpid()
        self.unread = b""

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises ServerDiedError if it cannot start."""
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # The server sees no GPU and takes one core per worker, whatever the caller's environment asks for.
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "utils.rewards.server", *map(str, self.settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, bufsize=0
        )
        self.owner, self.unread = os.getpid(), b""
        if self._lines(START_LIMIT) != [READY.encode()]:
            raise ServerDiedError("the grading server did not start; see its error above")

    def grade(self, jobs: list[tuple[str, str]]) -> list[str]:
        """The verdict on each (prediction, truth), canonical texts, in order. A dead server is replaced."""
        verdicts: dict[int, str] = {}
        attempts = [0] * len(jobs)
        while len(verdicts) < len(jobs):
            waiting = [i for i in range(len(jobs)) if i not in verdicts]
            in_flight: dict[int, int] = {}
            try:
                if self.process is None or self.owner != os.getpid():
                    self.start()
                self._exchange(jobs, waiting, in_flight, verdicts)
            except (ServerDiedError, OSError) as error:
                self.close()
                if not in_flight:  # it did not die of an answer
                    raise RuntimeError(f"cannot grade: {error}") from error
                for i in in_flight:
                    attempts[i] += 1
                    if attempts[i] == MAX_ATTEMPTS:
                        verdicts[i] = CRASH
        return [verdicts[i] for i in range(len(jobs))]

    def _exchange(
        self, jobs: list[tuple[str, str]], waiting: list[int], in_flight: dict[int, int], verdicts: dict[int, str]
    ) -> None:
        """Send what waits, a window at a time, and collect the verdicts. `in_flight` maps a job to its bytes."""
        waiting = waiting[::-1]
        while waiting or in_flight:
            while waiting:
                line = json.dumps([waiting[-1], *jobs[waiting[-1]]]).encode() + b"\n"
                if in_flight and sum(in_flight.values()) + len(line) > WINDOW_BYTES:
                    break
                in_flight[waiting.pop()] = len(line)
                self.process.stdin.write(line)
            for reply in self._lines(2 * self.wall_limit + SILENCE_MARGIN):
                i, verdict = json.loads(reply)
                verdicts[i] = verdict
                del in_flight[i]

    def _lines(self, limit: float) -> list[bytes]:
        """The lines that the server has written, at least one. Raises ServerDiedError at its end or after `limit` s."""
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ServerDiedError(f"the grading server was silent for {limit:.0f} s")
                chunk = os.read(self.process.stdout.fileno(), 65_536)
                if not chunk:
                    raise ServerDiedError("the grading server died")
                *lines, self.unread = (self.unread + chunk).split(b"\n")
                if lines:
                    return lines

    def close(self) -> None:
        """End the server; in a fork of the caller, only forget it. Called again, it does nothing."""
        process, self.process = self.process, None
        if process is None:
            return
        process.stdin.close()
        process.stdout.close()
        if self.owner == os.getpid():
            try:
                process.wait(END_LIMIT)  # it ends its workers when the pipe closes
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
