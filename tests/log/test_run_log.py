"""What a run leaves behind: rows, rollouts and status, through crashes, resumes and failures."""

from __future__ import annotations

import json
import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.log import console as console_module
from utils.log.files import (
    UNFINISHED,
    CannotWrite,
    cut_rows,
    encode_row,
    git_state,
    package_versions,
    read_rows,
    save_run_info,
    whole_folder,
    write_atomically,
)
from utils.log.metrics import METRICS, metrics_table
from utils.log.run_log import RunLog
from utils.records import Problem, Prompt, Reward, Rollout

SPECIFIED = [
    "eval/reward",
    "eval/format_reward",
    "eval/answer_reward",
    "train/loss",
    "train/grad_norm",
    "train/reward",
    "train/reward_std",
    "train/frac_zero_std_groups",
    "train/mean_response_length",
    "train/frac_truncated",
    "train/entropy",
    "train/mean_ratio",
    "train/clip_fraction",
    "train/sampler_kl",
    "train/sampler_max_diff",
    "train/rollout_dt",
    "train/train_dt",
    "train/eval_dt",
    "train/step_dt",
    "train/tokens_per_second",
    "train/peak_memory_gb",
]


def strict_rows(path: Path) -> list[dict]:
    """Rows as a reader sees them that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def make_rollouts(n: int) -> tuple[list[Rollout], list[Reward]]:
    prompt = Prompt(Problem("1 + 1?", ("2", "two")), "User: 1 + 1?", (5, 6))
    rollouts = [
        Rollout(prompt, f"response {i}", (7,) * i, (-0.5,) * i, "length" if i % 2 else "stop") for i in range(n)
    ]
    return rollouts, [Reward(1.0, float(i % 2), i / 10) for i in range(n)]


def warnings_in(folder: Path) -> list[str]:
    return [row["warning"] for row in strict_rows(folder / "warnings.jsonl")]


def indices(path: Path, split: str, step: int) -> list[int]:
    return [row["index"] for row in strict_rows(path) if (row["split"], row["grpo_step"]) == (split, step)]


def run_child(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_rows_hold_axis_time_and_values(tmp_path: Path) -> None:
    with RunLog(tmp_path, n_grpo_steps=2) as log:
        assert log.evaluation(0, {"reward": 0.25, "eval_dt": 2.5}) == {"eval/reward": 0.25, "train/eval_dt": 2.5}
        log.train_step(1, {"loss": -0.5, "optimizer_step": 4})
        before_close = strict_rows(tmp_path / "metrics.jsonl")
    times = [row.pop("time") for row in before_close]
    assert before_close == [
        {"eval_step": 0, "eval/reward": 0.25, "train/eval_dt": 2.5},
        {"grpo_step": 1, "train/loss": -0.5, "optimizer_step": 4},
    ]
    assert 0 <= times[0] <= times[1]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["grpo_step"], status["detail"]) == ("finished", 1, "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_strict_json_and_named(value: float) -> None:
    row = json.loads(encode_row({"grpo_step": 3, "train/loss": value, "train/reward": 0.5}))
    assert row == {"grpo_step": 3, "train/loss": None, "train/reward": 0.5, "nonfinite": {"train/loss": str(value)}}


def test_unknown_or_misplaced_metric_raises(tmp_path: Path) -> None:
    with RunLog(tmp_path, n_grpo_steps=1) as log:
        with pytest.raises(ValueError, match=r"no metric is called train/los: .*log/metrics"):
            log.train_step(1, {"los": 1.0})
        with pytest.raises(ValueError, match=r"no metric is called eval/loss"):
            log.evaluation(1, {"loss": 1.0})
    assert strict_rows(tmp_path / "metrics.jsonl") == []


def test_every_specified_metric_is_described() -> None:
    assert [name for name in SPECIFIED if name not in METRICS] == []
    cells = [re.split(r"(?<!\\)\|", row) for row in metrics_table().splitlines()]
    assert all(len(row) == 4 for row in cells)  # a bar in a meaning would cut the row
    assert {row[1].strip(" `") for row in cells} >= set(METRICS)


def test_a_folder_with_metrics_is_refused_without_resume(tmp_path: Path) -> None:
    RunLog(tmp_path, n_grpo_steps=1).close("finished")
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl"):
        RunLog(tmp_path, n_grpo_steps=1)


def test_resume_cuts_what_came_later_and_each_step_stands_once(tmp_path: Path) -> None:
    rollouts, rewards = make_rollouts(6)
    log = RunLog(tmp_path, n_grpo_steps=4)
    for step in range(1, 5):
        log.train_step(step, {"loss": float(step)})
        log.evaluation(step, {"reward": step / 10})
        log.rollouts("train", step, rollouts, rewards, n=2)
    log.warn("kept")
    log.close("failed", "crash")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"grpo_step": 2, "train/lo')
    last_time = strict_rows_of_step(tmp_path, 2)[-1]["time"]

    with RunLog(tmp_path, n_grpo_steps=4, resume_at=2) as log:
        assert not (tmp_path / "status.json").exists()
        assert {row["grpo_step"] for row in strict_rows(tmp_path / "rollouts.jsonl")} == {1, 2}
        log.train_step(3, {"loss": 30.0})
    rows = strict_rows(tmp_path / "metrics.jsonl")
    assert [(row.get("grpo_step"), row.get("eval_step")) for row in rows] == [
        (1, None), (None, 1), (2, None), (None, 2), (3, None)
    ]  # fmt: skip
    assert rows[-1]["train/loss"] == 30.0
    assert rows[-1]["time"] >= last_time
    warnings = [row["warning"] for row in strict_rows(tmp_path / "warnings.jsonl")]
    assert warnings[0] == "kept"
    assert len(warnings) == 3
    assert all("not a whole JSON row" in text for text in warnings[1:])


def strict_rows_of_step(folder: Path, step: int) -> list[dict]:
    rows, _ = read_rows(folder / "metrics.jsonl")
    return [row for row in rows if step in (row.get("grpo_step"), row.get("eval_step"))]


def test_resumed_time_leaves_out_the_time_between(tmp_path: Path) -> None:
    row = {"grpo_step": 1, "time": 1000.0, "train/loss": 0.0}
    (tmp_path / "metrics.jsonl").write_text(encode_row(row) + "\n")
    with RunLog(tmp_path, n_grpo_steps=2, resume_at=1) as log:
        assert 1000.0 <= log.time < 1060.0


def test_interrupted_cut_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(encode_row({"grpo_step": step}) + "\n" for step in range(5))
    path.write_text(text)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", crash)
        cut_rows(path, 2)
    assert path.read_text() == text
    cut_rows(path, 2)
    assert [row["grpo_step"] for row in strict_rows(path)] == [0, 1, 2]


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = """
import sys, itertools
from pathlib import Path
from utils.log.run_log import RunLog
log = RunLog(Path(sys.argv[1]), n_grpo_steps=10**6)
for step in itertools.count(1):
    log.train_step(step, {"loss": 0.5})
