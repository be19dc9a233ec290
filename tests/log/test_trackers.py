"""Trackers: what each is shown, what is read back, and that no failure of theirs reaches the run."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.defaults import Training
from utils.log import followers
from utils.log.files import METRICS_FILE, read_rows
from utils.log.follow import NewRows, as_measured
from utils.log.run_log import RunLog
from utils.log.tracker import TrackedRun, as_curves, as_row, table_of
from utils.log.trackers import FETCH, TRACKERS
from utils.log.wandb_tracker import WandbTracker, fetch_wandb_runs
from utils.plots.history import load_runs
from utils.records import Problem, Prompt, Reward, Rollout

ROOT = Path(__file__).parents[2]
LOCAL = [name for name in ("trackio", "tensorboard") if importlib.util.find_spec(name)]
CONFIG = {"training": {"seed": 7, "stop": ["a"]}, "paths": {"output_dir": "x"}}
ODD_TEXT = "<think>\n*2* \\(\\frac{1}{2}\\) | \ud800\n\n</think> <answer>2</answer>"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, no settings, and a home of its own."""
    for name in os.environ:
        if name.startswith(("WANDB", "TRACKIO")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def warnings_in(folder: Path) -> list[str]:
    path = folder / "warnings.jsonl"
    return [row["warning"] for row in read_rows(path)[0]] if path.exists() else []


def log_steps(log: RunLog, steps: range) -> None:
    rollout = Rollout(Prompt(Problem("1 + 1?", ("2", "two")), "User: 1 + 1?", (5, 6)), ODD_TEXT, (7,), (-0.5,), "stop")
    for step in steps:
        log.train_step(step, {"loss": float("nan") if step == 2 else 0.5 / step, "optimizer_step": 4 * step})
        log.evaluation(step, {"reward": step / 10, "eval_dt": 0.25})
        log.rollouts("train", step, [rollout] * 4, [Reward(1.0, 0.0, step / 10)] * 4, [0.5] * 4, n=2, group_size=2)
        log.rollouts("eval", step, [rollout] * 3, [Reward(1.0, 1.0, 1.0)] * 3, n=3)


def test_the_config_names_the_trackers_that_there_are() -> None:
    (field,) = [field for field in Training.__dataclass_fields__.values() if field.name == "trackers"]
    assert set(field.metadata["choices"]) == set(TRACKERS) == set(FETCH)
    assert Training().tracker_names == []
    assert Training(wandb_project="p").tracker_names == ["wandb"]
    assert Training(wandb_project="p", trackers=["trackio"]).tracker_names == ["trackio"]


class FakeWandb(types.ModuleType):
    """wandb as far as it is used here."""

    class Error(Exception):
        pass

    def __init__(self, connects: bool = True, logged_in: bool = True) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []
        self.connects, self.logged_in, self.summary = connects, logged_in, {}
        self.errors = types.SimpleNamespace(CommError=type("CommError", (self.Error,), {}))
        self.Settings = lambda **options: options
        self.Table = lambda columns, data: {"columns": columns, "data": data}

    def setup(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, mode: str = "online", **options: object) -> FakeWandb:
        self.options = options | {"mode": mode}
        if mode == "online" and not self.connects:
            raise self.errors.CommError("no route to host\nsecond line")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append((name, step_metric))

    def log(self, row: dict) -> None:
        self.calls.append(("log", row))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def wandb_tracker(monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb, **fields: object) -> WandbTracker:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = TrackedRun("runs/lr/seed_1", "p", "lr/seed_1", "abc", ["a"], {"b": 1})
    return WandbTracker(replace(run, **fields))


def test_wandb_axes_rows_table_and_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    tracker = wandb_tracker(monkeypatch, wandb, resume_at=3)
    assert [wandb.options[name] for name in ("id", "resume", "tags")] == ["abc", "allow", ["a"]]
    assert ("train/*", "grpo_step") in wandb.calls and ("eval/*", "eval_step") in wandb.calls
    rows = [{"truth": ["2", "two"], "response": "a\ud800"}, {"truth": "3", "response": "b"}]
    tracker.log({"grpo_step": 1, "train/loss": 0.5})
    tracker.log_rollouts("eval", 4, rows)
    tracker.close("failed")
    *_, logged, shown, ending = wandb.calls
    assert logged == ("log", {"grpo_step": 1, "train/loss": 0.5})
    table = {"columns": ["truth", "response"], "data": [["2 or two", "a?"], ["3", "b"]]}
    assert shown == ("log", {"eval_step": 4, "rollouts/eval": table})
    assert (wandb.summary, ending) == ({"status": "failed"}, ("finish", 1))
    assert (tracker.warning, tracker.hint) == ("", "")


@pytest.mark.parametrize(
    ("options", "reason"), [({"logged_in": False}, "not logged in"), ({"connects": False}, "no route to host")]
)
def test_without_login_or_network_wandb_is_kept_offline(monkeypatch, options: dict, reason: str) -> None:
    wandb = FakeWandb(**options)
    tracker = wandb_tracker(monkeypatch, wandb)
    assert wandb.options["mode"] == "offline" and "resume" not in wandb.options
    assert reason in tracker.warning and "wandb sync runs/lr/seed_1/wandb/offline-*" in tracker.warning
    assert "second line" not in tracker.warning and "wandb sync" in tracker.hint


def test_wandb_runs_are_fetched_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"grpo_step": 1, "train/loss": 0.5}]
    run = types.SimpleNamespace(
        name="n", id="i", config={"training": {"seed": 3}}, summary={"status": "collapsed"}, state="crashed"
    )
    run.scan_history = lambda: iter(history)
    wandb = FakeWandb()
    wandb.Api = lambda: types.SimpleNamespace(runs=lambda project: [run], run=lambda path: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    expected = {"name": "n", "id": "i", "seed": 3, "ending": "collapsed", "history": history}
    assert fetch_wandb_runs("entity/project") == [expected]
    wandb.Api = lambda: (_ for _ in ()).throw(wandb.Error("no key"))
    with pytest.raises(ValueError, match=r"^Error: no key$"):
        fetch_wandb_runs("entity/project")


def test_a_package_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fetch in FETCH.items():
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"package {name}, .*pip install"):
            fetch("somewhere")


