"""LoRA (Hu et al. 2021, arXiv:2106.09685): thin matrices B and A beside frozen weights, put into a policy by `peft`.

An adapted weight is W + s B A with s = lora_alpha / lora_rank. The policy stays the model that it was, with layers of
`peft` in place of some of its own, so packing, the chunked head and the engines see nothing new. A and B are kept in
float32, since bfloat16 would round most updates away; their products are computed in the dtype of what comes in.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from configs.defaults import Training
from utils.adapter_files import (
    ADAPTER_WEIGHTS,
    ORIGIN_FILE,
    beyond_lora,
    origin,
    other_base,
    saved_adapter,
    saved_origin,
)
from utils.algorithm.four_bit import is_four_bit, n_weights, plain_weight
from utils.notes import note
from utils.seeding import derive_seed, preserved_random_state

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"  # of the one adapter, among those that peft would let a layer have
PEFT_PREFIX = "base_model.model."  # begins every name in peft's files
# peft imports bitsandbytes where it is installed, which then misses a kernel for inference in 4 bits on the CPU
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
ATTENTION = ("attn", "attention")  # one of these is in the name of every family's attention


class AdapterMistake(ValueError):
    """An adapter's settings do not go with the model."""


class WideLinear(nn.Linear):
    """Keeps its weight in float32 and computes in the dtype of its input, whether or not autocast is on."""

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight.to(states.dtype))


def has_adapter(policy: nn.Module) -> bool:
    """Whether `add_adapter` or `load_adapter` was here."""
    return hasattr(policy, "adapter_origin")


def check_adapter(config: PreTrainedConfig, training: Training) -> None:
    """Raise AdapterMistake, before weights are read, for a target that the model lacks or a rank above its matrices."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    targets, target, rank = targets_of(skeleton, training.lora_target), training.lora_target, training.lora_rank
    if not targets:
        raise AdapterMistake(
            f"training.lora_target = {target!r} matches no matrix of {type(skeleton).__name__}; "
            f"{'set it to all-linear' if target == 'attention' else 'set training.lora_rank to null'}"
        )
    smallest = min(targets, key=lambda name: min(targets[name]))
    if rank > min(targets[smallest]):
        n_rows, n_columns = targets[smallest]
        raise AdapterMistake(
            f"training.lora_rank = {rank} is above the smallest dimension of what it adapts: {smallest} is {n_rows} x "
            f"{n_columns}; give {min(n_rows, n_columns)} or less"
        )


def targets_of(model: PreTrainedModel, target: str) -> dict[str, tuple[int, int]]:
    """The matrices that `lora_target` names, with their shapes; the head is never one of them."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not model.get_output_embeddings()
        and (target == "all-linear" or any(word in part for part in name.split(".")[:-1] for word in ATTENTION))
    }


def add_adapter(policy: PreTrainedModel, base: str, training: Training) -> None:
    """Put a new adapter into a policy whose weights are `base`, and freeze all but it. B is 0: nothing changes yet."""
    with preserved_random_state():
        torch.manual_seed(derive_seed(training.seed, "adapter"))
        inject(policy, lora_config(policy, base, training))
    policy.adapter_origin = origin(_folder_of(base), training)


