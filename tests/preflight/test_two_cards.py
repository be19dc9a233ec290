"""vLLM on a GPU of its own, beside the policy's: what it asks of the config and the machine, and what follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_count import QWEN_1_5B

import train_grpo
from utils.ablations.places.modal import misplaced
from utils.engines import choose_engine
from utils.preflight import machine
from utils.preflight.config import load_config, load_config_and_origins
from utils.preflight.config_rules import ConfigError
from utils.preflight.derive import Card, derive
from utils.preflight.fit import fit_to_card
from utils.preflight.memory_estimate import VLLM_OVERHEAD, count_parameters, estimate_peak_memory
from utils.preflight.obstacles import shortfalls

OVERLAY = Path(__file__).parents[2] / "configs/hardware/two_gpus.yaml"
TWO = ["training.device=cuda:1", "vllm.device=cuda:0"]
LONGEST = 1424
ENGINES, TRAINERS = Card(24 * 10**9, 23 * 10**9), Card(80 * 10**9, 79 * 10**9)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with vLLM and two GPUs, of 24,000 and 80,000 MiB in the driver's order."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in\n*query-gpu=index*) echo 0; echo 1 ;;\n*--id=0*) echo 24000, 23000 ;;\n'
        "*--id=1*) echo 80000, 79000 ;;\n*) exit 6 ;;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("utils.preflight.obstacles.has_gpu", lambda: True)
    monkeypatch.setattr("utils.engines.installed_vllm", lambda: "vllm")
    machine._ask_driver.cache_clear()
    yield
    machine._ask_driver.cache_clear()


def about_cards(config) -> list[str]:
    return [line for line in shortfalls(config) if "device" in line.split(":")[0]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.device=cuda:0"], "not two GPUs; set training.device to cuda:1, or vllm.device to null"),
        (["training.device=cuda"], "not two GPUs"),
        (["training.device=cpu"], "not two GPUs"),
        (["vllm.device=cuda:1", "training.device=cuda:0"], "first GPU .* training.device to cuda:1 .*VISIBLE_DEVICES"),
        (["vllm.device=cpu"], "set it to cuda:0"),
        (["training.rollout_engine=transformers"], "samples from the policy itself"),
    ],
)
def test_what_is_not_two_gpus_is_refused_in_a_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config([], [*TWO, *overrides])
    assert "\n" not in str(refused.value) and "vllm.device" in str(refused.value)


def test_the_sampler_never_sleeps_on_a_gpu_of_its_own() -> None:
    assert load_config().vllm_sleeps and not load_config([], ["training.use_vllm_sleep_mode=false"]).vllm_sleeps
    assert not load_config([], [*TWO, "training.use_vllm_sleep_mode=true"]).vllm_sleeps
    assert not load_config([OVERLAY]).vllm_sleeps


@pytest.mark.usefixtures("two_gpus")
def test_fewer_visible_gpus_are_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config([OVERLAY])
    assert about_cards(config) == []
    for visible, n in (("1", 1), ("0,-1,1", 1), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        (line,) = about_cards(config)
        assert f"sees {n} GPU" in line and "training.device=cuda:0 and vllm.device=null" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert about_cards(config) == []
    assert "make 4 visible" in about_cards(load_config([], ["training.device=cuda:3", "vllm.device=cuda:0"]))[0]


@pytest.mark.usefixtures("two_gpus")
def test_an_engine_that_cannot_have_the_gpu_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine(load_config([], TWO)) == "vllm"
    with pytest.raises(ValueError, match=r"first GPU .* set vllm.device=cuda:0 .*, or training.device=cuda:0"):
        choose_engine(load_config([], ["training.device=cuda:1"]))
    monkeypatch.setattr("utils.engines.installed_vllm", lambda: None)
    with pytest.raises(ValueError, match=r"needs the package vllm, .*transformers and vllm.device=null"):
        choose_engine(load_config([], TWO))  # auto would come to the transformers engine
    assert choose_engine(load_config([], ["training.device=cuda:1"])) == "transformers"


def test_beside_torchrun_it_is_refused_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_grpo.main(["--config", str(OVERLAY)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "torchrun" in line]
    assert "vllm.device = 'cuda:0' beside torchrun (WORLD_SIZE = 2)" in line and "vllm.device=null" in line
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not any("torchrun" in line for line in shortfalls(load_config([OVERLAY])))


def test_rented_gpus_are_two() -> None:
    assert not any("elsewhere.gpu" in line for line in misplaced(load_config([OVERLAY])))
    for gpu in ("A100", "A100:1"):
        lines = list(misplaced(load_config([OVERLAY], [f"elsewhere.gpu={gpu}"])))
        assert any("set it to A100:2" in line for line in lines)


def test_each_gpu_is_charged_for_what_is_on_it() -> None:
    """The policy's GPU: as without vLLM. vLLM's: the share of its own, whether the policy trains or not."""
    config, _ = load_config_and_origins([], [*TWO, "vllm.gpu_memory_utilization=0.5"])
    parts = estimate_peak_memory(QWEN_1_5B, config, LONGEST, TRAINERS.total, True, ENGINES.total)
    alone = estimate_peak_memory(QWEN_1_5B, config, LONGEST, TRAINERS.total, uses_vllm=False)
    assert parts["vllm_awake"] == parts["vllm_asleep"] == 12 * 10**9
    assert parts["training_peak"] == alone["training_peak"]
    assert parts["rollout_peak"] == alone["rollout_peak"] - alone["sampling"]
    shared = load_config([], ["vllm.gpu_memory_utilization=0.5", "training.use_vllm_sleep_mode=false"])
    one_card = estimate_peak_memory(QWEN_1_5B, shared, LONGEST, TRAINERS.total)
    assert one_card["training_peak"] - parts["training_peak"] == 0.5 * TRAINERS.total


def test_the_share_is_derived_from_vllms_gpu_and_the_microbatch_from_the_policys() -> None:
    config, origins = load_config_and_origins([], [*TWO, "training.use_gradient_checkpointing=false"])
    fitted, lines = derive(config, origins, QWEN_1_5B, LONGEST, TRAINERS, True, ENGINES)
    # weights, overhead and cache: 3.09 + 1.07 + 256 x 1,424 x 28,672 bytes = 14.61 of 24 GB
    wanted = count_parameters(QWEN_1_5B)["total"] * 2 + VLLM_OVERHEAD + 256 * LONGEST * 28_672
    assert fitted.vllm.gpu_memory_utilization == int(100 * wanted / ENGINES.total) / 100 == 0.6
    assert "of the 24.0 GB" in str(lines[0]) and "on a GPU of its own vLLM can have 20.6 GB" in str(lines[0])
    assert fitted.training.max_tokens_per_microbatch == 8 * LONGEST
    swapped, _ = derive(config, origins, QWEN_1_5B, LONGEST, ENGINES, True, TRAINERS)
    assert swapped.training.max_tokens_per_microbatch < 4 * LONGEST
    assert swapped.vllm.gpu_memory_utilization == int(100 * wanted / TRAINERS.total) / 100


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_is_asked_for_its_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(QWEN_1_5B))
    model = f"paths.model_path={tmp_path}/model"
    config, origins = load_config_and_origins([], [*TWO, model])
    assert machine.this_card("cuda:1") == Card(80000 * 2**20, 79000 * 2**20)
    _, (share, budget) = fit_to_card(config, origins)
    assert "of the 25.2 GB" in share and "of the 82.8 GB" in budget
    train_grpo.main(["--dry-run", *TWO, model])
    shown = capsys.readouterr().out
    assert "fits into the 83.9 GB" in shown and "those peaks are of cuda:1; vLLM keeps its" in shown
    assert "of the 25.2 GB that the GPU has" in shown and "DOES NOT FIT" not in shown
    train_grpo.main(["--dry-run", *TWO, model, "vllm.gpu_memory_utilization=0.99"])
    assert "vLLM's share of its own GPU DOES NOT FIT" in capsys.readouterr().out
    machine._ask_driver.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert machine.gpu_memory("cuda:1") == 24000 * 2**20 and machine.gpu_memory() == 80000 * 2**20
