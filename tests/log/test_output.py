"""Which output paths are refused, and who may write to a run's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.log.output import unwritable


def test_paths_that_can_be_written_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("full").mkdir()
    Path("full", "file").touch()
    Path("empty").mkdir()
    for folder in ("full", "empty", "new", "new/below", "."):
        assert unwritable(Path(folder)) is None
    for folder in ("empty", "new", "new/below"):
        assert unwritable(Path(folder), is_new=True) is None
    for file in ("file", "new", "new/file", "full/new"):
        assert unwritable(Path(file), is_file=True) is None


def test_each_refusal_says_what_is_in_the_way(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (folder / "link").symlink_to("nowhere")
    assert unwritable(file) == f"{file} is a file; give another folder"
    assert unwritable(file / "below" / "it") == f"{file} is a file; give another folder"
    assert unwritable(folder / "link").endswith("is a file; give another folder")
    assert unwritable(file / "below", is_file=True) == f"{file} is a file; give another file"
    assert unwritable(folder, is_file=True) == "is a folder; give a file"
    assert unwritable(file, is_file=True, is_new=True).startswith("is already there")
    assert unwritable(folder, is_new=True).startswith("already holds something")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    for is_file in (True, False):
        assert f"{folder} may not be written to" in unwritable(folder / "new", is_file=is_file)
