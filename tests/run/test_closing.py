"""The last lines of a run: they name only what exists."""

from __future__ import annotations

from pathlib import Path

from utils.run.closing import closing_lines
from utils.run.ending import Status


def test_only_what_exists_is_named(tmp_path: Path) -> None:
    text = "\n".join(closing_lines(tmp_path, Status.COLLAPSED))
    assert not [word for word in ("best", "view_rollouts", "evaluate.py", "metrics.jsonl") if word in text]
    assert "lower training.learning_rate" in text
    (tmp_path / "rollouts.jsonl").touch()
    assert "view_rollouts" not in "\n".join(closing_lines(tmp_path, Status.COLLAPSED))  # nothing was logged
    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    for name in ("best", "last"):
        (tmp_path / "checkpoints" / name).symlink_to("step_000001")
    text = "\n".join(closing_lines(tmp_path, Status.COLLAPSED))
    assert f"paths.model_path={tmp_path}/checkpoints/best" in text
    assert f"view_rollouts.py {tmp_path}" in text
    assert f"evaluate.py {tmp_path}/checkpoints/last" in text
