"""QLoRA's frozen weights: 4 bits each, NF4 of bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314). CUDA only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from configs.defaults import Training


def four_bit_options(training: Training) -> dict[str, Any]:
    """What `from_pretrained` is given to quantize the matrices as it reads them; nothing without `load_in_4bit`.

    Embeddings and the head stay in `training.dtype`, and products are computed in it.
    """
    if not training.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales of 64 weights in 8 bits: 0.13 bits per weight in place of 0.5
        bnb_4bit_compute_dtype=getattr(torch, training.dtype),
    )
    return {"quantization_config": quantization, "device_map": {"": training.device}}


def is_four_bit(parameter: Tensor) -> bool:
    """Whether a parameter holds two weights per byte; bitsandbytes need not be installed to ask."""
    return type(parameter).__name__ == "Params4bit"


def n_weights(parameter: Tensor) -> int:
    """How many weights a parameter stands for."""
    return parameter.quant_state.shape.numel() if is_four_bit(parameter) else parameter.numel()


def plain_weight(layer: nn.Module) -> Tensor:
    """A layer's weight: its own memory, or a fresh tensor in the dtype of before where it is kept in 4 bits."""
    if not is_four_bit(layer.weight):
        return layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
