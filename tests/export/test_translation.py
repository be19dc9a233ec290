"""A config written for TRL or verl: nothing in silence, the right numbers, and what their own config classes say."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import yaml

from configs.defaults import Config
from utils.export.translation import Translation, nested
from utils.export.trl import to_trl, trl_text
from utils.export.verl import to_verl, verl_text
from utils.preflight.config import load_config
from utils.preflight.config_rules import fields

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted(CONFIGS.glob("recipes/*.yaml"))
OTHERS = [
    CONFIGS / f"{name}.yaml"
    for name in ("quickstart", "gsm8k/gemma3_270m", "off_policy_sweep/e2_tb128_ga32", "lora/qwen2.5_7b_4bit",
                 "length_normalization/microbatch", "tiny/off_policy_recipes/scalerl", "lr_sweep/1e-5")
]  # fmt: skip
TARGETS = {"TRL": to_trl, "verl": to_verl}
ODD = [  # what the files above leave alone
    "sampler_correction=tis mask_truncated=true stop=[]",
    "sampler_correction=icepop kl_coef=0.1 kl_estimator=k1 reference_path=other reference_dtype=float32",
    "sampler_correction=mis loss_type=gspo dual_clip=3 kl_coef=0.1",
    "sampler_correction=geo rollout_engine=transformers negative_mask=0.1 retire_pass_rate=0.9",
    "loss_type=no_baseline use_std_normalization=false max_hours=2 wandb_tags=[a] eval_interval=null",
    "loss_type=reinforce_with_baseline advantage=rloo use_std_normalization=false weight_decay=0.1",
    "optimizer=adamw8bit_master warmup_steps=4",
    "loss_type=grpo_no_clip std_scope=batch lr_schedule=linear checkpoint_interval=null max_prompt_tokens=300",
    "loss_type=dppo normalize_mode=prompt lr_schedule=cosine dtype=float32 autocast_dtype=float16",
    "loss_type=sapo normalize_mode=token device=cpu use_chat_template=true system_prompt=Hello overlong_buffer=100",
    "loss_type=cispo normalize_mode=token advantage_eps=1e-4",
    "normalize_mode=constant normalize_constant=512.5 mask_truncated=true max_tokens_per_microbatch=4096",
    "device=cuda:1 vllm.device=cuda:0 vllm.dtype=float16 guard.action=stop refill_groups=true trackers=[wandb]",
    "lora_rank=8 lora_target=attention load_in_4bit=true head_dtype=float32 use_compile=true",
]  # fmt: skip


def config_of(text: str = "", *files: Path) -> Config:
    words = [word if "." in word.split("=")[0] else f"training.{word}" for word in text.split()]
    return load_config(files, words)


def recipe(path: Path) -> Config:
    return load_config([CONFIGS / "math.yaml", path] if path.parent.name == "recipes" else [path])


ALL = [*((path.stem, recipe(path)) for path in [*RECIPES, *OTHERS]), *((text, config_of(text)) for text in ODD)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("config", [config for _, config in ALL], ids=[name for name, _ in ALL])
def test_every_field_is_in_exactly_one_list(target: str, config: Config) -> None:
    to = TARGETS[target](config)
    parts = [set(to.translated), set(to.not_needed), set(to.missing)]
    assert sum(map(len, parts)) == len(fields()) and set.union(*parts) == set(fields())
    assert set(to.differences) <= parts[0]
    assert all([*to.not_needed.values(), *to.missing.values()])
    given = to.values | to.beside
    assert all(name in given for names in to.translated.values() for name in names.split(", "))


@pytest.mark.parametrize(
    ("text", "expected", "missing"),
    [
        (  # 2 epochs of 256 rollouts in minibatches of 64: 8 optimizer steps per GRPO step
            "epochs_per_rollout_batch=2 train_batch_size=64 gradient_accumulation_steps=16 warmup_steps=3",
            {"max_steps": 80, "generation_batch_size": 256, "num_iterations": 2, "per_device_train_batch_size": 4,
             "gradient_accumulation_steps": 16, "num_generations": 8, "warmup_steps": 24, "eval_steps": 32,
             "save_steps": 32},
            [],
        ),
        ("cliprange_high=0.28", {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28}, []),
        ("normalize_mode=token std_scope=batch", {"loss_type": "dapo", "scale_rewards": "batch"}, []),
        ("normalize_mode=constant", {"loss_type": "dr_grpo", "max_completion_length": 1024}, []),
        ("normalize_mode=constant max_tokens=512", {"max_completion_length": 512}, ["normalize_constant"]),
        ("loss_type=gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, []),
        ("loss_type=cispo normalize_mode=token", {"loss_type": "cispo", "epsilon_high": 5.0}, []),
        ("loss_type=cispo", {"loss_type": "cispo"}, ["normalize_mode"]),
        ("loss_type=sapo", {"loss_type": "sapo", "sapo_temperature_neg": 1.05}, []),
        ("loss_type=grpo_no_clip", {"epsilon": 1e9, "epsilon_high": 1e9}, []),
        ("loss_type=reinforce_with_baseline train_batch_size=128 gradient_accumulation_steps=128", {}, ["loss_type"]),
        ("loss_type=dppo", {}, ["loss_type", "dppo_delta"]),
        ("dual_clip=3", {"delta": 3.0}, []),
        ("dual_clip=1.1", {}, ["dual_clip"]),  # below 1 + 0.2
        ("use_std_normalization=false advantage=rloo", {"scale_rewards": "none"}, ["advantage"]),
        ("sampler_correction=tis", {"vllm_importance_sampling_mode": "token_truncate",
                                    "vllm_importance_sampling_clip_max": 2.0}, []),
        ("sampler_correction=icepop", {"vllm_importance_sampling_mode": "token_mask",
                                       "vllm_importance_sampling_clip_min": 0.5}, []),
        ("sampler_correction=mis", {"vllm_importance_sampling_mode": "sequence_mask"}, []),
        ("sampler_correction=geo", {"vllm_importance_sampling_correction": False}, ["sampler_correction"]),
        ("kl_coef=0.04", {"beta": 0.04, "use_bias_correction_kl": True}, []),
        ("mask_truncated=true stop=[]", {"mask_truncated_completions": True}, []),
        ("mask_truncated=true", {}, ["mask_truncated"]),  # a stop string's end would count as truncated
        ("dtype=float32 autocast_dtype=bfloat16", {"bf16": True, "model_init_kwargs.dtype": "float32"}, []),
        ("device=cuda:1 vllm.device=cuda:0", {"vllm_mode": "server"}, []),
        ("optimizer=adamw temperature=0.7", {"optim": "adamw_torch_fused", "temperature": 0.7}, []),
    ],
)  # fmt: skip
def test_trl_by_hand(text: str, expected: dict[str, object], missing: list[str]) -> None:
    to = to_trl(config_of(text))
    assert {name: to.values.get(name) for name in expected} == expected
    assert all(f"training.{name}" in to.missing for name in missing)
    loss_fields = {"loss_type", "normalize_mode", "normalize_constant", "advantage", "dual_clip", "mask_truncated",
                   "sampler_correction", "dppo_delta"}  # fmt: skip
    assert {name for name in loss_fields if f"training.{name}" in to.missing} == set(missing)


def test_trl_options_are_those_whose_gradients_were_measured_as_ours() -> None:
    """`results/algorithm`: the gradients of these cases differ from TRL's by 1e-8 of their size at most."""
    script = runpy.run_path(str(ROOT / "play-scripts/bench/losses_trl.py"))
    n_told = 0
    for case in script["CASES"]:
        if case.trl.get("loss_type") == "bnpo" or "use_bias_correction_kl" in case.trl:
            continue  # the same as dapo where there is one microbatch; and what TRL would do otherwise
        changes = " ".join(f"{name}={value}" for name, value in case.ours.items())
        files = CONFIGS / "quickstart.yaml", CONFIGS / f"recipes/{case.recipe}.yaml"
        values = to_trl(config_of(f"max_tokens={script['MAX_TOKENS']} {changes}", *files)).values
        assert {name: values.get(name) for name in case.trl} == case.trl, case
        n_told += 1
    assert n_told > 10


