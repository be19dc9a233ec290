"""Damage of checkpoints that shows without loading them, on files made by hand."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from utils.log.checkpoints import NEEDED, DamagedCheckpoint, check_checkpoint, check_checkpoints, saved_checkpoints
from utils.log.output import holds_run


def safetensors(header: dict, n_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\1" * n_bytes


def make_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint of two shards, as far as its outside shows."""
    checkpoint = folder / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    for name in NEEDED:
        (checkpoint / name).write_text("{}")
    with zipfile.ZipFile(checkpoint / "optimizer.pt", "w") as file:
        file.writestr("data.pkl", "tensors" * 1000)
    shards = ["model-1.safetensors", "model-2.safetensors"]
    for name in shards:
        header = {"w": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}, "__metadata__": {"format": "pt"}}
        (checkpoint / name).write_bytes(safetensors(header, 100))
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def test_whole_checkpoints_pass_and_are_listed_by_number(tmp_path: Path) -> None:
    check_checkpoints(tmp_path / "none")
    for step in (1_000_000, 5, 999_999):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_7").touch()
    (tmp_path / "step_best").mkdir()
    check_checkpoints(tmp_path)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["step_000005", "step_999999", "step_1000000"]


@pytest.mark.parametrize("name", [*NEEDED, "model-1.safetensors", "model.safetensors.index.json"])
def test_every_cut_of_a_file_is_seen(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 5)
    whole = (checkpoint / name).read_bytes()
    for n_bytes in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
        (checkpoint / name).write_bytes(whole[:n_bytes])
        with pytest.raises(DamagedCheckpoint, match=name):
            check_checkpoint(checkpoint)
    (checkpoint / name).write_bytes(b"\0" * len(whole))
    with pytest.raises(DamagedCheckpoint, match=name):
        check_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    if "index" not in name:
        with pytest.raises(DamagedCheckpoint, match=f"without .*{name}"):
            check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "header", [{"w": {}}, {"w": {"data_offsets": [0]}}, {"w": 3}, {"w": {"data_offsets": "ab"}}, []]
)
def test_a_header_that_is_none_is_damage(tmp_path: Path, header: object) -> None:
    checkpoint = make_checkpoint(tmp_path, 5)
    (checkpoint / "model-2.safetensors").write_bytes(safetensors(header, 100))
    with pytest.raises(DamagedCheckpoint, match=r"model-2\.safetensors"):
        check_checkpoint(checkpoint)


def test_the_remedy_names_what_resume_goes_on_from(tmp_path: Path) -> None:
    older, newest = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8)
    (older / "trainer_state.json").write_text("")
    with pytest.raises(DamagedCheckpoint) as damage:
        check_checkpoints(tmp_path)
    assert str(damage.value).startswith(f"the checkpoint {older} is damaged (trainer_state.json is not JSON: ")
    assert str(damage.value).endswith(f"delete that folder, and --resume goes on from {newest}")
    (older / "trainer_state.json").write_text("{}")
    (newest / "trainer_state.json").write_text("[]")
    with pytest.raises(DamagedCheckpoint, match=f"holds no JSON object.* goes on from {older}$"):
        check_checkpoints(tmp_path)
    only = make_checkpoint(tmp_path / "other", 1)
    (only / "optimizer.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.pt is cut off.* --resume begins anew$"):
        check_checkpoints(only.parent)


def test_a_folder_with_checkpoints_alone_holds_a_run(tmp_path: Path) -> None:
    """Otherwise a new run's checkpoints would be mixed with those of an old one."""
    assert not holds_run(tmp_path)
    make_checkpoint(tmp_path / "checkpoints", 3)
    assert holds_run(tmp_path)
