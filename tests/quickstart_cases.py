"""The quickstart's command in a fork of the test's process, on a world that a test names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked

ROOT = Path(__file__).parents[1]


def command_line(world: Path, output: Path, *overrides: str) -> list[str]:
    template = world / "prompt" if (world / "prompt").exists() else ROOT / "data" / "tiny.prompt"
    return [
        sys.executable, str(ROOT / "train_grpo.py"), "--config", str(ROOT / "configs" / "quickstart.yaml"),
        f"paths.train_data_file={world}/train.jsonl", f"paths.val_data_file={world}/validation.jsonl",
        f"paths.prompt_template_file={template}", f"paths.model_path={world}/model",
        f"paths.output_dir={output}", *overrides,
    ]  # fmt: skip


def train(world: Path, output: Path, *overrides: str) -> subprocess.CompletedProcess:
    return forked.run(command_line(world, output, *overrides), cwd=ROOT)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
