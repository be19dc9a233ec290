"""What this machine has, asked without torch, and what a run would take of its memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.engines import card_index, choose_engine
from utils.preflight.derive import Card
from utils.preflight.memory_estimate import estimate_peak_memory
from utils.preflight.model_files import model_config

# One of these exists wherever the NVIDIA driver does; asking torch would take seconds to import it. dxg is WSL's.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg")
# A container's limit, version 2 and version 1.
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
ASSUMED_GPU = 24 * 10**9  # bytes, if there is no card to ask
ASSUMED_PROMPT = 512  # tokens, if neither training.max_prompt_tokens nor the data tells


def has_gpu() -> bool:
    """True if there is an NVIDIA driver."""
    return any(Path(file).exists() for file in GPU_FILES)


def gpu_memory(device: str = "cuda:0") -> int | None:
    """Bytes of memory that this GPU has, by the driver's tool; None if there is no GPU or no such tool."""
    asked = _ask_driver(card_index(device) or 0)
    return asked and asked[0]


def this_card(device: str = "cuda:0") -> Card:
    """This GPU's memory and what was free of it when it was first asked, or a card that is assumed."""
    asked = _ask_driver(card_index(device) or 0)
    if asked is None:
        return Card(ASSUMED_GPU, ASSUMED_GPU, "assumed, as no GPU here tells its memory")
    return Card(*asked)


def engine_card(config: Config) -> Card | None:
    """The GPU that vLLM has to itself; None if it shares the policy's."""
    return None if config.vllm.device is None else this_card(config.vllm.device)


def n_visible_gpus() -> int | None:
    """How many GPUs this process may use; None if nothing tells."""
    visible = _visible_gpus()
    if visible is not None:
        return len(visible)
    listed = _nvidia_smi("--query-gpu=index")
    return None if listed is None else len(listed)


def _visible_gpus() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names, indices or UUIDs; None if it is not set. CUDA stops at the first -1."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return None
    names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


@functools.cache
def _ask_driver(index: int) -> tuple[int, int] | None:
    """(total, free) bytes of a visible GPU. Asked once, before this process itself takes any."""
    visible = _visible_gpus() or []
    name = visible[index] if index < len(visible) else index  # the tool takes indices and UUIDs
    listed = _nvidia_smi("--query-gpu=memory.total,memory.free", f"--id={name}")
    try:
        total, free = listed[0].split(",") if listed else ("", "")
        return int(total) * 2**20, int(free) * 2**20
    except ValueError:  # some cards answer "[N/A]"
        return None


def _nvidia_smi(*options: str) -> list[str] | None:
    """The lines that the driver's tool answers with, None without it or its answer."""
    command = ["nvidia-smi", "--format=csv,noheader,nounits", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None


def host_memory() -> int:
    """Bytes of memory that this machine has, or that the container which we are in may take."""
    amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, MEMORY_LIMITS):
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():  # "max" is no limit
            amounts.append(int(text))
    return min(amounts)


def estimated_memory(config: Config, longest_prompt: int | None = None) -> dict[str, int]:
    """`estimate_peak_memory` on this machine, bytes by part. Raises ValueError if it cannot be estimated."""
    t, sizes = config.training, model_config(config.paths.model_path)
    if sizes is None:
        raise ValueError(f"{config.paths.model_path} is not on this machine, so its config.json cannot be read")
    longest_sequence = t.max_tokens + (longest_prompt or t.max_prompt_tokens or ASSUMED_PROMPT)
    device_memory = (gpu_memory(t.device) or ASSUMED_GPU) if t.device.startswith("cuda") else None
    card, uses_vllm = engine_card(config), choose_engine(config) == "vllm"
    return estimate_peak_memory(sizes, config, longest_sequence, device_memory, uses_vllm, card and card.total)


def machine_notes(config: Config) -> Iterator[str]:
    """What trainer and engine do not share with these settings, and what a GPU does slowly with them."""
    t = config.training
    with contextlib.suppress(ValueError):  # no engine can be used: told elsewhere
        if t.autocast_dtype == "float16" and config.vllm.dtype != "float16" and choose_engine(config) == "vllm":
            yield f"the trainer computes in float16 and vLLM in {config.vllm.dtype}: set vllm.dtype=float16 too"
    if not t.device.startswith("cuda"):
        return
    if t.dtype == "float32" and t.autocast_dtype is None:
        yield (
            "float32 on a GPU: attention may go without its fast kernels, and products are several times slower than "
            "in bfloat16; training.autocast_dtype=bfloat16 keeps the weights in float32 and computes in bfloat16"
        )
    if t.attention_type.startswith("flash") and t.use_packing:
        yield (
            f"attention_type {t.attention_type} trains with padding, and computes a prompt again for each rollout, for "
            "up to 28 % more FLOPs; sdpa takes torch's own flash kernel and packs"
        )
