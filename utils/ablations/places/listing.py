"""What is in a run's folder, and pieces of its files, as they are copied between machines. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from utils.log.checkpoints import CHECKPOINTS_FOLDER

PIECE = 8 * 2**20  # bytes that are sent at once


class Stamp(NamedTuple):
    """A file's identity: one that was replaced has another, one that was appended to is only larger."""

    inode: int
    size: int
    time: int  # ns; of the last change


Listing = dict[str, Stamp | str]  # by relative path; a link is its target


class Changed(Exception):
    """A file is no longer what a listing said: it was removed or replaced since."""


def list_folder(folder: Path) -> Listing:
    """Files and links of a run, without what is being written and what belongs to a machine.

    What a save is still writing or removing begins with a dot.
    """
    found: Listing = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*files, *folders]:
            path = Path(place, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = str(path.readlink())
            elif name in files and not name.startswith("."):
                try:
                    status = path.stat()
                except FileNotFoundError:  # removed while we looked
                    continue
                found[str(path.relative_to(folder))] = Stamp(status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def read_piece(path: Path, stamp: Stamp, offset: int, n_bytes: int) -> bytes:
    """Bytes of a file as it was listed; raises Changed if it was removed or replaced since."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != stamp.inode or status.st_size < stamp.size:
                raise Changed(str(path))
            file.seek(offset)
            return file.read(min(n_bytes, stamp.size - offset))
    except FileNotFoundError as error:
        raise Changed(str(path)) from error


def checkpoint_of(name: str) -> str | None:
    """The checkpoint folder that a file of a run is in, None if it is in none."""
    parts = Path(name).parts
    return "/".join(parts[:2]) if len(parts) > 2 and parts[0] == CHECKPOINTS_FOLDER else None
