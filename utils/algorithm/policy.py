"""The policy: load a causal language model and its tokenizer, build the optimizer."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from configs.defaults import Training
from utils.adapter_files import base_of, is_in_4bit, saved_adapter
from utils.algorithm.adapters import (
    AdapterMistake,
    adapter_weights,
    add_adapter,
    check_adapter,
    has_adapter,
    load_adapter,
    merged_weights,
    save_adapter,
)
from utils.algorithm.four_bit import four_bit_options, n_weights
from utils.algorithm.head import sees_the_future
from utils.algorithm.loss_scale import fit_loss_scale
from utils.algorithm.optimizers import OPTIMIZERS
from utils.algorithm.packing import enable_packing
from utils.notes import note

NO_CAUSAL_HEAD = "its model type has no head that predicts the next token; take a causal language model"


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises ValueError if it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"paths.model_path = {model_path!r}: cannot load a tokenizer: {_one_line(error)}") from error
    if not tokenizer("1").input_ids:
        raise ValueError(f"paths.model_path = {model_path!r}: its tokenizer knows no text; are its files there?")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"paths.model_path = {model_path!r}: its tokenizer has no end token, so nothing would tell where a "
            "response ends; name one as `eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def load_policy(model_path: str, training: Training) -> PreTrainedModel:
    """The checkpoint's model on `training.device`, ready to train. Raises ValueError if it cannot be loaded.

    With `lora_rank` it has an adapter, and nothing else of it is trained: the saved one if the checkpoint is an
    adapter, else a new one. A saved adapter is loaded without `lora_rank` too.
    """
    if training.cpu_threads is not None:
        torch.set_num_threads(training.cpu_threads)
    if training.device == "cpu":
        choose_cpu_products(training.use_onednn)
    elif training.device.startswith("cuda"):  # Triton's kernels run on the current card, whichever their tensors are on
        torch.cuda.set_device(training.device)
    policy = _load_weights(model_path, training)
    policy.to(training.device)
    if sees_the_future(policy):
        raise ValueError(f"paths.model_path = {model_path!r}: {NO_CAUSAL_HEAD}: it looks at the tokens that follow")
    policy.train()
    if training.use_gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if training.use_liger_kernel and training.device.startswith("cuda") and find_spec("liger_kernel") is not None:
        use_fused_kernels(policy)
    if training.use_packing:
        enable_packing(policy)  # or it stays padded: `is_packable` tells
    if training.use_compile:
        # in place, so that parameter names stay as they are; dynamic, since every microbatch has a length of its own
        policy.get_decoder().compile(dynamic=True)
    return policy


def _load_weights(model_path: str, training: Training) -> PreTrainedModel:
    """The model with its adapter, if it has or gets one, as `from_pretrained` leaves it."""
    base, is_adapter = base_of(model_path), saved_adapter(model_path) is not None
    named = f"paths.model_path = {model_path!r}{f', whose base is {base!r}' if is_adapter else ''}"
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        dropouts = switch_off_dropout(config)
        if training.lora_rank is not None and not is_adapter:
            check_adapter(config, training)
        policy = AutoModelForCausalLM.from_pretrained(
            base,
            config=config,
            trust_remote_code=False,  # with None, its default, it asks on the terminal and then runs the folder's code
            dtype=getattr(torch, training.dtype),
            attn_implementation=training.attention_type,
            **four_bit_options(training),
        )
    except AdapterMistake:
        raise
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise ValueError(f"{named}: cannot load the model: {_one_line(error)}") from error
    if dropouts:
        note(
            f"{base}: its dropout is switched off ({', '.join(dropouts)}): with it, the ratio of the policy to "
            "the one that sampled would be noise"
        )
    disable_progress_bar()  # loading has shown its own; every save to come would show one more
    if is_adapter:
        load_adapter(policy, model_path)
    elif training.lora_rank is not None:
        add_adapter(policy, base, training)
    return policy


def load_reference(model_path: str, policy: PreTrainedModel, training: Training) -> PreTrainedModel:
    """A frozen copy of a checkpoint in `reference_dtype`, to measure the policy's KL divergence from.

    Raises ValueError if it cannot be loaded, or has another vocabulary than the policy.
    """
    frozen = replace(
        training,
        dtype=training.reference_dtype,
        use_gradient_checkpointing=False,
        use_compile=False,
        lora_rank=None,
        load_in_4bit=is_in_4bit(model_path),
    )
    reference = load_policy(model_path, frozen).eval().requires_grad_(False)
    sizes = [model.config.get_text_config().vocab_size for model in (reference, policy)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"training.reference_path: {model_path} has a vocabulary of {sizes[0]}, the policy one of {sizes[1]}; the "
            "reference must be of the policy's family"
        )
    return reference


def use_fused_kernels(policy: PreTrainedModel) -> None:
    """Put liger-kernel's RMSNorm, MLP gate and rotary embedding into a policy on a GPU, in place: equal to rounding.

    Its losses stay out: the log-probs are computed by this project's own head.
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,  # what transformers' own Trainer calls for `use_liger_kernel`
    )

    if policy.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        note(f"training.use_liger_kernel: liger-kernel does not know {policy.config.model_type}, so it is not used")
        return
    _apply_liger_kernel_to_instance(
        policy,
        rope=True,
        rms_norm=True,
        swiglu=True,
        geglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )


