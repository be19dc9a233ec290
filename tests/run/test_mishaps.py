"""Training processes starved of disk and time, fed NaN, or collapsed: nothing is lost, and none of it goes unsaid."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from functools import partial
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

import train_grpo
from utils.algorithm import update
from utils.engines import transformers_engine
from utils.log import run_log
from utils.log.checkpoints import OPTIMIZER_FILE, STATE_FILE, saved_checkpoints
from utils.preflight import disk
from utils.run import guard
from utils.run.checkpoint import Checkpoints
from utils.run.ending import Status, TimeLimit

pytestmark = pytest.mark.slow


def fill_disk_for_three_saves(checkpoints: Path) -> None:
    """In a training process: from step 3 on files are cut off at 100 kB, until three saves have failed."""
    original, failures = Checkpoints.save, []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, state, *args, **options):
        is_full = state.steps_done > 2 and len(failures) < 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if is_full else hard, hard))
        failure = original(self, state, *args, **options)
        if failure is not None:
            failures.append(failure)
            load_file(checkpoints / "last" / "model.safetensors")
        return failure

    Checkpoints.save = save


def test_a_full_disk_costs_checkpoints_but_not_the_run(world, tmp_path):
    """Files are cut off at less than the weights take, until saves have failed three times."""
    options = ["training.n_grpo_steps=8", "training.eval_interval=8"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    assert finish(arguments(world, undisturbed, *options)) == Status.FINISHED
    checkpoints = output / "checkpoints"
    assert finish(arguments(world, output, *options), lambda: fill_disk_for_three_saves(checkpoints)) == Status.FINISHED
    warnings = [row["warning"] for row in rows_of(output / "warnings.jsonl")]
    failures = [text for text in warnings if "was not saved" in text]
    assert len({text.split(" was not")[0] for text in failures}) == len(failures) == 3  # once for a step
    assert "MiB are free" in failures[0]
    assert (checkpoints / "last").readlink() == Path("step_000008")
    assert_equal_runs(output, undisturbed)


def test_a_disk_full_to_the_end_is_no_success(world, tmp_path):
    """The run is done but its last weights are on no disk: the exit status says so, and the message which stand."""
    output = tmp_path / "run"
    process = launch(arguments(world, output))
    wait_for(process, lambda: (output / "checkpoints" / "step_000002").exists())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process.join()
    assert process.exitcode == Status.ERROR
    assert "GRPO step 6 was not saved" in printed_file(output).read_text()
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert int((output / "checkpoints" / "last").readlink().name[-6:]) == N_STEPS


def test_a_log_that_cannot_be_written_closes_everything_with_one_message(world, tmp_path):
    """rollouts.jsonl leads to a device on which no space is ever left; the evaluation after step 2 wants to write."""
    output = tmp_path / "run"
    assert finish(arguments(world, output, "training.n_grpo_steps=1", "training.eval_interval=null")) == 0
    rollouts = output / "rollouts.jsonl"

    def fill_disk() -> None:
        original = run_log.cut_rows

        def cut_rows(path, *steps):
            outcome = original(path, *steps)
            if path == rollouts:
                path.unlink(missing_ok=True)
                path.symlink_to("/dev/full")
            return outcome

        run_log.cut_rows = cut_rows

    printed_file(output).unlink()
    process = launch([*arguments(world, output), "--resume"], fill_disk)
    process.join()
    assert process.exitcode == Status.ERROR
    printed = printed_file(output).read_text()
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if "error" in line.lower()]
    assert line.startswith(f"error: {rollouts} cannot be written: No space left on device")
    assert f"The newest checkpoint is {output / 'checkpoints' / 'step_000001'}; the same command with --resume" in line
    status = json.loads((output / "status.json").read_text())
    assert (status["status"], "No space left" in status["detail"]) == ("failed", True)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children_in_session(process.pid))


def children_in_session(session: int) -> list[str]:
    """Processes that are left of a process that led a session."""
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                left.append(folder.name)
    return left


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start_and_by_the_dry_run(world, tmp_path, capsys):
    output = tmp_path / "run"

    def fill_disk() -> None:
        usage = disk.shutil.disk_usage(tmp_path)
        disk.shutil.disk_usage = lambda path: usage._replace(free=100_000)

    for flags in ([], ["--dry-run"]):
        assert finish([*arguments(world, output), *flags], fill_disk) == Status.USER_MISTAKE
        (line,) = [text for text in printed_file(output).read_text().splitlines() if "a checkpoint takes" in text]
        printed_file(output).unlink()
        needed = float(re.search(r"a checkpoint takes about (\S+) GB, and 0.0001 GB are free there", line)[1])
        assert needed == pytest.approx(3 * (world / "model" / "model.safetensors").stat().st_size / 1e9, rel=0.1)
        assert not output.exists()


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file in a folder with what it holds, and every link with its target."""
    paths = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return {str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() for path in paths}


