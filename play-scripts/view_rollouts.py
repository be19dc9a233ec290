"""Look at what a run's model wrote: page through the logged rollouts, or write them as one HTML page.

    python play-scripts/view_rollouts.py runs/quickstart --split eval --step 40-100 --max-reward 0
    python play-scripts/view_rollouts.py runs/quickstart --html rollouts.html

The page needs no network: it shows a map of problems by GRPO steps, and every response of a problem in turn.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import os
import re
import string
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from utils.log.files import ROLLOUTS_FILE, Row, read_rows
from utils.log.output import unwritable

PAGE = Path(__file__).with_name("rollout_page.html")
FIELDS = {
    "split": str,
    "grpo_step": int,
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
    """The rollouts of a run folder, and a complaint for each line that is none. Raises ValueError without a file."""
    path = run if run.is_file() else run / ROLLOUTS_FILE
    if not path.exists():
        inside = sorted(str(found.parent) for found in run.rglob(ROLLOUTS_FILE)) if run.is_dir() else []
        raise ValueError(f"{path}: no such file" + (f"; runs in it: {', '.join(inside)}" if inside else ""))
    rows, complaints = read_rows(path)
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


def visible(text: str) -> str:
    """Text with every character that a terminal might obey, or that can't be seen, written as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def describe(rollout: Row) -> Text:
    """One rollout for the terminal."""
    colour = "green" if rollout["answer_reward"] > 0 else "yellow" if rollout["format_reward"] > 0 else "red"
    advantage = "" if rollout["advantage"] is None else f"  advantage {rollout['advantage']:+.3f}"
    truth = rollout["truth"] if isinstance(rollout["truth"], str) else " or ".join(map(str, rollout["truth"]))
    rewards = f"reward {rollout['reward']:g} (format {rollout['format_reward']:g}, answer {rollout['answer_reward']:g})"
    length = f"{rollout['response_length']} tokens" + (", truncated" if rollout["finish_reason"] == "length" else "")
    heading = f"{rollout['split']}  step {rollout['grpo_step']}  #{rollout['index']}  {rewards}{advantage}  {length}"
    return Text.assemble(
        (visible(heading) + "\n", f"bold reverse {colour}"),
        (visible(rollout["prompt"]) + "\n", "dim"),
        (visible(rollout["response"]) + "\n", colour),
        ("truth: ", "bold"),
        visible(truth) + "\n",
    )


def page(rollouts: Sequence[Row], title: str) -> str:
    """All rollouts as one HTML page that loads nothing, and in which only its own script can run."""
    template = PAGE.read_text(encoding="utf-8")
    known = [{name: row[name] for name in FIELDS} for row in rollouts]
    data = json.dumps(known).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    filled = string.Template(template).substitute(title=html.escape(title), data=data, policy="$policy")
    script, style = (re.search(rf"<{tag}>(.*?)</{tag}>", filled, re.DOTALL)[1] for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    return filled.replace("$policy", policy, 1)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or its rollouts.jsonl")
    parser.add_argument("--split", choices=["train", "eval", "nonfinite"], help="only these")
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
        arguments.html.write_text(page(chosen, f"Rollouts of {arguments.run}"), encoding="utf-8")
        print(arguments.html)
        return 0
    console = Console(highlight=False)
    os.environ.setdefault("LESS", "-R")  # colours, not their codes
    text = Text("\n").join(map(describe, chosen))
    if console.is_terminal:
        with console.pager(styles=True):
            console.print(text)
    else:
        console.print(text, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
