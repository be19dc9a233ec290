"""Whether an output path can be written, decided only here, and a process's claim on a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils.log.checkpoints import CHECKPOINTS_FOLDER, saved_checkpoints
from utils.log.files import CONFIG_FILE, METRICS_FILE

LOCK_FILE = ".lock"
ATTEMPTS = 100  # to lock a file that other starts keep removing


def unwritable(path: Path, is_file: bool = False, is_new: bool = False) -> str | None:
    """Why an output path cannot be used, and the remedy, to be put after "{path}: "; None if it can be used.

    The path is a folder, or with `is_file` a file. Missing folders above it are no obstacle, as they can be made.
    With `is_new` there must be no such file, or nothing in the folder.
    """
    kind = "file" if is_file else "folder"
    existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if is_file and existing == path:
        if path.is_dir():
            return "is a folder; give a file"
        if is_new:
            return "is already there; delete it, or choose another"
        return None if os.access(path, os.W_OK) else "may not be written to; give another file"
    if not existing.is_dir():
        return f"{existing} is a file; give another {kind}"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} may not be written to; give another {kind}"
    if is_new and existing == path and any(path.iterdir()):
        return "already holds something; choose another folder, or delete it"
    return None


def holds_run(output_dir: Path) -> bool:
    """Whether a run, perhaps of another config, has begun to write there."""
    begun = any((output_dir / name).exists() for name in (CONFIG_FILE, METRICS_FILE))
    return begun or bool(saved_checkpoints(output_dir / CHECKPOINTS_FOLDER))


@contextlib.contextmanager
def claimed(output_dir: Path) -> Iterator[TextIO]:
    """Claim a run folder for this process, until the file that it yields is closed or the process ends.

    An exception within the context takes the claim back: a lock file and folders that it made are removed again.
    Raises ValueError if the folder cannot be written to, and if another process has it: two would write over each
    other's checkpoints.
    """
    made: list[Path] = []
    try:
        lock = _lock(output_dir / LOCK_FILE, made)
    except BlockingIOError as error:
        raise ValueError(f"{output_dir}: another process is running there; wait for it, or end it") from error
    except OSError as error:
        reason = unwritable(output_dir) or f"cannot be written to ({error.strerror}); give another folder"
        raise ValueError(f"{output_dir}: {reason}") from error
    try:
        yield lock
    except BaseException:
        if output_dir / LOCK_FILE in made:
            (output_dir / LOCK_FILE).unlink(missing_ok=True)
        lock.close()
        with contextlib.suppress(OSError):  # not empty: something else has been written there
            for folder in (output_dir, *output_dir.parents):
                if folder in made:
                    folder.rmdir()
        raise


def _lock(path: Path, made: list[Path]) -> TextIO:
    """The file, open and locked; the file and folders that it had to make are added to `made`.

    Raises BlockingIOError if another process has locked the file, OSError if it cannot be made.

    A start that is refused removes its lock file again. Another process may have opened that file just before: its lock
    would be on a file without a name, which no third process ever sees. So it checks that the name still leads to the
    locked file, and otherwise tries again.
    """
    for _ in range(ATTEMPTS):
        made += [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            path.open("x").close()
            made.append(path)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as closing:
            lock = closing.enter_context(path.open("r+"))  # not "a", which would make the file unnoticed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                closing.pop_all()
                return lock
    raise BlockingIOError(f"{path} was removed {ATTEMPTS} times in a row")
