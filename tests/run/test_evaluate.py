"""Evaluation figures against numbers worked by hand and brute force."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import forked
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.records import Problem, Prompt, Reward, Rollout
from utils.run.evaluate import evaluate, maj_at_k, pass_at_k, response_metrics, standard_error

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


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["5", "5", "6"], [True, True, False], 3, 1.0),
        (["5", "6", "6"], [True, False, False], 3, 0.0),
        (["5", "10/2", "6", "6", "7"], [True, True, False, False, False], 5, 0.5),  # two ways to be right, two for 6
        (["5", "6", "7"], [True, False, False], 3, 1 / 3),
        (["x + 1", "x+1", "5"], [False, False, True], 3, 0.0),
        ([None, None, "5"], [False, False, True], 3, 1.0),
        ([None, None], [False, False], 2, 0.0),
        (["5", "5", "6", "6", "5"], [True, True, False, False, True], 2, 0.5),  # two blocks; the fifth is in none
    ],
)
def test_majority_by_hand(answers: list[str | None], right: list[bool], k: int, expected: float) -> None:
    assert maj_at_k(answers, right, k) == pytest.approx(expected)


def test_majority_of_one_is_the_share_that_is_right() -> None:
    assert maj_at_k(["1", "2", None, "1"], [True, False, False, True], 1) == 0.5
    with pytest.raises(ValueError, match="maj@5 needs at least 5 samples per problem, there are 4"):
        maj_at_k(["1"] * 4, [True] * 4, 5)


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
    done = forked.run(
        [
            sys.executable, str(ROOT / "play-scripts" / "evaluate.py"), str(tiny_model_dir),
            "--config", str(ROOT / "configs" / "quickstart.yaml"), "--samples", "2",
            "--output", str(tmp_path / "out"),
            f"paths.val_data_file={data}", f"paths.prompt_template_file={ROOT / 'data' / 'tiny.prompt'}",
        ],
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())["sets"][str(data)]
    assert figures["greedy"]["problems"] == 6
    assert figures["greedy"]["wrong_format"] == 6  # random weights
    assert figures["sampled"]["wrong_format"] == 12
    assert list(figures["sampled"]["pass_at_k"]) == ["1", "2"]
    assert f"{data}: sampled, 12 responses to 6 problems" in done.stdout
    written = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [(row["split"], row["group"]) for row in written] == [
        *(("greedy", i) for i in range(6)), *(("sampled", i // 2) for i in range(12))
    ]  # fmt: skip
    viewer = [sys.executable, str(ROOT / "play-scripts" / "view_rollouts.py"), str(tmp_path / "out")]
    seen = forked.run([*viewer, "--split", "sampled"])
    assert seen.stdout.count("0 of 2 right") == 6, seen.stderr
    assert {level: split["problems"] for level, split in figures["greedy"]["by_level"].items()} == {
        "Level 0": 3,
        "Level 1": 3,
    }


def refused(*arguments: str, cwd: Path) -> str:
    """What the command says when it refuses, which is one line."""
    command = [sys.executable, str(ROOT / "play-scripts" / "evaluate.py"), *arguments]
    done = forked.run(command, cwd=cwd)
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
    for output, reason in (("file/out", "is a file"), (".", "already holds something")):
        message = refused(str(tiny_model_dir), "--output", output, cwd=tmp_path)
        assert message.startswith(f"error: --output {output}: ")
        assert reason in message


def test_several_data_files_are_one_table(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = [{"problem": f"{a}+{a}=?", "answer": str(2 * a)} for a in range(4)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, str(ROOT / "play-scripts" / "evaluate.py"), str(tiny_model_dir),
        "--config", str(ROOT / "configs" / "quickstart.yaml"), "--samples", "4",
        "--output", "out", f"paths.prompt_template_file={ROOT / 'data' / 'tiny.prompt'}",
        "--data", "one/test.jsonl", "two/test.jsonl",
    ]  # fmt: skip
    done = forked.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in ("one/test.jsonl", "two/test.jsonl"):
        (line,) = [line for line in done.stdout.splitlines() if path in line and "│" in line]
        assert line.count("0.0000 ± 0.0000") == 4  # greedy, sampled, pass@4, maj@4
    rows = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows[::4]] == [
        "one/test greedy", *["one/test sampled"] * 4, "two/test greedy", *["two/test sampled"] * 4
    ]  # fmt: skip
    assert len(json.loads((tmp_path / "out" / "figures.json").read_text())["sets"]) == 2
    done = forked.run([*command, "three.jsonl", "--output", "other"], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("three.jsonl")) == (2, 1)
