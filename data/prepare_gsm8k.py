"""Make data/gsm8k/train.jsonl and validation.jsonl from GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

The published split: 7,473 training problems, and the 1,319 test problems as validation. The answer is the number after
`####`, without thousands commas.

    python data/prepare_gsm8k.py                    from the Hugging Face hub (needs the package datasets)
    python data/prepare_gsm8k.py --raw FOLDER       from FOLDER/train.jsonl and FOLDER/test.jsonl, as published
"""

from __future__ import annotations

import argparse
import sys

from prepare_common import hub_rows, run_command, write_splits

from utils.problems import read_rows

PUBLISHED = {"train": 7473, "test": 1319}


def prepare(options: argparse.Namespace) -> None:
    splits = {}
    for split in PUBLISHED:
        if options.raw is not None:
            file = options.raw / f"{split}.jsonl"
            splits[split] = [(f"{file}:{line_number}", row) for line_number, row in read_rows(file)]
        else:
            splits[split] = hub_rows(options.hub_name, "main", split)
    write_splits(options.output, splits, PUBLISHED)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, "data/gsm8k", "openai/gsm8k", prepare))
