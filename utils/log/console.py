"""How a training run looks in the terminal: a line a step, and a progress bar below where there is a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# metric, its name on the console, its format
TRAIN_PARTS = (
    ("train/reward", "reward", ".3f"),
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
    """Lines on stdout, the progress bar under them. Without a terminal there is no bar, and no line is wrapped."""

    def __init__(self, n_grpo_steps: int, completed: int) -> None:
        self._n_grpo_steps = n_grpo_steps
        self._console = get_console()  # the one that generation's own bar uses, so that the two stack
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=2,
            speed_estimate_period=3600,  # a step may take minutes
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("GRPO steps", total=n_grpo_steps, completed=completed)
        self._progress.start()

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def train_step(self, grpo_step: int, metrics: Mapping[str, float]) -> None:
        self.line(self._describe("step", grpo_step, metrics, TRAIN_PARTS))
        self._progress.update(self._bar, completed=grpo_step)

    def evaluation(self, grpo_step: int, metrics: Mapping[str, float]) -> None:
        self.line(self._describe("eval", grpo_step, metrics, EVAL_PARTS), style="bold")
        if "eval/reward" in metrics:
            self._progress.update(self._bar, description=f"eval reward {metrics['eval/reward']:.3f}")

    def close(self) -> None:
        self._progress.stop()

    def _describe(
        self, label: str, grpo_step: int, metrics: Mapping[str, float], parts: tuple[tuple[str, str, str], ...]
    ) -> str:
        width = len(str(self._n_grpo_steps))
        shown = [f"{name} {float(metrics[metric]):{form}}" for metric, name, form in parts if metric in metrics]
        return "  ".join([f"{label} {grpo_step:{width}}/{self._n_grpo_steps}", *shown])
