"""The folder of a run on a Modal volume, as the mirror asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from utils.ablations.places.listing import Changed, Listing, Stamp


class VolumeFiles:
    """A folder on a volume, for the mirror."""

    def __init__(self, modal: Any, volume: Any, folder: str) -> None:
        self.modal, self.volume, self.folder = modal, volume, folder.strip("/")

    def listing(self) -> Listing:
        found: Listing = {}
        try:
            for entry in self.volume.iterdir(f"/{self.folder}", recursive=True):
                name = entry.path.lstrip("/").removeprefix(f"{self.folder}/")
                is_file = entry.type == self.modal.volume.FileEntryType.FILE
                if is_file and not any(part.startswith(".") for part in name.split("/")):
                    found[name] = Stamp(entry.mtime, entry.size, entry.mtime)  # a volume has no inodes
        except (FileNotFoundError, self.modal.exception.NotFoundError):
            return {}  # nothing was written yet
        return found

    def read(self, name: str, stamp: Stamp, begin: int) -> Iterator[bytes]:
        try:
            for data in self.volume.read_file(f"{self.folder}/{name}"):
                yield data[begin:]
                begin = max(0, begin - len(data))
        except FileNotFoundError as error:
            raise Changed(name) from error
