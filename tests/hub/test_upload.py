"""upload.py against a server that speaks the Hub's API: what goes, what goes once, and what is refused."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, running
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.defaults import Config, Paths, Training
from utils.log import files
from utils.log.files import encode_row
from utils.preflight import hub as preflight_hub
from utils.preflight.config import save_config

SCRIPT = Path(__file__).parents[2] / "play-scripts" / "upload.py"
ROLLOUT = {"question": "1 + 1?", "response": "2", "reward": 1.0}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", fake.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server knows the older way to send large files
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        preflight_hub.answers.cache_clear()
        yield fake


@pytest.fixture
def upload(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        return int(status), out, err

    run.main = main
    return run


def make_run(folder: Path, model: Path, seed: int = 1, best: int = 2, **paths: str) -> Path:
    """A run of four GRPO steps, evaluated and saved at 0 (not saved), 2 and 4."""
    config = Config(
        paths=Paths(model_path="Qwen/Qwen2.5-Math-1.5B", **paths), training=Training(seed=seed, learning_rate=3e-4)
    )
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    files.save_run_info(folder, seed)
    rewards = {0: 0.25, 2: 0.75 if best == 2 else 0.25, 4: 0.5}
    rows = [{"eval_step": step, "time": 10.0 * step, "eval/reward": value} for step, value in rewards.items()]
    rows += [{"grpo_step": step, "time": 10.0 * step, "train/reward": 0.1 * step} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(encode_row(row) + "\n" for row in rows))
    logged = [ROLLOUT | {"split": "eval", "grpo_step": step} for step in (0, 1, 2, 3, 4)]
    (folder / "rollouts.jsonl").write_text("".join(encode_row(row) + "\n" for row in logged))
    (folder / "status.json").write_text('{"status": "finished"}')
    for step in (2, 4):
        checkpoint = folder / "checkpoints" / f"step_{step}"
        shutil.copytree(model, checkpoint)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"steps_done": step}))
        (checkpoint / "optimizer.pt").write_bytes(b"PK\5\6" + bytes(18))  # an empty zip file
        (checkpoint / "generation_config.json").write_text(json.dumps({"max_length": step}))
    for name, step in (("best", best), ("last", 4)):
        (folder / "checkpoints" / name).symlink_to(f"step_{step}")
    return folder


def test_without_upload_nothing_is_sent(tmp_path: Path, tiny_model_dir: Path, hub: FakeHub, upload) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    status, out, err = upload(run, "--repo", "owner/name")
    assert (status, err, hub.files, hub.commits) == (0, "", None, [])
    assert "a new repository" in out and "add --upload" in out
    for name in ("metadata.json", "model.safetensors", "last/model.safetensors", "reward_curve.png", "README.md"):
        assert f"  {name}" in out
    assert "optimizer.pt" not in out and "trainer_state.json" not in out


def test_a_run_arrives_whole_and_only_once(tmp_path: Path, tiny_model_dir: Path, hub: FakeHub, upload) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    figures = {"reward": 0.625, "reward_std_error": 0.03125, "problems": 1319, "pass_at_k": {"1": 0.625}}
    (tmp_path / "evaluated").mkdir()
    about = {"checkpoint": f"{run}/checkpoints/best", "sets": {"data/math.jsonl": {"greedy": figures}}}
    (tmp_path / "evaluated" / "figures.json").write_text(json.dumps(about))
    command = (run, "--repo", "owner/name", "--evaluation", tmp_path / "evaluated", "--upload")
    status, _, err = upload(*command)
    assert (status, err, hub.private) == (0, "", True)
    assert [paths[0] for paths in hub.commits] == ["metadata.json", "config.json", "last/config.json", "README.md"]

    metadata = json.loads(hub.files["metadata.json"])["runs"]["."]
    assert [metadata[name]["step"] for name in ("best", "last")] == [2, 4]
    assert [metadata[name]["folder"] for name in ("best", "last")] == [".", "last"]
    assert metadata["best"]["eval/reward"] == 0.75
    assert metadata["config"]["training"]["learning_rate"] == 3e-4
    assert (metadata["steps"], metadata["ended"], metadata["seed"]) == (4, "finished", 1)
    assert metadata["commit"] and metadata["packages"]["torch"] and metadata["command"].startswith("python ")
    kept = [json.loads(line)["grpo_step"] for line in hub.files["rollouts.jsonl"].splitlines()]
    assert kept == [0, 2, 4]
    card = hub.files["README.md"].decode()
    for text in ("![", "reward_curve.png", "- \"Qwen/Qwen2.5-Math-1.5B\"", metadata["command"], metadata["commit"],
                 "0.6250 ± 0.0312", "data/math.jsonl", "| `training.learning_rate` | `0.0003` |", "| best | `.` | 2 |",
                 'from_pretrained("owner/name")'):  # fmt: skip
        assert text in card, text
    for name, content in hub.files.items():
        place = tmp_path / "downloaded" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    for folder, step in (("", 2), ("last", 4)):
        about = json.loads((tmp_path / "downloaded" / folder / "generation_config.json").read_text())
        assert about["max_length"] == step
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "downloaded", subfolder=folder)
        assert AutoTokenizer.from_pretrained(tmp_path / "downloaded", subfolder=folder)

    sent, n_commits = list(hub.sent), len(hub.commits)
    status, out, _ = upload(*command)
    assert (status, hub.sent, len(hub.commits)) == (0, sent, n_commits)
    assert out.count("there already:") == 4
    everything = [*hub.files.values(), *(path.read_bytes() for path in run.rglob("*") if path.is_file())]
    assert not any(TOKEN.encode() in content for content in everything)


def test_an_upload_that_was_cut_off_goes_on(tmp_path: Path, tiny_model_dir: Path, hub: FakeHub, upload) -> None:
    run = make_run(tmp_path / "run", tiny_model_dir)
    command = (run, "--repo", "owner/name", "--upload")
    hub.refuse = lambda method, path: 403 if path.endswith("/commit/main") and len(hub.commits) == 2 else 0
    status, _, err = upload(*command)
    assert status == 2 and len(err.splitlines()) == 1 and "403" in err and "may not write" in err
    assert "README.md" not in hub.files and len(hub.commits) == 2
    weights = len(hub.sent)
    hub.refuse = lambda method, path: 0
    status, out, _ = upload(*command)
    assert status == 0 and out.count("there already:") == 2
    assert [paths[0] for paths in hub.commits[2:]] == ["last/config.json", "README.md"]
    assert len(hub.sent) == weights  # the same weights had been sent for the best checkpoint

    # the run goes on and its last checkpoint becomes the best, in other files: what is left of the old one goes
    hub.files["model-00001-of-00002.safetensors"] = hub.files["NOTES.md"] = b"mine"
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").symlink_to("step_4")
    assert upload(*command)[0] == 0
    assert json.loads(hub.files["generation_config.json"])["max_length"] == 4
    assert "model-00001-of-00002.safetensors" not in hub.files and "NOTES.md" in hub.files
    assert not any(name.startswith("last/") for name in hub.files)


def test_a_folder_of_runs_goes_to_one_repository(tmp_path: Path, tiny_model_dir: Path, hub: FakeHub, upload) -> None:
    for name, seed, best in (("3e-4", 1, 2), ("3e-4", 2, 4)):
        make_run(tmp_path / "lr" / name / f"seed_{seed}", tiny_model_dir, seed, best)
    status, out, err = upload(tmp_path / "lr", "--repo", "owner/name", "--upload", "--public")
    assert (status, err, hub.private) == (0, "", False), out
    metadata = json.loads(hub.files["metadata.json"])["runs"]
    assert list(metadata) == ["3e-4/seed_1", "3e-4/seed_2"]
    assert metadata["3e-4/seed_2"]["last"] == metadata["3e-4/seed_2"]["best"]  # one step, sent once
    assert "3e-4/seed_1/last/model.safetensors" in hub.files and "3e-4/seed_2/last/model.safetensors" not in hub.files
    card = hub.files["README.md"].decode()
    assert "| 3e-4 | 2 |" in card and 'subfolder="3e-4/seed_1"' in card and "`3e-4/seed_2`" in card
    assert "reward_curve.png" in hub.files
    status, _, err = upload(tmp_path / "lr" / "3e-4" / "seed_1", "--repo", "owner/name", "--upload")
    assert status == 2 and "3e-4/seed_1" in err and "another --repo" in err


def test_an_adapter_is_loaded_into_its_base_or_refused_with_a_base_that_is_here_alone(
    tmp_path: Path, tiny_model_dir: Path, hub: FakeHub, upload
) -> None:
    upload.main.__globals__["figure_of"] = lambda runs: None
    run = make_run(tmp_path / "run", tiny_model_dir)
    for step in (2, 4):
        folder = run / "checkpoints" / f"step_{step}"
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
        (folder / "base_model.json").write_text("{}")
    assert upload(run, "--repo", "owner/name", "--upload")[0] == 0
    card = hub.files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in card and "library_name: peft" in card
    assert 'PeftModel.from_pretrained(model, "owner/name")' in card
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "data/tiny/model"}')
    (tmp_path / "data").mkdir()
    assert "merge_lora.py" in refused(upload, run, "--repo", "owner/name")


def refused(upload, *arguments: object) -> str:
    status, out, err = upload(*arguments)
    assert (status, len(err.splitlines())) == (2, 1), (out, err)
    return err


def test_what_is_wrong_is_one_line_before_anything_is_sent(
    tmp_path: Path, tiny_model_dir: Path, hub: FakeHub, upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload.main.__globals__["figure_of"] = lambda runs: None  # drawn in the other tests
    run = make_run(tmp_path / "run", tiny_model_dir)
    there = (run, "--repo", "owner/name", "--upload")
    assert "no run in it" in refused(upload, tiny_model_dir, *there[1:])
    assert "give owner/name" in refused(upload, run, "--repo", "name")
    assert "--repo" in refused(upload, run, "--repo", "owner/na me")
    assert "evaluate.py" in refused(upload, *there, "--evaluation", tmp_path)
    (tmp_path / "figures.json").write_text(json.dumps({"checkpoint": "other/best", "sets": {}}))
    assert "other/best" in refused(upload, *there, "--evaluation", tmp_path)

    hub.files = {".gitattributes": b"", "model.bin": b""}
    assert "already holds something" in refused(upload, *there) == refused(upload, *there[:-1])
    hub.files["metadata.json"] = json.dumps({"runs": {".": {"id": "another"}}}).encode()
    assert "another run" in refused(upload, *there)
    hub.files["metadata.json"] = b"[]"
    assert "not of this program" in refused(upload, *there)
    hub.files = None

    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 8)
    assert "not valid" in refused(upload, *there)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in refused(upload, *there)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for status, word in ((402, "no room"), (403, "full")):
        hub.refuse = lambda method, path, status=status: status if path == "/api/repos/create" else 0
        error = refused(upload, *there)
        assert f"({status})" in error and f"refused for {status}" in error and word in error
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in refused(upload, *there)
    status, out, _ = upload(*there[:-1])
    assert status == 0 and "could not be looked at" in out and "model.safetensors" in out

    launches = (run / "run.json").read_text()
    (run / "run.json").write_text('{"launches": [{"started": "then"}]}')
    assert "run.json" in refused(upload, *there)
    (run / "run.json").write_text(launches)
    (run / "checkpoints" / "step_4" / "model.safetensors").write_bytes(b"")
    assert "damaged" in refused(upload, *there)
    (run / "checkpoints" / "last").unlink()
    assert "no checkpoint is saved" in refused(upload, *there)
    leaky = make_run(tmp_path / "leaky", tiny_model_dir, output_dir=f"runs/{TOKEN}")
    error = refused(upload, leaky, *there[1:])
    assert "access token" in error and "config.yaml" in error
    assert hub.commits == []
