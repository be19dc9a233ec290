"""Make data/math/train.jsonl and validation.jsonl from MATH (Hendrycks et al. 2021, arXiv:2103.03874).

The published split: 7,500 training problems, and the 5,000 test problems as validation. The answer is what the
solution's last \\boxed{} holds.

    python data/prepare_math.py                     from the Hugging Face hub (needs the package datasets)
    python data/prepare_math.py --raw FOLDER        from FOLDER/{train,test}/<subject>/<number>.json, as published,
                                                    or from FOLDER/train.jsonl and test.jsonl or validation.jsonl,
                                                    rows of `problem` with `answer` or `solution`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prepare_common import Rows, hub_rows, run_command, write_splits

from utils.problems import parse_json, read_rows
from utils.rewards.grader import last_box

PUBLISHED = {"train": 7500, "test": 5000}
JSONL_NAMES = {"train": ("train.jsonl",), "test": ("test.jsonl", "validation.jsonl")}
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def prepare(options: argparse.Namespace) -> None:
    splits = {}
    for split in PUBLISHED:
        if options.raw is not None:
            rows = raw_rows(options.raw, split)
        else:
            rows = [row for subject in SUBJECTS for row in hub_rows(options.hub_name, subject, split)]
        splits[split] = [(origin, with_answer(row)) for origin, row in rows]
    write_splits(options.output, splits, PUBLISHED)


def raw_rows(folder: Path, split: str) -> Rows:
    """The rows of a split's JSONL file, or of its folder with one JSON file per problem, by subject and number."""
    names = JSONL_NAMES[split]
    jsonl_files = [folder / name for name in names if (folder / name).is_file()]
    if len(jsonl_files) > 1:
        raise ValueError(
            f"{folder} holds {' and '.join(names)}: which is to be the validation set? Move the other away"
        )
    if jsonl_files:
        return [(f"{jsonl_files[0]}:{line_number}", row) for line_number, row in read_rows(jsonl_files[0])]
    files = sorted((folder / split).glob("*/*.json"), key=lambda file: (file.parent.name, len(file.stem), file.stem))
    if not files:
        inside = sorted({str(place.parent) for name in (split, *names) for place in folder.glob(f"*/{name}")})
        hint = f"; did you mean --raw {' or '.join(inside)}?" if inside else ""
        raise ValueError(f"{folder} holds no {' or '.join(names)}, and no {split}/<subject>/<number>.json{hint}")
    return [(str(file), read_json(file)) for file in files]


def read_json(file: Path) -> dict[str, Any]:
    row = parse_json(file.read_bytes(), str(file))
    if not isinstance(row, dict):
        raise ValueError(f"{file}: expected a JSON object, not {type(row).__name__}")
    return row


def with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MATH under our names: `type` is `subject`, and the answer comes from the solution if not given."""
    renamed = {"subject": row.get("type"), **row}
    if "answer" not in row and isinstance(row.get("solution"), str):
        renamed["answer"] = last_box(row["solution"]) or ""
    return renamed


if __name__ == "__main__":
    sys.exit(run_command(__doc__, "data/math", "EleutherAI/hendrycks_math", prepare))
