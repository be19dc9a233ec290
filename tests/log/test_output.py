"""Which output paths are refused, and who may write to a run's folder."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from utils.log.output import claimed, unwritable

CONTEXT = multiprocessing.get_context("fork")


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


def claim_slowly(folder: Path, events: dict[str, Event], outcome: Connection) -> None:
    """From `begin` on claim a folder, pausing between opening the lock file and locking it; hold it until `end`."""
    flock = fcntl.flock

    def paused(*arguments: object) -> None:
        events["opened"].set()
        events["go_on"].wait()
        flock(*arguments)

    fcntl.flock = paused
    events["begin"].wait()
    try:
        with claimed(folder):
            outcome.send("claimed")
            events["end"].wait()
    except ValueError as error:
        outcome.send(str(error))


def test_a_lock_file_removed_after_another_process_opened_it_gives_no_second_claim(tmp_path: Path) -> None:
    """A start is refused while another process waits with the lock file open; a third comes after them."""
    folder = tmp_path / "runs" / "run"
    events = {name: CONTEXT.Event() for name in ("begin", "opened", "go_on", "end")}
    receiver, sender = CONTEXT.Pipe(duplex=False)
    other = CONTEXT.Process(target=claim_slowly, args=(folder, events, sender))
    other.start()  # here, as a fork within the claim would have a share in it
    with pytest.raises(ValueError, match="refused"), claimed(folder):
        events["begin"].set()
        events["opened"].wait()
        raise ValueError("refused")
    events["go_on"].set()
    assert receiver.recv() == "claimed"
    assert (folder / ".lock").exists()
    with pytest.raises(ValueError, match="another process is running there"), claimed(folder):
        pass
    events["end"].set()
    other.join()
    with claimed(folder):
        pass


def claim_and_fail(folder: Path, n_claims: int, inside: Path, doubled: Event) -> None:
    """Claim and be refused, again and again; tell if two processes are ever inside at once."""
    for _ in range(n_claims):
        try:
            with claimed(folder):
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    doubled.set()
                inside.unlink(missing_ok=True)
                raise RuntimeError
        except (ValueError, RuntimeError):
            pass


def test_many_processes_that_claim_and_are_refused_never_hold_a_folder_together(tmp_path: Path) -> None:
    doubled = CONTEXT.Event()
    arguments = (tmp_path / "run", 300, tmp_path / "inside", doubled)
    processes = [CONTEXT.Process(target=claim_and_fail, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert not doubled.is_set()
