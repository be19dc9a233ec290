"""Start vLLM in the training process: its knobs checked first, its failures explained, the trainer left as it was."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil  # vLLM depends on it
import torch

# Before vLLM is first imported: with 1, its default, the engine would run in a process of its own, which the policy's
# tensors can't be handed to.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from utils.adapter_files import base_of
from utils.algorithm.policy import count_full_weights
from utils.seeding import preserved_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from configs.defaults import Config

GB = 1e9
MIB = 2**20


def start_vllm(config: Config, policy: PreTrainedModel, vocabulary_size: int, longest_prompt: int) -> LLM:
    """An engine of the policy's shape with random weights: nothing is read from disk that a push would replace.

    `vocabulary_size` is the tokenizer's. Where the model pads its vocabulary beyond that, the engine's ends there, so
    that no such id can be sampled. Raises ValueError if a knob can't work, RuntimeError if vLLM fails to start.
    """
    max_model_len = check_knobs(config, policy, longest_prompt)
    if torch.distributed.is_initialized():  # the end of either engine would take the other's process group away
        raise RuntimeError("another vLLM engine runs in this process: close it before starting one")
    knobs = config.vllm
    options: dict[str, Any] = {
        "model": base_of(config.paths.model_path),
        "trust_remote_code": False,
        "load_format": "dummy",
        "dtype": knobs.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": knobs.max_num_seqs,
        "enable_prefix_caching": knobs.enable_prefix_caching,
        "enforce_eager": knobs.enforce_eager or config.training.device == "cpu",
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: temperature and top-p applied
        "generation_config": "vllm",  # else the checkpoint's own temperature and top-p would come in silently
        **device_options(config, max_model_len),
    }
    overrides = {"vocab_size": vocabulary_size} if vocabulary_size < policy.config.vocab_size else {}
    if config.training.head_dtype is not None:
        overrides["head_dtype"] = config.training.head_dtype  # of logits: `LogitsProcessor`, tied embeddings too
    if overrides:
        options["hf_overrides"] = overrides
    n_threads, cpu_products = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    try:
        with preserved_random_state(), quiet(), compilation(config.training.device):
            return LLM(**options)
    # torch's out-of-memory error is a RuntimeError; vLLM asserts that no other engine of this process could sleep
    except (RuntimeError, ValueError, MemoryError, AssertionError) as error:
        cleanup_dist_env_and_memory()
        raise RuntimeError(explain_failed_start(config, max_model_len, error)) from error
    finally:
        torch.set_num_threads(n_threads)  # the CUDA build sets one
        torch.backends.mkldnn.matmul.fp32_precision = cpu_products  # and both choose who makes float32 products


def check_knobs(config: Config, policy: PreTrainedModel, longest_prompt: int) -> int:
    """The `max_model_len` to start with, tokens. Raises ValueError if a knob can't work, before vLLM starts."""
    needed = longest_prompt + config.training.max_tokens
    max_model_len = config.vllm.max_model_len or needed
    if max_model_len < needed:
        raise ValueError(
            f"vllm.max_model_len={max_model_len} is below the {needed} tokens of the longest prompt ({longest_prompt})"
            f" and training.max_tokens ({config.training.max_tokens}): raise it, or set it to null to derive it"
        )
    context = getattr(policy.config, "max_position_embeddings", None)
    if context is not None and max_model_len > context:
        if needed > context:
            raise ValueError(
                f"the longest prompt ({longest_prompt} tokens) and training.max_tokens ({config.training.max_tokens})"
                f" are more than the model's context of {context} tokens: lower training.max_tokens or set"
                f" training.max_prompt_tokens"
            )
        raise ValueError(
            f"vllm.max_model_len={max_model_len} is above the model's context of {context} tokens:"
            f" lower it, or set it to null to derive it ({needed})"
        )
    cache = kv_cache_bytes_per_token(config, policy) * max_model_len
    if config.training.device == "cpu":
        if cache > config.vllm.cpu_kv_cache_mb * MIB:
            raise ValueError(
                f"vllm.cpu_kv_cache_mb={config.vllm.cpu_kv_cache_mb} can't hold one sequence of {max_model_len} tokens:"
                f" it takes {cache / MIB:.0f} MiB"
            )
        check_host_memory(config)
    else:
        check_gpu_memory(config, policy, cache)
    return max_model_len


def check_host_memory(config: Config) -> None:
    """Raise ValueError if the CPU build's cache is larger than the memory that is free."""
    available = psutil.virtual_memory().available
    if config.vllm.cpu_kv_cache_mb * MIB > available:
        raise ValueError(
            f"vllm.cpu_kv_cache_mb={config.vllm.cpu_kv_cache_mb}, but only {available // MIB} MiB of memory are free:"
            " lower it"
        )