def lora_config(policy: PreTrainedModel, base: str, training: Training) -> LoraConfig:
    """What `peft` is told of a new adapter."""
    from peft import LoraConfig

    targets = list(targets_of(policy, training.lora_target))
    return LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        target_modules=targets,
        fan_in_fan_out=isinstance(policy.get_submodule(targets[0]), Conv1D),  # GPT-2's matrices are transposed
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def load_adapter(policy: PreTrainedModel, folder: str) -> None:
    """Put a saved adapter into its base. Raises ValueError if it does not fit, or the base is another one."""
    from peft import PeftConfig

    base = _folder_of(saved_adapter(folder)["base_model_name_or_path"])
    reason = beyond_lora(folder) or other_base(folder, base)
    if reason is not None:
        raise ValueError(reason)
    config = PeftConfig.from_pretrained(folder)
    if config.lora_dropout:
        note(f"{folder}: its lora_dropout of {config.lora_dropout} is switched off, as the model's own would be")
        config.lora_dropout = 0.0
    config.inference_mode = False  # which would freeze it
    try:
        with preserved_random_state():
            inject(policy, config)
        weights = load_file(Path(folder) / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot load the adapter: {error}") from error
    own = _parameters(policy)
    unlike = sorted(name for name in own | weights if _shape(own, name) != _shape(weights, name))
    if unlike:
        name = unlike[0]
        raise ValueError(
            f"{folder} is an adapter of another base than {config.base_model_name_or_path!r}: {len(unlike)} tensors do "
            f"not fit, among them {name}, which is {_shape(weights, name)} there and {_shape(own, name)} here"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    policy.adapter_origin = saved_origin(folder)


def inject(policy: PreTrainedModel, config: LoraConfig) -> None:
    """peft's layers, with A and B in float32, or float64 for a policy in float64.

    Raises ValueError for layers that `merged_weights` would not merge: embeddings, the head, and variants of LoRA.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, policy, NAME)
    dtype, head = torch.promote_types(policy.dtype, torch.float32), policy.get_output_embeddings()
    for name, layer in _adapted_layers(policy).items():
        if NAME not in layer.lora_A or layer.lora_variant or layer is head:
            raise ValueError(f"only plain LoRA on matrices beside embeddings and head is known, and {name} has other")
        layer.cast_input_dtype_enabled = False  # `WideLinear` casts the weight; the input is far larger
        for matrices in (layer.lora_A, layer.lora_B):
            thin = matrices[NAME]
            wide = WideLinear(thin.in_features, thin.out_features, bias=False, device="meta")
            wide.weight = nn.Parameter(thin.weight.detach().to(dtype))
            matrices[NAME] = wide


def _adapted_layers(policy: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}


def _parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapted layer, under the names that they have in peft's files."""
    return {
        PEFT_PREFIX + name.replace("_orig_mod.", "").replace(f".{NAME}.", "."): parameter
        for name, parameter in policy.named_parameters()
        if f".{NAME}." in name and ".lora_" in name
    }


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _folder_of(base: str) -> Path:
    """Where a model's files are: its folder, or its place in the hub's cache."""
    return Path(cached_file(base, "config.json")).parent


def describe(policy: nn.Module) -> str:
    """What is trained of a policy with an adapter, for people."""
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    everything = sum(n_weights(parameter) for parameter in policy.parameters())
    rank = policy.peft_config[NAME].r
    return (
        f"LoRA of rank {rank} on {len(_adapted_layers(policy))} matrices: {trained:,} weights are trained, "
        f"{everything - trained:,} are frozen"
    )


@contextlib.contextmanager
def trained_adapter_off(policy: nn.Module) -> Iterator[None]:
    """The policy as it was before training: without its adapter, if that is what is trained. A frozen one stays."""
    layers = [] if not has_adapter(policy) else list(_adapted_layers(policy).values())
    layers = [layer for layer in layers if layer.lora_A[NAME].weight.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(policy: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model that computes what the policy computes, one after another.

    W + s B A is summed in float32 and rounded once, to `dtype`, or to W's if that is None. A merged weight is made
    when it is asked for, and nobody keeps it: at most one is there at a time. All others are the policy's own memory.
    """
    layers, modules = _adapted_layers(policy), dict(policy.named_modules())
    for name, tensor in policy.state_dict().items():
        adapted, inside, rest = name.partition(".base_layer.")
        if inside and rest == "weight":
            layer = layers[adapted]
            base = plain_weight(layer.base_layer)
            yield f"{adapted}.weight", layer.get_delta_weight(NAME).add_(base).to(dtype or base.dtype)
        elif inside and rest == "bias":
            yield f"{adapted}.bias", tensor
        elif inside or ".lora_" in name:
            continue  # A, B, and the scales of weights in 4 bits
        elif is_four_bit(getattr(modules.get(name.partition(".weight")[0]), "weight", tensor)):
            if name.endswith(".weight"):
                yield name, plain_weight(modules[name.removesuffix(".weight")])
        else:
            yield name, tensor


def adapter_weights(policy: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: A and B under peft's names."""
    return {name: parameter.detach() for name, parameter in _parameters(policy).items()}


def save_adapter(policy: PreTrainedModel, folder: Path | str, weights: dict[str, Tensor]) -> None:
    """Write an adapter as `peft` does, and beside it what its base was; the base's config tells the model's shape."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    policy.peft_config[NAME].save_pretrained(folder)
    save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    (folder / ORIGIN_FILE).write_text(json.dumps(policy.adapter_origin, indent=2) + "\n")
    plain_config(policy.config).save_pretrained(folder)


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A model's config without what loading in 4 bits added to it."""
    entries: dict[str, Any] = config.to_dict()
    entries.pop("quantization_config", None)
    return type(config).from_dict(entries)
