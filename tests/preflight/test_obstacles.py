"""What keeps a run from starting, told before anything is loaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.defaults import Config, Paths, Training
from utils.preflight import hub
from utils.preflight.config import save_config
from utils.preflight.machine import host_memory
from utils.preflight.model_files import bytes_to_fetch, context_of, is_local, lacks_chat_template, model_config
from utils.preflight.obstacles import INPUTS, obstacles, output_obstacles, shortfalls

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def model_in(folder: Path, **tokenizer: object) -> Config:
    """A config whose model is a folder with the small JSON files, and no weights."""
    write(folder, "config.json", json.dumps(SIZES))
    write(folder, "tokenizer_config.json", json.dumps(tokenizer))
    config = Config()
    config.paths.model_path = str(folder)
    return config


def lines_about(config: Config, key: str) -> list[str]:
    return [line for line in shortfalls(config) if line.startswith(key)]


def test_a_tracker_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = Config(training=Training(trackers=["trackio"], use_bnb_adamw8bit=False))
    (line,) = lines_about(wanted, "the tracker trackio")
    assert 'pip install -e ".[trackers]"' in line
    (line,) = lines_about(Config(training=Training(wandb_project="p")), "the tracker wandb")
    assert "pip install wandb" in line
    assert lines_about(Config(), "the tracker") == []


def test_the_command_tells_mistakes_in_one_line_with_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train_grpo.py")]
    for arguments, complaint in [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["training.sede=1"], "unknown key 'training.sede'"),
        (["--config", "configs/quickstart.yaml", f"paths.train_data_file={tmp_path}/no.jsonl"], "no such file"),
    ]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")


def test_nothing_that_needs_no_torch_waits_for_it(tmp_path: Path) -> None:
    """Data, prompt template and output folder are looked at before anything slow is imported."""
    mistakes = {
        "paths.train_data_file": write(tmp_path, "rows.jsonl", '{"problem": "1", "answer": "2"}\n{"problem": "?"}\n'),
        "paths.val_data_file": write(tmp_path, "empty.jsonl", ""),
        "paths.prompt_template_file": write(tmp_path, "no_place.prompt", "Solve it!"),
        "paths.model_path": tmp_path / "model",
        "paths.output_dir": tmp_path / "old",
    }
    write(tmp_path / "old", "metrics.jsonl", "")
    probe = (
        "import sys, train_grpo; status = train_grpo.main(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(status)"
    )
    arguments = ["training.device=cpu", *(f"{key}={value}" for key, value in mistakes.items())]
    before = sorted(tmp_path.rglob("*"))
    for options in ([], ["--dry-run"]):
        done = subprocess.run([sys.executable, "-c", probe, *options, *arguments], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        output = done.stdout if options else done.stderr
        for key, words in {
            "paths.train_data_file": ["rows.jsonl:2", "`answer`"],
            "paths.val_data_file": ["empty.jsonl", "empty"],
            "paths.prompt_template_file": ["no_place.prompt", "{question}"],
            "paths.model_path": ["config.json", "folder"],
            "paths.output_dir": ["already holds a run", "--resume"],
        }.items():
            (line,) = [line for line in output.splitlines() if f"{key} = " in line]
            assert all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    file = write(tmp_path, "file", "")
    config = Config()
    for folder in (file, file / "run" / "seed_1"):
        config.paths.output_dir = str(folder)
        (line,) = output_obstacles(config, resume=False, allow_changes=False)
        assert f"paths.output_dir = '{folder}'" in line and f"{file} is a file; give another" in line
    config.paths.output_dir = str(tmp_path / "deep" / "run")
    assert not list(output_obstacles(config, resume=False, allow_changes=False))


@pytest.mark.parametrize(("refused", "word"), [(os.W_OK, "written"), (os.R_OK, "read")])
def test_an_output_folder_without_permission(tmp_path: Path, monkeypatch, refused: int, word: str) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & refused)  # to root everything is permitted
    config = Config(paths=Paths(output_dir=str(tmp_path)))
    (line,) = output_obstacles(config, resume=False, allow_changes=False)
    assert line.startswith(f"paths.output_dir = '{tmp_path}'") and f"may not be {word}" in line


def test_what_a_resume_is_refused_for(tmp_path: Path) -> None:
    saved, config = Config(), Config()
    config.paths.output_dir = saved.paths.output_dir = str(tmp_path)
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    damage, line = output_obstacles(config, resume=True, allow_changes=False)
    assert "step_000004 is damaged" in damage
    assert "no config.yaml" in line and "--allow-changes" in line
    (tmp_path / "checkpoints" / "step_000004").rmdir()
    save_config(saved, tmp_path / "config.yaml")
    config.training.n_grpo_steps = 99
    assert not list(output_obstacles(config, resume=True, allow_changes=False))
    config.training.learning_rate = 1.0
    (line,) = output_obstacles(config, resume=True, allow_changes=False)
    assert "training.learning_rate: saved 1e-05, asked for 1.0" in line and "--allow-changes" in line
    assert not list(output_obstacles(config, resume=True, allow_changes=True))


def test_a_missing_file_comes_with_where_to_get_it() -> None:
    config = Config()
    config.paths.train_data_file, config.paths.val_data_file = "data/tiny/trian.jsonl", "data/mine.jsonl"
    config.paths.prompt_template_file, config.paths.model_path = "data/tiny.promt", "data/tiny/modle"
    for name, path, remedy in [
        ("train_data_file", "data/tiny/trian.jsonl", "make_tiny.py"),
        ("val_data_file", "data/mine.jsonl", "another path"),
        ("prompt_template_file", "data/tiny.promt", "another path"),
        ("model_path", "data/tiny/modle", "make_tiny.py"),
    ]:
        (line,) = lines_about(config, f"paths.{name}")
        assert repr(path) in line and remedy in line


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    config = Config(paths=Paths(*[str(tmp_path)] * 4))
    for name in INPUTS:
        (line,) = lines_about(config, f"paths.{name} = '{tmp_path}'")
        assert "folder" in line and "give a file" in line
    (line,) = lines_about(config, f"paths.model_path = '{tmp_path}'")
    assert "no config.json" in line


def test_files_of_the_repository_are_found_from_its_folder_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = lines_about(Config(), "paths.prompt_template_file")
    assert "start from the folder of train_grpo.py" in line


def test_which_paths_are_folders_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert not any(map(is_local, ["gpt2", "Qwen/Qwen2.5-Math-1.5B", "nowhere/model"]))
    assert all(map(is_local, ["data", "data/nope", "./gpt2", "/models/gpt2", "a/b/c"]))


def test_max_tokens_beyond_the_context(tmp_path: Path) -> None:
    config = model_in(tmp_path)
    config.training.max_tokens = 511
    assert not lines_about(config, "training.max_tokens")
    config.training.max_tokens = 512
    (line,) = lines_about(config, "training.max_tokens = 512")
    assert "512 tokens" in line and "lower" in line


@pytest.mark.parametrize(
    ("sizes", "context"),
    [({"n_positions": 7}, 7), ({"text_config": {"max_position_embeddings": 8}}, 8), ({}, None)],
)
def test_the_context_under_its_other_names(sizes: dict, context: int | None) -> None:
    assert context_of(sizes) == context


def test_a_missing_chat_template(tmp_path: Path) -> None:
    config = model_in(tmp_path)
    assert not lines_about(config, "training.use_chat_template")
    config.training.use_chat_template = True
    (line,) = lines_about(config, "training.use_chat_template")
    assert str(tmp_path) in line and "false" in line
    write(tmp_path, "chat_template.jinja", "{{ messages }}")
    assert not lines_about(config, "training.use_chat_template")
    assert not lacks_chat_template(model_in(tmp_path / "other", chat_template="{{ messages }}").paths.model_path)
    (tmp_path / "tokenizer_config.json").unlink()  # then the tokenizer may be told elsewhere: not for us to say
    assert not lacks_chat_template(str(tmp_path))


def test_a_reference_of_another_vocabulary(tmp_path: Path) -> None:
    config, reference = model_in(tmp_path / "model"), tmp_path / "reference"
    config.training.reference_path = str(reference)
    assert not lines_about(config, "training.reference_path")  # kl_coef is 0: nothing is loaded
    config.training.kl_coef = 0.1
    (line,) = lines_about(config, f"training.reference_path = '{reference}'")
    assert "no config.json" in line
    write(reference, "config.json", json.dumps(SIZES))
    assert not lines_about(config, "training.reference_path")
    tokens = {"a": 0, "b": 1, "c": 2}
    write(tmp_path / "model", "tokenizer.json", json.dumps({"model": {"vocab": tokens}}))
    added = [{"id": 3, "content": "<pad>"}]  # in the reference alone
    same, unigram = {"vocab": tokens}, {"vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0]]}
    for model, complaint in [
        (same, None),
        (unigram, None),
        ({"vocab": tokens | {"b": 2, "c": 1}}, "id 2 is the token 'b' in its vocabulary and 'c' in the policy's"),
        ({}, "tokenizer.json: no vocabulary in it"),
    ]:
        write(reference, "tokenizer.json", json.dumps({"model": model, "added_tokens": added}))
        found = lines_about(config, "training.reference_path")
        assert not found if complaint is None else complaint in found[0]
    write(reference, "config.json", json.dumps(SIZES | {"vocab_size": 120}))
    (line,) = lines_about(config, "training.reference_path")
    assert "has 120 tokens, the policy's has 100" in line and str(tmp_path / "model") in line


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff"])
def test_a_broken_config_json_is_an_obstacle(tmp_path: Path, text: str) -> None:
    config = model_in(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    (line,) = lines_about(config, f"paths.model_path = '{tmp_path}'")
    assert "config.json" in line
    with pytest.raises(ValueError, match=r"config\.json"):
        model_config(str(tmp_path))


def test_a_hub_model_that_is_not_here_while_offline(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = Config(paths=Paths(model_path="nobody/no-such-model-1.5B"))
    (line,) = lines_about(config, "paths.model_path = 'nobody/no-such-model-1.5B'")
    assert "HF_HUB_OFFLINE" in line and "folder" in line


def test_sft_refuses_such_a_model_before_torch_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "play-scripts" / "train_sft.py", "--model", "nobody/no-such-model"]
    options = ["--data", "rows.jsonl", "--output", str(tmp_path / "sft"), "--steps", "1"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--model nobody/no-such-model" in done.stderr and "HF_HUB_OFFLINE" in done.stderr


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.answers.cache_clear()
    return monkeypatch


def test_a_hub_that_never_answers_is_soon_given_up(online: pytest.MonkeyPatch) -> None:
    assert hub.PATIENCE <= 5
    online.setattr(hub, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        config = Config(paths=Paths(model_path="nobody/model"))
        start = time.monotonic()
        (line,) = lines_about(config, "paths.model_path")
        assert "does not answer" in line and "network" in line
        assert lines_about(config, "paths.model_path") == [line]  # and not asked a second time
        assert time.monotonic() - start < 3


def test_a_hub_that_is_not_there_is_given_up_at_once(online: pytest.MonkeyPatch) -> None:
    online.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert "does not answer" in str(hub.unavailable("nobody/model"))
    assert time.monotonic() - start < 2


def test_what_the_hub_answers_is_left_to_its_client(online: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        code = (
            "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); c, _ = s.accept(); c.recv(9999); "
            "c.sendall(b'HTTP/1.1 401 Unauthorized\\r\\nContent-Length: 0\\r\\n\\r\\n')"
        )
        command = [sys.executable, "-c", code, str(server.fileno())]
        with subprocess.Popen(command, pass_fds=[server.fileno()]):
            assert hub.unavailable("nobody/model") is None


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "cached_file", lambda model, name: path if (path := tmp_path / name).exists() else None)
    assert not hub.is_cached("some/model")
    write(tmp_path, "config.json", json.dumps(SIZES))
    assert not hub.is_cached("some/model")
    write(tmp_path, "model.safetensors.index.json", json.dumps({"weight_map": {"a": "one", "b": "two"}}))
    write(tmp_path, "one", "")
    assert not hub.is_cached("some/model")  # a shard is missing
    write(tmp_path, "two", "")
    assert hub.is_cached("some/model")


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Qwen/Qwen2.5-Math-1.5B", 3.0), ("a/SmolLM2-360M-Instruct", 0.72), ("google/gemma-3-270m", 0.54), ("gpt2", None)],
)
def test_how_much_there_is_to_fetch_by_a_models_name(monkeypatch, name: str, gigabytes: float | None) -> None:
    monkeypatch.setattr("utils.preflight.model_files.model_config", lambda path: None)
    size = bytes_to_fetch(name)
    assert size is None if gigabytes is None else size == pytest.approx(gigabytes * 1e9)


def test_how_much_there_is_to_fetch_by_the_config(monkeypatch) -> None:
    monkeypatch.setattr("utils.preflight.model_files.model_config", lambda path: SIZES | {"torch_dtype": "float32"})
    assert bytes_to_fetch("a/7B") < 1e6


def test_the_memory_of_this_machine() -> None:
    assert 2**27 < host_memory() < 2**50


def test_all_obstacles_at_once(tmp_path: Path) -> None:
    config = Config(paths=Paths(train_data_file="no.jsonl", output_dir=str(write(tmp_path, "file", ""))))
    lines = list(obstacles(config, resume=False, allow_changes=False))
    assert any("no.jsonl" in line for line in lines) and any("paths.output_dir" in line for line in lines)
    assert not any("\n" in line for line in lines)
