"""What the runner asks of a place where runs run: to start a command, to say how it ended, and to bring files back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from configs.defaults import Config

CALL_FILE = "modal_call.json"  # in the folder of a run: its call on Modal, which may go on without the runner


@dataclass(frozen=True)
class Launch:
    """A run to be started, or continued, in `folder`."""

    name: str
    folder: Path  # paths.output_dir
    config: Config
    command: list[str]  # on this machine, and on those that share its files
    settings: str  # the fields that are set, as YAML: on other machines the config files of the command are absent


@dataclass(frozen=True)
class Ending:
    """How a launch ended. `code` is the exit status, negative for a signal; None if there was none to see.

    `lost` means that the machine, not the run, gave up: the run can be continued on another one.
    """

    code: int | None
    detail: str = ""
    seconds: float = 0.0  # that a machine was held
    lost: bool = False


class Work(Protocol):
    """A launch under way."""

    def poll(self) -> Ending | None:
        """How it ended, with all its files back; None while it goes on."""

    def interrupt(self) -> None:
        """Ask the run to save and end; the second call ends it at once."""


class Place(Protocol):
    """Where runs run."""

    name: str

    def at_once(self, launches: Sequence[Launch]) -> int:
        """How many runs the place takes at once, if the user does not say."""

    def obstacles(self, launch: Launch) -> Iterator[str]:
        """What keeps a launch from starting, one line each; asked of all before any of them is started."""

    def start(self, launch: Launch) -> Work:
        """Start or continue a run. Raises BlockingIOError if another process is running it."""

    def close(self) -> None:
        """Let go of the place, when all that was started has ended."""
