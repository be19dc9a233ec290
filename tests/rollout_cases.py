"""A run with rollouts that try to be obeyed, and the command that shows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from utils.log.run_log import RunLog
from utils.records import Problem, Prompt, Reward, Rollout

SCRIPT = Path(__file__).parents[1] / "play-scripts" / "view_rollouts.py"
HOSTILE = [
    "</script><script>document.title = 'obeyed'</script>",
    "<img src=x onerror=\"document.title = 'obeyed'\"><style>body { display: none }</style>",
    "<!-- <script> ]]> &lt;b&gt; $policy ${title} {data}",
    "\x1b[31mred\x1b]0;obeyed\x07 \x9b1m \u202etxet \u2028 \ud83d é ∑",
]


def view(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(name="run")
def hostile_run(tmp_path: Path) -> Path:
    """Evaluations at steps 0 and 4, training at 4: response i has reward i / 10, and is truncated where i is odd."""
    with RunLog(tmp_path / "run", n_grpo_steps=4) as log:
        for split, step in (("eval", 0), ("eval", 4), ("train", 4)):
            rollouts = [
                Rollout(
                    Prompt(Problem(f"question {i}", f"truth {i}"), f"prompt {i}", (1,)),
                    f"{split} response {i} of step {step} {HOSTILE[i]}",
                    (1,) * (10 + i),
                    (0.0,) * (10 + i),
                    "length" if i % 2 else "stop",
                )
                for i in range(4)
            ]
            rewards = [Reward(float(i > 1), float(i > 2), i / 10) for i in range(4)]
            log.rollouts(split, step, rollouts, rewards, [i - 1.5 for i in range(4)] if split == "train" else None, n=4)
    return tmp_path / "run"
