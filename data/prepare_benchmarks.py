"""Make a data file for each of several mathematics benchmarks, which evaluate.py takes together.

    python data/prepare_benchmarks.py                       all of them, from the Hugging Face hub (needs datasets)
    python data/prepare_benchmarks.py aime24 math500        only these
    python data/prepare_benchmarks.py --raw FOLDER          from FOLDER/aime24.jsonl and so on, as published
    python play-scripts/evaluate.py CHECKPOINT --data data/benchmarks/*.jsonl --samples 16

Each becomes data/benchmarks/NAME.jsonl. A row's answer is its `answer`, else its `final_answer` (of a list, each
counts as right), else what the last box of its `solution` holds. OlympiadBench is its English competition problems
without pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prepare_common import hub_rows, read_split, run_command

from utils.log.output import unwritable
from utils.problems import read_rows, save_problems
from utils.rewards.grader import last_box

# name: the data set on the hub, its split, and how many problems were published
BENCHMARKS = {
    "aime24": ("HuggingFaceH4/aime_2024", "train", 30),
    "aime25": ("math-ai/aime25", "test", 30),
    "amc23": ("math-ai/amc23", "test", 40),
    "math500": ("HuggingFaceH4/MATH-500", "test", 500),
    "minerva": ("math-ai/minervamath", "test", 272),
    "olympiadbench": ("math-ai/olympiadbench", "test", 674),
}


def prepare(options: argparse.Namespace) -> None:
    """Read all before anything is written. Raises ValueError for a bad row, with its place."""
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    names = options.names or list(BENCHMARKS)
    outputs = {name: options.output / f"{name}.jsonl" for name in names}
    for path in outputs.values():
        reason = unwritable(path, is_file=True, is_new=True)
        if reason is not None:
            raise ValueError(f"{path}: {reason}")
    read = {name: read_split(name, rows_of(name, options.raw)) for name in names}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (problems, without_answer) in read.items():
        save_problems(outputs[name], problems)
        print(f"wrote {outputs[name]}: {len(problems)} problems (published: {BENCHMARKS[name][2]})")
        for place in without_answer:
            print(f"  left out, as it has no answer: {place}")


def rows_of(name: str, raw: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a benchmark, with their places, under the names that a data file has."""
    hub_name, split, _ = BENCHMARKS[name]
    if raw is None:
        rows = hub_rows(hub_name, "default", split)
    else:
        rows = [(f"{raw / name}.jsonl:{line_number}", row) for line_number, row in read_rows(raw / f"{name}.jsonl")]
    return [(place, renamed(row)) for place, row in rows]


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a data file has it: question, answer, and level and subject if it tells them."""
    problem = {key: row[key] for key in ("problem", "question") if key in row}
    answers = [row[key] for key in ("answer", "final_answer") if row.get(key) is not None]
    if answers:
        answer = [str(each) for each in answers[0]] if isinstance(answers[0], list) else str(answers[0])
        problem["answer"] = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    elif "solution" in row:
        problem["answer"] = last_box(str(row["solution"])) or ""
    return problem | {key: str(row[key]) for key in ("level", "subject") if row.get(key) is not None}


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; none is all")


if __name__ == "__main__":
    sys.exit(run_command(__doc__, "data/benchmarks", None, prepare, add_names))
