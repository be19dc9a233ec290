"""A run's folder on another machine, copied here while the run goes on.

Whatever instant the other machine dies at, what was copied is a folder that `--resume` goes on from: a checkpoint
appears when it is whole, and never before the rows of metrics that led to it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from utils.ablations.places.listing import PIECE, Changed, Listing, Stamp, checkpoint_of
from utils.ablations.places.worker import CONSOLE_FILE
from utils.log.files import (
    METRICS_FILE,
    ROLLOUTS_FILE,
    RUN_INFO_FILE,
    UNFINISHED,
    WARNINGS_FILE,
    earlier_launches,
    replace_link,
    whole_folder,
)
from utils.log.output import holds_run

APPENDED = (METRICS_FILE, ROLLOUTS_FILE, WARNINGS_FILE, CONSOLE_FILE)  # only what is new is fetched of these


class Files(Protocol):
    """A folder on another machine."""

    def listing(self) -> Listing: ...

    def read(self, name: str, stamp: Stamp, begin: int) -> Iterator[bytes]:
        """A file as it was listed, from a byte on. Raises Changed."""


class Mirror:
    """Keeps `folder` a copy of `files`, as far as the names are `wanted`."""

    def __init__(self, files: Files, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.files, self.folder, self.wanted = files, folder, wanted
        self.known: Listing = {}  # what the copy holds, by the stamps of the original

    def adopt(self) -> None:
        """Both folders are the same now: nothing of this has to be fetched."""
        self.known = self._listing()

    def refresh(self) -> bool:
        """Fetch what has changed; returns False if something changed meanwhile, so that the next call has more to do.

        Logs are fetched before checkpoints, from one listing: a run logs a step before it saves it.
        """
        listing = self._listing()
        checkpoints = sorted({checkpoint_of(name) for name in listing} - {None})
        whole = [
            self._bring(name, stamp)
            for name, stamp in listing.items()
            if isinstance(stamp, Stamp) and checkpoint_of(name) is None and stamp != self.known.get(name)
        ]
        for checkpoint in checkpoints:
            inside = {name: stamp for name, stamp in listing.items() if checkpoint_of(name) == checkpoint}
            whole.append(self._bring_checkpoint(checkpoint, inside))
        if not all(whole):
            return False
        self._link({name: target for name, target in listing.items() if isinstance(target, str)})
        self._remove([name for name in self.known if name not in listing])
        return True

    def _listing(self) -> Listing:
        return {name: entry for name, entry in self.files.listing().items() if self.wanted(name)}

    def _bring(self, name: str, stamp: Stamp) -> bool:
        """Fetch one file, or what was appended to it; returns False if it has changed meanwhile."""
        path, known = self.folder / name, self.known.get(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        has_grown = name in APPENDED and isinstance(known, Stamp) and known.inode == stamp.inode
        try:
            if has_grown and path.exists() and path.stat().st_size == known.size <= stamp.size:
                with path.open("ab") as file:
                    self._copy(name, stamp, file, known.size)
            else:
                unfinished = path.with_name(UNFINISHED + path.name)
                with unfinished.open("wb") as file:
                    self._copy(name, stamp, file)
                unfinished.replace(path)
        except Changed:
            self.known.pop(name, None)
            return False
        self.known[name] = stamp
        return True

    def _bring_checkpoint(self, checkpoint: str, inside: Listing) -> bool:
        """Fetch a checkpoint, all of it or nothing; of one that is here, what has changed."""
        changed = {name: stamp for name, stamp in inside.items() if stamp != self.known.get(name)}
        if (self.folder / checkpoint).is_dir():
            whole = [self._bring(name, stamp) for name, stamp in changed.items()]
            return all(whole)
        with contextlib.suppress(Changed):
            with whole_folder(self.folder / checkpoint) as unfinished:
                for name, stamp in inside.items():
                    path = unfinished / Path(name).relative_to(checkpoint)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        self._copy(name, stamp, file)
            self.known |= inside
            return True
        return False

    def _copy(self, name: str, stamp: Stamp, file: BinaryIO, begin: int = 0) -> None:
        for data in self.files.read(name, stamp, begin):
            file.write(data)

    def _link(self, links: dict[str, str]) -> None:
        for name, target in links.items():
            link = self.folder / name
            if self.known.get(name) != target or not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                replace_link(link, target)
                self.known[name] = target

    def _remove(self, names: list[str]) -> None:
        """Remove what the original has no more, checkpoints as a whole."""
        for checkpoint in {checkpoint_of(name) for name in names} - {None}:
            if not any(checkpoint_of(name) == checkpoint for name in self.known if name not in names):
                gone = self.folder / Path(checkpoint).parent / f"{UNFINISHED}{Path(checkpoint).name}"
                with contextlib.suppress(FileNotFoundError):  # a folder with a checkpoint's name is whole at all times
                    (self.folder / checkpoint).rename(gone)
                    shutil.rmtree(gone)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            del self.known[name]


def holds_another_run(files: Files, folder: Path) -> bool:
    """Whether `folder` holds a run that is no copy of `files`, so that a mirror would write over it.

    A run is known by its first launch. Raises ValueError if a list of launches cannot be read.
    """
    if not holds_run(folder):
        return False
    listing, ours = files.listing(), earlier_launches(folder)[:1]
    stamp = listing.get(RUN_INFO_FILE)
    if not ours or not isinstance(stamp, Stamp):
        return bool(ours) or not listing
    return json.loads(b"".join(files.read(RUN_INFO_FILE, stamp, 0)))["launches"][:1] != ours


def pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file in pieces, each with its offset; one empty piece if it is empty."""
    with path.open("rb") as file:
        offset = 0
        while True:
            data = file.read(PIECE)
            if data or offset == 0:
                yield offset, data
            if len(data) < PIECE:
                return
            offset += len(data)