"""
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    shown = [child.stdout.readline() for _ in range(50)]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert shown[-1].startswith("step      50/1000000  loss 0.5")
    rows, complaints = read_rows(tmp_path / "metrics.jsonl")
    assert [row["grpo_step"] for row in rows[:50]] == list(range(1, 51))
    assert len(complaints) <= 1


def test_logged_rollouts(tmp_path: Path) -> None:
    rollouts, rewards = make_rollouts(40)
    random.seed(3)
    state = random.getstate()
    with RunLog(tmp_path / "a", n_grpo_steps=9) as log:
        log.rollouts("train", 1, rollouts, rewards, [i / 100 for i in range(40)], n=5)
        log.rollouts("train", 2, rollouts, rewards, n=5)
        log.rollouts("eval", 0, rollouts, rewards, n=5)
        log.rollouts("eval", 4, rollouts, rewards, n=5)
        log.rollouts("eval", 8, rollouts[:3], rewards[:3], n=5)
    assert random.getstate() == state
    random.seed(4)
    with RunLog(tmp_path / "b", n_grpo_steps=9) as log:
        log.rollouts("train", 1, rollouts, rewards, n=5)
    path = tmp_path / "a" / "rollouts.jsonl"
    first = indices(path, "train", 1)
    assert len(set(first)) == 5
    assert first == indices(tmp_path / "b" / "rollouts.jsonl", "train", 1)
    assert first != indices(path, "train", 2)
    assert indices(path, "eval", 0) == indices(path, "eval", 4)
    assert indices(path, "eval", 8) == [0, 1, 2]
    i = first[0]
    assert strict_rows(path)[0] == {
        "split": "train", "grpo_step": 1, "group": i, "index": i, "question": "1 + 1?", "prompt": "User: 1 + 1?",
        "response": f"response {i}", "truth": ["2", "two"], "format_reward": 1.0, "answer_reward": float(i % 2),
        "reward": i / 10, "advantage": i / 100, "finish_reason": "length" if i % 2 else "stop", "response_length": i,
    }  # fmt: skip


def test_training_logs_whole_groups(tmp_path: Path) -> None:
    rollouts, rewards = make_rollouts(40)
    with RunLog(tmp_path, n_grpo_steps=9) as log:
        for step, n in enumerate((0, 1, 8, 9, 100), 1):
            log.rollouts("train", step, rollouts, rewards, n=n, group_size=8)
    logged = [strict_rows(tmp_path / "rollouts.jsonl")]
    groups = [{(row["group"], row["index"]) for row in logged[0] if row["grpo_step"] == step} for step in range(1, 6)]
    assert [len(rows) for rows in groups] == [0, 8, 8, 16, 40]
    for rows in groups:
        whole = {group for group, _ in rows}
        assert rows == {(group, i) for group in whole for i in range(8 * group, 8 * group + 8)}


def test_any_text_a_model_writes_can_be_logged(tmp_path: Path) -> None:
    text = "\ud800 \x1b[31m \u2028 </script> \x00"
    rollout = Rollout(Prompt(Problem("q", "a"), "p", (1,)), text, (1,), (0.0,), "stop")
    with RunLog(tmp_path, n_grpo_steps=1) as log:
        log.rollouts("eval", 0, [rollout], [Reward(0.0, 0.0, 0.0)], n=1)
    assert strict_rows(tmp_path / "rollouts.jsonl")[0]["response"] == text


def test_endings(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "a", n_grpo_steps=1)
    with pytest.raises(ValueError, match="'done' is none of finished, collapsed"):
        log.close("done")
    log.close("collapsed", "entropy is 0")
    log.close("finished")
    assert json.loads((tmp_path / "a" / "status.json").read_text())["status"] == "collapsed"
    for error, status in ((KeyboardInterrupt(), "interrupted"), (RuntimeError("out of memory"), "failed")):
        folder = tmp_path / status
        with pytest.raises(type(error)), RunLog(folder, n_grpo_steps=1):
            raise error
        assert json.loads((folder / "status.json").read_text())["status"] == status
    assert "out of memory" in json.loads((tmp_path / "failed" / "status.json").read_text())["detail"]


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, n_grpo_steps=100) as log:
        log.train_step(7, {"reward": 0.5, "loss": math.nan, "tokens_per_second": 12345.6})
        log.note("x" * 300)
        log.warn("[bold]as it is[/bold]")
    assert capsys.readouterr().out.splitlines() == [
        "step   7/100  reward 0.500  loss nan  tokens/s 12,346  left 0:00:00",
        "x" * 300,
        "warning: [bold]as it is[/bold]",
    ]


def test_on_policy_the_share_of_groups_with_a_signal_stands_in_for_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"reward": 0.5, "loss": 1e-9, "frac_zero_std_groups": 0.25}
    with RunLog(tmp_path, n_grpo_steps=2) as log:
        log.train_step(1, metrics | {"mean_ratio": 1.0})
        log.train_step(2, metrics | {"mean_ratio": 1.01})
    first, second = capsys.readouterr().out.splitlines()
    assert "groups with a signal 75%" in first and "loss" not in first
    assert "groups with a signal 75%" in second and "loss 1e-09" in second


def test_time_left_is_told_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: clock[0])
    with RunLog(tmp_path, n_grpo_steps=10) as log:
        clock[0] = 400.0
        log.evaluation(0, {"reward": 0.5})  # not counted
        for step, now in ((1, 430.0), (2, 440.0), (10, 500.0)):
            clock[0] = now
            log.train_step(step, {"reward": 0.5})
    left = [line.partition("  left ")[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert left == ["0:04:30", "0:02:40", ""]  # 30 s for 9 steps each, 20 s for 8 each


def test_progress_bar_in_a_terminal(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from utils.log.run_log import RunLog
with RunLog(Path(sys.argv[1]), n_grpo_steps=3) as log:
    for step in (1, 2, 3):
        log.train_step(step, {"reward": step / 4})
    log.evaluation(3, {"reward": 0.875})
    log.end_progress()
    log.note("what to try next")
"""
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # how a Linux terminal says that nobody writes to it any more
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert child.wait() == 0
    text = shown.decode()
    assert "step 2/3  reward 0.500" in text
    bars, _, ending = text[text.rindex("eval reward 0.875") :].partition("\x1b[?25h")  # the cursor is back
    assert "3/3" in bars
    assert "left" in bars
    assert " ".join(ending.split()) == "what to try next"  # below the bar, and nothing after it


