"""Checkpoints: whole or absent, loadable by the usual classes, kept by rule; and what a resume may change."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from configs.defaults import Config
from utils import tiny
from utils.log.checkpoints import DamagedCheckpoint
from utils.preflight.config import load_config, save_config
from utils.preflight.config_rules import ConfigError, fields
from utils.preflight.resume_rules import MAY_CHANGE, changed_fields
from utils.run import checkpoint
from utils.run.checkpoint import Checkpoints, TrainState

disable_progress_bar()  # its lock is shared with forked processes: one killed while it holds it blocks all others
OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3, min_8bit_size=1),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


def make_policy(seed: int = 0, tie_embeddings: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return tiny.build_model(seed, hidden_size=16, n_layers=1, tie_embeddings=tie_embeddings).to(dtype)


def train_step(policy: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 200, (2, 8), generator=torch.Generator().manual_seed(seed))
    policy(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def parts(optimizer_name: str = "fused", n_steps: int = 1, **options):
    policy = make_policy(**options)
    optimizer = OPTIMIZERS[optimizer_name](policy.parameters())
    for seed in range(n_steps):
        train_step(policy, optimizer, seed)
    return policy, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit(tmp_path, tokenizer, optimizer_name, tie_embeddings, dtype):
    policy, optimizer = parts(optimizer_name, 3, tie_embeddings=tie_embeddings, dtype=dtype)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None
    assert checkpoints.save(TrainState(steps_done=3), policy, tokenizer, optimizer) is None

    resumed = AutoModelForCausalLM.from_pretrained(checkpoints.newest(), dtype=dtype)
    resumed_optimizer = OPTIMIZERS[optimizer_name](resumed.parameters())
    checkpoints.load(checkpoints.newest(), resumed_optimizer)
    for seed in (3, 4):
        train_step(policy, optimizer, seed)
        train_step(resumed, resumed_optimizer, seed)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_state_and_random_generators_come_back(tmp_path, tokenizer):
    policy, optimizer = parts()

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()  # a first gauss leaves a second one in store, which is state too
    state = TrainState(
        steps_done=7,
        optimizer_step=28,
        skipped_in_a_row=1,
        problem_stream={"epoch": 1, "position": 3},
        evaluated_step=4,
        best_reward=0.1 + 0.2,
        best_step=4,
        guard={"series": {"eval/reward": [[0, 0.25]]}},
        advisor={"said": {"no_signal": 3}},
        tracker_id="abc",
    )
    expected = draw()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, policy, tokenizer, optimizer)
    draw()
    loaded = checkpoints.load(tmp_path / "step_000007", optimizer)
    assert draw() == expected
    assert json.loads(json.dumps(dataclasses.asdict(state))) == dataclasses.asdict(loaded)
    file = tmp_path / "step_000007" / "trainer_state.json"
    file.write_text(file.read_text().replace('"steps_done"', '"grpo_step"'))  # as older checkpoints have it
    assert checkpoints.load(tmp_path / "step_000007", optimizer) == loaded


def test_state_is_that_of_the_moment_it_was_made(tmp_path, tokenizer):
    policy, optimizer = parts()
    state, expected = TrainState(steps_done=1), torch.rand(1)
    torch.rand(100)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, policy, tokenizer, optimizer)
    checkpoints.load(checkpoints.newest(), optimizer)
    assert torch.rand(1) == expected


def test_tokenizer_and_compiled_policy_load_as_usual(tmp_path, tokenizer):
    policy, optimizer = parts()
    compiled = torch.compile(policy)
    Checkpoints(tmp_path, keep=1).save(TrainState(steps_done=1), compiled, tokenizer, optimizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "last", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in policy.state_dict().items())
    text = "User: 1 + 1?\nAssistant: <think>"
    assert AutoTokenizer.from_pretrained(tmp_path / "last")(text).input_ids == tokenizer(text).input_ids
    assert [path.suffix for path in (tmp_path / "last").glob("model*")] == [".safetensors"]


def test_optimizer_keeps_the_hyperparameters_of_its_config(tmp_path, tokenizer):
    policy, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(TrainState(steps_done=1), policy, tokenizer, optimizer)
    unfused = torch.optim.AdamW(policy.parameters(), lr=5e-4, betas=(0.8, 0.9), fused=False)
    checkpoints.load(checkpoints.newest(), unfused)
    group = unfused.param_groups[0]
    assert (group["lr"], group["betas"], group["fused"]) == (5e-4, (0.8, 0.9), False)
    assert unfused.state[group["params"][0]]["step"] == 1


def save_all(checkpoints, tokenizer, best_steps, n_steps):
    policy, optimizer = parts()
    for step in range(1, n_steps + 1):
        assert checkpoints.save(TrainState(steps_done=step), policy, tokenizer, optimizer, step in best_steps) is None


def test_newest_best_and_last_are_kept_and_linked_relatively(tmp_path, tokenizer):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    save_all(checkpoints, tokenizer, best_steps={1, 3}, n_steps=6)
    assert names(checkpoints.folder) == ["best", "last", "step_000003", "step_000005", "step_000006"]
    assert (checkpoints.folder / "best").readlink() == Path("step_000003")
    assert (checkpoints.folder / "last").readlink() == Path("step_000006")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "checkpoints" / "best" / "config.json").is_file()


def test_newest_is_by_number_not_by_name(tmp_path, tokenizer):
    policy, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (999_999, 1_000_000):
        checkpoints.save(TrainState(steps_done=step), policy, tokenizer, optimizer)
    assert checkpoints.newest().name == "step_1000000"


def test_a_step_that_has_a_checkpoint_keeps_its_weights_and_takes_the_later_state(tmp_path, tokenizer):
    """As when a run is stopped before an evaluation, which is made up for after the resume and finds a new best."""
    policy, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(TrainState(steps_done=1, best_reward=0.1, best_step=0), policy, tokenizer, optimizer)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "step_000001").iterdir()}
    assert names(tmp_path) == ["last", "step_000001"]
    later = TrainState(steps_done=1, evaluated_step=1, best_reward=0.5, best_step=1)
    assert checkpoints.save(later, policy, tokenizer, optimizer, is_best=True) is None
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "step_000001").iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [checkpoint.STATE_FILE]
    assert names(tmp_path) == ["best", "last", "step_000001"]
    assert checkpoints.load(tmp_path / "best", optimizer).best_reward == 0.5


def is_whole(path: Path) -> bool:
    """Whether every part of a checkpoint loads."""
    AutoModelForCausalLM.from_pretrained(path)
    AutoTokenizer.from_pretrained(path)
    json.loads((path / checkpoint.STATE_FILE).read_text())
    torch.load(path / checkpoint.OPTIMIZER_FILE, weights_only=True)
    return True


def contents(path: Path) -> tuple[tuple[str, bytes], ...]:
    return tuple((file.name, file.read_bytes()) for file in sorted(path.iterdir()))


def copies_before_changes(folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Save three checkpoints in a row; a copy of the folder from before each call that changes the disk.

    A copy holds what a process leaves that is killed at this instant, for what Python still buffers is in no file.
    """
    made: list[Path] = []

    def copied_before(function):
        def call(*args, **kwargs):
            made.append(copies / f"{len(made):03}")
            if folder.exists():
                shutil.copytree(folder, made[-1], symlinks=True)
            return function(*args, **kwargs)

        return call

    tokenizer = tiny.build_tokenizer()
    with monkeypatch.context() as patch:
        for owner, name in [
            (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "symlink_to"),
            (Path, "write_text"), (os, "fsync"), (torch, "save"), (checkpoint.shutil, "rmtree"),
            (os, "unlink"), (os, "rmdir"),
        ]:  # fmt: skip
            patch.setattr(owner, name, copied_before(getattr(owner, name)))
        checkpoints = Checkpoints(folder, keep=1)
        save_all(checkpoints, tokenizer, best_steps={1}, n_steps=3)
        policy, optimizer = parts()
        checkpoints.save(TrainState(steps_done=3, evaluated_step=3), policy, tokenizer, optimizer)  # a later state
    return made


