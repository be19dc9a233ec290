"""The trackers by their names in the config: what shows a run there, and what reads its runs back."""

from __future__ import annotations

from collections.abc import Callable

from utils.log.files import Row
from utils.log.tensorboard_tracker import TensorboardTracker, fetch_tensorboard_runs
from utils.log.tracker import Tracker
from utils.log.trackio_tracker import TrackioTracker, fetch_trackio_runs
from utils.log.wandb_tracker import WandbTracker, fetch_wandb_runs

TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorboardTracker,
}
# `wandb:entity/project`, `trackio:project` and `tensorboard:folder` as sources of runs
FETCH: dict[str, Callable[[str], list[Row]]] = {
    "wandb": fetch_wandb_runs,
    "trackio": fetch_trackio_runs,
    "tensorboard": fetch_tensorboard_runs,
}
