"""Training processes killed, signalled, starved of disk, fed NaN; resumed, they end as if nothing had happened."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

import train_grpo
import utils.build  # noqa: F401 (forked processes then need not import it)
from utils import tiny, update
from utils.checkpoint import OPTIMIZER_FILE, STATE_FILE
from utils.ending import Status
from utils.engines import transformers_engine

ROOT = Path(__file__).parents[1]
disable_progress_bar()  # its lock is shared with forked processes: one killed while it holds it blocks all others
N_STEPS = 6
PROBLEMS = [{"problem": f"{i}", "answer": str(1 + i % 2)} for i in range(20)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, a template, and a model that has learned the format and guesses the answer: 1 or 2."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (folder / "prompt").write_text("{question}<think>")
    tokenizer, model = tiny.build_tokenizer(), tiny.build_model(0, n_layers=1)
    texts = [f"{i}<think></think> <answer>{answer}</answer>" for i in range(10) for answer in (1, 2)]
    ids = torch.tensor([tokenizer(text).input_ids for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


# Two epochs of two minibatches of two microbatches: eight microbatches and four optimizer steps a GRPO step.
OPTIONS = f"""
training.device=cpu training.dtype=float32 training.rollout_engine=transformers training.use_bnb_adamw8bit=false
training.use_gradient_checkpointing=false training.use_vllm_sleep_mode=false training.try_longest_microbatch=false
training.learning_rate=3e-4 training.n_grpo_steps={N_STEPS} training.rollout_batch_size=16 training.group_size=4
training.train_batch_size=8 training.gradient_accumulation_steps=2 training.epochs_per_rollout_batch=2
training.skip_zero_advantage=false training.max_tokens=16 training.eval_interval=2 training.checkpoint_interval=1
training.max_val_examples=8 training.n_rollouts_to_log=3 grader.workers=1 vllm.dtype=float32
""".split()


def arguments(world: Path, output_dir: Path, *overrides: str) -> list[str]:
    """What the command is given: every step is saved, every second one evaluated."""
    return [
        f"paths.train_data_file={world}/problems.jsonl",
        f"paths.val_data_file={world}/problems.jsonl",
        f"paths.prompt_template_file={world}/prompt",
        f"paths.model_path={world}/model",
        f"paths.output_dir={output_dir}",
        *OPTIONS,
        *overrides,
    ]


def launch(options: list[str], before: Callable[[], None] | None = None) -> multiprocessing.Process:
    """Start training in a process of its own, forked so that nothing is imported again; it writes to <output>.txt."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(options, before))
    process.start()
    return process


def _train(options: list[str], before: Callable[[], None] | None) -> None:
    os.setsid()
    torch.set_num_threads(1)
    with printed_file(output_of(options)).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not pytest's
    if before is not None:
        before()
    sys.exit(int(train_grpo.main(options)))


def output_of(options: list[str]) -> Path:
    return next(Path(option.split("=")[1]) for option in reversed(options) if option.startswith("paths.output_dir="))


def printed_file(output: Path) -> Path:
    return output.with_name(output.name + ".txt")


def finish(options: list[str], before: Callable[[], None] | None = None) -> int:
    """Train to the end; the exit status."""
    process = launch(options, before)
    process.join()
    return process.exitcode


def wait_for(process: multiprocessing.Process, happened: Callable[[], bool]) -> None:
    """Wait until something has happened, or the process has ended."""
    while process.is_alive() and not happened():
        time.sleep(0.002)


def rows_of(path: Path) -> list[dict]:
    """The whole lines of a file, which a process may be writing at this moment."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics_of(output: Path) -> list[dict]:
    """The rows of metrics.jsonl without what measures time or memory."""
    timed = ("time", "train/tokens_per_second")
    return [
        {k: v for k, v in row.items() if k not in timed and not k.endswith("_dt") and "memory" not in k}
        for row in rows_of(output / "metrics.jsonl")
    ]


def trained_steps(output: Path) -> list[int]:
    return [row["grpo_step"] for row in rows_of(output / "metrics.jsonl") if "grpo_step" in row]


def differing_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many bits of two tensors of the same shape differ."""
    changed = a.contiguous().view(torch.uint8).bitwise_xor(b.contiguous().view(torch.uint8))
    return sum(int(count) * bin(byte).count("1") for byte, count in enumerate(torch.bincount(changed.flatten())))


