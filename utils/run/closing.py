"""The last lines of a run: its files, and commands that people usually try next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from utils.log.files import METRICS_FILE, ROLLOUTS_FILE
from utils.run.ending import Status

WHAT_A_RUN_LEAVES = {
    "metrics": METRICS_FILE,
    "rollouts": ROLLOUTS_FILE,
    "checkpoint": "checkpoints/last",
    "best checkpoint": "checkpoints/best",
    "picture": "reward_curve.png",
}


def closing_lines(output_dir: Path, status: Status) -> list[str]:
    """The files in `output_dir`, then commands to try."""
    files = [
        f"  {what:16} {output_dir / file}" for what, file in WHAT_A_RUN_LEAVES.items() if (output_dir / file).exists()
    ]
    commands = [f"  python play-scripts/plot_runs.py {output_dir}"]
    rollouts = output_dir / ROLLOUTS_FILE
    if rollouts.exists() and rollouts.stat().st_size:
        commands.insert(0, f"  python play-scripts/view_rollouts.py {output_dir}")
    saved = (output_dir / "checkpoints/last").exists()
    if saved:
        commands.insert(0, f"  python play-scripts/evaluate.py {output_dir}/checkpoints/last")
    resume = "  the same command with --resume"
    if status == Status.FINISHED:
        commands.append(f"{resume} and a larger training.n_grpo_steps, to go on")
    elif status in (Status.COLLAPSED, Status.NONFINITE):
        if (output_dir / "checkpoints/best").exists():
            best = f"paths.model_path={output_dir}/checkpoints/best"
            commands.insert(0, f"  its best weights as the start of another run: {best}")
        commands.insert(0, "  a lower training.learning_rate, in another paths.output_dir")
    else:
        commands.insert(0, f"{resume}, to {'go on' if saved else 'begin anew'}")
    if sys.prefix == sys.base_prefix or "VIRTUAL_ENV" not in os.environ:
        commands.insert(0, "  source .venv/bin/activate")
    return [*files, "what to try next:", *commands]
