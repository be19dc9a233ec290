"""This machine: a run is a process here, and its files are where it writes them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from utils.ablations.places.place import Ending, Launch
from utils.ablations.places.worker import start_process
from utils.preflight.obstacles import shortfalls


class LocalWork:
    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.began = process, time.monotonic()

    def poll(self) -> Ending | None:
        code = self.process.poll()
        return None if code is None else Ending(code, seconds=time.monotonic() - self.began)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


class LocalPlace:
    name = "local"

    def at_once(self, launches: Sequence[Launch]) -> int:
        return 1

    def obstacles(self, launch: Launch) -> Iterator[str]:
        return shortfalls(launch.config)

    def start(self, launch: Launch) -> LocalWork:
        one_thread = {"OMP_NUM_THREADS": "1"} if launch.config.training.device == "cpu" else {}  # more would spin
        return LocalWork(start_process(launch.command, launch.folder, one_thread))

    def close(self) -> None:
        pass