def assert_equal_runs(output: Path, reference: Path) -> None:
    """Weights, optimizer, state, metrics and rollouts of two runs are the same, times aside."""
    ends = [folder / "checkpoints" / "last" for folder in (output, reference)]
    weights, expected = (load_file(end / "model.safetensors") for end in ends)
    assert weights.keys() == expected.keys()
    assert sum(differing_bits(weights[name], expected[name]) for name in expected) == 0
    adam, expected_adam = (torch.load(end / OPTIMIZER_FILE, weights_only=True) for end in ends)
    for key, state in expected_adam["state"].items():
        assert all(torch.equal(value, adam["state"][key][name]) for name, value in state.items())
    state, expected_state = (json.loads((end / STATE_FILE).read_text()) for end in ends)
    assert state == expected_state
    assert metrics_of(output) == metrics_of(reference)
    assert rows_of(output / "rollouts.jsonl") == rows_of(reference / "rollouts.jsonl")
    assert links_of(output) == links_of(reference)


def links_of(output: Path) -> dict[str, str]:
    """The links `best` (where there is one) and `last`."""
    return {path.name: str(path.readlink()) for path in (output / "checkpoints").iterdir() if path.is_symlink()}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("reference") / "run"
    assert finish(arguments(world, output)) == Status.FINISHED
    assert trained_steps(output) == list(range(1, N_STEPS + 1))
    return output


