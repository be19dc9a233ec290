"""Packing in every model family: the numbers of the family's own padded pass, gradients too; others stay padded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_packing import SIZES, log_probs_and_gradients
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from utils.algorithm.head import find_head
from utils.algorithm.packing import enable_packing, is_packable

WINDOW = 4  # shorter than the longest of the sequences
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "smollm3": (SmolLM3Config, {"pad_token_id": 0, "no_rope_layers": [1, 0]}),  # a layer without positions
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "mistral without window": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, ALTERNATING | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0}),
    "gemma3": (Gemma3TextConfig, ALTERNATING),
    "gemma3 capped": (Gemma3TextConfig, ALTERNATING | {"final_logit_softcapping": 1.0}),
    "olmo2": (Olmo2Config, {}),
    "phi3": (Phi3Config, {"sliding_window": WINDOW, "pad_token_id": 0}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
}


class InFloat64(TorchFunctionMode):
    """Models compute norms and softmax in float32, whatever their weights are; here float64 stays float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:  # positions too, which some versions multiply with float64 frequencies
            return args[0].double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.to and torch.float32 in args:
                args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def build(family: str, kernel: str = "eager", **changes: int) -> PreTrainedModel:
    config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**SIZES | options | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).double()
    for parameter in model.parameters():  # larger than as initialised, so that attention has something to choose from
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def compare(family: str, policy: PreTrainedModel) -> None:
    """Log-probs and gradients of a packed policy, against the family's own code in a padded pass."""
    assert is_packable(policy) and find_head(policy) is not None
    lengths = []
    policy.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda _m, inputs: lengths.append(inputs[0].shape[:2]))
    with InFloat64():
        expected, gradients = log_probs_and_gradients(build(family))
        log_probs, packed_gradients = log_probs_and_gradients(policy)
    assert set(lengths) == {(1, 11)}  # one row, each prompt once
    assert (log_probs - expected).abs().max() < 1e-10
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        assert (ours - theirs).norm() < 1e-10 * max(1.0, theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_family_has_the_numbers_of_its_padded_pass(family: str, kernel: str, checkpointing: bool) -> None:
    policy = build(family, kernel).train()
    if checkpointing:
        recomputing = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), InFloat64())}
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recomputing)
    assert enable_packing(policy)
    compare(family, policy)


@pytest.mark.parametrize(("family", "n_layers"), [("llama", 1), ("gemma2", 2), ("gemma3", 2), ("olmo2", 1)])
def test_a_compiled_family_too(family: str, n_layers: int) -> None:
    """Traced, it has the numbers of the packed policy above; what is compiled from a trace is in test_compile.py."""
    plain, compiled = (build(family, "sdpa", num_hidden_layers=n_layers).train() for _ in range(2))
    for policy in (plain, compiled):
        assert enable_packing(policy)
        find_head(policy)
    compiled.get_decoder().compile(backend="eager", dynamic=True)
    (expected, gradients), (log_probs, ours) = (log_probs_and_gradients(policy) for policy in (plain, compiled))
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (Qwen2Config, {"attention_dropout": 0.1}),
        (GPT2Config, {"n_embd": 32}),  # dropout elsewhere
        (MambaConfig, {}),  # a state that runs through the row
        (Llama4TextConfig, {"attention_chunk_size": 64, "num_local_experts": 2}),  # a chunk is no window
        (FalconConfig, {"alibi": True}),  # attention without the interface
    ],
)
def test_other_attention_stays_as_it_is(config_class: type, options: dict) -> None:
    sizes = SIZES if config_class not in (GPT2Config, FalconConfig) else {"vocab_size": 40, "num_attention_heads": 4}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config_class(**sizes | {"hidden_size": 32} | options)).train()
    before = policy.config._attn_implementation
    assert not enable_packing(policy) and not is_packable(policy)
    assert policy.config._attn_implementation == before


def test_looking_leaves_windows_as_they_are() -> None:
    policy = build("gemma3", "sdpa")
    policy.config.sliding_window = 512
    windows = [layer.self_attn.sliding_window for layer in policy.model.layers]
    assert enable_packing(policy)
    assert policy.config.sliding_window == 512
    assert [layer.self_attn.sliding_window for layer in policy.model.layers] == windows == [WINDOW, None]