@pytest.mark.parametrize("row", [{"grpo_step": 3, "time": 1.5, "optimizer_step": 12, "train/loss": 0.5},
                                 {"eval_step": 0, "time": 0.5, "eval/reward": 0.25, "train/eval_dt": 2.0},
                                 {"eval_step": 4, "train/eval_dt": 2.0}])  # fmt: skip
def test_a_row_survives_a_tracker_with_one_axis(row: dict) -> None:
    step, curves = as_curves(row)
    assert "time" not in curves and as_row(step, curves) == row


def test_rows_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b": null, "nonfinite": {"b": "-inf"}}\n{"a":')
    rows = NewRows(path, n_shown=1)
    assert list(rows) == [{"a": 2, "b": float("-inf")}]
    assert list(rows) == []
    with path.open("a") as file:
        file.write(" 3}\n")
    assert list(rows) == [{"a": 3}]
    assert rows.n_taken == 3
    assert as_measured({"a": 1}) == {"a": 1}


@pytest.mark.skipif(not LOCAL, reason="needs trackio or tensorboard")
def test_a_resumed_run_is_read_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against metrics.jsonl, with a resume that cut steps, a tracker that joined late, and text that is no Markdown."""
    monkeypatch.setattr(followers, "POLL_SECONDS", 0.005)
    folder, about = tmp_path / "lr" / "seed_7", {"tracker_project": "p", "config": CONFIG, "n_grpo_steps": 4}
    with RunLog(folder, trackers=LOCAL[:1], **about) as log:
        log_steps(log, range(1, 3))
        run_id = log.tracker_id
    with RunLog(folder, trackers=LOCAL, tracker_id=run_id, resume_at=2, **about) as log:
        assert log.tracker_id == run_id
        log_steps(log, range(3, 5))
    assert warnings_in(folder) == []
    if "trackio" in LOCAL:
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    (expected,), _ = load_runs([folder])
    for source in [{"trackio": "trackio:p", "tensorboard": f"tensorboard:{folder}"}[name] for name in LOCAL]:
        (run,), complaints = load_runs([source], FETCH)
        assert complaints == []
        assert (run.name, run.seed, run.ending) == ("lr", 7, "finished")
        assert run.curves.keys() == expected.curves.keys()
        for metric, curve in expected.curves.items():
            assert run.curves[metric].keys() == curve.keys(), (source, metric)
            for step, point in curve.items():
                assert run.curves[metric][step] == pytest.approx(point, rel=1e-6, nan_ok=True), (source, metric, step)
        _, (complaint,) = load_runs([source.replace(":p", ":q").replace(str(folder), "none")], FETCH)
        assert source.partition(":")[0] in complaint
    if "tensorboard" in LOCAL:
        check_tensorboard_tables(folder)
    if "trackio" in LOCAL:
        tables = [row for row in sqlite_storage.SQLiteStorage.get_logs("p", "lr/seed_7") if "rollouts/train" in row]
        assert [row["step"] for row in tables] == [1, 2, 3, 4]
        assert [cell["response"] for cell in tables[0]["rollouts/train"]["_value"]] == [
            ODD_TEXT.replace("\ud800", "?")
        ] * 2


def check_tensorboard_tables(folder: Path) -> None:
    """The cells as TensorBoard shows them: HTML that holds the text as it is."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.text.text_plugin import text_array_to_html
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tables = events.Tensors("rollouts/eval")
    assert [table.step for table in tables] == [1, 2, 3, 4]
    shown = text_array_to_html(make_ndarray(tables[0].tensor_proto), enable_markdown=True)
    text = html.escape(ODD_TEXT.replace("\ud800", "?"), quote=False)
    assert shown.count(f"<pre>{text}</pre>") == 3


