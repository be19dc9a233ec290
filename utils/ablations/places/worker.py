"""A run on the machine that trains: its process, and the files it reads and writes. Standard library only.

Ray and Modal import this module on their machines.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from utils.ablations.places.listing import Listing, Stamp, list_folder, read_piece

CODE = Path(__file__).parents[3]
TRAIN = CODE / "train_grpo.py"
CONSOLE_FILE = "console.log"
SETTINGS_FILE = "settings.yaml"
TIE = "tie"


def start_process(
    command: Sequence[str], folder: Path, env: dict[str, str], cwd: Path | None = None, tied: bool = False
) -> subprocess.Popen:
    """Start a command with its output in the folder's console.log; raises BlockingIOError if that is in use.

    The command runs in a session of its own, so that a terminal's Ctrl-C reaches this process alone. Its console.log
    is locked while it lives, so that no other process starts in the same folder. If `tied`, it dies with this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tie = [sys.executable, __file__, TIE, str(os.getpid())] if tied else []
    with (folder / CONSOLE_FILE).open("ab") as console:
        fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return subprocess.Popen(
            [*tie, *command],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=env | os.environ,  # what the user sets wins
            cwd=cwd,
            start_new_session=True,
        )


def run_tied(parent: int, command: Sequence[str]) -> None:
    """Become the command; the kernel kills it when the parent dies, however that dies."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of Linux's prctl
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a mask is inherited, and SIGINT must arrive
    if os.getppid() != parent:  # it died before
        sys.exit(1)
    os.execv(command[0], command)


class RunOnWorker:
    """One run on a machine of a cluster. Without shared files it runs in a folder of its own, a copy of the runner's.

    `work` is that folder: paths in the config are relative, so that they mean the same there as where the runner is.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.work: Path | None = None
        self.folder: Path | None = None
        self.process: subprocess.Popen | None = None
        self.began = time.monotonic()

    def sees(self, path: str, text: str) -> bool:
        """Whether a file that the runner has just written is here too, with the same text."""
        try:
            return Path(path).read_text() == text
        except OSError:
            return False

    def receive(self, name: str, offset: int, data: bytes) -> None:
        """Write a piece of a file into the folder of its own."""
        path = self._own(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)

    def receive_link(self, name: str, target: str) -> None:
        path = self._own(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def open(self, folder: str) -> None:
        """Make the run's output folder, relative like all paths, if it was not received."""
        self.folder = self._own(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, settings: str) -> None:
        """Start the run with the files received."""
        work = self._own(".")
        (work / SETTINGS_FILE).write_text(settings)
        command = [sys.executable, str(TRAIN), "--resume", f"--config={SETTINGS_FILE}"]
        self.process = start_process(command, self.folder, self.env, work, tied=True)

    def start_shared(self, arguments: Sequence[str], folder: str, cwd: str) -> str | None:
        """Start the run where the runner is, as the files are the same; returns why that is impossible, or None."""
        try:
            command = [sys.executable, str(TRAIN), *arguments]
            self.process = start_process(command, Path(folder), self.env, Path(cwd), tied=True)
        except BlockingIOError:
            return "another process is running it"
        return None

    def state(self) -> tuple[int | None, float]:
        """The exit status, None while the run goes on, and the seconds since this machine was taken."""
        code = None if self.process is None else self.process.poll()
        return code, time.monotonic() - self.began

    def listing(self) -> Listing:
        return list_folder(self.folder)

    def read(self, name: str, stamp: Stamp, offset: int, n_bytes: int) -> bytes:
        return read_piece(self.folder / name, stamp, offset, n_bytes)

    def interrupt(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)

    def clear(self) -> None:
        """Remove the folder of its own."""
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)

    def _own(self, name: str) -> Path:
        self.work = self.work or Path(tempfile.mkdtemp(prefix="grpo-"))
        path = self.work / name
        assert path.resolve().is_relative_to(self.work.resolve()), name
        return path


if __name__ == "__main__":
    assert sys.argv[1] == TIE
    run_tied(int(sys.argv[2]), sys.argv[3:])
