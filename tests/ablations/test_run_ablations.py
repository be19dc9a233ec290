"""The runner of ablations: training runs killed and stopped in between, mistakes, and a trainer that plays roles."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

from utils.ablations import jobs as ablation_jobs
from utils.ablations.jobs import Job, Progress, find_topics, plan, topic_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "play-scripts" / "run_ablations.py"
SMALL = """training:
  device: cpu
  dtype: float32
  use_bnb_adamw8bit: false
  use_gradient_checkpointing: false
  use_vllm_sleep_mode: false
  rollout_engine: transformers
  n_grpo_steps: 40
  rollout_batch_size: 8
  train_batch_size: 8
  group_size: 4
  gradient_accumulation_steps: 1
  max_tokens: 8
  max_val_examples: 4
  eval_interval: 10
  checkpoint_interval: 1
grader: {workers: 1}
"""
# Plays what the name of its setting says; a sleeper ends as train_grpo.py does on SIGINT, and says how many came.
FAKE_TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(next(word for word in sys.argv if word.startswith("paths.output_dir=")).split("=")[1])
role = folder.parent.name
n_steps = int(next((w.split("=")[1] for w in sys.argv if w.startswith("training.n_grpo_steps=")), 40))
row = {"eval_step": 0, "time": 1.0, "eval/reward": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + chr(10))
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
def end(status, code):
    (folder / "status.json").write_text(json.dumps({"status": status, "grpo_step": n_steps}))
    sys.exit(code)
def on_signal(*_):
    print("asked", flush=True)
    end("interrupted", 4)
if role == "sleeps":
    signal.signal(signal.SIGINT, on_signal)
    print("ready", flush=True)
    time.sleep(600)
if role == "mistake":
    print("error: no such thing")
    sys.exit(2)
if role == "dies":
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
end(*{"finishes": ("finished", 0), "collapses": ("collapsed", 3), "runs_out": ("time_limit", 5)}[role])
"""


