"""Runs on two ranks, each a process: the same as on one, and what ends one of them ends both, saved or resumable."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import torch.distributed.run
from parallel_cases import environment_of, finish_ranks, free_port, launch_ranks, statuses
from run_cases import (
    N_STEPS,
    arguments,
    assert_equal_runs,
    finish,
    metrics_of,
    printed_file,
    rows_of,
    trained_steps,
    wait_for,
    weights_file,
)
from safetensors.torch import load_file

import train_grpo
from utils.log import run_log
from utils.run import start
from utils.run.ending import Status

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def assert_equal_to_rounding(output: Path, reference: Path) -> None:
    """Weights, as far as Adam carries roundings on, which divides by a gradient's own size; metrics; and all texts."""
    ends = [load_file(weights_file(folder / "checkpoints" / "last")) for folder in (output, reference)]
    assert max((a - ends[1][name]).abs().max() for name, a in ends[0].items()) < 1e-4
    for row, expected in zip(metrics_of(output), metrics_of(reference), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert [row["response"] for row in rows_of(output / "rollouts.jsonl")] == [
        row["response"] for row in rows_of(reference / "rollouts.jsonl")
    ]


def rank_of(pid: int) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")), None)


def test_a_signal_to_one_rank_of_torchrun_ends_both_at_the_same_step_and_one_rank_goes_on(world, reference, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, torch.distributed.run.__file__, "--nproc-per-node", "2", ROOT / "train_grpo.py"]
    with (tmp_path / "printed.txt").open("w") as printed:
        # torchrun itself is forked; the two ranks that it starts are new Pythons
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        options = arguments(world, output)
        torchrun = forked.Popen([*command, *options], env=environment, stdout=printed, stderr=printed)
        while torchrun.poll() is None and not trained_steps(output):
            time.sleep(0.005)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(next(int(pid) for pid in workers if rank_of(int(pid)) == "1"), signal.SIGTERM)
        assert torchrun.wait(60) == 1  # as for every rank that does not end with 0
    text = (tmp_path / "printed.txt").read_text()
    done = trained_steps(output)[-1]
    assert done < N_STEPS
    assert f"interrupted after GRPO step {done}: a signal to another rank asked to stop" in text
    assert text.count("interrupted after") == 1
    assert "exitcode  : 4" in text
    assert json.loads((output / "status.json").read_text())["status"] == "interrupted"
    assert (output / "checkpoints" / "last").readlink() == Path(f"step_{done:06d}")
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_to_rounding(output, reference)


def test_a_killed_rank_ends_the_other_and_the_run_resumes_exactly(world, reference, tmp_path):
    """Begun on one rank, killed on two, and gone on with two: both kinds of ending leave the same bits."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert finish_ranks(2, arguments(world, whole)) == [Status.FINISHED] * 2
    assert_equal_to_rounding(whole, reference)
    ranks = launch_ranks(2, arguments(world, output))
    wait_for(ranks[0], lambda: len(trained_steps(output)) >= 3)
    ranks[1].kill()
    assert statuses(ranks) == [Status.ERROR, -signal.SIGKILL]
    (line,) = [line for line in printed_file(output).read_text().splitlines() if line.startswith("error: ")]
    assert "rank 0 of 2 has lost another rank" in line
    assert line.endswith("the same command with --resume goes on from there")
    assert "Traceback" not in printed_file(output).read_text()
    assert finish_ranks(2, [*arguments(world, output), "--resume"]) == [Status.FINISHED] * 2
    assert_equal_runs(output, whole)


def test_a_full_disk_on_rank_0_ends_both_with_the_status_of_an_error(world, tmp_path):
    output = tmp_path / "run"

    def fill_disk(rank: int) -> None:
        original = run_log.RunLog.train_step

        def train_step(self, grpo_step, metrics):
            if grpo_step == 2:
                self._files["metrics.jsonl"] = Path("/dev/full").open("w")  # noqa: SIM115
            return original(self, grpo_step, metrics)

        run_log.RunLog.train_step = train_step

    assert finish_ranks(2, arguments(world, output), fill_disk) == [Status.ERROR] * 2
    printed = printed_file(output).read_text()
    assert "Traceback" not in printed
    first, *others = sorted(line for line in printed.splitlines() if line.startswith("error: "))
    assert "metrics.jsonl cannot be written: No space left on device. The newest checkpoint is" in first
    assert all("rank 1 of 2 has lost another rank" in line for line in others)
    assert (output / "checkpoints" / "last").readlink() == Path("step_000001")


def test_a_mistake_is_told_by_rank_0_alone_and_every_rank_ends_with_status_2(world, tmp_path):
    """One prompt per step, which rank 0 refuses; and a folder that rank 1 does not see, as it says to rank 0."""
    output = tmp_path / "run"

    def look_elsewhere(rank: int) -> None:
        start.FOLDER_PATIENCE = 0.1
        if rank == 1:
            start.LOCK_FILE = "of_another_machine"

    for options, before, told in (
        (["training.group_size=16"], lambda rank: None, "its 1 prompts do not divide among 2 ranks"),
        ([], look_elsewhere, "rank 1 does not see there what rank 0 has written"),
    ):
        assert finish_ranks(2, arguments(world, output, *options), before) == [Status.USER_MISTAKE] * 2
        lines = [line for line in printed_file(output).read_text().splitlines() if "Loading weights" not in line]
        assert [line.startswith("error: ") for line in lines] == [True], lines
        assert told in lines[0]
        assert not output.exists()
        printed_file(output).unlink()


def test_the_dry_run_tells_what_each_rank_does(world, tmp_path, capsys, monkeypatch):
    for name, value in environment_of(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    assert train_grpo.main([*arguments(world, tmp_path / "run"), "--dry-run"]) == Status.FINISHED
    printed = capsys.readouterr().out
    assert "ranks: 2; each samples and scores 2 prompts (8 rollouts) per GRPO step" in printed
