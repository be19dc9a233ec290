"""Peak memory, measured between named points of a step."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

PHASES_ASLEEP = ("train",)  # of the GRPO step, while a vLLM engine may sleep


class MemoryTracker:
    """Peak memory between named points of the step.

    On CUDA that is what tensors took on the device, as the allocator counts it on the host: nothing waits. On the CPU
    it is the process's peak resident memory (where the system cannot reset that peak, the peak since the start).
    """

    def __init__(self, device: torch.device | str, enabled: bool = True) -> None:
        self.on_cuda = str(device).startswith("cuda")
        self.device = device
        self.enabled = enabled
        self.peaks: dict[str, int] = {}
        if enabled:
            self._reset()

    def start(self) -> None:
        """Forget the peak so far, so that a phase is not charged for what came before it."""
        if self.enabled:
            self._reset()

    def mark(self, name: str) -> int:
        """Record the peak since the last mark under `name`; repeated names keep the maximum. Returns it in bytes."""
        if not self.enabled:
            return 0
        peak = self._peak()
        self.peaks[name] = max(peak, self.peaks.get(name, 0))
        self._reset()
        return peak

    def report(self) -> dict[str, int]:
        """Bytes by name, in the order first marked; then start over. Empty if tracking is off."""
        peaks, self.peaks = self.peaks, {}
        return peaks

    def _peak(self) -> int:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
        in_bytes = sys.platform == "darwin"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if in_bytes else 1024)

    def _reset(self) -> None:
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        switch = Path("/proc/self/clear_refs")
        with contextlib.suppress(OSError):  # not Linux, or a /proc that may not be written
            switch.write_text("5")  # "reset the peak resident set size", man 5 proc


def peak_memory_metrics(peaks: dict[str, int], asleep_gb: float = 0.0) -> dict[str, float]:
    """Peak bytes by phase -> `peak_memory_gb`, the largest, and one metric per phase; GB of 10^9 bytes.

    `asleep_gb` is what vLLM gave back while it slept: torch's allocator does not notice
    this, and still counts it.
    """
    by_phase = {
        f"{phase}_peak_memory_gb": peak / 1e9 - (asleep_gb if phase in PHASES_ASLEEP else 0.0)
        for phase, peak in peaks.items()
    }
    return {"peak_memory_gb": max(by_phase.values()), **by_phase} if by_phase else {}