@pytest.fixture
def world(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder with problems, a model, and base.yaml; configs go to configs/<folder>/<run>.yaml in it."""
    (tmp_path / "problems.jsonl").write_text('{"problem": "1+1=?", "answer": "2"}\n' * 4)
    files = "".join(f"  {name}: {tmp_path}/problems.jsonl\n" for name in ("train_data_file", "val_data_file"))
    files += f"  prompt_template_file: {ROOT}/data/tiny.prompt\n  model_path: {tiny_model_dir}\n"
    (tmp_path / "base.yaml").write_text(f"paths:\n{files}{SMALL}")
    return tmp_path


def add_config(world: Path, name: str, text: str = "") -> None:
    path = world / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"base: {world}/base.yaml\n{text}")


def command(world: Path, *arguments: str) -> list[str]:
    places = ["--runs", str(world / "runs"), "--results", str(world / "results")]
    return [sys.executable, str(SCRIPT), *arguments, *places]


def run_here(world: Path, *arguments: str) -> int:
    """The runner within this process."""
    return runpy.run_path(str(SCRIPT))["main"](command(world, *arguments)[2:])


def jobs_of(world: Path, *folders: str, n_seeds: int = 1, overrides: tuple[str, ...] = ()) -> list[Job]:
    topics = find_topics([str(world / "configs" / folder) for folder in folders])
    return plan(topics, n_seeds, [], overrides, world / "runs")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def steps_in(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [row["grpo_step"] for row in rows if "grpo_step" in row]


def status_of(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


def child_in(runner: subprocess.Popen, folder: Path) -> int:
    """The process id of the training run that writes to a folder, and holds its lock."""
    for pid in Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split():
        if folder / ".lock" in [file.readlink() for file in Path(f"/proc/{pid}/fd").iterdir()]:
            return int(pid)
    raise AssertionError(f"no run in {folder}")


@pytest.mark.slow
def test_runs_killed_and_stopped_go_on_and_end_with_a_report(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", forked.popen_of("run_ablations.py", "train_grpo.py"))
    add_config(world, "sweep/slow", "training: {learning_rate: 1e-4}")
    add_config(world, "sweep/other", "training: {learning_rate: 1e-5}")
    add_config(world, "twin/same", "training: {learning_rate: 1e-5}")
    slow, other = (world / "runs" / "sweep" / name / "seed_1337" for name in ("slow", "other"))
    words = (
        str(world / "configs" / "sweep"),
        str(world / "configs" / "twin"),
        "--jobs",
        "2",
        "--retries",
        "0",
        "training.n_grpo_steps=20",
    )
    runner = subprocess.Popen(
        command(world, *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: len(steps_in(slow)) >= 3, runner)
    os.kill(child_in(runner, slow), signal.SIGKILL)
    wait_for(lambda: len(steps_in(other)) >= 3, runner)
    runner.send_signal(signal.SIGINT)
    output = runner.communicate()[0]
    assert runner.returncode == 4, output
    states = {tuple(line.split()[:2]) for line in output.splitlines()}
    assert {("failed", "sweep/slow"), ("interrupted", "sweep/other")} <= states
    assert "SIGKILL" in output
    assert "stopped" in output.splitlines()[-1]
    assert status_of(other) == "interrupted"
    assert not (slow / "status.json").exists()
    assert not (world / "results").exists()
    before = {folder: len(steps_in(folder)) for folder in (slow, other)}
    assert all(3 <= n < 20 for n in before.values())

    assert run_here(world, *words) == 0, capsys.readouterr()
    for folder in (slow, other):
        assert steps_in(folder) == list(range(1, 21))
        assert status_of(folder) == "finished"
        assert "resuming after GRPO step" in (folder / "console.log").read_text()
    twin = world / "runs" / "twin" / "same" / "seed_1337"
    assert (twin / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert json.loads((twin / "status.json").read_text())["same_as"] == "sweep/other"
    page = (world / "results" / "sweep" / "README.md").read_text()
    assert "| slow | 1 | 0.000 | 0.000 | 20 |" in page
    assert "`same` is the run `sweep/other`" in (world / "results" / "twin" / "README.md").read_text()

    written = {path: path.stat().st_mtime_ns for path in (world / "runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_here(world, *words) == 0
    assert "3 of 3 runs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (world / "runs").rglob("*") if path.is_file()} == written


@pytest.fixture
def main(world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The runner within this process, with the trainer that plays roles."""
    (world / "fake.py").write_text(FAKE_TRAINER)
    monkeypatch.setattr(ablation_jobs, "TRAIN", world / "fake.py")
    monkeypatch.delenv("OMP_NUM_THREADS")
    return lambda *arguments: runpy.run_path(str(SCRIPT))["main"](command(world, *arguments)[2:])


def test_more_steps_than_a_finished_run_has_are_added_to_it(
    world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    add_config(world, "roles/finishes")
    folder = world / "runs" / "roles" / "finishes" / "seed_1337"
    words = str(world / "configs" / "roles")
    for n, n_started in ((2, 1), (2, 1), (4, 2)):
        assert main(words, f"training.n_grpo_steps={n}") == 0
        assert (folder / "console.log").read_text().count("threads") == n_started
        assert json.loads((folder / "status.json").read_text())["grpo_step"] == n
    (folder / "config.yaml").write_text((world / "base.yaml").read_text())
    capsys.readouterr()
    assert main(words, "training.group_size=2") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert all(word in error for word in (str(folder), "training.group_size: saved 4", "asked for 2", "move it away"))


def test_one_that_fails_stops_no_other(
    world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("collapses", "dies", "finishes", "mistake", "runs_out"):
        add_config(world, f"roles/{role}")
    # the same seed and config would be the same run
    for i, path in enumerate(sorted((world / "configs" / "roles").iterdir())):
        path.write_text(path.read_text() + f"training: {{learning_rate: {i + 1}e-5}}\n")
    assert main(str(world / "configs" / "roles")) == 1
    printed = capsys.readouterr()
    log = world / "runs" / "roles" / "mistake" / "seed_1337" / "console.log"
    details = {tuple(line.split()[:2]): line for line in printed.out.splitlines()}
    for part in ("exit status 2", "error: no such thing", str(log)):
        assert part in details["failed", "roles/mistake"]
    assert "SIGKILL: last words" in details["failed", "roles/dies"]
    assert printed.out.count("cut_off     roles/dies") == 2
    ended = {("collapsed", "roles/collapses"), ("finished", "roles/finishes"), ("time_limit", "roles/runs_out")}
    assert ended <= set(details)
    assert log.read_text().startswith("threads 1\n")
    page = (world / "results" / "roles" / "README.md").read_text()
    assert "| collapses | 1 | 0.500 | 0.500 × | 0 | 1 s | collapsed |" in page
    assert "Collapsed: `collapses` (1 of 1 seeds)" in page
    assert "mistake/seed_1337: not finished" in printed.err

    assert main(str(world / "configs" / "roles"), "--retries", "0") == 1
    printed = capsys.readouterr().out
    assert "2 of 5 runs" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("running")] == [
        "roles/dies", "roles/mistake", "roles/runs_out"
    ]  # fmt: skip


def test_a_twin_of_a_run_that_failed_has_failed_too(
    world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    add_config(world, "first/mistake")
    add_config(world, "second/finishes")
    folders = [str(world / "configs" / name) for name in ("first", "second")]
    assert main(*folders) == 1
    assert "second/finishes seed 1337: the same config as first/mistake" in capsys.readouterr().out
    assert main(folders[1]) == 0
    assert main(*folders) == 1
    assert "1 of 2 runs" in capsys.readouterr().out


def test_stopped_while_others_wait(world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    add_config(world, "roles/sleeps")
    log = world / "runs" / "roles" / "sleeps" / "seed_1337" / "console.log"
    script = f"import sys, runpy; from utils.ablations import jobs; jobs.TRAIN = {str(world / 'fake.py')!r}; "
    script += f"sys.exit(runpy.run_path({str(SCRIPT)!r})['main'](sys.argv[1:]))"
    words = command(world, str(world / "configs" / "roles"), "--seeds", "3", "--jobs", "2")[2:]
    runner = subprocess.Popen(
        [sys.executable, "-c", script, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    logs = [log, Path(str(log).replace("1337", "1338"))]
    wait_for(lambda: all(path.exists() and "ready" in path.read_text() for path in logs), runner)
    assert main(str(world / "configs" / "roles")) == 1  # a second runner keeps its hands off
    assert "roles/sleeps seed 1337: another process" in capsys.readouterr().out
    runner.terminate()
    output = runner.communicate()[0]
    assert runner.returncode == 4, output
    assert output.count("interrupted") == 2
    assert all(path.read_text().count("asked") == 1 for path in logs)
    assert not (world / "runs" / "roles" / "sleeps" / "seed_1339").exists()


def test_plan_runs_equal_configs_once_and_seeds_in_turn(world: Path) -> None:
    add_config(world, "a/x", "training: {learning_rate: 1e-4}")
    add_config(world, "a/y", "training: {seed: 5}")
    add_config(world, "b/x2", f"paths: {{output_dir: {world}}}\ntraining: {{learning_rate: 1e-4, wandb_tags: [b]}}")
    jobs = jobs_of(world, "a", "b", n_seeds=2)
    assert [str(job) for job in jobs] == [
        "a/x seed 1337", "a/y seed 5", "b/x2 seed 1337", "a/x seed 1338", "a/y seed 6", "b/x2 seed 1338"
    ]  # fmt: skip
    assert [job.same_as and str(job.same_as) for job in jobs] == [
        None, None, "a/x seed 1337", None, None, "a/x seed 1338"
    ]  # fmt: skip
    assert jobs[1].folder == world / "runs" / "a" / "y" / "seed_5"
    assert jobs[0].config.guard.action == "stop"
    assert jobs_of(world, "a", overrides=("guard.action=warn",))[0].config.guard.action == "warn"
    (only,) = jobs_of(world, "b")
    assert only.same_as is None


def test_a_damaged_status_is_no_ending(world: Path) -> None:
    add_config(world, "a/x")
    folder = world / "runs" / "a" / "x" / "seed_1337"
    folder.mkdir(parents=True)
    states = []
    for text in ('{"status": "fin', "[]", '{"status": "finished"}', '{"status": "finished", "grpo_step": 39}',
                 '{"status": "finished", "grpo_step": 40}', '{"status": "collapsed", "grpo_step": 3}'):  # fmt: skip
        (folder / "status.json").write_text(text)
        states.append(jobs_of(world, "a")[0].state)
    assert states == ["waiting"] * 4 + ["finished", "collapsed"]
    assert jobs_of(world, "a", overrides=("guard.action=warn",))[0].state == "waiting"


@pytest.mark.parametrize("status", ["finished", "collapsed", "interrupted"])
def test_a_run_of_more_steps_is_another_one(world: Path, status: str) -> None:
    add_config(world, "a/x")
    folder = world / "runs" / "a" / "x" / "seed_1337"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"status": status, "grpo_step": 5}))
    complaint = r"training.n_grpo_steps: it has taken 5, asked for 2.*move it away"
    with pytest.raises(ValueError, match=complaint):
        jobs_of(world, "a", overrides=("training.n_grpo_steps=2",))
    assert len(jobs_of(world, "a", overrides=("training.n_grpo_steps=5",))) == 1


def test_progress_by_hand(world: Path) -> None:
    add_config(world, "a/x")
    (job,) = jobs_of(world, "a")
    assert (Progress(job).step, Progress(job).reward, Progress(job).seconds_left) == (0, None, None)
    job.folder.mkdir(parents=True)
    rows = [{"grpo_step": i, "time": 100.0 if i == 1 else 200.0 + 3 * i} for i in range(1, 31)]
    rows.insert(12, {"eval_step": 12, "time": 0.0, "eval/reward": 0.25})
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"grpo_st')
    progress = Progress(job)
    # 3 s per step over the last twenty, ten of forty steps left
    assert (progress.step, progress.n_steps, progress.reward, progress.seconds_left) == (30, 40, 0.25, 30.0)


def test_the_live_table_keeps_what_has_ended(world: Path) -> None:
    names = ("collapses", "finishes", "runs", "waits")
    for i, name in enumerate(names):
        add_config(world, f"a/{name}", f"training: {{learning_rate: {i + 1}e-5}}")
    jobs = jobs_of(world, "a")
    for job, state, step in zip(jobs, ("collapsed", "finished", "running"), (7, 40, 12), strict=False):
        job.folder.mkdir(parents=True)
        rows = [{"grpo_step": step, "time": 1.0}, {"eval_step": step, "time": 2.0, "eval/reward": step / 100}]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job.state = state
    script = runpy.run_path(str(SCRIPT))

    def shown(n_rows: int) -> tuple[list[tuple[str, ...]], str]:
        table = script["table"](jobs, 1, script["Stop"](), n_rows)
        return list(zip(*(column.cells for column in table.columns), strict=True)), table.caption

    running = ("a/runs seed 1337", "12/40", "0.120", "running", "–")
    finished = ("a/finishes seed 1337", "40/40", "0.400", "finished", "")
    collapsed = ("a/collapses seed 1337", "7/40", "0.070", "collapsed", "")
    assert shown(20) == ([running, collapsed, finished], "1 collapsed, 1 finished, 1 waiting")
    assert shown(2) == ([running, finished], "1 collapsed, 1 finished, 1 waiting; 1 that ended not shown")
    assert shown(-3)[0] == [running]


def test_topics(tmp_path: Path) -> None:
    for name in ("configs/lr", "configs/tiny/lr", "elsewhere/lr"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1e-5.yaml").write_text("")
    (tmp_path / "configs" / "tiny" / "base.yaml").write_text("")
    assert [topic_of(tmp_path / name) for name in ("configs/lr", "configs/tiny/lr", "elsewhere/lr")] == [
        "lr", "tiny/lr", "lr"
    ]  # fmt: skip
    assert find_topics([f"{tmp_path}/configs/tiny"]) == {"tiny/lr": tmp_path / "configs" / "tiny" / "lr"}
    assert list(find_topics([f"{tmp_path}/configs/lr", f"{tmp_path}/configs/lr/"])) == ["lr"]
    with pytest.raises(ValueError, match="both called lr"):
        find_topics([f"{tmp_path}/configs/lr", f"{tmp_path}/elsewhere/lr"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], ("nowhere", "folder")),
        (["{world}/empty"], ("empty", "*.yaml")),
        (["{world}/configs/a", "--seeds", "0"], ("--seeds 0", "at least 1")),
        (["{world}/configs/a", "--jobs", "0"], ("--jobs 0", "at least 1")),
        (["{world}/configs/a", "--seeds", "3", "--more-seeds", "2"], ("--more-seeds 2", "--seeds, which is 3")),
        (["{world}/configs/a", "--more-seeds", "2"], ("--more-seeds", "--seeds 2")),
        (["{world}/configs/a", "--overlay", "none.yaml"], ("none.yaml", "no such")),
        (["{world}/configs/a", "training.sede=1"], ("training.sede", "training.seed'")),
        (["{world}/configs/a", "training.group_size=3"], ("group", "divide")),
        (["training.seed=1"], ("no folder",)),
        (["{world}/configs/a", "paths.model_path=runs/tiny/sft_"], ("x.yaml", "paths.model_path", "runs/tiny/sft_")),
    ],
)
def test_mistakes_are_reported_before_anything_starts(
    world: Path,
    main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: tuple[str, ...],
) -> None:
    add_config(world, "a/x")
    (world / "empty").mkdir()
    try:
        code = main(*(word.replace("{world}", str(world)) for word in arguments))
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in complaint)
    assert not (world / "runs").exists()


def test_a_missing_start_is_reported_with_the_command_that_makes_it(
    world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "configs" / "tiny" / "sft_init", world / "configs" / "tiny" / "sft_init")
    for path in (world / "configs" / "tiny" / "sft_init").iterdir():
        path.write_text(path.read_text().replace("../base.yaml", f"{world}/base.yaml").replace("runs/", "no/such/"))
    assert main(str(world / "configs" / "tiny" / "sft_init")) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("early.yaml", "paths.model_path", "no/such/tiny/sft/step_100"))
    assert "python play-scripts/train_sft.py --model data/chains/model" in printed


def test_report_only_runs_nothing(world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    add_config(world, "roles/finishes")
    assert main(str(world / "configs" / "roles"), "--report-only") == 0
    assert "roles: no report: nothing to draw" in capsys.readouterr().err
    assert not (world / "runs").exists()


def test_redraw_needs_the_results_alone(
    world: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    add_config(world, "roles/collapses")
    words = str(world / "configs" / "roles")
    assert main(words, "--jobs", "2") == 0
    results = world / "results" / "roles"
    page = (results / "README.md").read_text()
    assert "--jobs 2" in page
    shutil.rmtree(world / "runs")
    (results / "figure.png").unlink()
    capsys.readouterr()
    assert main(words, "--redraw") == 0
    assert capsys.readouterr().err == ""
    assert (results / "README.md").read_text() == page
    assert (results / "figure.png").exists()
    assert not (world / "runs").exists()
