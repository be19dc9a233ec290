"""Runs on Modal: the functions that run there, and the commands that set them up (docs/elsewhere.md).

    modal run play-scripts/modal_app.py::setup_model --model Qwen/Qwen2.5-Math-1.5B
    modal run play-scripts/modal_app.py::upload_data
    modal run --detach play-scripts/modal_app.py::train --spawn --config configs/math.yaml \\
        --config configs/hardware/h100.yaml
    python play-scripts/modal_app.py pull math --checkpoints
    python play-scripts/run_ablations.py configs/lr_sweep --on modal --overlay configs/hardware/h100.yaml

`train` takes the options of train_grpo.py, and --gpu for the kind of card (H100). It waits for the run, or with --spawn
leaves it on Modal and prints what the run is called. `pull` brings results back into runs/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from configs.defaults import Config
from utils.ablations.estimate import cost
from utils.ablations.places import modal as place
from utils.ablations.places.container import run_in_container
from utils.ablations.places.inputs import is_inside
from utils.ablations.places.listing import checkpoint_of
from utils.ablations.places.mirror import Mirror, holds_another_run
from utils.ablations.places.place import Launch
from utils.ablations.places.worker import CODE
from utils.log.checkpoints import CHECKPOINTS_FOLDER, link_checkpoints
from utils.log.files import CONFIG_FILE, SOURCE_VARIABLE
from utils.log.output import claimed
from utils.preflight.config import load_config_and_origins
from utils.preflight.yaml_values import dump
from utils.run.ending import Status

try:
    import modal
except ImportError:
    print(f"error: {place.NO_MODAL}", file=sys.stderr)
    sys.exit(Status.USER_MISTAKE)

HOME = PurePosixPath("/grpo")  # the code in the container; runs/ and data/ in it are volumes
CACHE = "/models"  # of the Hugging Face hub's client
DEFAULT_GPU = "H100"
DAY = 24 * 3600
LEFT_OUT = [".*", "**/__pycache__", "data", "docs", "results", "runs", "tests", "wandb", "*.egg-info"]

app = modal.App(place.APP)
results = modal.Volume.from_name(place.RESULTS, create_if_missing=True)
data = modal.Volume.from_name(place.DATA, create_if_missing=True)
models = modal.Volume.from_name(place.MODELS, create_if_missing=True)
# The devel image has the compiler that vLLM's kernels are built with when they are first used.
image = (
    modal.Image.from_registry("nvidia/cuda:13.0.2-devel-ubuntu24.04", add_python="3.12")
    .pip_install_from_pyproject(str(CODE / "pyproject.toml"), optional_dependencies=["gpu", "trackers"])
    .env({"PYTHONPATH": str(HOME), "HF_HOME": CACHE})
    .workdir(str(HOME))
    .add_local_dir(CODE, str(HOME), ignore=LEFT_OUT)
)


@app.function(
    image=image,
    gpu=DEFAULT_GPU,
    timeout=DAY,
    retries=modal.Retries(max_retries=10, initial_delay=1.0),  # after TimeIsUp, or if the container dies
    volumes={f"{HOME}/{place.RESULTS_FOLDER}": results, f"{HOME}/{place.DATA_FOLDER}": data, CACHE: models},
)
def train_run(folder: str, settings: str, hours: float, max_hours: float | None, source: dict) -> tuple[int, float]:
    """Start or continue a run; returns its exit status and the seconds it took."""
    stops = modal.Dict.from_name(place.STOPS, create_if_missing=True)
    key = place.key_of(Path(folder))

    def n_stops() -> int:
        with contextlib.suppress(modal.exception.Error):  # the network: asked again soon
            return stops.get(key, 0)
        return 0

    results.reload()
    env = {SOURCE_VARIABLE: json.dumps(source)}
    return run_in_container(Path(folder), settings, hours, max_hours, env, n_stops, results.commit)


@app.function(image=image, timeout=DAY, volumes={CACHE: models})
def setup_model(model: str = "Qwen/Qwen2.5-Math-1.5B") -> None:
    """Fetch a model from the Hugging Face hub onto its volume."""
    from huggingface_hub import snapshot_download

    print(f"{model}: in {snapshot_download(model)}")
    models.commit()


@app.local_entrypoint()
def upload_data(path: str = place.DATA_FOLDER) -> None:
    """Put data/, or a file or folder in data/ or runs/, onto its volume."""
    local = Path(path)
    volume = {place.DATA_FOLDER: data, place.RESULTS_FOLDER: results}.get(local.parts[0] if local.parts else "")
    if volume is None or not is_inside(local) or not local.exists():
        sys.exit(refused(f"{path}: give what exists in {place.DATA_FOLDER}/ or {place.RESULTS_FOLDER}/"))
    target = "/" + "/".join(local.parts[1:])
    with volume.batch_upload(force=True) as batch:
        (batch.put_directory if local.is_dir() else batch.put_file)(str(local), target)
    print(f"{path} is on the volume")


@app.local_entrypoint()
def train(*words: str) -> None:
    """Train on Modal."""
    options = parse_train(words)
    try:
        launch = launch_of(options)
        check(launch, options.resume)
    except ValueError as mistake:
        sys.exit(refused(mistake))
    print(expected(launch.config))
    call = place.function_for(modal, train_run, launch.config).spawn(**place.arguments_of(launch))
    print(f"{launch.folder}: running on Modal as call {call.object_id}, on {launch.config.elsewhere.gpu}")
    print(f"results: python play-scripts/modal_app.py pull {launch.folder.relative_to(place.RESULTS_FOLDER)}")
    if options.spawn:
        return
    code, seconds = call.get()
    spent = cost([(seconds, launch.config.elsewhere.price_per_hour)])
    print(f"{launch.folder}: ended with exit status {code} after {seconds / 3600:.2f} hours{spent}")
    raise SystemExit(code)


def parse_train(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="modal run play-scripts/modal_app.py::train", description=train.__doc__)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("--gpu", help=f"kind of card, by Modal's name ({DEFAULT_GPU})")
    parser.add_argument("--spawn", action="store_true", help="do not wait for the run; needs `modal run --detach`")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is on the volume")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    return parser.parse_intermixed_args(words)


def launch_of(options: argparse.Namespace) -> Launch:
    """The run that the options ask for. Raises ValueError for a mistake in the config."""
    overrides = [*options.overrides, *([f"elsewhere.gpu={options.gpu}"] if options.gpu else [])]
    config, origins = load_config_and_origins(options.config, overrides)
    sections: dict[str, dict] = {}
    for section, name in (field.split(".") for field in [*origins, "paths.output_dir"]):
        sections.setdefault(section, {})[name] = getattr(getattr(config, section), name)
    folder = Path(config.paths.output_dir)
    return Launch(str(folder), folder, config, [], dump(sections))


def expected(config: Config) -> str:
    """A line about the hours and the cost that are to be expected."""
    pace, steps = config.elsewhere.seconds_per_step, config.training.n_grpo_steps
    if pace is None:
        return "estimate: for hours and cost, give elsewhere.seconds_per_step"
    spent = cost([(steps * pace, config.elsewhere.price_per_hour)])
    return f"estimate: {steps * pace / 3600:.1f} hours{spent}; starting and evaluations apart"


def check(launch: Launch, resume: bool) -> None:
    """Raise ValueError for what would fail on Modal, and for a name that is taken there."""
    obstacles = list(place.ModalPlace().obstacles(launch))
    if obstacles:
        raise ValueError("\n       ".join(obstacles))
    if not resume and CONFIG_FILE in place.VolumeFiles(modal, results, place.key_of(launch.folder)).listing():
        raise ValueError(
            f"{launch.folder} is taken on the volume; continue that run with --resume, or give another name"
        )


def pull(words: Sequence[str]) -> int:
    """Bring runs back from the volume, with --checkpoints those too."""
    parser = argparse.ArgumentParser(prog="modal_app.py pull", description=pull.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a folder of runs, as it is called in runs/")
    parser.add_argument("--checkpoints", action="store_true", help="checkpoints too, which may be many gigabytes")
    options = parser.parse_args(words)
    for run in options.runs:
        names = place.VolumeFiles(modal, results, run).listing()
        folders = sorted({PurePosixPath(name).parent for name in names if PurePosixPath(name).name == CONFIG_FILE})
        if not folders:
            return refused(f"no run {run} on the volume {place.RESULTS}; modal volume ls {place.RESULTS}")
        for folder in folders:
            local = Path(place.RESULTS_FOLDER, run, folder)
            files = place.VolumeFiles(modal, results, str(PurePosixPath(run, folder)))
            try:
                with claimed(local) as lock:
                    bring(files, local, options.checkpoints)
                    lock.close()
            except ValueError as mistake:
                return refused(mistake)
            print(f"{local}: brought back")
    return Status.FINISHED


def refused(mistake: object) -> Status:
    """Print a mistake on a line; the exit status that it has."""
    print(f"error: {mistake}", file=sys.stderr)
    return Status.USER_MISTAKE


def bring(files: place.VolumeFiles, local: Path, with_checkpoints: bool) -> None:
    """Copy a run from the volume. Raises ValueError if there is another one here."""
    if holds_another_run(files, local):
        raise ValueError(f"{local} holds another run than the one on the volume; move it away")
    mirror = Mirror(files, local, lambda name: with_checkpoints or checkpoint_of(name) is None)
    while not mirror.refresh():
        pass  # it was being written; once more
    if with_checkpoints:  # a volume tells of links, but not where they lead
        link_checkpoints(local / CHECKPOINTS_FOLDER)


if __name__ == "__main__":
    if sys.argv[1:2] != ["pull"]:
        print(__doc__, file=sys.stderr)
        sys.exit(Status.USER_MISTAKE)
    try:
        sys.exit(pull(sys.argv[2:]))
    except modal.exception.Error as refusal:
        sys.exit(refused(place.explain(modal, refusal)))
