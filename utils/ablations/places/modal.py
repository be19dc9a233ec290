"""Modal: a container with a rented GPU per run. Results stay on a volume; all but checkpoints come back meanwhile.

The functions that run there are in play-scripts/modal_app.py. A call goes on if this process ends: its id is kept in
the run's folder, and the same command finds it again.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from configs.defaults import Config
from utils.ablations.places.container import RESERVE_HOURS, TimeIsUp
from utils.ablations.places.inputs import input_files, is_inside
from utils.ablations.places.listing import checkpoint_of
from utils.ablations.places.mirror import Mirror, holds_another_run
from utils.ablations.places.place import CALL_FILE, Ending, Launch
from utils.ablations.places.volume import VolumeFiles
from utils.ablations.places.worker import CODE
from utils.log.files import git_state, write_atomically
from utils.log.output import claimed
from utils.preflight.model_files import is_local

APP = "grpo-from-scratch"
TRAIN_FUNCTION = "train_run"
APP_FILE = CODE / "play-scripts" / "modal_app.py"
RESULTS, DATA, MODELS = (f"{APP}-{name}" for name in ("results", "data", "models"))  # volumes
RESULTS_FOLDER, DATA_FOLDER = "runs", "data"  # where the first two are mounted, relative to the code
STOPS = f"{APP}-stops"  # a modal.Dict: how often each run was asked to end
SYNC_SECONDS = 10.0
AT_ONCE = 10  # GPUs that Modal's smallest plan allows
IN_SECRET = {  # what the secret of a tracker's name holds, which the run needs in its container
    "wandb": "WANDB_API_KEY=...",
    "trackio": "TRACKIO_SPACE_ID=owner/name HF_TOKEN=...",
}
NO_MODAL = '--on modal needs the package modal, which is missing: pip install -e ".[modal]"'


class ModalPlace:
    name = "modal"

    def __init__(self) -> None:
        if importlib.util.find_spec("modal") is None:
            raise ValueError(NO_MODAL)
        import modal

        self.modal = modal
        self._deploying = threading.Lock()

    def at_once(self, launches: Sequence[Launch]) -> int:
        return AT_ONCE

    def obstacles(self, launch: Launch) -> Iterator[str]:
        yield from misplaced(launch.config)
        try:
            yield from self._absent(launch.config)
            yield from self._other_run(launch.folder)
            for name in launch.config.elsewhere.secrets:
                yield from self._no_secret(name)
        except self.modal.exception.Error as error:
            raise ValueError(f"--on modal: {explain(self.modal, error)}") from error

    def start(self, launch: Launch) -> ModalWork:
        return ModalWork(self, launch)

    def close(self) -> None:
        pass

    def train_function(self) -> Any:
        """The function that trains, of this code: the app is deployed once per command. Raises ValueError."""
        with self._deploying:
            return self._deployed

    @functools.cached_property
    def _deployed(self) -> Any:
        done = subprocess.run([sys.executable, "-m", "modal", "deploy", str(APP_FILE)], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
            raise ValueError(f"`modal deploy` failed: {said[-1].strip()[:200]}")
        return self.modal.Function.from_name(APP, TRAIN_FUNCTION)

    @functools.cached_property
    def results(self) -> Any:
        return self.modal.Volume.from_name(RESULTS, create_if_missing=True)

    def _absent(self, config: Config) -> Iterator[str]:
        """Which inputs are not on their volumes."""
        for field, path in input_files(config).items():
            folder, *rest = path.parts
            if folder in (RESULTS_FOLDER, DATA_FOLDER) and "/".join(rest) not in self._names(folder):
                how = "upload_data" if folder == DATA_FOLDER else f"upload_data --path {path}"
                yield f"{field} = {str(path)!r} is not on its volume: modal run play-scripts/modal_app.py::{how}"
        model = config.paths.model_path
        if not is_local(model) and hub_folder(model) not in self._names(MODELS):
            yield (
                f"paths.model_path = {model!r} is not on the volume {MODELS}: "
                f"modal run play-scripts/modal_app.py::setup_model --model {model}"
            )

    def _other_run(self, folder: Path) -> Iterator[str]:
        """Whether the run here would be written over by the one that starts on the volume."""
        if not is_inside(folder, RESULTS_FOLDER) or (folder / CALL_FILE).exists():
            return
        if holds_another_run(VolumeFiles(self.modal, self.results, key_of(folder)), folder):
            yield f"{folder} holds a run that is not the one on Modal; move it away, or give another name"

    @functools.cache  # noqa: B019 (one place per process)
    def _names(self, folder: str) -> frozenset[str]:
        """Files and folders on the volume that is mounted there."""
        name = {RESULTS_FOLDER: RESULTS, DATA_FOLDER: DATA}.get(folder, folder)
        volume = self.modal.Volume.from_name(name, create_if_missing=True)
        paths = [PurePosixPath(entry.path.lstrip("/")) for entry in volume.iterdir("/", recursive=True)]
        return frozenset(str(place) for path in paths for place in (path, *path.parents))

    def _no_secret(self, name: str) -> Iterator[str]:
        try:
            self.modal.Secret.from_name(name).hydrate()
        except self.modal.exception.NotFoundError:
            yield f"elsewhere.secrets: no Modal secret {name!r}; make it: modal secret create {name} KEY=VALUE"


def misplaced(config: Config) -> Iterator[str]:
    """Which paths lead where no volume is, and what else the config lacks for Modal."""
    if not is_inside(Path(config.paths.output_dir), RESULTS_FOLDER):
        yield (
            f"paths.output_dir = {config.paths.output_dir!r} is outside the volume of results, and would be lost; "
            f"give a folder in {RESULTS_FOLDER}/ (run_ablations.py: --runs)"
        )
    for field, path in input_files(config).items():
        is_code = "(" in field and is_inside(path) and (CODE / path).is_file()  # which the image holds
        if not is_code and not any(is_inside(path, folder) for folder in (DATA_FOLDER, RESULTS_FOLDER)):
            yield f"{field} = {str(path)!r} is on no volume; put it in {DATA_FOLDER}/ and upload that"
    if config.training.device == "cpu":
        yield "training.device = 'cpu': a rented GPU would stand idle; set training.device=cuda:0"
    gpu, _, n_gpus = config.elsewhere.gpu.partition(":")  # how Modal names several
    if config.vllm.device is not None and n_gpus in ("", "0", "1"):
        named = f"elsewhere.gpu = {config.elsewhere.gpu!r}"
        yield f"{named}: vllm.device and training.device are two GPUs; set it to {gpu}:2"
    for name in config.training.tracker_names:
        if name in IN_SECRET and name not in config.elsewhere.secrets:
            yield (
                f"the tracker {name} needs its login in the container: modal secret create {name} {IN_SECRET[name]}, "
                f"then elsewhere.secrets='[{name}]'"
            )
    hours, limit = config.training.max_hours, config.elsewhere.timeout_hours - RESERVE_HOURS
    if hours is not None and hours > limit:
        yield (
            f"training.max_hours = {hours:g}: it begins anew in each container, and a container saves after {limit:g} "
            "hours; give no more than that, or null"
        )


def key_of(folder: Path) -> str:
    """What a run is called on the volume of results."""
    return PurePosixPath(folder).relative_to(RESULTS_FOLDER).as_posix()


def hub_folder(model: str) -> str:
    """Where the hub's client keeps a model, below HF_HOME."""
    return f"hub/models--{model.replace('/', '--')}"