@pytest.mark.slow
def test_a_kill_before_any_change_on_the_disk_leaves_whole_checkpoints(tmp_path, tokenizer, monkeypatch):
    """Every instant between two changes is tried, removal included. Real kills are in test_resume.py."""
    copies = copies_before_changes(tmp_path / "run", tmp_path / "copies", monkeypatch)
    assert len(copies) > 60
    reached, whole = 0, set()
    policy, optimizer = parts()
    for folder in copies:
        restarted = Checkpoints(folder, keep=1)  # a new start, which cleans up
        restarted.tidy()
        newest = restarted.newest()
        assert newest is not None or reached == 0
        reached = max(reached, int(newest.name[-6:]) if newest else 0)
        assert newest is None or int(newest.name[-6:]) == reached
        for path in restarted.steps():
            assert contents(path) in whole or is_whole(path)
            whole.add(contents(path))
        if newest is not None:
            assert (folder / "best").resolve().name == "step_000001"
            assert (folder / "last").resolve() == newest.resolve()
        assert restarted.save(TrainState(steps_done=4), policy, tokenizer, optimizer) is None
        left = ["best", "last", *(["step_000001"] if newest else []), "step_000004"]
        assert names(folder) == (left if newest else left[1:])
    assert reached == 3


def saved_under_limit(folder: Path, limit: int, sender) -> None:
    """Two checkpoints, the second with files cut off at `limit` bytes, the third without a limit again."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    policy, optimizer = parts()
    checkpoints, tokenizer = Checkpoints(folder, keep=1), tiny.build_tokenizer()
    outcomes = [checkpoints.save(TrainState(steps_done=1), policy, tokenizer, optimizer)]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    outcomes.append(checkpoints.save(TrainState(steps_done=2), policy, tokenizer, optimizer))
    outcomes.append(checkpoints.failure)
    outcomes.append(names(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    outcomes.append(checkpoints.save(TrainState(steps_done=3), policy, tokenizer, optimizer))
    outcomes.append(checkpoints.failure)
    sender.send(outcomes)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("file_name", ["model.safetensors", checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE])
def test_a_disk_that_refuses_at_any_point_keeps_the_old_checkpoint(tmp_path, tokenizer, file_name, share):
    policy, optimizer = parts()
    Checkpoints(tmp_path / "probe", keep=1).save(TrainState(steps_done=1), policy, tokenizer, optimizer)
    limit = int(share * (tmp_path / "probe" / "last" / file_name).stat().st_size)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=saved_under_limit, args=(tmp_path / "run", limit, sender))
    process.start()
    sender.close()
    first, second, remembered, left, third, after = receiver.recv()
    process.join()
    assert first is None
    assert second == remembered
    assert left == ["last", "step_000001"]
    assert is_whole(tmp_path / "run" / "last")
    weights, adam = sum(p.nbytes for p in policy.parameters()), 2
    assert (1 + adam) * weights <= second.needed_bytes <= (1 + adam) * weights + 10_000
    assert second.free_bytes > 0
    assert "GRPO step 2 was not saved" in str(second)
    assert str(second).endswith(f"{tmp_path / 'run' / 'step_000001'} is kept")  # EFBIG: no space would help
    assert third is None
    assert after is None
    assert names(tmp_path / "run") == ["last", "step_000003"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, tokenizer, monkeypatch):
    policy, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, keep=1)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint, "_write", lambda *_: pytest.fail("wrote in spite of it"))
    failure = checkpoints.save(TrainState(steps_done=1), policy, tokenizer, optimizer)
    assert failure.free_bytes == 1000
    assert "not enough space" in str(failure)
    assert str(failure).endswith("No checkpoint was saved before; free some space, or lower checkpoint_keep")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_only_a_full_disk_comes_with_the_advice_to_free_space(tmp_path, tokenizer, monkeypatch, error, full):
    def refused(*_):
        raise error

    policy, optimizer = parts()
    monkeypatch.setattr(checkpoint, "_write", refused)
    failure = Checkpoints(tmp_path, keep=1).save(TrainState(steps_done=1), policy, tokenizer, optimizer)
    assert ("free some space" in str(failure)) == full


def test_a_tensor_file_with_code_in_it_is_refused(tmp_path, tokenizer):
    policy, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(TrainState(steps_done=1), policy, tokenizer, optimizer)
    torch.save({"state": Path}, tmp_path / "last" / checkpoint.OPTIMIZER_FILE)
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.pt cannot be read as tensors") as refusal:
        checkpoints.load(checkpoints.newest(), optimizer)
    assert "weights_only" not in str(refusal.value)


def test_lasting_fields_are_named_and_the_rest_may_change(tmp_path):
    saved = Config()
    save_config(saved, tmp_path / "config.yaml")
    saved, config = load_config([tmp_path / "config.yaml"], []), copy.deepcopy(Config())
    assert changed_fields(saved, config) == []
    config.training.learning_rate = 3e-5
    config.training.stop = ["\n"]
    config.paths.model_path = "elsewhere"
    config.training.n_grpo_steps = 99  # may change
    config.training.gradient_accumulation_steps = 64  # may change
    config.guard.action = "stop"  # may change
    changes = changed_fields(saved, config)
    assert [change.split(":")[0] for change in changes] == [
        "paths.model_path",
        "training.learning_rate",
        "training.stop",
    ]
    assert "1e-05" in changes[1]
    assert "3e-05" in changes[1]


def test_a_saved_config_with_removed_guard_fields_is_refused_by_name_and_remedy(tmp_path):
    """A config.yaml of an older run holds all of them: one message names every one."""
    path = tmp_path / "config.yaml"
    save_config(Config(), path)
    path.write_text(path.read_text().replace("guard:\n", "guard:\n  repeat_interval: 20\n  runaway_share: 0.9\n"))
    line = path.read_text().splitlines().index("  repeat_interval: 20") + 1
    with pytest.raises(ConfigError, match=rf"^\S+config\.yaml:{line}: ") as refusal:
        load_config([path])
    assert "guard.repeat_interval, guard.runaway_share: a constant in utils/run/guard.py now" in str(refusal.value)
    assert str(refusal.value).endswith("delete the lines")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"^command line: guard\.kept_share: .*delete the line$"):
        load_config([], ["guard.kept_share=0.5"])


def test_the_cut_into_microbatches_lasts_where_the_loss_depends_on_it():
    saved, config = Config(), Config()
    saved.training.normalize_mode = config.training.normalize_mode = "microbatch"
    config.training.gradient_accumulation_steps = 64
    assert [change.split(":")[0] for change in changed_fields(saved, config)] == [
        "training.gradient_accumulation_steps"
    ]


def test_fields_that_may_change_exist():
    assert set(fields()) >= MAY_CHANGE
