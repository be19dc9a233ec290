"""Asking a model: the prompt it was trained with, its response, and nothing that a terminal would obey."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]


def chat(model: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    command = [
        sys.executable, str(ROOT / "play-scripts" / "chat.py"), str(model),
        "--config", str(ROOT / "configs" / "quickstart.yaml"),
        f"paths.prompt_template_file={ROOT / 'data' / 'tiny.prompt'}", *arguments,
    ]  # fmt: skip
    return forked.run(command, input=typed)


@pytest.mark.slow
def test_a_trained_model_answers_in_its_format(world: Path) -> None:
    template = f"paths.prompt_template_file={world / 'prompt'}"
    done = chat(world / "model", "--greedy", template, typed="2\n4\n\nnever asked\n")
    assert done.returncode == 0, done.stderr
    responses = [line for line in done.stdout.splitlines() if "</think> <answer>" in line]
    assert len(responses) == 2
    assert all(line.endswith("</answer>") for line in responses)  # the stop string ends it


def test_one_question_and_the_same_seed(tiny_model_dir: Path) -> None:
    one, again, other = (
        chat(tiny_model_dir, "--question", "1+1=?", "--seed", seed, "training.max_tokens=9") for seed in "112"
    )
    assert one.returncode == 0, one.stderr
    assert one.stdout == again.stdout != other.stdout
    assert one.stdout.endswith("tokens, ran into max_tokens]\n")
    assert "User:" not in one.stdout  # the prompt is not repeated


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = chat(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {tmp_path} is no checkpoint" in done.stderr
