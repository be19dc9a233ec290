"""A run's folder copied from another machine while it changes: whatever instant it is cut off at, it can be resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.ablations.places.listing import Changed, Listing, Stamp, list_folder, read_piece
from utils.ablations.places.mirror import Mirror, pieces

NEEDED = {"weights", "trainer_state.json"}


class Original:
    """A folder that a run of the shortest kind writes, and `Files` of it; `happens` in the middle of reads."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step, self.sent = folder, 0, 0
        self.happens: dict[int, str] = {}  # by the number of the read: what the run does meanwhile
        self.bytes_read = 0
        (folder / "checkpoints").mkdir(parents=True)

    def do(self, what: str) -> None:
        if what == "step":
            self.step += 1
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"grpo_step": self.step}) + "\n")
        elif what == "save":
            self.save()
        elif what == "overtake":  # both checkpoints that are kept are replaced
            for action in ("step", "save", "step", "save"):
                self.do(action)
        elif what == "evaluate" and self.newest() is not None:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"eval_step": self.newest()[0]}) + "\n")
            self.replace(
                self.newest()[1] / "trainer_state.json", json.dumps({"step": self.newest()[0], "evaluated": True})
            )
        elif what == "status":
            self.replace(self.folder / "status.json", json.dumps({"status": "x" * self.step}))

    def save(self) -> None:
        final = self.folder / "checkpoints" / f"step_{self.step:06d}"
        if final.exists():
            return
        unfinished = final.with_name(f".saving-{final.name}")
        unfinished.mkdir()
        (unfinished / "weights").write_text(str(self.step) * 50)
        (unfinished / "trainer_state.json").write_text(json.dumps({"step": self.step, "evaluated": False}))
        unfinished.rename(final)
        self.link(final)
        for old in sorted(final.parent.glob("step_*"))[:-2]:
            shutil.rmtree(old)

    def link(self, target: Path) -> None:
        link = target.with_name("last")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)

    def newest(self) -> tuple[int, Path] | None:
        saved = sorted((self.folder / "checkpoints").glob("step_*"))
        return (int(saved[-1].name[5:]), saved[-1]) if saved else None

    def replace(self, path: Path, text: str) -> None:
        path.with_name(f".saving-{path.name}").write_text(text)
        path.with_name(f".saving-{path.name}").replace(path)

    def listing(self) -> Listing:
        return list_folder(self.folder)

    def read(self, name: str, stamp: Stamp, begin: int) -> Iterator[bytes]:
        self.sent += 1
        what = self.happens.get(self.sent, "")
        if what == "cut":
            raise ConnectionError
        self.do(what)
        data = read_piece(self.folder / name, stamp, begin, 10**6)
        self.bytes_read += len(data)
        yield data


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_can_be_resumed(folder: Path) -> None:
    """Each checkpoint is whole and of one moment, and the rows that led to it are here."""
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        assert {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")} == NEEDED
        state, step = json.loads((checkpoint / "trainer_state.json").read_text()), int(checkpoint.name[5:])
        assert state["step"] == step
        assert (checkpoint / "weights").read_text() == str(step) * 50
        logged = [row["grpo_step"] for row in rows(folder) if "grpo_step" in row]
        assert logged[:step] == list(range(1, step + 1))
        assert not state["evaluated"] or {"eval_step": step} in rows(folder)


ACTIONS = ("step", "save", "evaluate", "status", "overtake")


@settings(max_examples=60)
@given(
    before=st.lists(st.lists(st.sampled_from(ACTIONS), max_size=6), max_size=5),
    happens=st.dictionaries(st.integers(1, 25), st.sampled_from([*ACTIONS, "cut"]), max_size=8),
)
def test_at_every_moment_the_copy_can_be_resumed_and_in_the_end_it_is_the_original(
    tmp_path_factory: pytest.TempPathFactory, before: list[list[str]], happens: dict[int, str]
) -> None:
    folder = tmp_path_factory.mktemp("mirror")
    original = Original(folder / "there")
    original.happens = happens
    mirror = Mirror(original, folder / "here")
    newest = -1
    for actions in before:
        for action in actions:
            original.do(action)
        with contextlib.suppress(ConnectionError):
            mirror.refresh()
        assert_can_be_resumed(folder / "here")
        saved = [int(path.name[5:]) for path in (folder / "here" / "checkpoints").glob("step_*")]
        assert max(saved, default=-1) >= newest
        newest = max(saved, default=-1)
    original.happens = {}
    assert mirror.refresh()
    there, here = list_folder(folder / "there"), list_folder(folder / "here")
    assert there.keys() == here.keys()
    for name, entry in there.items():
        assert (
            (folder / "here" / name).read_bytes() == (folder / "there" / name).read_bytes()
            if isinstance(entry, Stamp)
            else here[name] == entry
        )
    shutil.rmtree(folder)


def test_only_what_is_new_is_fetched(tmp_path: Path) -> None:
    original = Original(tmp_path / "there")
    for action in ("step", "save", "status"):
        original.do(action)
    mirror = Mirror(original, tmp_path / "here")
    assert mirror.refresh()
    fetched = original.bytes_read
    assert mirror.refresh()
    assert original.bytes_read == fetched
    original.do("step")
    assert mirror.refresh()
    assert original.bytes_read - fetched == len('{"grpo_step": 2}\n')

    shutil.copytree(tmp_path / "there", tmp_path / "sent", symlinks=True)
    again = Mirror(original, tmp_path / "sent")
    again.adopt()
    fetched = original.bytes_read
    assert again.refresh()
    assert original.bytes_read == fetched


def test_a_copy_without_checkpoints(tmp_path: Path) -> None:
    original = Original(tmp_path / "there")
    for action in ("step", "save"):
        original.do(action)
    assert Mirror(original, tmp_path / "here", wanted=lambda name: "checkpoints" not in name).refresh()
    assert list(list_folder(tmp_path / "here")) == ["metrics.jsonl"]


def test_what_changed_since_the_listing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    stamp = list_folder(tmp_path)["a"]
    with path.open("a") as file:
        file.write(" more")
    assert read_piece(path, stamp, 0, 100) == b"one"
    path.rename(tmp_path / "kept")
    path.write_text("another")
    with pytest.raises(Changed):
        read_piece(path, stamp, 0, 100)
    path.unlink()
    with pytest.raises(Changed):
        read_piece(path, stamp, 0, 100)


def test_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.ablations.places.mirror.PIECE", 3)
    for text, expected in ((b"", [(0, b"")]), (b"abc", [(0, b"abc")]), (b"abcd", [(0, b"abc"), (3, b"d")])):
        (tmp_path / "a").write_bytes(text)
        assert [(offset, data) for offset, data in pieces(tmp_path / "a") if data or not offset] == expected