@pytest.mark.parametrize(
    ("text", "expected", "missing"),
    [
        (
            "epochs_per_rollout_batch=2 train_batch_size=64 gradient_accumulation_steps=16 warmup_steps=3",
            {"trainer.total_training_steps": 10, "data.train_batch_size": 32, "rollout.n": 8, "actor.ppo_epochs": 2,
             "actor.ppo_mini_batch_size": 8, "actor.ppo_micro_batch_size_per_gpu": 4, "actor.shuffle": True,
             "actor.optim.lr_warmup_steps": 3, "actor.optim.zero_indexed_step": False},
            [],
        ),
        ("", {"actor.clip_ratio_low": 0.2, "actor.clip_ratio_high": 0.2, "actor.clip_ratio_c": 1e9,
              "actor.loss_agg_mode": "seq-mean-token-mean", "algorithm.adv_estimator": "grpo"}, []),
        ("dual_clip=3", {"actor.clip_ratio_c": 3.0}, []),
        ("loss_type=gspo dual_clip=3", {"actor.policy_loss.loss_mode": "gspo"}, ["dual_clip"]),
        ("loss_type=cispo", {"actor.clip_ratio_low": 1.0, "actor.clip_ratio_high": 4.0}, []),  # from 0 to 5
        ("loss_type=dppo", {"actor.policy_loss.loss_mode": "dppo_tv", "actor.clip_ratio_c": 20.0}, []),
        ("loss_type=reinforce_with_baseline", {"actor.policy_loss.loss_mode": "gpg"}, []),
        ("normalize_mode=constant", {"actor.loss_scale_factor": 1024}, []),
        ("normalize_mode=prompt", {}, ["normalize_mode"]),
        ("advantage=rloo use_std_normalization=false", {"algorithm.adv_estimator": "rloo"}, []),
        ("sampler_correction=icepop", {"algorithm.rollout_correction.rollout_is_threshold": "0.5_5.0"}, []),
        ("sampler_correction=geo", {"algorithm.rollout_correction.rollout_rs_threshold": "0.99_1.01"}, []),
        ("kl_coef=0.04", {"actor.use_kl_loss": True, "actor.kl_loss_type": "k3+"}, []),
        ("refill_groups=true", {"algorithm.filter_groups.max_num_gen_batches": 10}, []),
        ("max_tokens_per_microbatch=4096", {"actor.ppo_max_token_len_per_gpu": 4096}, []),
        ("lr_schedule=linear", {"actor.optim.lr_scheduler_type": "constant"}, ["lr_schedule"]),
        ("dtype=float32 autocast_dtype=bfloat16", {"actor.fsdp_config.model_dtype": "fp32",
                                                   "actor.fsdp_config.dtype": "bfloat16"}, []),
    ],
)  # fmt: skip
def test_verl_by_hand(text: str, expected: dict[str, object], missing: list[str]) -> None:
    to = to_verl(config_of(text))
    values = {name.removeprefix("actor_rollout_ref."): value for name, value in to.values.items()}
    assert {name: values.get(name) for name in expected} == expected
    always = {"paths.train_data_file", "paths.val_data_file", "paths.prompt_template_file", "training.reward_fn",
              "training.min_tokens", "training.stop", "training.include_stop_str_in_output",
              "training.max_nonfinite_steps"}  # fmt: skip
    assert {name.removeprefix("training.") for name in to.missing if name not in always} == set(missing)


