"""Files that are whole or absent, rows that are strict JSON, and the state of a git repository."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from utils.log.files import UNFINISHED, encode_row, git_state, read_rows, whole_folder, write_atomically


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_write_atomically_replaces(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "one")
    write_atomically(tmp_path / "f", "two")
    assert (tmp_path / "f").read_text() == "two"
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "one")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "f", "\ud800")
    assert (tmp_path / "f").read_text() == "one"
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(RuntimeError), whole_folder(folder) as unfinished:
        (unfinished / "f").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f"{UNFINISHED}folder").mkdir()  # left by a process that was killed
    (tmp_path / f"{UNFINISHED}folder" / "stale").touch()
    with whole_folder(folder) as unfinished:
        (unfinished / "f").write_text("whole")
        assert not folder.exists()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("folder"), Path("folder/f")]


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_numbers_that_strict_json_lacks_make_a_line_no_row(tmp_path: Path, number: str) -> None:
    path = tmp_path / "rollouts.jsonl"
    lines = [f'{{"grpo_step": 1, "reward": {number}}}', '{"grpo_step": 2, "reward": 1.5}', "[" * 100_000]
    path.write_text("".join(line + "\n" for line in lines))
    rows, complaints = read_rows(path)
    assert rows == [{"grpo_step": 2, "reward": 1.5}]
    assert [text.partition(": ")[0] for text in complaints] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_strict_json_and_named(value: float) -> None:
    row = json.loads(encode_row({"grpo_step": 3, "train/loss": value, "train/reward": 0.5}))
    assert row == {"grpo_step": 3, "train/loss": None, "train/reward": 0.5, "nonfinite": {"train/loss": str(value)}}
