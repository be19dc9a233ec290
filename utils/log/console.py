"""How a training run looks in the terminal: a line per step, with a progress bar below the lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from utils.log.progress import ProgressBar

SIGNAL = "groups with a signal"  # what is not in train/frac_zero_std_groups: these alone teach something

# metric, its name on the console, its format
TRAIN_PARTS = (
    ("train/reward", "reward", ".3f"),
    (SIGNAL, SIGNAL, ".0%"),
    ("train/loss", "loss", ".3g"),
    ("train/grad_norm", "grad norm", ".3g"),
    ("train/mean_response_length", "length", ".1f"),
    ("train/frac_truncated", "truncated", ".1%"),
    ("train/entropy", "entropy", ".3f"),
    ("train/tokens_per_second", "tokens/s", ",.0f"),
    ("train/step_dt", "seconds", ".2f"),
)
EVAL_PARTS = (
    ("eval/reward", "reward", ".3f"),
    ("eval/format_reward", "format", ".3f"),
    ("eval/answer_reward", "answer", ".3f"),
    ("eval/mean_response_length", "length", ".1f"),
)


class TrainingConsole:
    """Lines on stdout, with the progress bar below them. Without a terminal there is no bar."""

    def __init__(self, n_grpo_steps: int, completed: int) -> None:
        self._n_grpo_steps = n_grpo_steps
        self._bar = ProgressBar("GRPO steps", n_grpo_steps, completed, stays=True)
        self.line, self.close = self._bar.line, self._bar.close
        self._completed, self._started = completed, time.monotonic()  # when the first step of this process began

    def train_step(self, grpo_step: int, metrics: Mapping[str, float]) -> None:
        line = self._describe("step", grpo_step, _worth_showing(metrics), TRAIN_PARTS)
        left = self._n_grpo_steps - grpo_step
        if left > 0:
            seconds = (time.monotonic() - self._started) / max(1, grpo_step - self._completed) * left
            line += f"  left {timedelta(seconds=round(seconds))}"
        self.line(line)
        self._bar.show(completed=grpo_step)

    def evaluation(self, grpo_step: int, metrics: Mapping[str, float]) -> None:
        self.line(self._describe("eval", grpo_step, metrics, EVAL_PARTS), style="bold")
        if grpo_step == self._completed:  # an evaluation before the first step says nothing about those to come
            self._started = time.monotonic()
        if "eval/reward" in metrics:
            self._bar.show(label=f"eval reward {metrics['eval/reward']:.3f}")

    def _describe(
        self, label: str, grpo_step: int, metrics: Mapping[str, float], parts: tuple[tuple[str, str, str], ...]
    ) -> str:
        width = len(str(self._n_grpo_steps))
        shown = [f"{name} {float(metrics[metric]):{form}}" for metric, name, form in parts if metric in metrics]
        return "  ".join([f"{label} {grpo_step:{width}}/{self._n_grpo_steps}", *shown])


def _worth_showing(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step with the share of groups that have a signal. At a ratio of 1 the loss is left out: with the
    default loss and aggregation it adds up to 0 within a group, whatever the policy learns."""
    shown = dict(metrics)
    if "train/frac_zero_std_groups" in metrics:
        shown[SIGNAL] = 1 - metrics["train/frac_zero_std_groups"]
        if metrics.get("train/mean_ratio") == 1.0:
            shown.pop("train/loss", None)
    return shown
