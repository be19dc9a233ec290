"""The start of a run: what a resume found; and with several ranks, rank 0 decides and mistakes are told once.

Nothing here imports torch before it is needed. With one rank everything happens as if it stood alone.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from utils.log.output import LOCK_FILE
from utils.preflight.config_rules import ConfigError
from utils.ranks import launched, take_own_card
from utils.run.ending import StoppedWhileLoading

T = TypeVar("T")
FOLDER_PATIENCE = 10.0  # seconds in which what one machine writes must be seen by the others


def decided_by_first_rank(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; the ranks meet here. Raises ValueError if it did on rank 0."""
    launch = launched()
    if launch.n_ranks == 1:
        return decide()
    outcome: T | ValueError | None = None
    if launch.is_first:
        try:
            outcome = decide()
        except ValueError as mistake:
            outcome = ConfigError(str(mistake))
    take_own_card()
    from utils.algorithm import parallel  # torch, which takes seconds

    parallel.join()
    outcome = parallel.first(outcome)
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


@contextlib.contextmanager
def together() -> Iterator[None]:
    """At its end the ranks meet: a user's mistake or a stop on any of them is raised on all.

    Nothing within may wait for other ranks. Any other exception ends its rank, which the others notice.
    """
    from utils.algorithm import parallel

    failure: Exception | None = None
    try:
        yield
    except (ValueError, StoppedWhileLoading) as error:
        if parallel.n_ranks() == 1:
            raise
        failure = error
    told = None if failure is None else (isinstance(failure, StoppedWhileLoading), str(failure))
    for other in parallel.gather(told):
        if other is not None:
            is_stop, text = other
            raise StoppedWhileLoading(text) if is_stop else ConfigError(text)


def new_token(lock: TextIO) -> str | None:
    """Write a text that nobody else could have written into the lock file; None if there is one rank."""
    if launched().n_ranks == 1:
        return None
    token = uuid.uuid4().hex
    lock.seek(0)
    lock.truncate()
    lock.write(token)
    lock.flush()
    return token


def check_shared_folder(output_dir: Path, token: str | None) -> None:
    """Raise ConfigError if this rank does not see what rank 0 has written into the output folder."""
    if token is None:
        return
    path, until = output_dir / LOCK_FILE, time.monotonic() + FOLDER_PATIENCE
    while not path.is_file() or path.read_text() != token:
        if time.monotonic() > until:
            raise ConfigError(
                f"paths.output_dir = {str(output_dir)!r}: rank {launched().rank} does not see there what rank 0 has "
                "written; give a folder that all machines share"
            )
        time.sleep(0.1)


def open_nothing() -> TextIO:
    """What a rank holds in place of the lock file, which rank 0 has."""
    return Path(os.devnull).open()


def what_resume_found(output_dir: Path, grpo_step: int, n_grpo_steps: int, held_run: bool = True) -> str:
    """A line about how far the run in the folder had come."""
    if grpo_step == 0:
        if not held_run:
            return f"--resume: {output_dir} held NO RUN: a new one starts from the beginning; check paths.output_dir"
        return f"no checkpoint in {output_dir} yet: starting from the beginning"
    if grpo_step < n_grpo_steps:
        return f"resuming after GRPO step {grpo_step} of {n_grpo_steps}"
    return (
        f"{output_dir} holds a run that has done {grpo_step} of {n_grpo_steps} GRPO steps: nothing is left to train; "
        "to run it again, delete that folder or set another paths.output_dir"
    )
