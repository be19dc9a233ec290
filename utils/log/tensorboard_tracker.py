"""TensorBoard: runs are written as event files in the run's own folder, and read back. Only this file imports it."""

from __future__ import annotations

import html
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.log.files import Row
from utils.log.tracker import TrackedRun, as_curves, as_row, describe, is_of_evaluation, missing_package, table_of

FOLDER = "tensorboard"  # in the run's folder
EVENTS = "events.out.tfevents.*"
TEXTS = ("config", "status")


class TensorboardTracker:
    """Event files for TensorBoard. There is no server: only the disk can fail."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(Path(run.folder) / FOLDER))
        self.warning = ""
        self.hint = f"shows this run with\n  tensorboard --logdir {shlex.quote(run.folder)}"
        if run.resume_at is not None:  # TensorBoard then drops what was written of later steps
            self._add(run.resume_at + 1, session_log=SessionLog(status=SessionLog.START))
        config = run.config or {}
        self._add(0, summary=hparams_pb(_flat(config), trial_id=run.run_id))
        about = {"name": run.name, "id": run.run_id, "project": run.project, "tags": list(run.tags), "config": config}
        self._text("config", json.dumps(about, indent=2), 0)

    def log(self, row: Row) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        step, curves = as_curves(row)
        for name, value in curves.items():
            self._add(step, summary=scalar_pb(name, value))
        self._writer.flush()

    def log_rollouts(self, split: str, grpo_step: int, rows: Sequence[Row]) -> None:
        columns, cells = table_of(rows)
        self._text(f"rollouts/{split}", [columns, *cells], grpo_step)

    def close(self, status: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        self._text("status", status, 0)
        ended = api_pb2.STATUS_FAILURE if status in ("failed", "killed") else api_pb2.STATUS_SUCCESS
        info = plugin_data_pb2.SessionEndInfo(status=ended, end_time_secs=time.time())
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
        summary = Summary()
        summary.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        self._add(0, summary=summary)
        self._writer.close()

    def _text(self, tag: str, content: str | list[list[Any]], step: int) -> None:
        """A text, or a table of texts. TensorBoard reads each as Markdown, which would hide <think> and eat \\(."""
        import numpy as np
        from tensorboard.plugins.text.summary_v2 import text_pb

        cells = [[_as_it_is(cell) for cell in row] for row in content] if isinstance(content, list) else None
        data = _as_it_is(content) if cells is None else np.array(cells, dtype=object)
        self._add(step, summary=text_pb(tag, data))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))


def _as_it_is(cell: Any) -> str:
    """HTML that shows the text letter by letter."""
    return f"<pre>{html.escape(str(cell), quote=False)}</pre>"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"training": {"seed": 1}} -> {"training.seed": 1}, in types that TensorBoard's table of runs takes."""
    values = {f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()}
    return {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}


def fetch_tensorboard_runs(folder: str) -> list[Row]:
    """The runs whose event files are in the folder or below it: see `fetch_wandb_runs`. Values are float32.

    Other programs' event files are read too, as far as their curves are called train/* and eval/*. Raises ValueError if
    there are none.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    except ImportError as error:
        raise missing_package("tensorboard") from error
    places = sorted({path.parent for path in Path(folder).rglob(EVENTS)})
    if not places:
        raise ValueError(f"no event files there ({EVENTS})")
    runs = []
    for place in places:
        events = EventAccumulator(str(place), size_guidance={TENSORS: 0})  # 0: all of them
        try:
            events.Reload()
            runs.append(_read_back(events, place))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{place}: {describe(error)}") from error
    return runs


def _read_back(events: Any, place: Path) -> Row:
    from tensorboard.util.tensor_util import make_ndarray

    tags = events.Tags()["tensors"]
    curves: dict[tuple[int, bool], Row] = {}
    for tag in tags:
        for event in [] if tag in TEXTS or tag.startswith(("rollouts/", "_hparams_/")) else events.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if value.shape == () and value.dtype.kind in "fiu":
                curves.setdefault((event.step, is_of_evaluation(tag)), {})[tag] = float(value)
    texts = {
        tag: html.unescape(events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()) for tag in TEXTS if tag in tags
    }
    about = json.loads(texts["config"].removeprefix("<pre>").removesuffix("</pre>")) if "config" in texts else {}
    return {
        "name": about.get("name") or place.name,
        "id": about.get("id") or str(place),
        "seed": about.get("config", {}).get("training", {}).get("seed"),
        "ending": texts.get("status", "<pre>unfinished</pre>").removeprefix("<pre>").removesuffix("</pre>"),
        "history": [as_row(step, curves[step, kind]) for step, kind in sorted(curves)],
    }
