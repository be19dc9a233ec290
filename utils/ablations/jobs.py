"""The runs of an ablation: planned from folders of configs, started in a place, or copied from an equal run."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

from configs.defaults import Config
from utils.ablations.places.place import CALL_FILE, Ending, Launch, Place, Work
from utils.ablations.places.worker import CONSOLE_FILE
from utils.ablations.published import find_ablation
from utils.log.files import METRICS_FILE, STATUS_FILE, Row, read_rows, write_atomically
from utils.preflight.config import load_config, load_config_and_origins
from utils.preflight.resume_rules import changed_fields
from utils.preflight.yaml_values import dump
from utils.run.ending import Status

TRAIN = Path(__file__).parents[2] / "train_grpo.py"
ENDED = ("finished", "collapsed")
COPIED = ("metrics.jsonl", "rollouts.jsonl", "warnings.jsonl", "config.yaml", "run.json")
PACE_FROM = 20  # last GRPO steps, from which the time left is estimated
STATES = {
    Status.FINISHED: "finished",
    Status.COLLAPSED: "collapsed",
    Status.STOPPED_BY_SIGNAL: "interrupted",
    Status.TIME_LIMIT: "time_limit",
    -signal.SIGINT: "interrupted",  # a signal before the run handles them, or a second one
}


@dataclass
class Job:
    """A run: a config with a seed. `same_as` is an earlier job with the same config, whose run is copied."""

    topic: str  # the folder of configs, without what leads to it
    path: Path  # its config file
    config: Config
    arguments: list[str]  # of train_grpo.py
    set_fields: tuple[str, ...] = ()  # dotted names; all other fields have their defaults, or are derived from the card
    same_as: Job | None = None
    state: str = "waiting"  # then running, then how it ended
    detail: str = ""
    work: Work | None = None
    seconds: float = 0.0  # that machines were held for it, by this command
    n_cuts: int = 0  # how often in a row it was cut off, without a GRPO step in between
    cut_at: int = 0  # its last GRPO step then
    ended_at: Progress | None = None  # kept so that its metrics are not read again

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.output_dir)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def setting(self) -> str:
        return f"{self.topic}/{self.name}"

    @property
    def launch(self) -> Launch:
        command = [sys.executable, str(TRAIN), "--resume", *self.arguments]
        return Launch(str(self), self.folder, self.config, command, self.settings)

    @property
    def settings(self) -> str:
        """The fields that are set, as YAML."""
        sections: dict[str, dict] = {}
        for section, name in (field.split(".") for field in self.set_fields):
            sections.setdefault(section, {})[name] = getattr(getattr(self.config, section), name)
        return dump(sections)

    def __str__(self) -> str:
        return f"{self.setting} seed {self.config.training.seed}"


def find_topics(folders: Sequence[str]) -> dict[str, Path]:
    """The folders of configs, or the folders in them, by topic. Raises ValueError for a folder without configs."""
    topics: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give folders of configs, such as configs/lr_sweep")
        inside = [path for path in sorted(folder.iterdir()) if any(path.glob("*.yaml"))]
        if not inside and not any(folder.glob("*.yaml")):
            raise ValueError(f"{folder}: no configs in it (*.yaml)")
        for path in inside or [folder]:
            other = topics.setdefault(topic_of(path), path)
            if other.resolve() != path.resolve():
                raise ValueError(f"{other} and {path} are both called {topic_of(path)}; run one at a time")
    return topics


def topic_of(folder: Path) -> str:
    """configs/tiny/lr_sweep -> tiny/lr_sweep; a folder elsewhere has its own name."""
    parts = folder.resolve().parts
    if "configs" not in parts[:-1]:
        return parts[-1]
    return "/".join(parts[len(parts) - parts[::-1].index("configs") :])


def plan(
    topics: dict[str, Path],
    n_seeds: int,
    overlays: Sequence[str],
    overrides: Sequence[str],
    runs: Path,
    *,
    more: Mapping[str, int] = MappingProxyType({}),
    earlier: Sequence[Job] = (),
) -> list[Job]:
    """All runs asked for, the first seed of every setting before the second ones. Raises ValueError for a mistake.

    `more` has the number of seeds of settings (topic/name) that get others than `n_seeds`. Jobs in `earlier`, of an
    earlier plan, stay as they are.
    """
    overrides = ["guard.action=stop", *overrides]
    settings = []
    for topic, folder in topics.items():
        for path in sorted(folder.glob("*.yaml")):
            files = [path, *overlays]
            settings.append((topic, files, load_config_and_origins(files, overrides)))
    known = {job.folder: job for job in earlier}
    jobs: list[Job] = []
    first: dict[str, Job] = {}
    for i in range(max([n_seeds, *more.values()])):
        for topic, files, (config, origins) in settings:
            if i >= more.get(f"{topic}/{files[0].stem}", n_seeds):
                continue
            job = seeded(topic, files, config, origins, overrides, runs, i)
            job = known.get(job.folder, job)
            original = first.setdefault(identity(job.config), job)
            if job.folder not in known:
                job.state = standing(job)
                if job.state == "waiting" and original is not job and not (job.folder / METRICS_FILE).exists():
                    job.same_as = original
            jobs.append(job)
    return jobs


def seeded(
    topic: str,
    files: Sequence[str | Path],
    config: Config,
    origins: Mapping[str, str],
    overrides: Sequence[str],
    runs: Path,
    i: int,
) -> Job:
    """The i-th seed of a setting, whose own config file is the first of `files`."""
    seed, path = config.training.seed + i, Path(files[0])
    output = str(runs / topic / path.stem / f"seed_{seed}")
    with_seed = replace(
        config, training=replace(config.training, seed=seed), paths=replace(config.paths, output_dir=output)
    )
    own = [f"training.seed={seed}", f"paths.output_dir={output}"]
    set_fields = tuple(dict.fromkeys([*origins, "training.seed", "paths.output_dir"]))
    arguments = [*(f"--config={file}" for file in files), *overrides, *own]
    return Job(topic, path, with_seed, arguments, set_fields)


def check_place(jobs: Sequence[Job], place: Place) -> None:
    """Raise ValueError for what keeps a run from starting in the place, with the commands that prepare the ablation."""
    for job in jobs:
        if place.name != "modal" and (job.folder / CALL_FILE).exists():
            raise ValueError(f"{job.folder} may be running on Modal ({CALL_FILE}): ask there with --on modal")
        missing = list(place.obstacles(job.launch)) if job.state == "waiting" and not job.same_as else []
        if missing:
            raise ValueError(
                "\n       ".join([f"{job.path}: {missing[0]}", *missing[1:], *find_ablation(job.topic).prepare])
            )


def identity(config: Config) -> str:
    """The same text for configs that differ only in where a run goes and what it is called."""
    sections = asdict(config)
    del sections["paths"]["output_dir"]
    for name in ("trackers", "wandb_run_name", "wandb_tags"):
        del sections["training"][name]
    del sections["elsewhere"]
    return json.dumps(sections)


def standing(job: Job) -> str:
    """How the run in the job's folder ended, or "waiting" if something is left to do.

    Raises ValueError if the folder holds a run of another config, or one that has taken more steps.
    """
    saved = job.folder / "config.yaml"
    changed = changed_fields(load_config([saved]), job.config) if saved.exists() else []
    state, n_steps = "waiting", job.config.training.n_grpo_steps
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file: the run is resumed
        row = json.loads((job.folder / STATUS_FILE).read_text())
        if row["grpo_step"] > n_steps:
            changed.append(f"training.n_grpo_steps: it has taken {row['grpo_step']}, asked for {n_steps}")
        done = row["status"] == "finished" and row["grpo_step"] >= n_steps
        if done or (row["status"] == "collapsed" and job.config.guard.action == "stop"):
            state = row["status"]
    if changed:
        raise ValueError(
            f"{job.folder} holds a run of another config ({'; '.join(changed)}): move it away, or give another --runs"
        )
    return state


def start(job: Job, place: Place) -> None:
    """Start or continue the run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        job.work = place.start(job.launch)
    except BlockingIOError:
        job.state, job.detail = "failed", "another process is running it"
        return
    job.state, job.detail = "running", ""


