"""What a run says about a model that takes more time or memory than others."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, PhiConfig, PretrainedConfig
from update_cases import ON_POLICY

from utils.algorithm.policy import load_policy
from utils.run.build import notes_on_policy

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (LlamaConfig(**SIZES), {}, []),
        (FalconConfig(**FALCON), {}, ["padded"]),
        (FalconConfig(**FALCON), {"use_packing": False}, []),
        (PhiConfig(**SIZES), {}, ["full logits"]),
    ],
)
def test_notes_name_the_model_and_no_warning_is_given(
    config: PretrainedConfig, changes: dict, words: list[str], tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    training = replace(ON_POLICY, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        policy = load_policy(str(tmp_path), training)
        notes = notes_on_policy(policy, training)
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert word in note and type(policy).__name__ in note


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({"learning_rate": 1e-6}, True),
        ({"learning_rate": 1e-6, "optimizer": "adamw8bit"}, True),
        ({"learning_rate": 1e-4}, False),  # most of these weights are below 0.05
        ({"learning_rate": 1e-6, "optimizer": "adamw8bit_master"}, False),
        ({"learning_rate": 1e-6, "dtype": "float32", "autocast_dtype": "bfloat16"}, False),
    ],
)
def test_updates_that_will_be_lost_are_told(changes: dict, is_told: bool, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    training = replace(ON_POLICY, **({"dtype": "bfloat16"} | changes))
    notes = notes_on_policy(load_policy(str(tmp_path), training), training)
    assert len(notes) == is_told
    for note in notes:
        assert "1e-06" in note and "train/frac_weights_moved" in note and "adamw8bit_master" in note