def test_real_wandb_is_kept_offline_and_a_crash_elsewhere_is_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SERVER_URL", "no address")
    folder = tmp_path / "run"
    with RunLog(folder, n_grpo_steps=2, trackers=["wandb", "trackio"], tracker_project="p", config=CONFIG) as log:
        log_steps(log, range(1, 3))
    (kept,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stem.removeprefix("run-") == log.tracker_id
    offline, crashed = sorted(warnings_in(folder), key=lambda text: not text.startswith("wandb"))
    assert "not logged in" in offline
    assert (
        "trackio failed" in crashed and ("no address" in crashed or "trackio" not in LOCAL) and "trackio.log" in crashed
    )
    assert "Traceback" in (folder / "trackio.log").read_text()
    assert f"wandb sync {folder}/wandb/offline-*" in capsys.readouterr().out
    assert len(read_rows(folder / METRICS_FILE)[0]) == 4


@pytest.fixture
def dead_server() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_dead_server_neither_stops_nor_slows_a_run(
    tmp_path: Path, dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", dead_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"{dead_server}/?write_token=none")
    names = [name for name in ("wandb", "trackio") if name == "wandb" or name in LOCAL]
    options = {"trackers": names, "tracker_project": "p", "tracker_patience": 3.0, "config": CONFIG}
    started = time.monotonic()
    log = RunLog(tmp_path / "run", n_grpo_steps=50, **options)
    log_steps(log, range(1, 51))
    assert time.monotonic() - started < 3.0
    log.close("finished")
    assert time.monotonic() - started < 10.0
    assert len(read_rows(tmp_path / "run" / METRICS_FILE)[0]) == 100
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "run").glob(".*.json"))  # so that --resume shows all of it again
    told = warnings_in(tmp_path / "run")
    assert sorted({text.partition(":")[0].split()[0] for text in told}) == sorted(names), told


@pytest.mark.skipif("tensorboard" not in LOCAL, reason="needs tensorboard")
def test_a_killed_run_is_shown_as_killed_with_all_that_it_wrote(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from utils.log.run_log import RunLog
log = RunLog(Path(sys.argv[1]), n_grpo_steps=9, trackers=["tensorboard"], tracker_project="p")
for step in range(1, 4):
    log.train_step(step, {"loss": 0.5})
print(log._followers._processes[0]._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL
    deadline, follower = time.monotonic() + 60, int(done.stdout.split()[-1])
    while Path(f"/proc/{follower}/fd/0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (run,) = FETCH["tensorboard"](str(tmp_path))
    assert run["ending"] == "killed"
    assert [row["grpo_step"] for row in run["history"]] == [1, 2, 3]


def test_a_table_needs_no_tracker() -> None:
    assert table_of([{"truth": "a", "x": 1}]) == (["truth", "x"], [["a", 1]])


def test_a_tracker_whose_process_cannot_be_started_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / followers.LOG_FILE.format("tensorboard")).mkdir()  # its log cannot be opened
    shown = followers.Followers(["tensorboard"], TrackedRun(str(tmp_path), "grpo", "run", "id"))
    assert [kind for kind, text in [*shown.messages(), *shown.close("finished")] if "tensorboard" in text] == [
        "warning"
    ]
