"""A Ray cluster, or this machine's cards through Ray: an actor per run, which holds its GPU while the run lives."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.ablations.places.inputs import bad_inputs, input_files, is_inside
from utils.ablations.places.listing import PIECE, Listing, Stamp, list_folder
from utils.ablations.places.mirror import Mirror, pieces
from utils.ablations.places.place import Ending, Launch
from utils.ablations.places.worker import CODE, RunOnWorker
from utils.log.files import SOURCE_VARIABLE, git_state
from utils.log.output import claimed

PATIENCE = 5  # seconds that an address has to answer
SYNC_SECONDS = 2.0  # between looks at a run's files
POLL_SECONDS = 0.5
TOKEN_FILE = ".seen-from-here"  # which a worker looks for, to learn whether it shares the runner's files
LEFT_OUT = ("/.*", "/data/*/", "/docs", "/results", "/runs", "/tests", "/wandb", "__pycache__")


class RayPlace:
    """The cluster at `address`; None is the one that this machine belongs to, or else a Ray of this machine alone."""

    name = "ray"
    shares_files: bool | None = None  # None: each worker is asked

    def __init__(self, address: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ValueError('--on ray needs the package ray, which is missing: pip install -e ".[ray]"')
        import ray

        self.ray, self.address = ray, address
        if address is not None:
            check_answers(address)
        runtime = {"working_dir": str(CODE), "excludes": list(LEFT_OUT)}
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            found = address or running_cluster()
            ray.init(address=found, runtime_env=runtime, **quiet, **({} if found else {"include_dashboard": False}))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"--on ray: no connection to {address or 'a local Ray'}: {first_line(error)}") from error

    def at_once(self, launches: Sequence[Launch]) -> int:
        """How many of the largest of the runs the live nodes hold."""
        needs = [needed(launch) for launch in launches]
        largest = {name: max((need[name] for need in needs), default=0.0) for name in ("GPU", "CPU")}
        return max(1, sum(fitting(node["Resources"], largest) for node in self._nodes()))

    def obstacles(self, launch: Launch) -> Iterator[str]:
        yield from bad_inputs(launch.config)
        need, n_gpus = needed(launch), launch.config.elsewhere.ray_gpus
        if launch.config.vllm.device is not None and n_gpus < 2:
            yield f"elsewhere.ray_gpus = {n_gpus:g}: vllm.device and training.device are two GPUs; set it to 2"
        if not any(fitting(node["Resources"], need) for node in self._nodes()):
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items() if amount)
            yield (
                f"no node of the cluster has {wanted} for a run; start one that has, or lower elsewhere.ray_gpus and "
                "elsewhere.ray_cpus"
            )

    def start(self, launch: Launch) -> RayWork:
        return RayWork(self, launch)

    def close(self) -> None:
        self.ray.shutdown()

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]


def running_cluster() -> str | None:
    """The address of the cluster that this machine belongs to, None if it belongs to none."""
    from ray._private.services import find_gcs_addresses

    return os.environ.get("RAY_ADDRESS") or ("auto" if find_gcs_addresses() else None)


def check_answers(address: str) -> None:
    """Raise ValueError if nothing listens there: Ray itself would try for a long time, and end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--on ray:{address}: give host:port, or ray://host:port of a Ray Client server")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ValueError(
            f"--on ray:{address}: does not answer ({error}); is the cluster up (`ray status` there), and its port open?"
        ) from error


def needed(launch: Launch) -> dict[str, float]:
    """What a run takes of a node."""
    uses_gpu = launch.config.training.device.startswith("cuda")
    return {"GPU": launch.config.elsewhere.ray_gpus if uses_gpu else 0.0, "CPU": launch.config.elsewhere.ray_cpus}


def fitting(resources: dict[str, float], need: dict[str, float]) -> int:
    """How many runs a node holds."""
    return min((math.floor(resources.get(name, 0.0) / n + 1e-9) for name, n in need.items() if n), default=1)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class WorkerFiles:
    """The folder of a run on its worker, for the mirror."""

    def __init__(self, work: RayWork) -> None:
        self.work = work

    def listing(self) -> Listing:
        return self.work.ask("listing")

    def read(self, name: str, stamp: Stamp, begin: int) -> Iterator[bytes]:
        for offset in range(begin, stamp.size, PIECE):
            yield self.work.ask("read", name, stamp, offset, PIECE)


