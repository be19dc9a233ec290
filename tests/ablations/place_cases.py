"""A Modal of this machine alone, in place of the package: volumes are folders, and calls are threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FILE = 1  # as in modal.volume.FileEntryType


class Error(Exception):
    pass


class NotFoundError(Error):
    pass


class AuthError(Error):
    pass


class ConnectionFailed(Error):
    pass


class ResourceExhaustedError(Error):
    pass


class FunctionTimeoutError(Error):
    pass


class Volume:
    """A volume that is mounted at `folder` while a function runs, and asked by its paths otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def iterdir(self, path: str, recursive: bool) -> Iterator[SimpleNamespace]:
        root = self.folder / path.strip("/")
        if not root.is_dir():
            raise FileNotFoundError(path)
        for entry in sorted(root.rglob("*")):
            kind = 3 if entry.is_symlink() else FILE if entry.is_file() else 2
            status = entry.lstat()
            name = str(entry.relative_to(self.folder))
            yield SimpleNamespace(path=name, type=kind, mtime=status.st_mtime_ns, size=status.st_size)

    def read_file(self, path: str) -> Iterator[bytes]:
        yield (self.folder / path).read_bytes()


class Call:
    """A function that runs in a thread, again after TimeIsUp, as Modal's retries do."""

    def __init__(self, call_id: str, function: Callable[[], Any]) -> None:
        self.object_id, self.result, self.error = call_id, None, None
        self.attempts = 0
        self.thread = threading.Thread(target=self.run, args=(function,), daemon=True)
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> None:
        from utils.ablations.places.container import TimeIsUp

        while True:
            self.attempts += 1
            try:
                self.result = function()
            except TimeIsUp:
                continue
            except Error as error:
                self.error = error
            return

    def get(self, timeout: float | None = None) -> Any:
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return self.result


class FakeModal:
    """What the project uses of the package `modal`."""

    def __init__(self, root: Path, function: Callable[..., Any]) -> None:
        self.root, self.function = root, function
        self.volumes: dict[str, Volume] = {}
        self.calls: dict[str, Call] = {}
        self.numbers = itertools.count()
        self.options: list[dict[str, Any]] = []
        self.stops: dict[str, int] = {}
        self.secrets: set[str] = set()
        self.refusal: Error | None = None  # of a spawn
        self.no_login = False
        self.exception = SimpleNamespace(
            Error=Error, NotFoundError=NotFoundError, AuthError=AuthError, ConnectionError=ConnectionFailed,
            ResourceExhaustedError=ResourceExhaustedError, FunctionTimeoutError=FunctionTimeoutError,
        )  # fmt: skip
        self.volume = SimpleNamespace(FileEntryType=SimpleNamespace(FILE=FILE))
        self.Volume = SimpleNamespace(from_name=self.find_volume)
        self.Secret = SimpleNamespace(from_name=lambda name: SimpleNamespace(hydrate=lambda: self.check_secret(name)))
        self.Dict = SimpleNamespace(
            from_name=lambda name, create_if_missing: SimpleNamespace(put=self.stops.__setitem__)
        )
        self.Function = SimpleNamespace(from_name=lambda app, name: self)
        self.FunctionCall = SimpleNamespace(from_id=self.find_call)

    def find_volume(self, name: str, create_if_missing: bool) -> Volume:
        if self.no_login:
            raise AuthError("Token missing.\nSee more.")
        folder = self.root / {"results": "runs", "data": "data"}.get(name.rpartition("-")[2], name.rpartition("-")[2])
        folder.mkdir(parents=True, exist_ok=True)
        return self.volumes.setdefault(name, Volume(folder))

    def check_secret(self, name: str) -> None:
        if name not in self.secrets:
            raise NotFoundError(name)

    def find_call(self, call_id: str) -> Call:
        if call_id not in self.calls:
            raise NotFoundError(call_id)
        return self.calls[call_id]

    def with_options(self, **options: Any) -> FakeModal:
        self.options.append(options)
        return self

    def spawn(self, **arguments: Any) -> Call:
        if self.refusal is not None:
            raise self.refusal
        call_id = f"fc-{next(self.numbers)}"  # runs are started by threads, all at once
        self.calls[call_id] = Call(call_id, lambda: self.function(**arguments))
        return self.calls[call_id]
