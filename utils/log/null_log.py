"""The log of a rank that writes nothing: rank 0 writes for all."""

from __future__ import annotations

from typing import Any

from utils.log.metrics import written_names


class NullLog:
    """Answers as `RunLog` does, whose metrics have other names once they are written, and writes nothing."""

    lost_evaluation = False
    tracker_id = None

    def train_step(self, grpo_step: int, metrics: dict[str, float]) -> dict[str, float]:
        return written_names(metrics, "train/")

    def evaluation(self, grpo_step: int, metrics: dict[str, float]) -> dict[str, float]:
        return written_names(metrics, "eval/")

    def rollouts(self, *arguments: Any, **options: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def end_progress(self) -> None:
        pass

    def close(self, status: str, detail: str = "") -> None:
        pass