def switch_off_dropout(config: PreTrainedConfig) -> list[str]:
    """Set every dropout rate in a model's config to 0, in place; returns those that were not, as `name 0.1`."""
    text_config = config.get_text_config()
    switched_off = [
        name for name, value in vars(text_config).items() if "drop" in name and isinstance(value, float) and value > 0
    ]
    described = [f"{name} {getattr(text_config, name)}" for name in switched_off]
    for name in switched_off:
        setattr(text_config, name, 0.0)
    return described


def choose_cpu_products(use_onednn: bool) -> None:
    """Let oneDNN or MKL make this process's float32 matrix products on the CPU; MKL where oneDNN would round.

    torch uses MKL unless `fp32_precision` allows bfloat16. Then it uses oneDNN, which still computes in float32 unless
    the processor has AMX. This is not documented, so the error is measured against float64.
    """
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16" if use_onednn else "none"
    if use_onednn and product_error() > 1e-5:  # 3e-7 in float32, 3e-3 in bfloat16
        matmul.fp32_precision = "none"
        note("training.use_onednn: oneDNN rounds to bfloat16 on this processor, so MKL is used")


def product_error(size: int = 512) -> float:
    """The relative error of a (size, size) float32 product on the CPU, against float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator)
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


def trainable(policy: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an update changes, each once."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def full_weights(policy: torch.nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights under their checkpoint names, one after another: what is pushed into an engine.

    From `state_dict`, which holds a tied head under both its names. The tensors are the policy's own memory, but for
    those that have an adapter merged into them, which are made as they are asked for and rounded once to `dtype`.
    """
    weights = merged_weights(policy, dtype) if has_adapter(policy) else iter(policy.state_dict().items())
    for name, tensor in weights:
        yield checkpoint_name(name), tensor


def count_full_weights(policy: torch.nn.Module) -> int:
    """How many weights `full_weights` has, a tied one counted once: those of the policy without its adapter."""
    return sum(n_weights(p) for name, p in policy.named_parameters() if ".lora_" not in name)


def saved_weights(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the policy: its adapter, if it has one, or all of it."""
    return adapter_weights(policy) if has_adapter(policy) else dict(full_weights(policy))


def save_policy(policy: PreTrainedModel, folder: Path | str, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the policy into a folder that `load_policy` loads. `weights`: `saved_weights` of an earlier moment."""
    weights = saved_weights(policy) if weights is None else weights
    if has_adapter(policy):
        save_adapter(policy, folder, weights)
    else:
        policy.save_pretrained(folder, state_dict=dict(weights))


def checkpoint_name(name: str) -> str:
    """A weight's or module's name without what wrapping a policy in torch.compile adds."""
    return name.replace("_orig_mod.", "")


def autocast(
    policy: torch.nn.Module, dtype: str | None, keep_copies: bool = False
) -> contextlib.AbstractContextManager:
    """Compute in this dtype on the policy's device while its weights keep theirs; None: in the weights' own.

    A weight's copy in this dtype lives as long as autograd needs it: where activations are recomputed, a layer at a
    time. `keep_copies`, for many passes with the same weights: until the context ends. Torch keeps copies of trained
    weights alone: those that an adapter has frozen are cast anew at each use.
    """
    if dtype is None:
        return contextlib.nullcontext()
    device_type = next(policy.parameters()).device.type
    return torch.autocast(device_type, getattr(torch, dtype), cache_enabled=keep_copies)


def build_optimizer(policy: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """The AdamW that the config names. Raises ValueError if its package is missing."""
    options = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
    }
    optimizer = OPTIMIZERS[training.optimizer_name](trainable(policy), **options)
    fit_loss_scale(optimizer, training.autocast_dtype)
    return optimizer


def context_length(model_path: str) -> int:
    """Tokens that the model's positions allow, prompt and response together. Raises ValueError if it does not say."""
    try:
        model_config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"paths.model_path = {model_path!r}: cannot load its config: {_one_line(error)}") from error
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ValueError(
            f"{model_path}: its config.json has no max_position_embeddings; set training.max_prompt_tokens"
        )
    return length


def _one_line(error: Exception) -> str:
    """An error of transformers' in one line: its first sentences are often wrapped, and its later ones long."""
    if "trust_remote_code" in str(error):  # it advises to run the code
        return "it needs code of its own, which is never run; take a model that transformers knows without it"
    if "Unrecognized configuration class" in str(error):  # it lists every known class
        return NO_CAUSAL_HEAD
    return textwrap.shorten(str(error), width=300, placeholder=" ...")
