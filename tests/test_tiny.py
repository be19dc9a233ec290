from __future__ import annotations

import random
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import tiny
from utils.problems import load_problems, load_template
from utils.rewards.functions import r1_zero_answer

REPOSITORY = Path(__file__).parents[1]
TEMPLATE = load_template(REPOSITORY / "data" / "tiny.prompt")

built = tiny.build_tokenizer()


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path):
    """The tokenizer as every other part sees it, vLLM too: saved, and loaded by AutoTokenizer."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


# NFC-normalised, as Qwen2's tokenizer makes every text
@given(text=st.text(st.characters(codec="ascii")) | st.sampled_from(["  a\n\n b\t<think> 1+1", "né 中 🎲", "answers"]))
def test_text_survives_and_a_loaded_tokenizer_agrees(loaded, text: str) -> None:
    ids = built(text).input_ids
    assert loaded(text).input_ids == ids
    assert built.decode(ids) == loaded.decode(ids) == text


def test_tokens_of_a_conversation(loaded) -> None:
    tokens = loaded.convert_ids_to_tokens(
        loaded("User: 7+8=?\nAssistant: <think> 15 </think> <answer> 15 </answer>").input_ids
    )
    assert tokens == [
        *("User", ":", "Ġ", "7", "+", "8", "=", "?", "Ċ", "Assistant", ":", "Ġ<", "think", ">", "Ġ", "1", "5"),
        *("Ġ</", "think", ">", "Ġ<", "answer", ">", "Ġ", "1", "5", "Ġ</", "answer", ">"),
    ]


def test_special_tokens(loaded) -> None:
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|endoftext|>", "<|pad|>", None)
    assert loaded("a<|endoftext|>").input_ids == [*loaded("a").input_ids, loaded.eos_token_id]


def test_the_model_is_small_float32_and_knows_its_special_tokens(tiny_model_dir: Path, loaded) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().num_embeddings == len(loaded) > max(loaded.eos_token_id, loaded.pad_token_id)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == loaded.eos_token_id
    assert loaded.pad_token_id != loaded.eos_token_id


def test_the_seed_decides_the_weights_and_global_generators_stay() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (tiny.build_model(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_untied_embeddings() -> None:
    model = tiny.build_model(seed=0, tie_embeddings=False)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def test_problems_are_right_and_no_pair_is_on_both_sides() -> None:
    training, validation = tiny.make_problems(n_validation_pairs=150, seed=1)
    pairs = []
    for problems in (training, validation):
        numbers = [tuple(map(int, re.fullmatch(r"(\d+)\+(\d+)=\?", p.question).groups())) for p in problems]
        assert [str(a + b) for a, b in numbers] == [p.answer for p in problems]
        pairs.append({frozenset(pair) for pair in numbers})
    assert len(pairs[1]) == 150 and not pairs[0] & pairs[1]
    assert len({p.question for p in training + validation}) == len(training) + len(validation) == 50 * 50
    assert tiny.make_problems(150, seed=1) == (training, validation)
    assert tiny.make_problems(150, seed=2)[1] != validation


def test_clean_demonstrations_are_right_and_fit() -> None:
    training, _ = tiny.make_problems(150, seed=1)
    rows = tiny.make_demonstrations(training, TEMPLATE, 1, share_wrong=0.0, share_malformed=0.0, seed=1)
    assert [r1_zero_answer(row["response"]) for row in rows] == [problem.answer for problem in training]
    assert max(len(built(row["response"]).input_ids) for row in rows) < 32
    example = tiny.make_response(tiny.Problem("38+25=?", "63"), random.Random(0), 0.0, 0.0)
    assert example == " 13+50=63 </think> <answer> 63 </answer>"


def test_messy_demonstrations_are_wrong_and_malformed_as_often_as_asked() -> None:
    training, _ = tiny.make_problems(150, seed=1)
    rows = tiny.make_demonstrations(training, TEMPLATE, 4, share_wrong=0.4, share_malformed=0.2, seed=1)
    truth = {TEMPLATE.replace("{question}", problem.question): problem.answer for problem in training}
    verdicts = Counter()
    for row in rows:
        answer = r1_zero_answer(row["response"])
        verdicts["malformed" if answer is None else "right" if answer == truth[row["prompt"]] else "wrong"] += 1
    # within four standard errors of 8,840 draws, sqrt(0.5 * 0.5 / 8840) = 0.0053
    assert verdicts["malformed"] / len(rows) == pytest.approx(0.2, abs=0.02)
    assert verdicts["right"] / len(rows) == pytest.approx(0.8 * 0.6, abs=0.021)


def make_tiny(*options: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "play-scripts" / "make_tiny.py", *map(str, options)]
    return forked.run(command)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_make_tiny(tmp_path: Path) -> None:
    output = tmp_path / "tiny"
    options = ("--output", output, "--steps", 3, "--save-at", 2, "--demonstrations-each", 1)
    result = make_tiny(*options)
    assert result.returncode == 0, result.stderr
    made = contents(output)
    assert {"train.jsonl", "validation.jsonl", "model/config.json", "sft_step_2/model.safetensors"} < set(made)
    assert made["model/model.safetensors"] != made["sft_step_2/model.safetensors"]
    AutoModelForCausalLM.from_pretrained(output / "model")
    demonstrations = made["demonstrations.jsonl"].decode()
    for problem in load_problems(output / "validation.jsonl"):
        assert f"User: {problem.question}" not in demonstrations

    again = make_tiny(*options)
    assert again.returncode == 0 and "already there" in again.stdout
    changed = make_tiny(*options, "--seed", 7)
    assert changed.returncode == 2 and "was made with other options (seed); --force" in changed.stderr
    assert contents(output) == made

    (output / "train.jsonl").unlink()
    forced = make_tiny(*options, "--force")
    assert forced.returncode == 0, forced.stderr
    assert contents(output) == made, "the same options give the same bytes"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--share-wrong", "1.5"), "--share-wrong 1.5 should be from 0 to 1"),
        (("--share-wrong", "-3"), "--share-wrong -3.0 should be from 0 to 1"),
        (("--share-malformed", "nan"), "--share-malformed nan should be from 0 to 1"),
        (("--steps", "0"), "--steps 0 should be 1 or more"),
        (("--demonstrations-each", "0"), "--demonstrations-each 0 should be 1 or more"),
        (("--validation-pairs", "0"), "--validation-pairs 0 should be from 1 to 1274"),
        (("--validation-pairs", "1275"), "--validation-pairs 1275 should be from 1 to 1274"),
        (("--steps", "3", "--save-at", "4"), "--save-at 4 is not one of the 3 --steps"),
    ],
)
def test_make_tiny_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: tuple, complaint: str
) -> None:
    (tmp_path / "options.json").write_text("{}")  # what an earlier call made, which --force would replace
    monkeypatch.syspath_prepend(REPOSITORY / "play-scripts")
    script = runpy.run_path(str(REPOSITORY / "play-scripts" / "make_tiny.py"))
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--output", str(tmp_path), "--force", *options])
    assert script["run_command"](script["build_parser"](), script["make"]) == 2
    assert capsys.readouterr().err == f"make_tiny.py: {complaint}\n"
    assert contents(tmp_path) == {"options.json": b"{}"}
    assert not tmp_path.with_name(f".saving-{tmp_path.name}").exists()


def test_make_tiny_leaves_a_folder_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = make_tiny("--output", tmp_path, "--force")
    assert result.returncode == 2 and "something that this script did not make" in result.stderr
    assert contents(tmp_path) == {"mine.txt": b"mine"}