def test_run_info(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from utils.log.files import save_run_info
save_run_info(Path(sys.argv[1]), seed=7)
print(sorted({"torch", "transformers", "vllm", "wandb", "numpy"} & set(sys.modules)))
"""
    done = run_child(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
    save_run_info(tmp_path, seed=8)
    launches = json.loads((tmp_path / "run.json").read_text())["launches"]
    assert [launch["seed"] for launch in launches] == [7, 8]
    assert launches[0]["packages"]["torch"] == torch.__version__ == package_versions()["torch"]
    assert str(tmp_path) in launches[0]["command"]


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_write_atomically_replaces(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "one")
    write_atomically(tmp_path / "f", "two")
    assert (tmp_path / "f").read_text() == "two"
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "one")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "f", "\ud800")
    assert (tmp_path / "f").read_text() == "one"
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(RuntimeError), whole_folder(folder) as unfinished:
        (unfinished / "f").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f"{UNFINISHED}folder").mkdir()  # left by a process that was killed
    (tmp_path / f"{UNFINISHED}folder" / "stale").touch()
    with whole_folder(folder) as unfinished:
        (unfinished / "f").write_text("whole")
        assert not folder.exists()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("folder"), Path("folder/f")]


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_numbers_that_strict_json_lacks_make_a_line_no_row(tmp_path: Path, number: str) -> None:
    path = tmp_path / "rollouts.jsonl"
    lines = [f'{{"grpo_step": 1, "reward": {number}}}', '{"grpo_step": 2, "reward": 1.5}', "[" * 100_000]
    path.write_text("".join(line + "\n" for line in lines))
    rows, complaints = read_rows(path)
    assert rows == [{"grpo_step": 2, "reward": 1.5}]
    assert [text.partition(": ")[0] for text in complaints] == [f"{path}, line 1", f"{path}, line 3"]


def test_rows_without_a_step_or_a_time_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    rows = [{"grpo_step": 1, "train/loss": 0.5}, {"train/loss": 1.0}, {"grpo_step": "2", "time": 7.5}, {"eval_step": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with RunLog(tmp_path, n_grpo_steps=2, resume_at=1) as log:
        assert not log.lost_evaluation
    assert strict_rows(tmp_path / "metrics.jsonl") == [rows[0], rows[3]]
    (warning,) = warnings_in(tmp_path)
    assert "rows without a grpo_step or an eval_step, left out: 2" in warning


def test_a_resume_without_metrics_says_what_is_lost(tmp_path: Path) -> None:
    with RunLog(tmp_path, n_grpo_steps=5, resume_at=4, evaluated_at=4) as log:
        assert log.lost_evaluation
        log.train_step(5, {"loss": 0.5})
    assert [row["grpo_step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [5]
    missing, again = warnings_in(tmp_path)
    assert "metrics.jsonl is missing: what was measured up to GRPO step 4 is lost" in missing
    assert "made again" in again


def test_rollouts_of_a_lost_evaluation_are_cut_with_it(tmp_path: Path) -> None:
    rollouts, rewards = make_rollouts(2)
    with RunLog(tmp_path, n_grpo_steps=4) as log:
        for step in (0, 2):
            log.evaluation(step, {"reward": 0.5})
            log.rollouts("eval", step, rollouts, rewards, n=2)
        log.rollouts("train", 2, rollouts, rewards, n=1)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-20])
    with RunLog(tmp_path, n_grpo_steps=4, resume_at=2, evaluated_at=2) as log:
        assert log.lost_evaluation
    kept = [(row["split"], row["grpo_step"]) for row in strict_rows(tmp_path / "rollouts.jsonl")]
    assert kept == [("eval", 0), ("eval", 0), ("train", 2)]


def test_a_full_disk_is_named_and_everything_is_closed(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").symlink_to("/dev/full")
    (tmp_path / "warnings.jsonl").symlink_to("/dev/full")
    rollouts, rewards = make_rollouts(1)
    with (
        pytest.raises(CannotWrite, match=r"rollouts\.jsonl cannot be written: No space left"),
        RunLog(tmp_path, n_grpo_steps=1) as log,
    ):
        log.warn("lost, but no error")
        log.train_step(1, {"loss": 0.5})
        log.rollouts("train", 1, rollouts, rewards, n=1)
    assert [row["grpo_step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [1]
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def test_a_status_that_cannot_be_written_is_told_after_the_rest_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, n_grpo_steps=1)
    (tmp_path / "status.json").mkdir()
    files = list(log._files.values())
    with pytest.raises(CannotWrite, match=r"status\.json cannot be written"):
        log.close("finished")
    assert all(file.closed for file in files)
    log.close("finished")  # once is enough
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl", "status.json"]
