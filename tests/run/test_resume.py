"""Training processes killed, signalled, failed and resumed: they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_cases import (
    N_STEPS,
    arguments,
    assert_equal_runs,
    differing_bits,
    finish,
    launch,
    metrics_of,
    printed_file,
    rows_of,
    trained_steps,
    wait_for,
)
from safetensors.torch import load_file

from utils.algorithm import log_probs
from utils.run import build
from utils.run.checkpoint import OPTIMIZER_FILE
from utils.run.ending import Status

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_the_reference_run_learns_something(world, reference):
    """Otherwise equal weights would prove nothing."""
    before, after = (
        load_file(folder / "model.safetensors") for folder in (world / "model", reference / "checkpoints/last")
    )
    assert all(differing_bits(before[name], after[name]) > 0 for name in before)
    assert 0.1 < metrics_of(reference)[0]["eval/reward"] < 0.9


def test_validation_that_is_trained_on_is_reported_before_the_first_step(reference):
    lines = printed_file(reference).read_text().splitlines()
    (place,) = [i for i, line in enumerate(lines) if "in the training data: 20 of 20" in line]
    assert place < next(i for i, line in enumerate(lines) if "reward" in line)


def wait_until_gone(session: int) -> None:
    """Wait until no process of a session is left: grading processes end by themselves when their trainer is killed."""
    while any(
        fields[0] != "Z" and int(fields[3]) == session for fields in map(stat_fields, Path("/proc").glob("[0-9]*"))
    ):
        time.sleep(0.01)


def stat_fields(process: Path) -> list[str]:
    """State, parent, group, session, ... of a process; those of a zombie where it is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0", "0", "0"]


def test_killed_at_random_instants_and_resumed_it_ends_bit_identical(world, tmp_path):
    """SIGKILL six times: half at a random instant, half around the writing of a checkpoint; no process stays behind."""
    n_kills, rng = 6, random.Random(0)
    options = ["training.n_grpo_steps=12", "training.eval_interval=3", "training.checkpoint_interval=2"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "killed"
    started = time.monotonic()
    assert finish(arguments(world, undisturbed, *options)) == Status.FINISHED
    whole_run = time.monotonic() - started

    def saving() -> bool:
        return any((output / "checkpoints").glob(".saving-*"))

    kills = killed_while_saving = 0
    while kills < n_kills or killed_while_saving < 1:
        process = launch([*arguments(world, output, *options), *(["--resume"] if output.exists() else [])])
        if kills % 2:
            wait_for(process, saving)
            time.sleep(rng.uniform(0, 0.005))
        else:
            process.join(timeout=rng.uniform(0, whole_run / 3))
        if process.exitcode is not None:  # done before its kill came: the machine has become faster meanwhile
            assert process.exitcode == Status.FINISHED, printed_file(output).read_text()
            shutil.rmtree(output)
            continue
        process.kill()
        process.join()
        kills += 1
        killed_while_saving += saving()
        wait_until_gone(process.pid)
    assert finish([*arguments(world, output, *options), "--resume"]) == Status.FINISHED
    print(f"{kills} kills, {killed_while_saving} of them while a checkpoint was being written")
    assert trained_steps(output) == list(range(1, 13))
    assert_equal_runs(output, undisturbed)


def test_a_signal_ends_the_run_with_a_save_and_the_resumed_run_is_the_same(world, reference, tmp_path):
    """At three different moments: before the first step, in a step, and again after a resume."""
    output, statuses = tmp_path / "run", []
    for n_rows, number in ((1, signal.SIGINT), (2, signal.SIGTERM), (5, signal.SIGHUP)):
        options = [*arguments(world, output), *(["--resume"] if output.exists() else [])]
        process = launch(options, lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
        wait_for(process, lambda n_rows=n_rows: len(rows_of(output / "metrics.jsonl")) >= n_rows)
        os.killpg(process.pid, number)  # as a terminal does: to the grading processes too
        process.join()
        statuses.append(process.exitcode)
        printed = printed_file(output).read_text()
        assert signal.Signals(number).name in printed
        assert "--resume" in printed
        assert json.loads((output / "status.json").read_text())["status"] == "interrupted"
        assert not list((output / "checkpoints").glob(".*"))
    assert statuses == [Status.STOPPED_BY_SIGNAL] * 3
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)


def test_a_terminal_that_closes_ends_the_run_with_a_save(world, reference, tmp_path):
    """The whole command in a terminal of its own, which is gone when the run wants to say that it saves."""
    output = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, str(ROOT / "train_grpo.py"), *arguments(world, output)])
    while len(trained_steps(output)) < 2:
        os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == Status.STOPPED_BY_SIGNAL
    assert (output / "checkpoints" / "last").resolve().name == f"step_{trained_steps(output)[-1]:06d}"
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)


