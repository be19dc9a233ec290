"""Checkpoints written in the background: the copy of the moment, in order, one at a time, with failures told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from utils import tiny
from utils.run import checkpoint
from utils.run.background_save import BackgroundSaver, to_host
from utils.run.checkpoint import Checkpoints, TrainState


@pytest.fixture
def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    policy = tiny.build_model(0, n_layers=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    train(policy, optimizer)
    return policy, optimizer


def train(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def test_it_saves_the_weights_of_the_moment_though_training_goes_on(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, optimizer = parts
    tokenizer, may_write, write = tiny.build_tokenizer(), threading.Event(), checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *args: (may_write.wait(60), write(*args)))
    Checkpoints(tmp_path / "plain", keep=1)
    saver = BackgroundSaver(Checkpoints(tmp_path / "run", keep=2))
    saver.begin(TrainState(steps_done=1), policy, tokenizer, optimizer, is_best=False)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    assert saver.is_writing
    train(policy, optimizer)
    may_write.set()
    assert saver.wait() is None and not saver.is_writing and saver.seconds > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/last", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    saved = torch.load(tmp_path / "run/last" / checkpoint.OPTIMIZER_FILE, weights_only=True)["state"]
    assert all(torch.equal(saved[i]["exp_avg"], moment) for i, moment in enumerate(moments))
    assert not torch.equal(loaded["lm_head.weight"], policy.state_dict()["lm_head.weight"])


def test_the_files_are_those_of_a_plain_save(parts, tmp_path: Path) -> None:
    policy, optimizer = parts
    tokenizer, state = tiny.build_tokenizer(), TrainState(steps_done=3)
    Checkpoints(tmp_path / "plain", keep=1).save(state, policy, tokenizer, optimizer)
    saver = BackgroundSaver(Checkpoints(tmp_path / "run", keep=1))
    saver.begin(state, torch.compile(policy), tokenizer, optimizer, is_best=False)
    assert saver.wait() is None
    plain, run = tmp_path / "plain/last", tmp_path / "run/last"
    assert sorted(p.name for p in plain.iterdir()) == sorted(p.name for p in run.iterdir())
    ours, theirs = load_file(run / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run / "config.json").read_text() == (plain / "config.json").read_text()


def test_the_next_save_waits_and_failures_are_told_where_it_is_waited_for(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, optimizer = parts
    tokenizer, write, writing = tiny.build_tokenizer(), checkpoint._write, []

    def one_at_a_time(folder, state, *rest):
        writing.append(state.steps_done)
        assert len(writing) == 1
        if state.steps_done == 2:
            writing.clear()
            raise OSError(28, "No space left on device")
        write(folder, state, *rest)
        writing.clear()

    monkeypatch.setattr(checkpoint, "_write", one_at_a_time)
    saver = BackgroundSaver(Checkpoints(tmp_path, keep=5))
    for step in (1, 2):
        saver.begin(TrainState(steps_done=step), policy, tokenizer, optimizer, is_best=False)
    failure = saver.wait()
    assert failure.grpo_step == 2 and "No space left" in str(failure)
    saver.begin(TrainState(steps_done=3), policy, tokenizer, optimizer, is_best=True)
    assert saver.wait() is None
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000001", "step_000003"]
    monkeypatch.setattr(checkpoint, "_write", lambda *_: 1 / 0)
    saver.begin(TrainState(steps_done=4), policy, tokenizer, optimizer, is_best=False)
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_a_host_copy_shares_what_was_shared_and_nothing_with_the_original() -> None:
    tied = torch.ones(3)
    copy = to_host({"a": tied, "b": [tied, (1, "x")], "c": torch.zeros(0)})
    tied.add_(1)
    assert copy["a"].tolist() == [1, 1, 1] and copy["a"] is copy["b"][0] and copy["b"][1] == (1, "x")
