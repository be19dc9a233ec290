"""Runs with an adapter: killed and resumed, started from one another's checkpoints, merged; and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import arguments, assert_equal_runs, finish, launch, printed_file, rows_of, wait_for, weights_file
from transformers import AutoModelForCausalLM

from configs.defaults import Training
from utils import tiny
from utils.adapter_files import ADAPTER_CONFIG, ORIGIN_FILE, other_adapter
from utils.algorithm.policy import load_policy, save_policy
from utils.log.checkpoints import DamagedCheckpoint, check_checkpoint
from utils.preflight.adapter_checks import adapter_notes
from utils.preflight.config import ConfigError, load_config
from utils.preflight.memory_estimate import estimate_peak_memory
from utils.preflight.model_files import model_config
from utils.preflight.obstacles import obstacles
from utils.run.ending import Status

ROOT = Path(__file__).parents[2]
OPTIONS = ("training.lora_rank=4", "training.learning_rate=3e-3", "training.kl_coef=0.05", "training.n_grpo_steps=4")


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapter") / "run"
    assert finish(arguments(world, output, *OPTIONS)) == Status.FINISHED
    return output


def test_killed_and_resumed_it_ends_bit_identical(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = launch(arguments(world, output, *OPTIONS))
    wait_for(process, lambda: (output / "checkpoints" / "step_000002").is_dir())
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert finish([*arguments(world, output, *OPTIONS), "--resume"]) == Status.FINISHED
    assert_equal_runs(output, undisturbed)


def test_it_says_what_is_trained_and_saves_only_that(world: Path, undisturbed: Path) -> None:
    assert "LoRA of rank 4 on 7 matrices" in printed_file(undisturbed).read_text()
    trained = [row for row in rows_of(undisturbed / "metrics.jsonl") if "grpo_step" in row]
    assert 0 < trained[0]["train/reference_kl"] < trained[-1]["train/reference_kl"]
    assert trained[-1]["train/frac_weights_moved"] > 0.9
    last = undisturbed / "checkpoints" / "last"
    assert weights_file(last).stat().st_size < 0.5 * (world / "model" / "model.safetensors").stat().st_size
    check_checkpoint(last.resolve())


def test_merged_it_is_a_plain_model_of_the_same_numbers(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(ROOT / "play-scripts")
    import merge_lora

    last, merged = undisturbed / "checkpoints" / "last", tmp_path / "merged"
    command = [str(last), "--output", str(merged)]
    merge_lora.merge(merge_lora.build_parser().parse_args(command))
    assert "with the adapter merged in, float32" in capsys.readouterr().out
    for source, target, complaint in [
        (last, merged, "already holds"),
        (merged, tmp_path / "x", "is a whole model already"),
        (tmp_path, tmp_path / "x", "no checkpoint"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            merge_lora.merge(merge_lora.build_parser().parse_args([str(source), "--output", str(target)]))
    policy = load_policy(str(last), Training(device="cpu", dtype="float32", use_gradient_checkpointing=False)).eval()
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    ids = torch.arange(1, 40).view(3, 13)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, policy(ids).logits, rtol=1e-5, atol=1e-5)
    assert not list(merged.glob("adapter*")) and (merged / "tokenizer.json").is_file()
    half = tmp_path / "half"
    merge_lora.merge(merge_lora.build_parser().parse_args([str(last), "--output", str(half), "--dtype", "bfloat16"]))
    for name, weight in AutoModelForCausalLM.from_pretrained(half).state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, plain.state_dict()[name].bfloat16()), name  # of the sum in float32, rounded once


def lines(world: Path, output: Path, *overrides: str) -> str:
    config = load_config([], arguments(world, output, *overrides))
    return "\n".join(obstacles(config, resume=output.exists(), allow_changes=True))


def test_mistakes_are_told_before_anything_is_loaded(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    last, new = undisturbed / "checkpoints" / "last", tmp_path / "new"
    assert "give 64 or less" in lines(world, new, "training.lora_rank=65")
    assert lines(world, new, "training.lora_rank=64") == ""
    from_adapter = f"paths.model_path={last}"
    assert "training.lora_rank is null: set it to 4" in lines(world, new, from_adapter)
    assert "is an adapter with 4; give that" in lines(world, new, from_adapter, "training.lora_rank=2")
    narrower = lines(world, new, from_adapter, "training.lora_rank=4", "training.lora_target=attention")
    assert "is an adapter with 'all-linear'" in narrower
    assert lines(world, new, from_adapter, "training.lora_rank=4") == ""
    assert "training.lora_rank is null" in lines(world, undisturbed)  # as --resume --allow-changes would
    whole = tmp_path / "whole"
    shutil.copytree(world / "model", whole / "checkpoints" / "step_000001")
    assert "trains all weights: set it to null" in lines(world, whole, "training.lora_rank=4")


def test_another_base_is_told_before_anything_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.build_model(seed=0, n_layers=1).save_pretrained(base)
    tiny.build_tokenizer().save_pretrained(adapter)
    t = Training(device="cpu", dtype="float32", lora_rank=4, use_gradient_checkpointing=False)
    save_policy(load_policy(str(base), t), adapter)
    options = (f"paths.model_path={adapter}", "training.lora_rank=4")
    assert lines(world, tmp_path / "new", *options) == ""
    tiny.build_model(seed=1, n_layers=1).save_pretrained(base)
    assert "is an adapter of another base" in lines(world, tmp_path / "new", *options)
    saved = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(saved | {"base_model_name_or_path": f"{tmp_path}/gone/away"}))
    assert "put that model there" in lines(world, tmp_path / "new", *options)
    reference = ("training.kl_coef=0.1", f"training.reference_path={adapter}")
    assert "training.reference_path = " in lines(world, tmp_path / "new", *reference)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(saved | {"base_model_name_or_path": "nobody/nothing-7b"}))
    assert "'nobody/nothing-7b': it is not on this machine" in lines(world, tmp_path / "new", *options)
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(saved | {"use_dora": True}))
    assert "use_dora = True" in lines(world, tmp_path / "new", *options)


def test_a_reference_that_does_not_load_leaves_no_folder(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    options = ("training.kl_coef=0.1", f"training.reference_path={tmp_path}/broken")
    assert finish(arguments(world, tmp_path / "run", *options)) == Status.USER_MISTAKE
    assert not (tmp_path / "run").exists()


def test_a_base_in_four_bits_stays_so_for_sft_and_as_a_reference(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "play-scripts")
    import train_sft

    t = Training(device="cpu", dtype="float32", lora_rank=4, use_gradient_checkpointing=False)
    save_policy(load_policy(str(world / "model"), t), tmp_path)
    kept = load_config([], ["training.lora_rank=4", "training.kl_coef=0.1", f"paths.model_path={tmp_path}"])
    needed = [estimate_peak_memory(model_config(str(tmp_path)), kept, 64)["reference"]]
    saved = json.loads((tmp_path / ORIGIN_FILE).read_text())
    (tmp_path / ORIGIN_FILE).write_text(json.dumps(saved | {"load_in_4bit": True}))
    needed.append(estimate_peak_memory(model_config(str(tmp_path)), kept, 64)["reference"])
    assert 0 < needed[1] < needed[0]
    command = ["--model", str(tmp_path), "--data", "x", "--output", "x", "--steps", "1", "--lora-rank", "4"]
    assert train_sft.training_of(train_sft.build_parser().parse_args(command)).load_in_4bit
    said = train_sft.as_options(other_adapter(str(tmp_path), replace(t, lora_rank=None)))
    assert "and --lora-rank is null: set it to 4" in said and "training." not in said
    for device, words in (("cuda:0", "no NVIDIA GPU"), ("tpu", "must be cpu")):
        monkeypatch.setattr(train_sft, "has_gpu", lambda: False)
        with pytest.raises(ValueError, match=words):
            train_sft.check_device(device)


def test_a_checkpoint_without_a_part_of_its_adapter_is_damaged(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_000001"
    folder.mkdir()
    for path in (undisturbed / "checkpoints" / "last").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / ORIGIN_FILE).unlink()
    with pytest.raises(DamagedCheckpoint, match=ORIGIN_FILE):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lora_dropout=0.1", ("lora_dropout", "ratio", "leave it out")),
        ("training.load_in_4bit=true", ("load_in_4bit", "set lora_rank")),
        ("training.lora_target=mlp", ("lora_target", "all-linear, attention")),
    ],
)
def test_fields_that_cannot_be_are_refused(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config([], [override])
    assert all(word in str(refused.value) for word in words)


def test_four_bits_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"load_in_4bit .*need a GPU"):
        load_config([], ["training.load_in_4bit=true", "training.lora_rank=4", "training.device=cpu"])


def test_a_rate_for_full_weights_is_noted() -> None:
    noted = [list(adapter_notes(load_config([], o))) for o in (["training.lora_rank=8", "training.learning_rate=9e-6"],
             ["training.lora_rank=8"], ["training.learning_rate=9e-6"])]  # fmt: skip
    assert "10 x full fine-tuning's" in noted[0][0] and noted[1:] == [[], []]


def test_masters_of_an_adapter_are_noted_as_none() -> None:
    config = load_config([], ["training.lora_rank=8", "training.optimizer=adamw8bit_master"])
    assert "so it is adamw8bit" in "".join(adapter_notes(config))