def test_a_signal_while_the_model_loads_leaves_the_folder_as_it_was(world, tmp_path):
    def interrupt() -> None:
        original = build.load_policy

        def load_policy(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        build.load_policy = load_policy

    output = tmp_path / "runs" / "run"
    output.parent.mkdir()
    assert finish(arguments(world, output), interrupt) == Status.STOPPED_BY_SIGNAL
    assert not output.exists()
    assert "nothing was saved" in printed_file(output).read_text()


def count_microbatches(counted: list[int], at: int, action: Callable[[], None]) -> None:
    """Do something in the middle of the n-th microbatch of this process."""
    original = log_probs.policy_log_probs  # called by the inner loop for each microbatch

    def policy_log_probs(*args, **kwargs):
        if torch.is_grad_enabled():  # old log-probs come from the same function, without a gradient
            counted.append(1)
            if len(counted) == at:
                action()
        return original(*args, **kwargs)

    log_probs.policy_log_probs = policy_log_probs


@pytest.mark.parametrize(
    ("microbatch", "saved_step"),
    [(10, 1), (11, 2), (16, 2)],  # the first optimizer step of a GRPO step follows its second microbatch
)
def test_a_signal_within_a_step_gives_it_up_or_finishes_it(world, reference, tmp_path, microbatch, saved_step):
    """Before its first optimizer step a GRPO step is given up; after it, finished: weights are those of whole steps."""
    output = tmp_path / "run"

    def before() -> None:
        count_microbatches([], microbatch, lambda: os.kill(os.getpid(), signal.SIGTERM))

    assert finish(arguments(world, output), before) == Status.STOPPED_BY_SIGNAL
    assert (output / "checkpoints" / "last").readlink() == Path(f"step_{saved_step:06d}")
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_serves(world, reference, tmp_path):
    output = tmp_path / "run"
    process = launch(
        arguments(world, output), lambda: count_microbatches([], 20, lambda: (signal.raise_signal(15), time.sleep(600)))
    )
    wait_for(process, lambda: printed_file(output).exists() and "SIGTERM" in printed_file(output).read_text())
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)


def test_an_exception_saves_nothing_and_names_the_checkpoint_to_resume_from(world, reference, tmp_path):
    def fail() -> None:
        raise RuntimeError("out of luck")

    output = tmp_path / "run"
    assert finish(arguments(world, output), lambda: count_microbatches([], 20, fail)) == Status.ERROR
    printed, last = printed_file(output).read_text(), output / "checkpoints" / "last"
    assert "out of luck" in printed
    assert f"{last.resolve()}" in printed
    assert not list((output / "checkpoints").glob(".*"))
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)


def test_resuming_with_another_config_is_refused_unless_insisted_on(world, reference, tmp_path):
    output, other = tmp_path / "run", ["training.learning_rate=1e-4", "training.checkpoint_keep=5"]
    assert finish(arguments(world, output, "training.n_grpo_steps=2")) == Status.FINISHED
    before = (output / "metrics.jsonl").read_bytes()
    assert finish([*arguments(world, output, *other), "--resume"]) == Status.USER_MISTAKE
    message = printed_file(output).read_text().splitlines()[-1]
    assert "training.learning_rate" in message
    assert "checkpoint_keep" not in message
    assert "n_grpo_steps" not in message
    assert finish(arguments(world, output)) == Status.USER_MISTAKE  # without --resume a run is never overwritten
    assert (output / "metrics.jsonl").read_bytes() == before
    assert finish([*arguments(world, output, *other), "--resume", "--allow-changes"]) == Status.FINISHED
    assert trained_steps(output) == list(range(1, N_STEPS + 1))
    assert metrics_of(output)[:3] == metrics_of(reference)[:3]
    adam = torch.load(output / "checkpoints" / "last" / OPTIMIZER_FILE, weights_only=True)
    assert adam["param_groups"][0]["lr"] == 1e-4


def test_a_longer_run_may_be_asked_for_and_a_resume_without_a_checkpoint_begins_anew(world, reference, tmp_path):
    output = tmp_path / "run"
    process = launch(arguments(world, output))
    wait_for(process, lambda: "eval_step" in (rows_of(output / "metrics.jsonl") or [{}])[0])
    process.kill()
    process.join()
    resumed = [*arguments(world, output), "--resume"]
    assert finish([*resumed, "training.n_grpo_steps=3"]) == Status.FINISHED
    assert finish(resumed) == Status.FINISHED
    assert trained_steps(output) == list(range(1, N_STEPS + 1))
    assert [row["eval_step"] for row in rows_of(output / "metrics.jsonl") if "eval_step" in row].count(0) == 1
    empty = tmp_path / "empty"
    assert finish([*arguments(world, empty), "--resume"]) == Status.FINISHED
    assert "from the beginning" in printed_file(empty).read_text()
    assert_equal_runs(empty, reference)


def test_a_kill_with_refill_retirement_schedule_and_kl_on_leaves_no_trace(world, tmp_path):
    """All that samples, draws or trains by what came before it, in one run."""
    options = [
        "training.refill_groups=true",
        "training.max_generation_rounds=3",
        "training.retire_pass_rate=0.5",
        "training.kl_coef=0.05",
        "training.reference_dtype=float32",
        "training.warmup_steps=2",
        "training.lr_schedule=cosine",
        "training.sampler_correction=tis",
        "training.overlong_buffer=4",
    ]
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert finish(arguments(world, whole, *options)) == Status.FINISHED
    rounds = [row["train/generation_rounds"] for row in rows_of(whole / "metrics.jsonl") if "grpo_step" in row]
    assert max(rounds) > 1
    for n_rows in (3, 6):
        process = launch([*arguments(world, output, *options), *(["--resume"] if output.exists() else [])])
        wait_for(process, lambda n_rows=n_rows: len(rows_of(output / "metrics.jsonl")) >= n_rows)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert finish([*arguments(world, output, *options), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, whole)