def test_gpus_share_the_batch_and_must_divide_it() -> None:
    assert to_trl(Config(), 8).values["gradient_accumulation_steps"] == 32  # 256 = 8 GPUs x 1 rollout x 32
    assert to_verl(Config(), 8).values["trainer.n_gpus_per_node"] == 8
    for translate in TARGETS.values():
        with pytest.raises(ValueError, match=r"--gpus 3: training\.train_batch_size = 256 does not divide"):
            translate(Config(), 3)
    with pytest.raises(ValueError, match="make it a multiple of group_size, 8"):
        to_verl(config_of("train_batch_size=4 gradient_accumulation_steps=4"))
    with pytest.raises(ValueError, match="group_size = 1: GRPOTrainer"):
        to_trl(config_of("group_size=1 loss_type=no_baseline use_std_normalization=false"))


def test_a_field_told_twice_or_unknown_is_a_mistake_of_ours() -> None:
    to = Translation("TRL", Config(), 1)
    to.translate("seed", {"seed": 1})
    with pytest.raises(AssertionError, match="told twice"):
        to.lack("seed", "none")
    with pytest.raises(AssertionError, match="no field"):
        to.skip("sede", "none")
    with pytest.raises(AssertionError):
        to.check_complete()


def test_the_script_writes_yaml_and_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = runpy.run_path(str(ROOT / "play-scripts/export_config.py"))["main"]
    arguments = ["--to", "trl", "--config", str(CONFIGS / "math.yaml"), "training.refill_groups=true"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["loss_type"] == "grpo"
    for text in (printed.err, printed.out):
        assert "Without counterpart in TRL" in text and "training.refill_groups" in text
        assert "vllm.gpu_memory_utilization: it is not derived from the card" in text
    assert "Not needed there" in printed.out and "Not needed there" not in printed.err
    output = tmp_path / "verl.yaml"
    assert main([*arguments[2:], "--to", "verl", "--gpus", "4", "--output", str(output)]) == 0
    assert yaml.safe_load(output.read_text())["trainer"]["n_gpus_per_node"] == 4
    capsys.readouterr()
    for wrong, words in {
        ("--output", str(output)): "exists",
        ("--output", str(tmp_path / "no/file")): "No such file",
        ("--gpus", "0"): "give 1 or more",
        ("training.sede=1",): "did you mean",
    }.items():
        assert main([*arguments, *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install trl==1.16.0")
@pytest.mark.parametrize("config", [config for _, config in ALL], ids=[name for name, _ in ALL])
def test_grpo_config_takes_it(config: Config) -> None:
    from trl import GRPOConfig

    values = yaml.safe_load(trl_text(to_trl(config)))
    t, taken = config.training, GRPOConfig(**values | {"use_cpu": True})  # bf16 is refused where no GPU is
    assert taken.generation_batch_size // taken.per_device_train_batch_size == taken.steps_per_generation
    steps = taken.num_iterations * taken.steps_per_generation // taken.gradient_accumulation_steps
    assert steps == t.optimizer_steps_per_rollout_batch
    assert all(getattr(taken, name) == value for name, value in values.items() if name not in ("use_cpu", "report_to"))


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl and its packages: verl==0.9.1")
def test_verl_composes_it_and_its_classes_take_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    for number, (_, config) in enumerate(ALL):
        config.paths.model_path = str(tiny_model_dir)  # whose config verl reads
        (tmp_path / f"{number}.yaml").write_text(verl_text(to_verl(config)))
        with initialize_config_dir(version_base=None, config_dir=str(tmp_path)):
            composed = compose(str(number))
        model = composed.actor_rollout_ref
        actor = omega_conf_to_dataclass(model.actor)
        for part in (model.rollout, model.model, composed.algorithm, model.actor.optim):
            omega_conf_to_dataclass(part)
        if config.training.lora_rank is None:  # with an adapter it imports vLLM, which must then be the build for CUDA
            validate_config(composed, use_reference_policy=actor.use_kl_loss, use_critic=False)
        expected = nested(to_verl(config).values)["actor_rollout_ref"]["actor"]
        assert actor.policy_loss.loss_mode == expected.get("policy_loss", {}).get("loss_mode", "vanilla")
        assert actor.clip_ratio_high == expected.get("clip_ratio_high", 0.2)
