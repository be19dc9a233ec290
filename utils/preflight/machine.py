"""What this machine has, asked without torch, and what a run would take of its memory."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from configs.defaults import Config
from utils.engines import choose_engine
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


def gpu_memory() -> int | None:
    """Bytes of memory that the first visible GPU has, by the driver's tool; None if there is no GPU or no such tool."""
    asked = _ask_driver()
    return asked and asked[0]


def this_card() -> Card:
    """The first visible GPU's memory and what was free of it when it was first asked, or a card that is assumed."""
    asked = _ask_driver()
    if asked is None:
        return Card(ASSUMED_GPU, ASSUMED_GPU, "assumed, as no GPU here tells its memory")
    return Card(*asked)


@functools.cache
def _ask_driver() -> tuple[int, int] | None:
    """(total, free) bytes. Asked once, before this process itself takes any."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    first_visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first_visible:  # an index or a UUID; the tool takes both, and lists all cards without it
        command.append(f"--id={first_visible}")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        total, free = listed.splitlines()[0].split(",")
        return int(total) * 2**20, int(free) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # some cards answer "[N/A]"
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
    device_memory = (gpu_memory() or ASSUMED_GPU) if t.device.startswith("cuda") else None
    return estimate_peak_memory(sizes, config, longest_sequence, device_memory, choose_engine(config) == "vllm")


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
