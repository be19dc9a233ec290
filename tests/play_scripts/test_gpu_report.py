"""The GPU report with a tiny model on the CPU: every stage, written as it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "play-scripts/bench/gpu_report.py"


@pytest.mark.slow
def test_every_stage_runs_on_the_cpu_with_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--steps", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, (tmp_path / "README.md").read_text() + done.stderr
    stages = report["stages"]
    assert list(stages) == ["tests", "update", "train", "resume", "engine", "engine_float32"]
    assert not any("failed" in stage or "skipped" in stage for stage in stages.values())
    assert stages["update"]["tokens"]["packed"] < stages["update"]["tokens"]["padded"]
    assert stages["train"]["steps"] == 2 and len(stages["train"]["evaluation_seconds"]) == 2
    assert stages["resume"] == stages["resume"] | {"killed_after_step": 3, "steps_in_the_end": 5}
    assert stages["engine"]["pushes"] == 20 and stages["engine"]["gap_max"] < 1e-4
    assert all(outcome.startswith(("passed", "skipped")) for outcome in stages["tests"]["tests"].values())
    page = (tmp_path / "README.md").read_text()
    assert "Nothing so far" in page and "MFU" not in page and "seconds per update" in page


@pytest.mark.parametrize(("stage", "expected"), [("train", "only the training half"), ("update", "1 s.")])
def test_a_stage_that_fails_or_is_skipped_is_told(
    stage: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from gpu_pages import page

    outcome = {"train": {"skipped": "no vLLM, so only the training half was measured"}, "update": {"failed": "boom"}}
    report = {"card": "h100", "overlay": "h100", "versions": {"torch": "2"}, "stages": {}}
    report["stages"][stage] = outcome[stage] | {"stage_seconds": 1}
    text = page(report)
    assert expected in text and ("boom" in text) == (stage == "update")