def test_the_reference_run_learns_something(world, reference):
    """Otherwise equal weights would prove nothing."""
    before, after = (
        load_file(folder / "model.safetensors") for folder in (world / "model", reference / "checkpoints/last")
    )
    assert all(differing_bits(before[name], after[name]) > 0 for name in before)
    assert 0.1 < metrics_of(reference)[0]["eval/reward"] < 0.9


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
    """SIGKILL 24 times: half at a random instant, half around the writing of a checkpoint; no process stays behind."""
    n_kills, rng = 24, random.Random(0)
    options = ["training.n_grpo_steps=30", "training.eval_interval=3", "training.checkpoint_interval=2"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "killed"
    started = time.monotonic()
    assert finish(arguments(world, undisturbed, *options)) == Status.FINISHED
    whole_run = time.monotonic() - started

    def saving() -> bool:
        return any((output / "checkpoints").glob(".saving-*"))

    kills = killed_while_saving = 0
    while kills < n_kills or killed_while_saving < 4:
        process = launch([*arguments(world, output, *options), *(["--resume"] if output.exists() else [])])
        if kills % 2:
            wait_for(process, saving)
            time.sleep(rng.uniform(0, 0.005))
        else:
            process.join(timeout=rng.uniform(0, whole_run / 10))
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
    assert trained_steps(output) == list(range(1, 31))
    assert_equal_runs(output, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_save_and_the_resumed_run_is_the_same(world, reference, tmp_path, number):
    """At three different moments each: before the first step, in a step, and again after a resume."""
    output, statuses = tmp_path / "run", []
    for n_rows in (1, 2, 5):
        process = launch([*arguments(world, output), *(["--resume"] if output.exists() else [])])
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


def count_microbatches(counted: list[int], at: int, action: Callable[[], None]) -> None:
    """Do something in the middle of the n-th microbatch of this process."""
    from utils import update

    original = update.train_on_microbatch

    def train_on_microbatch(*args, **kwargs):
        counted.append(1)
        if len(counted) == at:
            action()
        return original(*args, **kwargs)

    update.train_on_microbatch = train_on_microbatch


@pytest.mark.parametrize(
    ("microbatch", "saved_step"),
    [(9, 1), (10, 1), (11, 2), (16, 2)],  # the first optimizer step of a GRPO step follows its second microbatch
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


def test_a_full_disk_costs_checkpoints_but_not_the_run(world, tmp_path):
    """From step 2 on files are cut off at 100 kB, less than the weights take, until saves have failed three times."""
    options = ["training.n_grpo_steps=40", "training.eval_interval=40"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    assert finish(arguments(world, undisturbed, *options)) == Status.FINISHED
    process, checkpoints = launch(arguments(world, output, *options)), output / "checkpoints"
    wait_for(process, lambda: (checkpoints / "step_000002").exists())
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, hard))

    def failures() -> list[str]:
        warnings = [row["warning"] for row in rows_of(output / "warnings.jsonl")]
        return [text for text in warnings if "was not saved" in text]

    wait_for(process, lambda: len(failures()) >= 3)
    assert load_file(checkpoints / "last" / "model.safetensors")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    process.join()
    assert process.exitcode == Status.FINISHED
    n_failures = len(failures())
    assert n_failures >= 3
    assert "MiB are free" in failures()[0]
    assert int(checkpoints.joinpath("last").readlink().name[-6:]) == 40
    assert n_failures < 38  # the warnings ended with the first save that succeeded
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


def spoil_log_probs(grpo_step: int) -> None:
    """Put a NaN into the log-probs that the engine reports of one rollout of a GRPO step."""
    original, counted = transformers_engine.TransformersEngine.generate, itertools.count(1)

    def generate(self, prompts, n, seed, temperature=None, label="rollouts"):
        rollouts = original(self, prompts, n, seed, temperature, label)
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
    output = tmp_path / "run"
    options = ["training.n_grpo_steps=100000", "training.checkpoint_interval=null", "training.eval_interval=1000"]
    assert finish(arguments(world, output, *options, "training.max_hours=0.003")) == Status.TIME_LIMIT
    steps, evaluated = trained_steps(output), [r["eval_step"] for r in metrics_of(output) if "eval_step" in r]
    assert steps == list(range(1, steps[-1] + 1))
    assert evaluated == [0, steps[-1]]
    assert (output / "checkpoints" / "last").readlink() == Path(f"step_{steps[-1]:06d}")


def test_a_collapse_stops_the_run_with_a_save_where_the_config_says_so(world, tmp_path):
    """A learning rate of 1: reward is 0 from the first step on."""
    stopped, warned = tmp_path / "stopped", tmp_path / "warned"
    options = ["training.eval_interval=1", "training.learning_rate=1.0", "guard.repeat_interval=4"]
    options += ["training.n_grpo_steps=16"]
    assert finish(arguments(world, stopped, *options, "guard.action=stop")) == Status.COLLAPSED
    last = trained_steps(stopped)[-1]
    assert 3 <= last < 12
    assert (stopped / "checkpoints" / "last").readlink() == Path(f"step_{last:06d}")
    assert finish(arguments(world, warned, *options)) == Status.FINISHED
    warnings = [row["grpo_step"] for row in rows_of(warned / "warnings.jsonl") if "collapse" in row["warning"]]
    assert warnings == list(range(last, 17, 4))


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


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_with_vllm_a_killed_run_ends_the_same(world, tmp_path):
    """The whole command, killed as it saves, and ended in a step by a signal that lets it save."""
    options = ["training.rollout_engine=vllm", "vllm.enforce_eager=true", "training.checkpoint_interval=2"]

    def start(output: Path, *flags: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train_grpo.py"), *arguments(world, output, *options), *flags]
        with printed_file(output).open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    assert start(undisturbed).wait() == Status.FINISHED, printed_file(undisturbed).read_text()
    moments = [
        (signal.SIGKILL, lambda: any((output / "checkpoints").glob(".saving-step_000004"))),
        (signal.SIGTERM, lambda: trained_steps(output)[-1:] == [3]),
    ]
    for number, happened in moments:
        process = start(output, *(["--resume"] if output.exists() else []))
        while process.poll() is None and not happened():
            time.sleep(0.002)
        process.send_signal(number)
        assert process.wait() == (Status.STOPPED_BY_SIGNAL if number == signal.SIGTERM else -number)
    assert start(output, "--resume").wait() == Status.FINISHED
    assert trained_steps(output) == list(range(1, N_STEPS + 1))
    assert_equal_runs(output, undisturbed)