def damages(newest: Path, older: Path) -> Iterator[tuple[Path, bytes | None, Path]]:
    """(file, its new bytes or None to remove it, the folder that is named) of each kind of damage."""
    for name in ("model.safetensors", OPTIMIZER_FILE, STATE_FILE, "config.json"):
        whole = (newest / name).read_bytes()
        for damaged in (b"\0" * len(whole), whole[: len(whole) // 2], b"", None):
            yield newest / name, damaged, newest
    yield newest / STATE_FILE, b"{}", newest
    yield older / STATE_FILE, b"", older
    yield newest.with_name("step_000099") / "notes.txt", b"a folder that no run made", newest.with_name("step_000099")


def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on_from_another(world, reference, tmp_path):
    """Each kind of damage is one line; nothing in the folder is changed by the start that it refuses."""
    output = tmp_path / "run"
    assert finish(arguments(world, output)) == Status.FINISHED
    older, newest = saved_checkpoints(output / "checkpoints")[-2:]
    for file, damaged, named in list(damages(newest, older)):
        whole = file.read_bytes() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.unlink() if damaged is None else file.write_bytes(damaged)
        before = contents(output)
        printed_file(output).unlink()
        assert finish([*arguments(world, output), "--resume"]) == Status.USER_MISTAKE, file
        *before_it, line = printed_file(output).read_text().splitlines()
        assert not any("Traceback" in text for text in before_it)
        assert line.startswith(f"error: the checkpoint {named} is damaged (")
        assert file.name in line or named.name == "step_000099"
        assert line.endswith(f"delete that folder, and --resume goes on from {older if named == newest else newest}")
        assert contents(output) == before
        file.unlink(missing_ok=True) if whole is None else file.write_bytes(whole)
        if whole is None:
            file.parent.rmdir()
    shutil.rmtree(newest)
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)


def test_a_damaged_list_of_launches_is_named_and_a_missing_one_is_begun_again(world, reference, tmp_path):
    output = tmp_path / "run"
    assert finish(arguments(world, output, "training.n_grpo_steps=2")) == Status.FINISHED
    for damaged in (b"", b'{"launches": [{"started"', b"[]"):
        (output / "run.json").write_bytes(damaged)
        before = contents(output)
        assert finish([*arguments(world, output), "--resume"]) == Status.USER_MISTAKE
        line = printed_file(output).read_text().splitlines()[-1]
        assert line.startswith(f"error: {output / 'run.json'} is damaged")
        assert "delete that file, and --resume goes on" in line
        assert contents(output) == before
    (output / "run.json").unlink()
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert len(json.loads((output / "run.json").read_text())["launches"]) == 1
    assert_equal_runs(output, reference)


def test_a_lost_evaluation_is_made_again_and_rows_without_a_step_are_left_out(world, reference, tmp_path):
    """The tail of metrics.jsonl is cut within the last evaluation's row; a line before it has no step."""
    output = tmp_path / "run"
    assert finish(arguments(world, output)) == Status.FINISHED
    *lines, last = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(last)["eval_step"] == N_STEPS
    (output / "metrics.jsonl").write_text("".join([*lines, '{"train/loss": 1.0}\n', last[: len(last) // 2]]))
    assert finish([*arguments(world, output), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, reference)
    warnings = [row["warning"] for row in rows_of(output / "warnings.jsonl")]
    about_metrics = [text for text in warnings if text.startswith(str(output / "metrics.jsonl"))]
    assert len(about_metrics) == 3
    assert f"the evaluation at GRPO step {N_STEPS} is missing, so it is made again" in about_metrics[2]


def test_fewer_steps_than_done_are_refused(world, tmp_path):
    output = tmp_path / "run"
    assert finish(arguments(world, output, "training.n_grpo_steps=2")) == Status.FINISHED
    before = contents(output)
    assert finish([*arguments(world, output, "training.n_grpo_steps=1"), "--resume"]) == Status.USER_MISTAKE
    line = printed_file(output).read_text().splitlines()[-1]
    assert "training.n_grpo_steps = 1" in line
    assert "already done 2 steps; give 2 or more" in line
    assert contents(output) == before


def test_a_signal_before_the_first_step_is_done_has_nothing_to_save(world, tmp_path):
    output = tmp_path / "run"

    def interrupt() -> None:
        original = transformers_engine.TransformersEngine.generate

        def generate(self, *args, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **options)

        transformers_engine.TransformersEngine.generate = generate

    assert finish(arguments(world, output), interrupt) == Status.STOPPED_BY_SIGNAL
    assert not (output / "checkpoints").exists()
    printed = printed_file(output).read_text()
    assert "a save of the steps done, if any" in printed
    assert "the same command with --resume, to begin anew" in printed


def spoil_log_probs(grpo_step: int) -> None:
    """Put a NaN into the log-probs that the engine reports of one rollout of a GRPO step."""
    original, counted = transformers_engine.TransformersEngine.generate, itertools.count(1)

    def generate(self, *args, label="rollouts", **options):
        rollouts = original(self, *args, label=label, **options)
        if label == "rollouts" and next(counted) == grpo_step:
            first = rollouts[5]
            rollouts[5] = dataclasses.replace(first, sampler_log_probs=(float("nan"), *first.sampler_log_probs[1:]))
        return rollouts

    transformers_engine.TransformersEngine.generate = generate


def spoil_gradient(calls: range) -> None:
    """Put an infinity into one entry of the gradient before some optimizer steps, counted from 1."""
    original, counted = update.clip_gradients, itertools.count(1)

    def clip_gradients(policy, max_grad_norm):
        if next(counted) in calls:
            next(policy.parameters()).grad.view(-1)[7] = float("inf")
        return original(policy, max_grad_norm)

    update.clip_gradients = clip_gradients


def all_finite(output: Path) -> bool:
    last = output / "checkpoints" / "last"
    adam = torch.load(last / OPTIMIZER_FILE, weights_only=True)["state"].values()
    tensors = [*load_file(last / "model.safetensors").values(), *(value for state in adam for value in state.values())]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def test_a_nan_in_a_rollouts_log_probs_skips_the_optimizer_steps_that_use_it(world, tmp_path):
    """Once an epoch, so in two of the four optimizer steps; and the rollout that caused it is written down."""
    output = tmp_path / "run"
    assert finish(arguments(world, output), lambda: spoil_log_probs(grpo_step=2)) == Status.FINISHED
    steps = [row for row in rows_of(output / "metrics.jsonl") if "grpo_step" in row]
    assert [row["train/nonfinite_steps"] for row in steps] == [0, 2, 0, 0, 0, 0]
    assert [row["optimizer_step"] for row in steps] == [4, 6, 10, 14, 18, 22]
    (culprit,) = [row for row in rows_of(output / "rollouts.jsonl") if row["split"] == "nonfinite"]
    assert (culprit["grpo_step"], culprit["prompt"].endswith("<think>")) == (2, True)
    assert all_finite(output)


def test_an_infinity_in_a_gradient_skips_that_optimizer_step(world, reference, tmp_path):
    output = tmp_path / "run"
    assert finish(arguments(world, output), lambda: spoil_gradient(range(6, 7))) == Status.FINISHED
    steps = [row for row in rows_of(output / "metrics.jsonl") if "grpo_step" in row]
    assert [row["train/nonfinite_steps"] for row in steps] == [0, 1, 0, 0, 0, 0]
    assert [row["optimizer_step"] for row in steps] == [4, 7, 11, 15, 19, 23]
    assert metrics_of(output)[:2] == metrics_of(reference)[:2]
    assert any("skipped" in row["warning"] for row in rows_of(output / "warnings.jsonl"))
    assert all_finite(output)


def test_several_in_a_row_stop_the_run_with_a_diagnosis(world, reference, tmp_path):
    """From the second GRPO step on: its four optimizer steps are more than the three allowed, and change no weight."""
    output = tmp_path / "run"
    assert finish(arguments(world, output), lambda: spoil_gradient(range(5, 1000))) == Status.NONFINITE
    assert trained_steps(output) == [1, 2]
    assert "learning rate" in json.loads((output / "status.json").read_text())["detail"]
    at = [load_file(output / "checkpoints" / f"step_{step:06d}" / "model.safetensors") for step in (1, 2)]
    assert all(differing_bits(at[0][name], at[1][name]) == 0 for name in at[0])


def test_the_time_limit_ends_the_run_with_an_evaluation_and_a_save(world, tmp_path):
    """By a clock that goes on by a second whenever it is read: seven steps are through after 7.2 seconds."""
    output = tmp_path / "run"

    def tick() -> None:
        train_grpo.TimeLimit = partial(TimeLimit, clock=itertools.count().__next__)

    options = ["training.n_grpo_steps=100000", "training.checkpoint_interval=null", "training.eval_interval=1000"]
    assert finish(arguments(world, output, *options, "training.max_hours=0.002"), tick) == Status.TIME_LIMIT
    steps, evaluated = trained_steps(output), [r["eval_step"] for r in metrics_of(output) if "eval_step" in r]
    assert steps == list(range(1, steps[-1] + 1))
    assert 3 <= steps[-1] <= 8
    assert evaluated == [0, steps[-1]]
    assert (output / "checkpoints" / "last").readlink() == Path(f"step_{steps[-1]:06d}")


def test_a_collapse_stops_the_run_with_a_save_where_the_config_says_so(world, tmp_path):
    """A learning rate of 1: reward is 0 from the first step on."""
    stopped, warned = tmp_path / "stopped", tmp_path / "warned"
    options = ["training.eval_interval=1", "training.learning_rate=1.0", "training.n_grpo_steps=16"]
    assert finish(arguments(world, stopped, *options, "guard.action=stop")) == Status.COLLAPSED
    last = trained_steps(stopped)[-1]
    assert 3 <= last < 12
    assert (stopped / "checkpoints" / "last").readlink() == Path(f"step_{last:06d}")
    assert finish(arguments(world, warned, *options), lambda: setattr(guard, "REPEAT_INTERVAL", 4)) == Status.FINISHED
    warnings = [row["grpo_step"] for row in rows_of(warned / "warnings.jsonl") if "collapse" in row["warning"]]
    assert warnings == list(range(last, 17, 4))


def test_a_collapse_is_evaluated_before_it_is_told(world, tmp_path):
    """Lengths alone tell of it, long before the next evaluation is due."""
    output = tmp_path / "run"
    options = ["training.eval_interval=1000", "training.learning_rate=1.0", "training.n_grpo_steps=30"]
    assert finish(arguments(world, output, *options, "guard.action=stop", "guard.patience=2")) == Status.COLLAPSED
    last = trained_steps(output)[-1]
    assert [row["eval_step"] for row in metrics_of(output) if "eval_step" in row] == [0, last]
    (told,) = [row for row in rows_of(output / "warnings.jsonl") if "collapse" in row["warning"]]
    assert told["grpo_step"] == last
    assert "eval/reward 0" in told["warning"]
    printed = printed_file(output).read_text()
    assert printed.index(f"eval {last:2}/30") < printed.index("collapse at GRPO step")


def test_the_best_is_kept_without_a_checkpoint_interval(world, reference, tmp_path):
    output = tmp_path / "run"
    assert finish(arguments(world, output, "training.checkpoint_interval=null")) == Status.FINISHED
    rewards = {row["eval_step"]: row["eval/reward"] for row in metrics_of(reference) if row.get("eval_step", 0) > 0}
    first = metrics_of(reference)[0]["eval/reward"]
    best = max(rewards, key=rewards.get)
    if rewards[best] > first:
        assert (output / "checkpoints" / "best").readlink() == Path(f"step_{best:06d}")
    saved = sorted(path.name for path in (output / "checkpoints").glob("step_*"))
    assert saved[-1] == f"step_{N_STEPS:06d}"


def test_a_resume_of_nothing_is_told_loudly(world, tmp_path):
    output = tmp_path / "run"
    assert finish([*arguments(world, output, "training.n_grpo_steps=1"), "--resume"]) == Status.FINISHED
    (told,) = [row["warning"] for row in rows_of(output / "warnings.jsonl") if "NO RUN" in row["warning"]]
    assert str(output) in told
    assert f"warning: --resume: {output} held NO RUN" in printed_file(output).read_text()
