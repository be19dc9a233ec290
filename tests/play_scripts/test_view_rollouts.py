"""Looking at rollouts: the filters, and that nothing a model writes is obeyed by a terminal or a browser."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import sys
import time
from pathlib import Path

import pytest
from rollout_cases import SCRIPT, hostile_run, view  # noqa: F401, the fixture `run`

from utils.log.run_log import RunLog
from utils.records import Problem, Prompt, Reward, Rollout


def shown(output: str) -> set[tuple[str, str, str]]:
    """Split, step and number of the responses in the output."""
    return {(split, step, i) for split, i, step in re.findall(r"(eval|train) response (\d) of step (\d)", output)}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], {(split, step, i) for split, step in (("eval", "0"), ("eval", "4"), ("train", "4")) for i in "0123"}),
        (["--split", "train", "--truncated"], {("train", "4", "1"), ("train", "4", "3")}),
        (["--step", "0", "--no-truncated"], {("eval", "0", "0"), ("eval", "0", "2")}),
        (["--step", "1-9", "--min-reward", "0.3"], {("eval", "4", "3"), ("train", "4", "3")}),
        (["--step", "0-3", "--max-reward", "0.1"], {("eval", "0", "0"), ("eval", "0", "1")}),
    ],
)
def test_filters(run: Path, filters: list[str], expected: set[tuple[str, str, str]]) -> None:
    done = view(run, *filters)
    assert done.returncode == 0, done.stderr
    assert shown(done.stdout) == expected


def test_what_is_shown_of_a_rollout(run: Path) -> None:
    done = view(run, "--split", "train", "--min-reward", "0.3")
    assert "train  step 4  group 3  (1 of 1)  1 of 1 right, mean reward 0.300" in done.stdout
    assert "#3  reward 0.3  advantage +1.500\nformat 1, answer 1, 13 tokens, truncated\n" in done.stdout
    assert "prompt: prompt 3" in done.stdout
    assert "truth: truth 3" in done.stdout


@pytest.fixture
def grouped_run(tmp_path: Path) -> Path:
    """Training at steps 2 and 4 with three groups of four each; the last group of each step is all right."""
    rollouts = [
        Rollout(
            Prompt(Problem(f"question {i // 4}", "t"), f"Solve it.\nquestion {i // 4}\nNow:", (1,)),
            f"response {i}", (1,), (0.0,), "stop",
        )
        for i in range(12)
    ]  # fmt: skip
    rewards = [Reward(1.0, float(i % 2 or i >= 8), float(i % 2 or i >= 8)) for i in range(12)]
    with RunLog(tmp_path / "grouped", n_grpo_steps=4) as log:
        for step in (2, 4):
            log.rollouts("train", step, rollouts, rewards, [i / 10 for i in range(12)], n=12, group_size=4)
    return tmp_path / "grouped"


def test_a_group_stands_together_and_a_repeated_prompt_is_folded(grouped_run: Path) -> None:
    lines = view(grouped_run, "--step", "2").stdout.splitlines()
    headings = [line for line in lines if line.startswith("train  step 2")]
    assert headings == [
        f"train  step 2  group {i}  ({i + 1} of 3)  {n} of 4 right, mean reward {n / 4:.3f}"
        for i, n in enumerate((2, 2, 4))
    ]
    asked = [line for line in lines if line.startswith("question: ")]
    assert asked == [f"question: question {i}" for i in range(3)]
    assert lines.count("Now:") == 1  # the prompt in full, once
    assert sum("the same as before" in line for line in lines) == 2
    responses = [line for line in lines if line.startswith("response ")]
    assert responses == [f"response {i}" for i in range(12)]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("rollout_screen")


def test_responses_of_a_group_are_side_by_side(grouped_run: Path, screen: object) -> None:
    rows = [json.loads(line) for line in (grouped_run / "rollouts.jsonl").read_text().splitlines()]
    group = screen.groups_of(rows)[0]
    for width, at_once in ((200, 4), (100, 2), (40, 1)):
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in screen.drawn(group, "1 of 6", False, width)]
        assert all(len(line) <= width for line in lines)
        together = [re.findall(r"response \d", line) for line in lines if "response" in line]
        assert [len(found) for found in together] == [at_once] * (4 // at_once)
        assert "advantage +0.300" in " ".join(" ".join(lines).split())


def test_keys_lead_from_group_to_group(grouped_run: Path, screen: object) -> None:
    rows = [json.loads(line) for line in (grouped_run / "rollouts.jsonl").read_text().splitlines()]
    groups = screen.groups_of(rows)
    pager = screen.Pager(groups, lambda i, fold: [f"group {i} {fold}"] + ["line"] * 20, height=12)
    seen = []
    for key in "npwwwwnp":
        assert pager.press(key)
        seen.append(pager.at)
    assert seen == [1, 0, 1, 3, 4, 4, 5, 4]  # groups 2 and 5 are all right
    assert pager.screen()[0] == "group 4 True"
    pager.press("f")
    assert pager.screen()[0] == "group 4 False"
    assert "10 lines below" in pager.screen()[-1]
    tops = [pager.press(key) and pager.top for key in (" ", " ", "j", "k", "b", "b", "k", "j")]
    assert tops == [10, 11, 11, 10, 0, 0, 0, 1]
    assert pager.press("n") and pager.top == 0
    assert not pager.press("q")


def test_a_terminal_shows_one_group_after_another(grouped_run: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, str(SCRIPT), str(grouped_run)])
    shown = b""

    def read_until(text: str) -> None:
        nonlocal shown
        shown, begun = b"", time.monotonic()
        while text.encode() not in shown:
            assert time.monotonic() < begun + 60
            shown += os.read(terminal, 4096)

    read_until("q quit")
    assert b"group 0  (1 of 6)" in shown
    os.write(terminal, b"\x1b[Cn")  # an arrow and a letter at once
    read_until("group 2  (3 of 6)")
    os.write(terminal, b"w")
    read_until("step 4  group 0  (4 of 6)")
    os.write(terminal, b"q")
    read_until("\x1b[?1049l")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_a_terminal_obeys_nothing(run: Path) -> None:
    output = view(run).stdout
    assert set(output) - {"\n"} == {c for c in output if c.isprintable()}
    assert r"\x1b[31mred\x1b]0;obeyed\x07 \x9b1m \u202etxet \u2028 \ud83d é ∑" in output


def test_bad_input(run: Path, tmp_path: Path) -> None:
    missing = view(tmp_path)
    assert missing.returncode == 2
    assert f"rollouts.jsonl: no such file; runs in it: {run}" in missing.stderr
    none = view(run, "--step", "9")
    assert none.returncode == 2
    assert "no rollout to show (12 logged, none passes the filters)" in none.stderr
    assert "'x' is no step: write 20 or 20-40" in view(run, "--step", "x").stderr
    assert "9-3: the first step is beyond the last" in view(run, "--step", "9-3").stderr
    folder = view(run, "--html", tmp_path)
    assert (folder.returncode, folder.stderr) == (2, f"--html {tmp_path}: is a folder; give a file\n")
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"split": "eval"}\n{"split": "ev')
    done = view(run)
    assert len(shown(done.stdout)) == 12
    assert "left out rows without a proper grpo_step, group" in done.stderr
    assert "or others of a rollout: 1\n" in done.stderr
    assert "line 14: not a whole JSON row" in done.stderr
