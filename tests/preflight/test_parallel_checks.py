"""What several ranks ask of a config and a machine, told in one line each."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from parallel_cases import environment_of

from configs.defaults import Config, Training
from utils.preflight import machine, parallel_checks
from utils.preflight.memory_estimate import estimate_peak_memory
from utils.preflight.parallel_checks import parallel_obstacles
from utils.ranks import Launch, launched, take_own_card

CONFIG = Config(training=Training(device="cpu", rollout_batch_size=64, group_size=8, train_batch_size=32))
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(2, 4, 29500).items():
        monkeypatch.setenv(name, value)


def obstacles_of(**fields: object) -> list[str]:
    return list(parallel_obstacles(replace(CONFIG, training=replace(CONFIG.training, **fields))))


def test_a_process_that_torchrun_has_not_started_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == Launch() and launched().is_first
    assert obstacles_of(train_batch_size=1) == []
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a cluster's scheduler may have put it there
    assert launched().n_ranks == 1


def test_batches_that_do_not_divide_are_refused(four_ranks: None) -> None:
    assert obstacles_of() == []
    (line,) = obstacles_of(rollout_batch_size=48)
    assert line.startswith("training.rollout_batch_size = 48: its 6 prompts do not divide among 4 ranks")
    (line,) = obstacles_of(train_batch_size=2)
    assert line.startswith("training.train_batch_size = 2 does not divide among 4 ranks")


def test_cards_are_counted_and_each_rank_takes_its_own(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_checks, "n_visible_gpus", lambda: 4)
    assert obstacles_of(device="cuda:0") == []
    (line,) = obstacles_of(device="cuda:1")
    assert line.startswith("training.device = 'cuda:1'") and "set it to cuda:0" in line
    monkeypatch.setattr(parallel_checks, "n_visible_gpus", lambda: 2)
    (line,) = obstacles_of(device="cuda:0")
    assert "4 ranks here, and there are 2 cards" in line


@pytest.mark.parametrize(("visible", "own"), [(None, "2"), ("4,5, GPU-6,7", "GPU-6"), ("0,1", "")])
def test_a_rank_sees_one_card(four_ranks: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, own: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine.n_visible_gpus() == len(visible.split(","))
    take_own_card()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert machine.n_visible_gpus() == bool(own)


def test_a_ranks_memory_is_that_of_its_share(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    one_cut = replace(CONFIG, training=replace(CONFIG.training, gradient_accumulation_steps=1))
    share = estimate_peak_memory(SIZES, one_cut, 100, uses_vllm=False)
    monkeypatch.delenv("RANK")
    whole = estimate_peak_memory(SIZES, one_cut, 100, uses_vllm=False)
    assert 4 * share["sampling"] == whole["sampling"]
    assert 4 * share["activations"] == whole["activations"]
    assert share["optimizer"] == whole["optimizer"]
