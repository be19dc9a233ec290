"""The page of the tiny world, from runs and evaluations and again from its CSV files."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENGTHS = {"usual": 40, "long": 96, "short": 6}


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command within this process."""
    monkeypatch.syspath_prepend(ROOT / "play-scripts")
    script = runpy.run_path(str(ROOT / "play-scripts" / "show_world.py"))

    def run(*options: str) -> int:
        words = ["show_world.py", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *options]
        monkeypatch.setattr(sys, "argv", words)
        return script["run_command"](script["build_parser"](), script["show"])

    return run


def add_runs(folder: Path) -> None:
    for name, length in LENGTHS.items():
        rows = [{"eval_step": 0, "time": 1.0, **evaluated(0.25, 30)}]
        for step in (1, 2):
            share = float(length == 96)
            lengths = {"train/mean_response_length": length + step / 2, "train/frac_truncated": share}
            rows.append({"grpo_step": step, "time": 1.0 + step, "train/reward": 0.5, **lengths})
        rows.append({"eval_step": 2, "time": 4.0, **evaluated(0.75, length)})
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / name / "status.json").write_text(json.dumps({"status": "finished", "grpo_step": 2}))
    for stage, reward in (("before", 0.25), ("after", 0.75)):
        by_level = {f"{n} terms": {"problems": 32, "reward": reward - n / 100, "std_error": 0.1} for n in (3, 4)}
        figures = {"problems": 64, "reward": reward, "reward_std_error": 0.05, "by_level": by_level}
        (folder / stage).mkdir()
        sets = {"validation.jsonl": {"greedy": figures, "sampled": {**figures, "reward": reward / 2}}}
        (folder / stage / "figures.json").write_text(json.dumps({"sets": sets}))


def evaluated(reward: float, length: float) -> dict[str, float]:
    return {
        "eval/reward": reward,
        "eval/format_reward": 1.0,
        "eval/answer_reward": reward,
        "eval/mean_response_length": length,
    }


def test_the_page_and_the_same_page_from_its_files(show, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show() == 2
    assert "usual: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    add_runs(tmp_path / "runs")
    assert show() == 0, capsys.readouterr().err
    results = tmp_path / "results"
    page = (results / "README.md").read_text()
    assert "from 0.25 to 0.75" in page and "30.0 to 40.0" in page and "96.5 to 97.0" in page
    assert "| 4 terms | 0.210 ± 0.100 | 0.210 ± 0.100 | 0.710 ± 0.100 | 0.710 ± 0.100 |" in page
    assert "| all | 0.250 ± 0.050 | 0.125 ± 0.050 | 0.750 ± 0.050 | 0.375 ± 0.050 |" in page
    for picture in ("lengths.png", "collapses.png", "difficulty.png"):
        assert f"({picture})" in page and (results / picture).exists()
    for path in [*results.glob("*.png"), results / "README.md"]:
        path.unlink()
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert show("--redraw") == 0
    assert (results / "README.md").read_text() == page
