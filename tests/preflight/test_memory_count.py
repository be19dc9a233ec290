"""The memory estimate against a count on fake tensors of the published model's real shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_count import QWEN_1_5B, count_training_peak

from utils.preflight.config import load_config
from utils.preflight.memory_estimate import estimate_peak_memory
from utils.preflight.model_files import model_config

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPT, RESPONSE = 400, 1024


@pytest.mark.parametrize("overlay", ["hardware/rtx4090", "hardware/h100", "recipes/hardware/h100", None])
def test_the_estimate_is_within_a_tenth_of_the_count(overlay: str | None) -> None:
    config = load_config([CONFIGS / f"{overlay}.yaml"] if overlay else [])
    parts = estimate_peak_memory(QWEN_1_5B, config, PROMPT + RESPONSE, device_memory=24 * 10**9)
    budget = config.training.max_tokens_per_microbatch or 0
    n_sequences = max(1, budget // (PROMPT + RESPONSE))
    counted = count_training_peak(QWEN_1_5B, config, parts["optimizer"], PROMPT, n_sequences)
    estimated = parts["training_peak"] - parts["allowance"] - parts["vllm_asleep"]
    print(f"{overlay}: counted {counted / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB")
    assert estimated == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("overlay", "changes"),
    [
        ("rtx4090", ["training.lora_rank=32"]),
        ("h100", ["training.lora_rank=1", "training.lora_target=attention"]),
        ("h100", ["training.lora_rank=32", "training.attention_type=eager"]),
    ],
)
def test_an_adapter_of_the_7b_model_within_a_tenth(overlay: str, changes: list[str]) -> None:
    """Weights are left out of both, as they would hide all else. Four layers: the others are like them."""
    sizes = model_config("Qwen/Qwen2.5-7B") | {"num_hidden_layers": 4}  # known offline
    budget = f"training.max_tokens_per_microbatch={2 * (PROMPT + RESPONSE)}"
    config = load_config([CONFIGS / "hardware" / f"{overlay}.yaml"], [budget, *changes])
    parts = estimate_peak_memory(sizes, config, PROMPT + RESPONSE, device_memory=24 * 10**9)
    counted = count_training_peak(sizes, config, parts["optimizer"], PROMPT, 2) - parts["weights"]
    estimated = parts["training_peak"] - parts["weights"] - parts["allowance"] - parts["vllm_asleep"]
    print(f"{overlay} {changes}: counted {counted / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB")
    assert estimated == pytest.approx(counted, rel=0.1)