def kv_cache_bytes_per_token(config: Config, policy: PreTrainedModel) -> int:
    """Keys and values of all layers for one token, in vLLM's dtype."""
    shape = policy.config
    n_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * n_heads * head_size * getattr(torch, config.vllm.dtype).itemsize


def explain_failed_start(config: Config, max_model_len: int, error: Exception) -> str:
    """What a user can turn where vLLM failed to start, most often because memory ran out."""
    knobs = config.vllm
    if config.training.device == "cpu":
        memory, used = f"vllm.cpu_kv_cache_mb={knobs.cpu_kv_cache_mb}", ""
    else:
        free, total = torch.cuda.mem_get_info()
        memory = f"vllm.gpu_memory_utilization={knobs.gpu_memory_utilization}"
        used = f" {free / GB:.1f} of {total / GB:.1f} GB of GPU memory are free now."
    return (
        f"vLLM failed to start: {error}\nIf memory ran out, the knobs are {memory}, vllm.max_num_seqs="
        f"{knobs.max_num_seqs}, vllm.max_model_len={max_model_len} and vllm.enforce_eager={knobs.enforce_eager}"
        f" (true saves the memory of CUDA graphs).{used}"
    )


def compilation(device: str) -> contextlib.AbstractContextManager[None]:
    """vLLM's own use of torch.compile: as it likes on CUDA, none on the CPU.

    There it would need a C++ compiler and start half a minute later, and sample no faster.
    """
    return torch.compiler.set_stance("force_eager") if device == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only errors, here and from vLLM afterwards; the rest concerns serving. VLLM_LOGGING_LEVEL brings it back."""
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        logging.disable(disabled)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        # this part warns of weights that a push did not fill; rotary embeddings, computed from the config, need none
        logging.getLogger("vllm.model_executor.model_loader").setLevel(logging.WARNING)
        reload_logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        reload_logger.addFilter(_is_not_of_rotary_embeddings)


def _is_not_of_rotary_embeddings(record: logging.LogRecord) -> bool:
    return "RotaryEmbedding" not in record.getMessage()


def give_memory_back() -> None:
    """After the last reference to an engine is gone: what it held can be allocated again."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# What only CUDA has: memory shared with the policy, or a card of its own, and sleep.


@contextlib.contextmanager
def on_its_card(config: Config) -> Iterator[None]:
    """Make the first GPU, which vLLM runs on, the current one, whichever the policy trains on; nothing on the CPU.

    vLLM's kernels and streams are those of the current card. On a card of its own it is waited for, as the trainer's
    clock waits for the policy's card alone.
    """
    if config.training.device == "cpu":
        yield
        return
    with torch.cuda.device(0):
        yield
        if config.vllm.device is not None:
            torch.cuda.synchronize()


def device_options(config: Config, max_model_len: int) -> dict[str, Any]:
    """Where vLLM takes its memory from, and what the CPU build can't do."""
    if config.training.device == "cpu":
        return {
            "kv_cache_memory_bytes": config.vllm.cpu_kv_cache_mb * MIB,
            # A prompt cut in two winds its random generator back, which generators on the CPU can't.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_model_len, config.vllm.max_num_seqs, 4096),
        }
    return {
        "gpu_memory_utilization": config.vllm.gpu_memory_utilization,
        "enable_sleep_mode": config.vllm_sleeps,
    }


def check_gpu_memory(config: Config, policy: PreTrainedModel, cache: int) -> None:
    """Raise ValueError if the weights and one sequence's cache (bytes) can't fit into vLLM's share of the GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    utilization = config.vllm.gpu_memory_utilization
    share = utilization * total
    weights = count_full_weights(policy) * getattr(torch, config.vllm.dtype).itemsize
    if share < weights + cache:
        raise ValueError(
            f"vllm.gpu_memory_utilization={utilization} is {share / GB:.1f} GB, but weights ({weights / GB:.1f} GB) and"
            f" one sequence's cache ({cache / GB:.1f} GB) need more: raise it to {(weights + cache) / total + 0.05:.2f}"
        )
    if share > free:
        raise ValueError(
            f"vllm.gpu_memory_utilization={utilization} is {share / GB:.1f} GB, but only {free / GB:.1f} of"
            f" {total / GB:.1f} GB are free: lower it below {free / total:.2f}, or end what else uses the GPU"
        )


def free_gpu_bytes() -> int:
    """GPU memory that nobody holds, once torch has returned what it only caches; 0 without a GPU."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
