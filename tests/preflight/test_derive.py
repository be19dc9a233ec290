"""What is derived from made-up cards, and what stays as it was set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_count import QWEN_1_5B

import train_grpo
from configs.defaults import Config
from utils.preflight import machine
from utils.preflight.config import load_config, load_config_and_origins, save_config
from utils.preflight.derive import BUDGET, CUTS, UTILIZATION, Card, derive
from utils.preflight.fit import fit_to_card
from utils.preflight.memory_estimate import estimate_peak_memory, kv_cache_tokens

ROOT = Path(__file__).parents[2]
LONGEST = 1424
SMALL, LARGE = Card(24564 * 2**20, 24000 * 2**20), Card(81559 * 2**20, 81000 * 2**20)  # 24 GB and 80 GB


def derived(card: Card, *overrides: str, files: tuple[Path, ...] = (), uses_vllm: bool = True) -> Config:
    config, origins = load_config_and_origins(files, overrides)
    return derive(config, origins, QWEN_1_5B, LONGEST, card, uses_vllm)[0]


@pytest.mark.parametrize("card", [SMALL, LARGE], ids=["24GB", "80GB"])
@pytest.mark.parametrize("overlay", [None, "rtx4090", "h100"])
@pytest.mark.parametrize("sleep", [True, False])
def test_what_is_derived_fits_and_fills(card: Card, overlay: str | None, sleep: bool) -> None:
    if card is SMALL and overlay == "h100":
        pytest.skip("the overlay's own microbatches are for another card")
    files = (ROOT / f"configs/hardware/{overlay}.yaml",) if overlay else ()
    config = derived(card, f"training.use_vllm_sleep_mode={sleep}", files=files)
    parts = estimate_peak_memory(QWEN_1_5B, config, LONGEST, card.total)
    assert max(parts["rollout_peak"] + parts["log_probs"], parts["training_peak"]) < 0.95 * card.total
    held = kv_cache_tokens(QWEN_1_5B, config, card.total)
    assert held > 256 * (600 if sleep else 300)  # the published mean response is 400 tokens
    if card is LARGE:
        assert held > 250 * LONGEST  # all sequences at their longest; rounding takes a few


def test_without_an_overlay_microbatches_are_cut_by_tokens() -> None:
    for card in (SMALL, LARGE):
        assert derived(card).training.max_tokens_per_microbatch == 8 * LONGEST
    kept = derived(SMALL, "training.use_gradient_checkpointing=false").training.max_tokens_per_microbatch
    assert LONGEST <= kept < 4 * LONGEST
    tiny = Card(8 * 10**9, 8 * 10**9)
    assert derived(tiny).training.max_tokens_per_microbatch == LONGEST  # it will not fit, and the dry run says so


@pytest.mark.parametrize("setting", ["vllm.gpu_memory_utilization=0.2", "training.gradient_accumulation_steps=256"])
def test_what_is_set_stays_even_at_the_default(setting: str) -> None:
    config = derived(SMALL, setting)
    if "gpu_memory" in setting:
        assert config.vllm.gpu_memory_utilization == 0.2 and config.training.max_tokens_per_microbatch is not None
    else:
        assert config.training.max_tokens_per_microbatch is None and config.vllm.gpu_memory_utilization > 0.4
    assert derived(SMALL, "training.max_tokens_per_microbatch=null").training.max_tokens_per_microbatch is None


def test_null_asks_for_it_and_every_line_tells_why() -> None:
    config, origins = load_config_and_origins([], ["vllm.gpu_memory_utilization=null"])
    fitted, lines = derive(config, origins, QWEN_1_5B, LONGEST, SMALL, uses_vllm=True)
    assert config.vllm.gpu_memory_utilization is None and fitted.vllm.gpu_memory_utilization > 0.4
    assert [line.field for line in lines] == [UTILIZATION, BUDGET]
    assert "25.8 GB" in str(lines[0]) and "tokens" in str(lines[0]) and "8 of the longest" in str(lines[1])
    without_sizes, lines = derive(config, origins, None, LONGEST, SMALL, uses_vllm=True)
    assert without_sizes.vllm.gpu_memory_utilization == 0.2 and lines == []


def test_on_the_cpu_the_defaults_stay() -> None:
    config = derived(SMALL, "training.device=cpu")
    assert config == load_config([], ["training.device=cpu"])


def test_the_count_that_normalize_mode_microbatch_divides_by_stays() -> None:
    config = derived(SMALL, files=(ROOT / "configs/length_normalization/microbatch.yaml",))
    assert (config.training.microbatch_size, config.training.max_tokens_per_microbatch) == (4, None)
    overlay = ROOT / "configs/hardware/rtx4090.yaml"
    config = derived(SMALL, files=(ROOT / "configs/length_normalization/microbatch.yaml", overlay))
    assert (config.training.microbatch_size, config.training.max_tokens_per_microbatch) == (4, 8192)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("off_policy_sweep/*64*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_that_counts_its_microbatches_keeps_them(path: Path) -> None:
    assert derived(SMALL, files=(path,)).training.max_tokens_per_microbatch is None
    assert set(CUTS) & set(load_config_and_origins([path])[1])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model's config.json, data, and a card of 24 GB."""
    monkeypatch.setattr(machine, "_ask_driver", lambda _index: (SMALL.total, SMALL.free))
    monkeypatch.setattr("utils.engines.installed_vllm", lambda: "vllm")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(QWEN_1_5B))
    (tmp_path / "data.jsonl").write_text(json.dumps({"problem": "x" * 391, "answer": "1"}) + "\n")
    (tmp_path / "prompt").write_text("question:{question}")
    data = [f"paths.{name}={tmp_path}/data.jsonl" for name in ("train_data_file", "val_data_file")]
    return [*data, f"paths.prompt_template_file={tmp_path}/prompt", f"paths.model_path={tmp_path}/model",
            f"paths.output_dir={tmp_path}/run"]  # fmt: skip


