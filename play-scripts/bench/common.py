"""What the benchmarks share: shapes of models, what they ran on, and clocks."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

QWEN_1_5B = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
QWEN_0_5B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SHAPES = {
    name: {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True, **sizes}
    for name, sizes in {"qwen2.5-1.5b": QWEN_1_5B, "qwen2.5-0.5b": QWEN_0_5B}.items()
}


TRL, TRL_OUR_KERNELS = "TRL GRPOTrainer", "TRL with our kernels"


def hardware(device: str) -> str:
    """What the figures were measured on, and torch's version."""
    version = f"torch {torch.__version__}"
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {version}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} ({capability}), {os.cpu_count()} cores, {torch.get_num_threads()} torch thread(s), {version}"


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Phases:
    """Seconds by phase; a phase inside another one stops the outer one's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.running = device, {}, []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._tick()
        self.running.append(name)
        try:
            yield
        finally:
            self._tick()
            self.running.pop()

    def _tick(self) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


class Clock:
    """Time from lap to lap, on the wall and of the processor (all threads), which busy neighbours disturb less."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []
        self.lap()

    def lap(self) -> None:
        wait_for(self.device)
        self.times.append((time.perf_counter(), time.process_time()))

    def laps(self) -> dict[str, list[float]]:
        walls, cpus = zip(*self.times, strict=True)
        return {
            "seconds": [later - sooner for sooner, later in itertools.pairwise(walls)],
            "cpu_seconds": [later - sooner for sooner, later in itertools.pairwise(cpus)],
        }
