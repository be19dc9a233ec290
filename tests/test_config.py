"""Config files, overrides, and the errors that people see."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.defaults import Config, Training, Vllm, default_of
from utils.config import ConfigError, describe_fields, fields, load_config, save_config, to_yaml_value
from utils.preflight import describe_run

ROOT = Path(__file__).parents[1]

# The names and defaults that people's YAML files rely on.
FIXED = {
    "seed": 1337, "device": "cuda:0", "dtype": "bfloat16", "use_compile": False, "learning_rate": 1e-5,
    "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "temperature": 1.0, "top_p": 1.0,
    "min_tokens": 4, "max_tokens": 1024, "stop": ["</answer>"], "include_stop_str_in_output": True, "n_grpo_steps": 10,
    "advantage_eps": 1e-6, "wandb_project": "", "wandb_run_name": "", "wandb_tags": [], "rollout_batch_size": 256,
    "group_size": 8, "epochs_per_rollout_batch": 1, "train_batch_size": 256, "gradient_accumulation_steps": 256,
    "loss_type": "grpo_clip", "use_std_normalization": True, "cliprange": 0.2, "max_grad_norm": 1.0,
    "old_log_probs_train_size": 2, "normalize_mode": "mean", "normalize_constant": 1024.0, "eval_interval": 4,
    "max_val_examples": 1024, "checkpoint_interval": 4, "n_rollouts_to_log": 16, "track_peak_memory": True,
    "use_gradient_checkpointing": True, "use_vllm_sleep_mode": True, "use_bnb_adamw8bit": True,
    "attention_type": "sdpa",
}  # fmt: skip


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_are_the_published_ones() -> None:
    defaults = dataclasses.asdict(Training())
    assert {name: defaults[name] for name in FIXED} == FIXED
    vllm = dataclasses.asdict(Vllm())
    assert (vllm["gpu_memory_utilization"], vllm["dtype"], vllm["enable_prefix_caching"]) == (0.2, "bfloat16", True)


def test_every_field_has_a_doc_and_a_default_that_its_own_rules_allow() -> None:
    load_config()
    assert all(field.metadata["doc"] for field in fields().values())
    for name, field in fields().items():
        assert f"{name} = {to_yaml_value(default_of(field))}" in describe_fields()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_in_the_repository_loads(path: Path) -> None:
    config = load_config([path])
    assert "optimizer steps" in describe_run(config)


def test_merge_order_base_then_file_then_later_file_then_override(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "training: {seed: 1, group_size: 2, n_grpo_steps: 1, max_tokens: 5}")
    first = write(tmp_path, "first.yaml", "base: base.yaml\ntraining: {group_size: 4, n_grpo_steps: 2, max_tokens: 6}")
    second = write(tmp_path, "second.yaml", "training: {n_grpo_steps: 3, max_tokens: 7}")
    t = load_config([first, second], ["training.max_tokens=8"]).training
    assert (t.seed, t.group_size, t.n_grpo_steps, t.max_tokens) == (1, 4, 3, 8)


def test_base_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "base.yaml", "training: {seed: 5}")
    path = write(tmp_path / "deep", "run.yaml", "base: ../base.yaml\n")
    assert load_config([path]).training.seed == 5


def test_a_list_replaces_the_list_before_it() -> None:
    assert load_config([], ["training.stop=[]"]).training.stop == []


def test_numbers_as_people_write_them() -> None:
    t = load_config(
        [], ["training.learning_rate=3e-5", "training.eval_interval=null", "training.cliprange=.2"]
    ).training
    assert (t.learning_rate, t.eval_interval, t.cliprange) == (3e-5, None, 0.2)


@given(st.floats(1e-12, 1.0), st.integers(0, 2**31), st.lists(st.text(min_size=1, max_size=5), max_size=3))
@example(1e-5, 0, ["0E0", "1e5", ".5", "-.inf", "0x1F", "1_000", "12:30", "yes", "null", "~", "2001-01-01", "e5"])
def test_a_saved_config_loads_the_same(tmp_path_factory, rate: float, seed: int, stop: list[str]) -> None:
    config = Config(training=Training(learning_rate=rate, seed=seed, stop=stop))
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    assert load_config([path]) == config


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("training:\n  grop_size: 4\n", r"bad\.yaml:2: unknown key 'training.grop_size'; .* 'training.group_size'"),
        ("trainig:\n  seed: 4\n", r"bad\.yaml:1: unknown key 'trainig'; did you mean 'training\."),
        ("group_size: 4\n", r"bad\.yaml:1: unknown key 'group_size'; did you mean 'training.group_size'"),
        ("training:\n  seed: 1\n  group_size: two\n", r"bad\.yaml:3: training.group_size = 'two' .* takes int"),
        ("training:\n  group_size: 2.5\n", r"bad\.yaml:2: training.group_size = 2.5 has the wrong type"),
        ("training:\n  learning_rate: -1\n", r"training.learning_rate = -1.0 \(.*bad\.yaml:2\): must be more than 0"),
        ("training:\n  learning_rate: .nan\n", r"learning_rate = nan .* must be more than 0"),
        ("training:\n  learning_rate: .inf\n", r"learning_rate = inf .* must be finite"),
        ("training:\n  loss_type: ppo\n", r"'ppo' \(.*:2\): choose one of: no_baseline, .*grpo_no_clip"),
        ("training:\n  group_size: 7\n", r"256 \(default\) and training.group_size = 7 .* do not divide into groups"),
        ("training:\n  train_batch_size: 100\n", r"train_batch_size = 100 .* do not divide into train batches"),
        ("training:\n  gradient_accumulation_steps: 100\n", r"does not divide into microbatches"),
        ("training:\n  min_tokens: 2000\n", r"min_tokens = 2000 .*max_tokens = 1024 .* lower min_tokens"),
        ("training:\n  group_size: 1\n", r"every advantage is 0"),
        ("training:\n  device: gpu\n", r"device = 'gpu' .* must be cpu, cuda, or cuda:N"),
        ("training:\n  autocast_dtype: bfloat16\n", r"autocast is for float32 weights"),
        ("training:\n  system_prompt: Hi\n", r"only read with a chat template"),
        ("training: [1\n", r"bad\.yaml: not valid YAML"),
        ("- 1\n", r"bad\.yaml: holds no sections"),
        ("training: 3\n", r"bad\.yaml:1: training is a section"),
        ("base: nowhere.yaml\n", r"nowhere\.yaml: no such config file .* named as base by bad\.yaml"),
        ("base: bad.yaml\n", r"its base leads back to itself"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config([write(tmp_path, "bad.yaml", text)])
    if "no sections" not in complaint:
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.seed", "'training.seed' is no override; write section.field=value"),
        ("training.sede=1", "command line: unknown key 'training.sede'; did you mean 'training.seed'"),
        ("training.use_compile=maybe", r"command line: .* takes bool"),
        ("training.learning_rate=null", r"learning_rate = None has the wrong type"),
        ("training.stop=[a", r"is not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config([], [override])


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train_grpo.py"), *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_the_command_tells_mistakes_in_one_line_with_status_2(tmp_path: Path) -> None:
    for arguments, complaint in [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["training.sede=1"], "unknown key 'training.sede'"),
        (["--config", "configs/quickstart.yaml", f"paths.train_data_file={tmp_path}/no.jsonl"], "no such file"),
    ]:
        done = command(*arguments)
        assert done.returncode == 2
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")


def test_dry_run_says_what_follows_without_torch_or_files(tmp_path: Path) -> None:
    probe = (
        "import sys, train_grpo; status = train_grpo.main(['--dry-run', 'training.train_batch_size=128', "
        "'training.gradient_accumulation_steps=32', 'training.rollout_engine=vllm']); "
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in [
        "prompts a GRPO step: 32 (groups of 8)",
        "microbatch: 4 rollouts",
        "optimizer steps a GRPO step: 2 (off-policy)",
        "reads  data/math/train.jsonl",
        "writes runs/grpo/metrics.jsonl",
        "paths.train_data_file = 'data/math/train.jsonl': no such file; make it: python data/prepare_math.py",
    ]:
        assert line in done.stdout
    assert not list(tmp_path.iterdir())


def test_help_lists_every_field() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in fields())


def test_nan_breaks_every_bound() -> None:
    floats = [name for name, field in fields().items() if isinstance(default_of(field), float)]
    assert len(floats) > 10
    for name in floats:
        with pytest.raises(ConfigError, match="nan"):
            load_config([], [f"{name}={math.nan:}".replace("nan", ".nan")])
