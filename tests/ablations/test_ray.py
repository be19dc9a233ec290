"""Runs on a Ray of two workers on this machine: one is killed in mid-run. Skipped where ray is not installed."""

from __future__ import annotations

import contextlib
import json
import runpy
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_cases import OPTIONS, assert_equal_runs, trained_steps

from utils.ablations.places.ray import RayPlace

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

SCRIPT = Path(__file__).parents[2] / "play-scripts" / "run_ablations.py"
SLOW_REWARD = """
import time
from utils.rewards.functions import r1_zero_reward_fn

def slow(rollout):
    time.sleep(0.02)
    rewards = r1_zero_reward_fn(rollout.response, rollout.prompt.problem.answer)
    total = rewards["reward"]
    return {"format": rewards["format_reward"], "answer": rewards["answer_reward"], "total": total}
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run from, with all that the run of run_cases.py reads, by relative paths, and a slow reward."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own.py").write_text(SLOW_REWARD)
    sections: dict[str, dict[str, object]] = {}
    for key, value in (option.split("=", 1) for option in OPTIONS):
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = (
            json.loads(value) if value[0].isdigit() or value in ("true", "false") else value
        )
    sections["training"]["reward_fn"] = "own.py:slow"
    sections["paths"] = {"train_data_file": "problems.jsonl", "val_data_file": "problems.jsonl"}
    sections["paths"] |= {"prompt_template_file": "prompt", "model_path": "./model"}
    (tmp_path / "configs" / "sweep").mkdir(parents=True)
    (tmp_path / "configs" / "sweep" / "one.yaml").write_text(json.dumps(sections))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.ablations.places.ray.SYNC_SECONDS", 0.1)
    return tmp_path


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def training_process() -> int:
    """The process id of the run that a worker has started."""
    for folder in Path("/proc").iterdir():
        words: list[bytes] = []
        with contextlib.suppress(OSError):  # it is no process, or one that has just ended
            words = (folder / "cmdline").read_bytes().split(b"\0")
        if b"--config=settings.yaml" in words and b"tie" not in words:
            return int(folder.name)
    raise AssertionError("no run")


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_is_resumed_by_the_other_and_ends_with_the_same_bits(
    cluster: Cluster, here: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "runs" / "sweep" / "one" / "seed_1337"
    monkeypatch.setattr(RayPlace, "shares_files", False)

    def kill_its_worker() -> None:
        while not (folder / "checkpoints" / "step_000002").exists():
            if is_over.wait(0.01):
                return
        run = training_process()
        chain = list(ancestors(run))
        nodes = [n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid in chain]
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.append(run)

    killed: list[int] = []
    is_over = threading.Event()
    killer = threading.Thread(target=kill_its_worker)
    killer.start()
    words = ["configs/sweep", "--on", f"ray:{cluster.address}", "elsewhere.seconds_per_step=2"]
    code = runpy.run_path(str(SCRIPT))["main"](words)
    is_over.set()
    killer.join()
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "1 run with 6 GRPO steps" in printed
    assert [line.split()[0] for line in printed.splitlines() if "sweep/one" in line.split()] == [
        "running", "cut_off", "running", "finished"
    ]  # fmt: skip
    assert not Path(f"/proc/{killed[0]}").exists()
    assert trained_steps(folder) == list(range(1, 7))
    assert_equal_runs(folder, reference, but_for="grader")  # a reward of one's own is not graded in processes
    first, second = json.loads((folder / "run.json").read_text())["launches"]
    assert first["git"] == second["git"]
    assert "resuming after GRPO step" in (folder / "console.log").read_text()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".saving")]