def finish(job: Job, ending: Ending, retries: int) -> None:
    """Set the job's state from how it ended. One that was cut off waits again, to be resumed.

    It is given up after `retries` in a row that have not brought it a GRPO step further.
    """
    code, path = ending.code, job.folder / CONSOLE_FILE
    job.seconds += ending.seconds
    job.state, job.detail = STATES.get(code, "failed"), ending.detail
    if job.state != "failed":
        return
    if code is not None:
        how = f"exit status {code}" if code > 0 else signal.Signals(-code).name
        job.detail = f"{how}: {last_words(path)} ({path})"
    step = Progress(job).step
    job.n_cuts, job.cut_at = (1 if step > job.cut_at else job.n_cuts + 1), step
    if (ending.lost or (code or 0) < 0) and job.n_cuts <= retries:
        job.state = "cut_off"


def last_words(path: Path) -> str:
    """The last line that names an error, else the last line."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "error:" in line.lower()]
    return (named or lines or ["no output"])[-1].strip()[:200]


def copy(job: Job) -> None:
    """Copy the ended run of the job with the same config, without its checkpoints."""
    original = job.same_as
    job.state, job.detail = original.state, f"the same config as {original.setting}"
    if original.state not in ENDED:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (original.folder / name).exists():
            shutil.copyfile(original.folder / name, job.folder / name)
    status = json.loads((original.folder / STATUS_FILE).read_text())
    write_atomically(job.folder / STATUS_FILE, json.dumps({**status, "same_as": original.setting}) + "\n")


def progress_of(job: Job) -> Progress:
    """How far a job is, or was when it ended."""
    if job.state == "running":
        return Progress(job)
    job.ended_at = job.ended_at or Progress(job)
    return job.ended_at


class Progress:
    """How far a job is, from its metrics.jsonl."""

    def __init__(self, job: Job) -> None:
        path = job.folder / METRICS_FILE
        rows: list[Row] = read_rows(path)[0] if path.exists() else []
        steps = [row for row in rows if "grpo_step" in row]
        rewards = [row["eval/reward"] for row in rows if row.get("eval/reward") is not None]
        self.n_steps = job.config.training.n_grpo_steps
        self.step = steps[-1]["grpo_step"] if steps else 0
        self.reward = rewards[-1] if rewards else None
        self.pace: float | None = None  # seconds per GRPO step, evaluations included
        recent = steps[-PACE_FROM:]
        if len(recent) > 1:
            self.pace = (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1)

    @property
    def seconds_left(self) -> float | None:
        return None if self.pace is None else self.pace * (self.n_steps - self.step)
