"""The script that measures the grader: its default sample, its table and its page."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_grader.py", *arguments])
    runpy.run_path(str(ROOT / "play-scripts" / "eval_grader.py"), run_name="__main__")


def write_rows(path: Path, *rows: tuple[str, str, bool]) -> str:
    keys = ("truth", "prediction", "match")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True)) | {"group": "mine"}) + "\n" for row in rows))
    return str(path)


def test_without_arguments_it_grades_the_committed_sample(monkeypatch, capsys):
    run(monkeypatch, "--no-math-verify")
    n_rows = len((ROOT / "data" / "grader_sample.jsonl").read_text().splitlines())
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    assert n_rows > 300 and total[1:3] == [str(n_rows), "100.00"]
    assert total[3:5] == ["0", "of"]


@pytest.mark.slow
def test_the_page_shows_both_graders_and_quotes_the_sample_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # Math-Verify accepts the second and the third.
    ours = write_rows(tmp_path / "grader_sample.jsonl", ("5", "5.0", True), (r"\frac{1}{2x}", "1/2x", False))
    theirs = write_rows(tmp_path / "secret.jsonl", (r"\frac{3}{2\pi}", r"3/2\pi", False))
    hostile = write_rows(tmp_path / "hostile.jsonl", ("5", "9^{9^{9}}", False))
    run(monkeypatch, "--pairs", ours, theirs, "--hostile", hostile, "--output", "page")
    page = (tmp_path / "page" / "README.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in page.splitlines() if line[:1] == "|"}
    assert rows["grader_sample/mine"][:3] == ["2", "100.00", "0 of 1"]
    assert rows["grader_sample/mine"][4:6] == ["50.00", "1 of 1"]
    assert rows["secret/mine"][:3] == ["1", "100.00", "0 of 1"]
    assert rows["all"][4:6] == ["33.33", "2 of 2"]
    assert "`1/2x` | accepts" in page and r"3/2\pi" not in page
    assert str(tmp_path) not in page and "--pairs grader_sample.jsonl secret.jsonl" in page


def test_a_page_needs_both_graders(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--no-math-verify", "--output", "page")
    assert "--no-math-verify" in capsys.readouterr().err
