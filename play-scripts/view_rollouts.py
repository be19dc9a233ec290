"""Look at what a run's model wrote, group by group: on the terminal, or as one HTML page.

    python play-scripts/view_rollouts.py runs/quickstart --split train --step 40-100
    python play-scripts/view_rollouts.py runs/quickstart --html rollouts.html

A group is a question with all its responses, rewards and advantages side by side. On a terminal, n and p go to the next
and the previous group, w to the next with a wrong answer, f shows its whole prompt, q ends. The page needs no network.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import re
import string
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rollout_screen import browse, folded, group_parts, groups_of

from utils.log.files import METRICS_FILE, ROLLOUTS_FILE, Row, is_evaluation, read_rows, step_of
from utils.log.output import unwritable

PAGE = Path(__file__).with_name("rollout_page.html")
FIELDS = {
    "split": str,
    "grpo_step": int,
    "group": int,
    "index": int,
    "question": str,
    "prompt": str,
    "response": str,
    "truth": (str, list),
    "format_reward": (int, float),
    "answer_reward": (int, float),
    "reward": (int, float),
    "advantage": (int, float, type(None)),
    "finish_reason": str,
    "response_length": int,
}


def load_rollouts(run: Path) -> tuple[list[Row], list[str]]:
    """The rollouts of a run folder, and a complaint for each line that is not one. Raises ValueError without a file."""
    path = run if run.is_file() else run / ROLLOUTS_FILE
    if not path.exists():
        inside = sorted(str(file.parent) for file in run.rglob(ROLLOUTS_FILE)) if run.is_dir() else []
        raise ValueError(f"{path}: no such file" + (f"; runs in it: {', '.join(inside)}" if inside else ""))
    rows, complaints = read_rows(path)
    rows = [({"group": row["index"]} if "index" in row else {}) | row for row in rows]  # older runs have no groups
    lacking = [[name for name, kind in FIELDS.items() if not isinstance(row.get(name, ...), kind)] for row in rows]
    n_lacking = sum(map(bool, lacking))
    if n_lacking:
        names = ", ".join(next(filter(None, lacking)))
        complaints.append(f"{path}: left out rows without a proper {names}, or others of a rollout: {n_lacking}")
    return [row for row, names in zip(rows, lacking, strict=True) if not names], complaints


def step_range(text: str) -> tuple[int, int]:
    """20 is that step, 20-40 those from 20 to 40."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no step: write 20 or 20-40")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise argparse.ArgumentTypeError(f"{text}: the first step is beyond the last")
    return first, last


def select(rollouts: Iterable[Row], arguments: argparse.Namespace) -> list[Row]:
    """Those that pass every filter."""
    first, last = arguments.step
    return [
        r
        for r in rollouts
        if (arguments.split in (None, r["split"]))
        and first <= r["grpo_step"] <= last
        and arguments.min_reward <= r["reward"] <= arguments.max_reward
        and (arguments.truncated in (None, r["finish_reason"] == "length"))
    ]


def whole_means(run: Path) -> dict[str, dict[int, Row]]:
    """{split: {step: {metric: value}}} of all the responses of a run, of which only a few are logged."""
    path = (run.parent if run.is_file() else run) / METRICS_FILE
    means: dict[str, dict[int, Row]] = {"eval": {}, "train": {}}
    for row in read_rows(path)[0] if path.exists() else []:
        split = "eval" if is_evaluation(row) else "train"
        values = {name: row.get(f"{split}/{name}") for name in ("reward", "mean_response_length")}
        means[split][step_of(row)] = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return means


def page(rollouts: Sequence[Row], title: str, means: dict[str, dict[int, Row]]) -> str:
    """All rollouts as one HTML page that loads nothing, and in which only its own script can run."""
    template = PAGE.read_text(encoding="utf-8")
    known = [{name: row[name] for name in FIELDS} for row in rollouts]
    data = json.dumps({"rollouts": known, "run": means})
    for character in "&<>":
        data = data.replace(character, f"\\u{ord(character):04x}")
    filled = string.Template(template).substitute(title=html.escape(title), data=data, policy="$policy")
    script, style = (re.search(rf"<{tag}>(.*?)</{tag}>", filled, re.DOTALL)[1] for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    return filled.replace("$policy", policy, 1)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or its rollouts.jsonl")
    parser.add_argument("--split", help="only these: train, eval, nonfinite")
    parser.add_argument("--step", type=step_range, default=(0, sys.maxsize), metavar="K or K-L", help="GRPO steps")
    parser.add_argument("--min-reward", type=float, default=-math.inf, metavar="R")
    parser.add_argument("--max-reward", type=float, default=math.inf, metavar="R")
    parser.add_argument("--truncated", action=argparse.BooleanOptionalAction, help="only those that ran out of tokens")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page in place of showing them here")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    reason = arguments.html and unwritable(arguments.html, is_file=True)
    if reason:
        print(f"--html {arguments.html}: {reason}", file=sys.stderr)
        return 2
    try:
        rollouts, complaints = load_rollouts(arguments.run)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = select(rollouts, arguments)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if not chosen:
        print(f"no rollout to show ({len(rollouts)} logged, none passes the filters)", file=sys.stderr)
        return 2
    if arguments.html:
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        text = page(chosen, f"Rollouts of {arguments.run}", whole_means(arguments.run))
        arguments.html.write_text(text, encoding="utf-8")
        print(arguments.html)
        return 0
    groups = groups_of(chosen)
    if sys.stdout.isatty() and sys.stdin.isatty():
        browse(groups)
        return 0
    console = Console(highlight=False)
    for i, (group, fold) in enumerate(zip(groups, folded(groups), strict=True), 1):
        for part in group_parts(group, f"{i} of {len(groups)}", fold, columns=1):
            console.print(part, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
