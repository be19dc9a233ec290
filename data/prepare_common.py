"""What the data preparation scripts share: reading rows, and writing `train.jsonl` and `validation.jsonl`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils.log.output import unwritable
from utils.problems import problem_from_row, save_problems
from utils.records import Problem

Rows = Iterable[tuple[str, dict[str, Any]]]  # each row with the place it comes from
SPLITS = {"train": "train.jsonl", "test": "validation.jsonl"}  # the published split: the file written


def hub_rows(hub_name: str, config: str, split: str) -> Rows:
    """The rows of a data set on the Hugging Face hub. Raises ValueError if they can't be fetched."""
    # Before version 4 a data set could bring a script, and `datasets` asked on the terminal whether to run it.
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("the hub needs the package datasets: pip install datasets; see --raw for files") from error
    try:
        rows = load_dataset(hub_name, config, split=split)
    except (OSError, ValueError) as error:  # no network, no such data set, one with a script
        message = str(error).splitlines()[0]
        raise ValueError(f"cannot fetch {hub_name} ({config}) from the hub: {message}; see --raw for files") from error
    return [(f"{hub_name}/{config}/{split}, row {i}", row) for i, row in enumerate(rows)]


def write_splits(output: Path, splits: dict[str, Rows], published: dict[str, int]) -> None:
    """Write each split's problems and print how many; rows without an answer are left out and listed.

    Raises ValueError, before anything is written, for a bad row, with its place, and for a file that is
    already there.
    """
    for split in splits:
        reason = unwritable(output / SPLITS[split], is_file=True, is_new=True)
        if reason is not None:
            raise ValueError(f"{output / SPLITS[split]}: {reason}")
    read = {split: read_split(split, rows) for split, rows in splits.items()}
    output.mkdir(parents=True, exist_ok=True)
    for split, (problems, without_answer) in read.items():
        save_problems(output / SPLITS[split], problems)
        print(f"wrote {output / SPLITS[split]}: {len(problems)} problems (published: {published[split]})")
        for origin in without_answer:
            print(f"  left out, as it has no answer: {origin}")


def read_split(split: str, rows: Rows) -> tuple[list[Problem], list[str]]:
    """The problems of the rows, and the places of the rows without an answer."""
    problems: list[Problem] = []
    without_answer = []
    for origin, row in rows:
        try:
            problem = problem_from_row(row)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        if problem is None:
            without_answer.append(origin)
        else:
            problems.append(problem)
    if not problems:
        raise ValueError(f"no {split} problem with an answer was found")
    return problems, without_answer


def run_command(description: str, output: str, hub_name: str, prepare: Callable[[argparse.Namespace], None]) -> int:
    """Parse the options, which both scripts share, and prepare. A mistake is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"folder to write ({output})")
    parser.add_argument("--raw", type=Path, metavar="FOLDER", help="read local files instead of the hub")
    parser.add_argument("--hub-name", default=hub_name, help=f"data set on the Hugging Face hub ({hub_name})")
    options = parser.parse_args()
    try:
        if options.raw is not None and not options.raw.is_dir():
            raise ValueError(f"--raw {options.raw} is not a folder")
        prepare(options)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0
