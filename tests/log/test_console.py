"""What a run prints: plain lines without a terminal, a progress bar in one."""

from __future__ import annotations

import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from utils.log import console as console_module
from utils.log.run_log import RunLog


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, n_grpo_steps=100) as log:
        log.train_step(7, {"reward": 0.5, "loss": math.nan, "tokens_per_second": 12345.6})
        log.note("x" * 300)
        log.warn("[bold]as it is[/bold]")
    assert capsys.readouterr().out.splitlines() == [
        "step   7/100  reward 0.500  loss nan  tokens/s 12,346  left 0:00:00",
        "x" * 300,
        "warning: [bold]as it is[/bold]",
    ]


def test_on_policy_the_share_of_groups_with_a_signal_stands_in_for_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"reward": 0.5, "loss": 1e-9, "frac_zero_std_groups": 0.25}
    with RunLog(tmp_path, n_grpo_steps=2) as log:
        log.train_step(1, metrics | {"mean_ratio": 1.0})
        log.train_step(2, metrics | {"mean_ratio": 1.01})
    first, second = capsys.readouterr().out.splitlines()
    assert "groups with a signal 75%" in first and "loss" not in first
    assert "groups with a signal 75%" in second and "loss 1e-09" in second


def test_time_left_is_told_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: clock[0])
    with RunLog(tmp_path, n_grpo_steps=10) as log:
        clock[0] = 400.0
        log.evaluation(0, {"reward": 0.5})  # not counted
        for step, now in ((1, 430.0), (2, 440.0), (10, 500.0)):
            clock[0] = now
            log.train_step(step, {"reward": 0.5})
    left = [line.partition("  left ")[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert left == ["0:04:30", "0:02:40", ""]  # 30 s for 9 steps each, 20 s for 8 each


def test_progress_bar_in_a_terminal(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from utils.log.run_log import RunLog
with RunLog(Path(sys.argv[1]), n_grpo_steps=3) as log:
    for step in (1, 2, 3):
        log.train_step(step, {"reward": step / 4})
    log.evaluation(3, {"reward": 0.875})
    log.end_progress()
    log.note("what to try next")
"""
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # how a Linux terminal says that nobody writes to it any more
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert child.wait() == 0
    text = shown.decode()
    assert "step 2/3  reward 0.500" in text
    bars, _, ending = text[text.rindex("eval reward 0.875") :].partition("\x1b[?25h")  # the cursor is back
    assert "3/3" in bars
    assert "left" in bars
    assert " ".join(ending.split()) == "what to try next"  # below the bar, and nothing after it