class RayWork:
    """A run on some worker. A thread starts it there, and copies its files here while it goes on."""

    def __init__(self, place: RayPlace, launch: Launch) -> None:
        self.ray, self.place, self.launch = place.ray, place, launch
        self.n_interrupts = 0
        self.seconds = 0.0
        self.ending: Ending | None = None
        need = needed(launch)
        source = {SOURCE_VARIABLE: json.dumps(git_state(CODE))}
        self.actor = (
            self.ray.remote(RunOnWorker)
            .options(num_gpus=need["GPU"], num_cpus=need["CPU"], max_restarts=0)
            .remote(source)
        )
        self.is_begun, self.begins = False, threading.Lock()
        threading.Thread(target=self._follow, daemon=True).start()

    def poll(self) -> Ending | None:
        return self.ending

    def interrupt(self) -> None:
        with self.begins:  # else the run could get one request twice, and the second one ends it without a save
            self.n_interrupts += 1
            if self.is_begun:
                self.actor.interrupt.remote()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of the worker. Raises RayError if the worker is gone."""
        try:
            return self.ray.get(getattr(self.actor, method).remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None

    def _follow(self) -> None:
        """Start the run, follow it to its end, and note how that was, when nothing more is asked of Ray."""
        ending = None
        try:
            ending = self._run()
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            ending = Ending(None, f"the worker was lost: {first_line(error)}", self.seconds, lost=True)
        except (OSError, ValueError) as error:
            ending = Ending(None, first_line(error), self.seconds)
        finally:
            with contextlib.suppress(self.ray.exceptions.RayError, ValueError):  # it is gone, or so is Ray
                if ending is not None and not ending.lost:
                    self.ask("clear")
                self.ray.kill(self.actor)
            self.ending = ending or Ending(None, "an error in the runner itself, shown above", self.seconds)

    def _run(self) -> Ending:
        ready = self.actor.state.remote()
        while not self.ray.wait([ready], timeout=POLL_SECONDS)[0]:  # until the cluster has room
            if self.n_interrupts:
                return Ending(-2, "stopped before the cluster had room for it")
        self.ray.get(ready)
        if self._shares_files():
            refusal = self.ask(
                "start_shared", self.launch.command[2:], str(self.launch.folder.absolute()), str(Path.cwd())
            )
            return Ending(None, refusal, self.seconds) if refusal else self._wait(None)
        with claimed(self.launch.folder) as lock:
            try:
                self._send()
                mirror = Mirror(WorkerFiles(self), self.launch.folder)
                self.ask("open", str(self.launch.folder))
                mirror.adopt()
                self.ask("start", self.launch.settings)
                return self._wait(mirror)
            finally:
                lock.close()

    def _shares_files(self) -> bool:
        if self.place.shares_files is not None:
            return self.place.shares_files
        token, text = self.launch.folder.absolute() / TOKEN_FILE, uuid.uuid4().hex
        token.write_text(text)
        try:
            return self.ask("sees", str(token), text)
        finally:
            token.unlink()

    def _send(self) -> None:
        """Send inputs, and the folder as it is here. Raises ValueError for a path that means nothing there."""
        folder = self.launch.folder
        for field, path in {"paths.output_dir": folder, **input_files(self.launch.config)}.items():
            if not is_inside(path):
                raise ValueError(
                    f"{field} = {str(path)!r}: the worker does not share this machine's files, and gets those below "
                    "the folder that you run from; give a relative path"
                )
            for name in list_folder(path) if path.is_dir() else [""]:
                self._send_file(path / name if name else path)

    def _send_file(self, path: Path) -> None:
        if path.is_symlink() and path.parent.name == "checkpoints":
            self.ask("receive_link", str(path), str(path.readlink()))
            return
        for offset, data in pieces(path):
            self.ask("receive", str(path), offset, data)

    def _wait(self, mirror: Mirror | None) -> Ending:
        """Wait for the end, copying files meanwhile; at the end until nothing is left to copy."""
        with self.begins:
            self.is_begun = True
            for _ in range(self.n_interrupts):  # which came while it was started
                self.actor.interrupt.remote()
        while True:
            code, self.seconds = self.ask("state")
            is_whole = mirror is None or mirror.refresh()
            if code is not None and is_whole:
                return Ending(code, seconds=self.seconds)
            time.sleep(POLL_SECONDS if code is not None else SYNC_SECONDS)
