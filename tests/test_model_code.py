"""A model folder may bring Python files of its own (`auto_map` in its JSON files). They are never run."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from configs.defaults import Training
from utils.algorithm.policy import context_length, load_policy, load_tokenizer

ROOT = Path(__file__).parents[1]
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
TOKENIZER_CLASS = {"AutoTokenizer": ["own.OwnTokenizer", None]}


def bring_code(folder: Path, model_type: str, own_tokenizer: bool) -> Path:
    """Give the model in the folder code of its own; returns the file that the code would write."""
    written = folder.parent / "written"
    (folder / "own.py").write_text(f"open({str(written)!r}, 'w').write('the code ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": CLASSES | (TOKENIZER_CLASS if own_tokenizer else {})}
    (folder / "config.json").write_text(json.dumps(config))
    if own_tokenizer:
        tokenizer = {"auto_map": TOKENIZER_CLASS, "tokenizer_class": "OwnTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return written


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def run_script(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a script to which somebody answers "y", whatever it asks."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return int(ended.value.code)


@pytest.mark.parametrize("own_tokenizer", [True, False])
@pytest.mark.parametrize("script", ["train_grpo.py", "play-scripts/evaluate.py", "play-scripts/train_sft.py"])
def test_the_code_of_a_model_folder_is_never_run(
    script: str, own_tokenizer: bool, model: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    written = bring_code(model, "of_its_own", own_tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1", "answer": "2", "prompt": "1+1", "response": "2"}\n')
    options = [
        "training.device=cpu", "training.use_bnb_adamw8bit=false", "training.max_tokens=4",
        f"paths.train_data_file={tmp_path}/rows.jsonl", f"paths.val_data_file={tmp_path}/rows.jsonl",
        f"paths.prompt_template_file={ROOT}/data/tiny.prompt", f"paths.output_dir={tmp_path}/run",
    ]  # fmt: skip
    arguments = {
        "train_grpo.py": [*options, f"paths.model_path={model}"],
        "play-scripts/evaluate.py": [str(model), "--config", str(ROOT / "configs" / "math.yaml"), *options],
        "play-scripts/train_sft.py": [
            "--model", str(model), "--data", f"{tmp_path}/rows.jsonl", "--output", f"{tmp_path}/sft", "--steps", "1"
        ],
    }[script]  # fmt: skip
    assert run_script(script, arguments, monkeypatch) == 2
    (complaint,) = [line for line in capfd.readouterr().err.splitlines() if str(model) in line]
    assert "code of its own" in complaint and "trust_remote_code" not in complaint
    assert not written.exists()


def test_a_model_that_transformers_knows_is_loaded_by_its_class(model: Path, monkeypatch) -> None:
    written = bring_code(model, "qwen2", own_tokenizer=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    policy = load_policy(str(model), Training(device="cpu", dtype="float32"))
    assert type(policy).__name__ == "Qwen2ForCausalLM"
    assert load_tokenizer(str(model))("1").input_ids and context_length(str(model)) == 2048
    assert not written.exists()


def test_every_loader_is_told_so() -> None:
    """Whatever loads by a path says trust_remote_code=False, so that no default or question decides."""
    paths = {*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("play-scripts/**/*.py")}
    for path in paths - {ROOT / "utils/hub/card.py"}:  # its calls are lines of a page, for people to copy
        text = path.read_text().replace("PeftConfig.from_pretrained", "")  # peft's reads JSON and imports nothing
        for call in text.split(".from_pretrained(")[1:]:
            arguments = call.split("\n    except")[0]
            assert "trust_remote_code=False" in arguments[:200], path
    assert '"trust_remote_code": False' in (ROOT / "utils" / "engines" / "vllm_start.py").read_text()
