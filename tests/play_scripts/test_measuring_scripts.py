"""What the scripts that measure the grader and the engines refuse before they measure anything."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "play-scripts"


@pytest.mark.parametrize(
    ("option", "row", "complaint"),
    [
        ("--pairs", '{"truth": "1", "prediction": "1"}', "no `match` among the keys ['prediction', 'truth']"),
        ("--pairs", '{"truth": "1", "prediction": "1", "match": 1}', "`match` should be true or false, not '1'"),
        ("--hostile", '{"truth": "1"}', "no `prediction` among the keys ['truth']"),
        ("--hostile", '{"truth": "1", "prediction": null}', "`prediction` should be a text, not None"),
    ],
)
def test_eval_grader_names_the_row_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    option: str, row: str, complaint: str,
) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text('{"truth": "1", "prediction": "1", "match": true}\n' + row + "\n")
    monkeypatch.setattr(sys, "argv", ["eval_grader.py", option, str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "eval_grader.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"eval_grader.py: error: {path}:2: {complaint}"


def test_losses_beside_trl_are_skipped_in_one_line_without_trl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    monkeypatch.setattr(sys, "argv", ["bench/losses_trl.py", "--output", str(tmp_path / "out")])
    runpy.run_path(str(SCRIPTS / "bench/losses_trl.py"), run_name="__main__")
    (line,) = capsys.readouterr().out.splitlines()
    assert "skipped" in line and "trl==1.16" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--sequences", "64", "0"), "--sequences 0: at least 1"),
        (("--new-tokens", "0"), "--new-tokens 0: at least 1"),
        (("--sequences", "12"), "--sequences 12 is not a multiple of the group size 8"),
    ],
)
def test_bench_engines_measures_nothing_where_nothing_is_asked_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    complaint: str,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS / "bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench/engines.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "bench/engines.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"engines.py: error: {complaint}"
    assert not any(tmp_path.iterdir())
