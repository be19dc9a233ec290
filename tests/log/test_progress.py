"""How far generation is, told in a log."""

from __future__ import annotations

import pytest

from utils.log import progress


def test_without_a_terminal_a_line_per_minute_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress_bar("evaluation", 2000) as advance:
        for _ in range(20):
            clock[0] += 25.0
            advance(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluation 300 of 2,000  left 0:07:05"  # 75 s for 300: 425 s for 1,700
    assert [line.split()[1] for line in lines] == ["300", "600", "900", "1,200", "1,500", "1,800"]


def test_a_first_minute_in_which_nothing_ends_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress_bar("rollouts", 64) as advance:
        clock[0] += 61.0
        advance(0)
    assert capsys.readouterr().out == "rollouts 0 of 64  left unknown\n"


def test_what_is_quick_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("rollouts", 10) as advance:
        advance(5)
        advance(5)
    assert capsys.readouterr().out == ""
