"""Config files, overrides, and the errors that people see."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.defaults import Training, Vllm, default_of
from utils.ablations.published import ABLATIONS
from utils.preflight.config import (
    ConfigError,
    load_config,
    to_dict,
)
from utils.preflight.config_rules import CLOSING_TEXTS, fields
from utils.preflight.dry_run import describe_run
from utils.preflight.field_docs import describe_fields
from utils.preflight.machine import ASSUMED_PROMPT
from utils.preflight.resume_rules import MAY_CHANGE
from utils.preflight.yaml_values import to_yaml_value
from utils.records import Problem, Prompt
from utils.rewards.functions import REWARD_FNS

ROOT = Path(__file__).parents[2]

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


HARDWARE = sorted(ROOT.glob("configs/hardware/*.yaml"))
ON_CARDS = [name for name in ABLATIONS if name.split("/")[0] not in ("tiny", "smollm2")]  # on the CPU
PUBLISHED = sorted(path for name in ON_CARDS for path in ROOT.glob(f"configs/{name}/*.yaml"))
# An overlay may set what a resumed run may change, but not the cut that is part of the loss under normalize_mode
# microbatch. It may also choose the optimizer's precision, which a resumed run must keep for its saved state, and what
# training does not read.
SET_BY_HARDWARE = MAY_CHANGE - {"training.gradient_accumulation_steps"} | {"training.use_bnb_adamw8bit"}
SET_BY_HARDWARE |= {key for key in fields() if key.startswith("elsewhere.")}


@pytest.mark.parametrize("overlay", HARDWARE, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_hardware_overlay_changes_no_published_ablation(path: Path, overlay: Path) -> None:
    plain, config = load_config([path]), load_config([path, overlay])
    assert config == load_config([overlay, path])
    before, after = to_dict(plain), to_dict(config)
    changed = {
        key for key in fields() for section, name in [key.split(".")] if before[section][name] != after[section][name]
    }
    assert changed <= SET_BY_HARDWARE, changed - SET_BY_HARDWARE
    longest = ASSUMED_PROMPT + config.training.max_tokens
    assert 2 <= config.training.max_tokens_per_microbatch // longest <= config.training.train_batch_size


def test_the_published_ablations_are_there() -> None:
    assert {path.stem for path in HARDWARE} == {"h100", "rtx4090", "two_gpus"}
    assert len(PUBLISHED) > 30


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


def test_of_several_bases_the_later_wins_and_each_may_have_its_own(tmp_path: Path) -> None:
    write(tmp_path, "ground.yaml", "training: {seed: 1, group_size: 2, max_tokens: 5}")
    write(tmp_path, "first.yaml", "base: ground.yaml\ntraining: {group_size: 4, max_tokens: 6}")
    write(tmp_path, "second.yaml", "training: {max_tokens: 7, min_tokens: 1}")
    path = write(tmp_path, "run.yaml", "base: [first.yaml, second.yaml]\ntraining: {min_tokens: 2}")
    t = load_config([path]).training
    assert (t.seed, t.group_size, t.max_tokens, t.min_tokens) == (1, 4, 7, 2)


def test_a_list_replaces_the_list_before_it() -> None:
    assert load_config([], ["training.stop=[]"]).training.stop == []


def test_numbers_as_people_write_them() -> None:
    t = load_config(
        [], ["training.learning_rate=3e-5", "training.eval_interval=null", "training.cliprange=.2"]
    ).training
    assert (t.learning_rate, t.eval_interval, t.cliprange) == (3e-5, None, 0.2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("training:\n  grop_size: 4\n", r"bad\.yaml:2: unknown key 'training.grop_size'; .* 'training.group_size'"),
        ("trainig:\n  seed: 4\n", r"bad\.yaml:1: unknown key 'trainig'; did you mean 'training\."),
        ("group_size: 4\n", r"bad\.yaml:1: unknown key 'group_size'; did you mean 'training.group_size'"),
        ("training:\n  seed: 1\n  group_size: two\n", r"bad\.yaml:3: training.group_size = two .* takes int"),
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
        (
            "training:\n  trackers: [wandb, tensorbord]\n",
            r"trackers = .*bad\.yaml:2\): choose .* wandb, trackio, tensorboard",
        ),
        ("training:\n  trackers: [wandb, wandb]\n", r"trackers = .* each tracker once"),
        ("training:\n  wandb_project: me/p\n", r"wandb_project = 'me/p' .* none of /"),
        ("training:\n  device: gpu\n", r"device = 'gpu' .* must be cpu, cuda, or cuda:N"),
        ("training:\n  autocast_dtype: bfloat16\n", r"autocast is for float32 weights"),
        ("training:\n  system_prompt: Hi\n", r"only read with a chat template"),
        ("training:\n  reward_fn: r2_zero\n", r"reward_fn = 'r2_zero' \(.*bad\.yaml:2\): .* did you mean 'r1_zero'\?"),
        ("training:\n  extra_rewards: {gsm: 1}\n", r"extra_rewards = .*bad\.yaml:2\): .* did you mean 'gsm8k'\?"),
        (
            "training:\n  include_stop_str_in_output: false\n",
            r"include_stop_str_in_output = False \(.*:2\) and training.stop = .*</answer>.* r1_zero .*set",
        ),
        (
            "training:\n  reward_fn: question_only\n  stop: ['}.']\n  include_stop_str_in_output: false\n",
            r"'}\.' would be cut off, .*question_only looks for '}'",
        ),
        ("paths:\n  output_dir: ''\n", r"output_dir = '' \(.*:2\): give the folder"),
        ("paths:\n  model_path: ~/qwen\n", r"model_path = '~/qwen' \(.*:2\): .*write the whole path"),
        ("training: [1\n", r"bad\.yaml:2: not valid YAML"),
        ("training:\n  seed: 1\n  seed: 2\n", r"bad\.yaml:3: not valid YAML: duplicate key seed"),
        ("training:\n\tseed: 1\n", r"bad\.yaml:2: not valid YAML"),
        ("training:\n  1: 2\n", r"bad\.yaml:2: unknown key 'training.1'"),
        ("<<: {training: {seed: 1}}\n", r"bad\.yaml:1: unknown key '<<'"),
        ("training:\n  seed: ${x}\n", r"bad\.yaml:2: training.seed = \$\{x\} has the wrong type; it takes int"),
        ("- 1\n", r"bad\.yaml:1: holds no sections"),
        ("3\n", r"bad\.yaml:1: holds no sections"),
        ("# a note\nseed 3\nand more\n", r"bad\.yaml:2: holds no sections"),
        ("base: {a: b}\n", r"bad\.yaml:1: base = \{a: b\}: give the path of a YAML file, or a list"),
        ("base: [[a]]\n", r"bad\.yaml:1: base = \[\[a\]\]: give the path of a YAML file, or a list"),
        ("base: [nowhere.yaml]\n", r"nowhere\.yaml: no such config file .* named as base by bad\.yaml"),
        ("training: 3\n", r"bad\.yaml:1: training is a section"),
        ("base: nowhere.yaml\n", r"nowhere\.yaml: no such config file .* named as base by bad\.yaml"),
        ("base: bad.yaml\n", r"its base leads back to itself"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config([write(tmp_path, "bad.yaml", text)])
    assert "\n" not in str(caught.value)


def test_a_reward_that_needs_its_closing_text_scores_nothing_without_it() -> None:
    responses = {
        "r1_zero": "so </think> <answer>5</answer>",
        "question_only": "so \\boxed{5}",
        "gsm8k": "<answer>5</answer>",
    }
    grader = SimpleNamespace(grade=lambda pairs: [True] * len(pairs))
    prompt = Prompt(Problem("q", "5"), "q", (1,))

    def score(reward: str, response: str) -> float:
        rollout = SimpleNamespace(response=response, prompt=prompt)
        return REWARD_FNS[reward]([rollout], grader)[0].total

    for reward, closing in CLOSING_TEXTS.items():
        whole = responses[reward]
        assert score(reward, whole) == 1.0
        assert score(reward, whole.partition(closing)[0]) == 0.0


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.stop=[]"],
        ["training.stop=['User:']"],
        ["training.reward_fn=question_only"],
        ["training.reward_fn=question_only", "training.extra_rewards={end_token_penalty: 1}"],
    ],
)
def test_a_stop_string_that_no_reward_needs_may_be_cut_off(overrides: list[str]) -> None:
    load_config([], ["training.include_stop_str_in_output=false", *overrides])


def test_a_file_of_another_kind_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: not UTF-8 text"):
        load_config([tmp_path / "bytes.yaml"])
    with pytest.raises(ConfigError, match=r"no such config file \(Is a directory\)$"):
        load_config([tmp_path])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.seed", "'training.seed' is no override; write section.field=value"),
        ("training.sede=1", "command line: unknown key 'training.sede'; did you mean 'training.seed'"),
        ("training.lr=1", "did you mean 'training.learning_rate'"),
        ("training.model=x", "did you mean 'paths.model_path'"),
        ("vllm.group_size=4", "did you mean 'training.group_size'"),
        ("vllm.dtyp=float16", "did you mean 'vllm.dtype'"),  # training.dtype is as like but for the section
        ("training.zzz=0.1", "unknown key 'training.zzz'; --help-config lists the fields$"),
        ("training.eval_interval=0", r"eval_interval = 0 \(command line\): must be at least 1; null is never$"),
        ("training.max_hours=0", r"max_hours = 0.0 \(command line\): must be more than 0.0; null is no limit$"),
        ("training.group_size=0", r"group_size = 0 \(command line\): must be at least 1$"),
        ("training.stop=foo", r"takes list\[str\], for example training.stop='\[foo\]'$"),
        ("training.extra_rewards=gsm8k", r"takes dict\[str, float\], for example .*='\{gsm8k: 0.5\}'$"),
        ("training.extra_rewards={foo:1}", r"space after the colon, for example .*extra_rewards='\{foo: 1\}'$"),
        ("training.reward_fn=zzz", "no reward function 'zzz'; there are: r1_zero, "),
        ("training.use_compile=maybe", r"command line: .* takes bool"),
        ("training.learning_rate=null", r"learning_rate = null has the wrong type"),
        ("training.stop=[a", r"is not valid YAML"),
        ("configs/math.yaml", r"'configs/math.yaml' is no override; write --config configs/math.yaml"),
        ("training.reward_fn=gsm", r"'gsm' \(command line\): .* did you mean 'gsm8k'\? There are: r1_zero, "),
    ],
)
def test_mistakes_on_the_command_line(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config([], [override])


def test_nan_breaks_every_bound() -> None:
    floats = [name for name, field in fields().items() if isinstance(default_of(field), float)]
    assert len(floats) > 10
    for name in floats:
        with pytest.raises(ConfigError, match="nan"):
            load_config([], [f"{name}={math.nan:}".replace("nan", ".nan")])