def explain(modal: Any, error: Exception) -> str:
    """A line about an error of Modal's client, with what helps."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    remedies = {
        modal.exception.AuthError: "no login; run: modal token new",
        modal.exception.ResourceExhaustedError: "a quota is used up; wait, or raise it at modal.com/settings",
        modal.exception.ConnectionError: "Modal does not answer; check the network",
    }
    remedy = next((text for kind, text in remedies.items() if isinstance(error, kind)), None)
    return f"{remedy} ({said})" if remedy else said


class ModalWork:
    """A call of the training function. A thread makes it, or finds the earlier one, and brings files back meanwhile."""

    def __init__(self, place: ModalPlace, launch: Launch) -> None:
        self.place, self.modal, self.launch = place, place.modal, launch
        self.key = key_of(launch.folder)
        self.call: Any = None
        self.n_interrupts = 0
        self.ending: Ending | None = None
        threading.Thread(target=self._follow, daemon=True).start()

    def poll(self) -> Ending | None:
        return self.ending

    def interrupt(self) -> None:
        self.n_interrupts += 1

    def _follow(self) -> None:
        began = time.monotonic()
        try:
            with claimed(self.launch.folder) as lock:
                try:
                    self.ending = self._run()
                finally:
                    lock.close()
        except (self.modal.exception.FunctionTimeoutError, TimeIsUp) as error:  # and Modal has tried often enough
            detail = explain(self.modal, error)
            self.ending = Ending(None, f"the container was ended: {detail}", time.monotonic() - began, lost=True)
        except (self.modal.exception.Error, OSError, ValueError) as error:
            named = "" if self.call is None else f"; it may go on as call {self.call.object_id}: the same command asks"
            detail = f"{explain(self.modal, error)}{named}"
            self.ending = Ending(None, detail, time.monotonic() - began if self.call else 0.0)
        finally:
            self.ending = self.ending or Ending(None, "an error in the runner itself, shown above")

    def _run(self) -> Ending:
        stops = self.modal.Dict.from_name(STOPS, create_if_missing=True)
        files = VolumeFiles(self.modal, self.place.results, self.key)
        mirror = Mirror(files, self.launch.folder, wanted=lambda name: checkpoint_of(name) is None)
        self.call = self._earlier_call() or self._new_call(stops)
        n_sent = 0
        while True:
            if n_sent < self.n_interrupts:
                n_sent = self.n_interrupts
                stops.put(self.key, n_sent)
            result = self._result()
            is_whole = mirror.refresh()
            if result is not None and is_whole:
                (self.launch.folder / CALL_FILE).unlink()
                return Ending(*result[:1], seconds=result[1])

    def _result(self) -> tuple[int, float] | None:
        """Exit status and seconds, None if the call goes on."""
        try:
            return self.call.get(timeout=SYNC_SECONDS)
        except TimeoutError:
            return None

    def _earlier_call(self) -> Any:
        """The call that an earlier command made, if Modal still knows it."""
        path = self.launch.folder / CALL_FILE
        if not path.exists():
            return None
        try:
            call = self.modal.FunctionCall.from_id(json.loads(path.read_text())["call"])
            call.get(timeout=0)
        except TimeoutError:
            return call
        except (self.modal.exception.AuthError, self.modal.exception.ConnectionError):  # it may go on all the same
            raise
        except (ValueError, KeyError, TimeIsUp, self.modal.exception.Error):  # damaged, expired, or it failed
            return None
        return call

    def _new_call(self, stops: Any) -> Any:
        config = self.launch.config
        stops.put(self.key, 0)
        call = function_for(self.modal, self.place.train_function(), config).spawn(**arguments_of(self.launch))
        write_atomically(self.launch.folder / CALL_FILE, json.dumps({"call": call.object_id}) + "\n")
        return call


def function_for(modal: Any, function: Any, config: Config) -> Any:
    """The training function, with the card, the time limit and the secrets that a config asks for."""
    place = config.elsewhere
    options: dict[str, Any] = {"gpu": place.gpu, "timeout": round(place.timeout_hours * 3600)}
    if place.secrets:
        options["secrets"] = [modal.Secret.from_name(name) for name in place.secrets]
    return function.with_options(**options)


def arguments_of(launch: Launch) -> dict[str, Any]:
    """What the training function is called with."""
    return {
        "folder": launch.folder.as_posix(),
        "settings": launch.settings,
        "hours": launch.config.elsewhere.timeout_hours,
        "max_hours": launch.config.training.max_hours,
        "source": git_state(CODE),
    }
