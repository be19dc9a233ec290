"""The clock and the memory of a GRPO step: how long each phase took, and its peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from utils.run.memory_tracker import MemoryTracker, peak_memory_metrics


class StepMeter:
    """Collects the figures of one GRPO step after another."""

    def __init__(self, memory: MemoryTracker) -> None:
        self._memory = memory
        self.start()

    def start(self) -> None:
        """Begin a step: its clock starts, its figures are empty."""
        self._started = time.perf_counter()
        self._metrics: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step as `<name>_dt`, repeats added up, and note its peak memory."""
        self._memory.start()
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._metrics[f"{name}_dt"] = self._metrics.get(f"{name}_dt", 0.0) + time.perf_counter() - started
        self._memory.mark(name)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add figures that another part reports."""
        self._metrics |= metrics

    def finish(self, n_tokens: int) -> dict[str, float]:
        """End the step, in which `n_tokens` were sampled; returns all its figures."""
        seconds = time.perf_counter() - self._started
        peaks = peak_memory_metrics(self._memory.report(), self._metrics.get("sleep_freed_gb", 0.0))
        return {**self._metrics, **peaks, "step_dt": seconds, "tokens_per_second": n_tokens / seconds}
