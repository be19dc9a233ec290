"""Evaluation figures against numbers worked by hand and brute force."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.records import Problem, Prompt, Reward, Rollout
from utils.run.evaluate import evaluate, pass_at_k, response_metrics, standard_error

ROOT = Path(__file__).parents[2]


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_chance_of_a_right_one_among_k(case: tuple[int, int, int]) -> None:
    n, n_right, k = case
    answers = [True] * n_right + [False] * (n - n_right)
    draws = list(itertools.combinations(answers, k))
    assert pass_at_k(n, n_right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples per problem, there are 4"):
        pass_at_k(4, 1, 5)


def test_standard_error_by_hand() -> None:
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)  # sqrt((1/4 + 1/4) / 1 / 2)
    assert standard_error([1.0]) == 0.0


def rollout(text: str, length: int, reason: str) -> Rollout:
    return Rollout(Prompt(Problem("?", "1"), "?", (1,)), text, (5,) * length, (-1.0,) * length, reason)


def test_response_metrics_by_hand() -> None:
    rollouts = [rollout("a", 2, "stop"), rollout("b", 4, "length")]
    rewards = [Reward(1.0, 1.0, 1.5), Reward(1.0, 0.0, 0.0)]
    assert response_metrics(rollouts, rewards) == {
        "reward": 0.75,
        "format_reward": 1.0,
        "answer_reward": 0.5,
        "mean_response_length": 3.0,
        "frac_truncated": 0.5,
    }


def test_standard_error_is_over_problems_not_responses() -> None:
    class Engine:
        def generate(self, prompts, n, seed, temperature=None, label="", should_stop=None):
            return [rollout("", 1, "stop") for _ in prompts for _ in range(n)]

    class Scorer:
        def score(self, rollouts):
            return [Reward(0, 0, value) for value in (1.0, 1.0, 0.0, 0.0)]

    metrics, _, _ = evaluate(Engine(), [None, None], Scorer(), seed=0, n=2)
    assert metrics["reward"] == 0.5
    assert metrics["reward_std_error"] == pytest.approx(0.5)


def test_the_command_evaluates_a_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"{a}+{a}=?", "answer": str(2 * a), "level": f"Level {a % 2}"} for a in range(6)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "play-scripts" / "evaluate.py"), str(tiny_model_dir),
            "--config", str(ROOT / "configs" / "quickstart.yaml"), "--samples", "2",
            "--output", str(tmp_path / "figures.json"),
            f"paths.val_data_file={data}", f"paths.prompt_template_file={ROOT / 'data' / 'tiny.prompt'}",
        ],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["greedy"]["problems"] == 6
    assert figures["greedy"]["wrong_format"] == 6  # random weights
    assert figures["sampled"]["wrong_format"] == 12
    assert list(figures["sampled"]["pass_at_k"]) == ["1", "2"]
    assert {level: split["problems"] for level, split in figures["greedy"]["by_level"].items()} == {
        "Level 0": 3,
        "Level 1": 3,
    }


def refused(*arguments: str, cwd: Path) -> str:
    """What the command says when it refuses, which is one line."""
    command = [sys.executable, str(ROOT / "play-scripts" / "evaluate.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_a_checkpoint_outside_a_run_needs_a_config(tiny_model_dir: Path, tmp_path: Path) -> None:
    message = refused(str(tiny_model_dir), cwd=tmp_path)
    assert "lies in no run folder, so its config is unknown; give --config" in message


def test_a_folder_that_is_no_checkpoint_comes_with_those_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    said = "error: {} is no checkpoint: it holds no config.json"
    assert refused("run", cwd=tmp_path) == said.format("run")
    (run / "checkpoints" / "last").symlink_to("step_000002")
    assert refused("run", cwd=tmp_path) == said.format("run") + "; give run/checkpoints/last"
    (run / "checkpoints" / "best").symlink_to("step_000002")
    both = "; give run/checkpoints/best or run/checkpoints/last"
    assert refused("run", cwd=tmp_path) == said.format("run") + both
    assert refused("run/checkpoints", cwd=tmp_path) == said.format("run/checkpoints") + both
    assert refused("./none", cwd=tmp_path) == said.format("./none")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, reason in (("file/figures.json", "is a file"), (".", "is a folder; give a file")):
        message = refused(str(tiny_model_dir), "--output", output, cwd=tmp_path)
        assert message.startswith(f"error: --output {output}: ")
        assert reason in message