def test_the_dry_run_shows_it_with_its_reason(world: list[str], capsys: pytest.CaptureFixture) -> None:
    train_grpo.main(["--dry-run", *world])
    shown = capsys.readouterr().out
    section = shown.split("derived from the card")[1].split("\n# ")[0]
    assert f"{UTILIZATION} = 0." in section and f"{BUDGET} = 11392: 8 of the longest sequences (1,424" in section
    assert "KV cache: about" in shown and "computes some of them twice" not in shown
    train_grpo.main(["--dry-run", *world, "vllm.gpu_memory_utilization=0.2"])
    shown = capsys.readouterr().out
    assert "computes some of them twice" in shown and f"{UTILIZATION} = " not in shown


def test_a_resumed_run_keeps_what_was_derived_if_it_still_fits(
    world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, origins = load_config_and_origins([], world)
    fitted, _ = fit_to_card(config, origins)
    (tmp_path / "run").mkdir()
    save_config(fitted, tmp_path / "run/config.yaml")
    assert load_config([tmp_path / "run/config.yaml"]) == fitted
    monkeypatch.setattr(machine, "_ask_driver", lambda _index: (SMALL.total, SMALL.free - 10**9))
    assert fit_to_card(config, origins)[0] != fitted
    again, lines = fit_to_card(config, origins, resume=True)
    assert again == fitted and all("as the run began" in line for line in lines)
    changed, set_now = load_config_and_origins([], [*world, "training.gradient_accumulation_steps=64"])
    assert fit_to_card(changed, set_now, resume=True)[0].training.max_tokens_per_microbatch is None
    monkeypatch.setattr(machine, "_ask_driver", lambda _index: (14 * 10**9, 14 * 10**9))
    smaller, _ = fit_to_card(config, origins, resume=True)
    assert smaller.training.max_tokens_per_microbatch < fitted.training.max_tokens_per_microbatch


def test_the_card_that_is_asked_is_the_first_visible_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"  # 1,024 MiB where no card is named, 81,559 where card 2 is
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=2) echo 81559, 80000 ;; *) echo 1024, 512 ;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for visible, total in (("2,0", 81559), ("", 1024)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        machine._ask_driver.cache_clear()
        assert machine.gpu_memory() == total * 2**20
    machine._ask_driver.cache_clear()
