"""The last lines of a run: where what it made is, and what people usually do next."""

from __future__ import annotations

from pathlib import Path

from utils.ending import Status
from utils.run_files import METRICS_FILE, ROLLOUTS_FILE

WHAT_A_RUN_LEAVES = {
    "metrics": METRICS_FILE,
    "rollouts": ROLLOUTS_FILE,
    "checkpoint": "checkpoints/last",
    "best checkpoint": "checkpoints/best",
    "picture": "reward_curve.png",
}


def closing_lines(output_dir: Path, status: Status) -> list[str]:
    """What lies in `output_dir`, then commands to try."""
    files = [
        f"  {what:16} {output_dir / file}" for what, file in WHAT_A_RUN_LEAVES.items() if (output_dir / file).exists()
    ]
    commands = [
        f"  python play-scripts/view_rollouts.py {output_dir}",
        f"  python play-scripts/plot_runs.py {output_dir}",
    ]
    if (output_dir / "checkpoints/last").exists():
        commands.insert(0, f"  python play-scripts/evaluate.py {output_dir}/checkpoints/last")
    resume = "  the same command with --resume, to go on"
    if status == Status.FINISHED:
        commands.append(resume + " with more steps")
    else:
        commands.insert(0, resume)
    return [*files, "what to try next:", *commands]
