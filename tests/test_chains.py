from __future__ import annotations

import json
import random
import runpy
import sys
from collections import Counter
from pathlib import Path

import forked
import pytest
from transformers import AutoModelForCausalLM

from utils import tiny
from utils.chains import Mixture, make_demonstrations, make_problems, make_response, terms_of
from utils.problems import load_problems, load_template
from utils.rewards.functions import question_only_answer, r1_zero_answer

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "play-scripts" / "make_chains.py"
TEMPLATES = tuple(load_template(REPOSITORY / "data" / name) for name in ("tiny.prompt", "question_only.prompt"))
FLAWLESS = Mixture(wrong_steps=0.0, wrong_guesses=0.0, malformed=0.0)


class Scripted(random.Random):
    """Draws the given numbers in turn, and always the first of what there is to choose."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)

    def choice(self, items):
        return items[0]


def test_problems_are_right_and_no_terms_are_on_both_sides() -> None:
    training, validation = make_problems(100, 20, seed=1)
    kept = []
    for problems, each in ((training, 100), (validation, 20)):
        for problem in problems:
            assert problem.question.endswith("=?") and problem.answer == str(sum(terms_of(problem)))
            assert all(1 <= term <= 9 for term in terms_of(problem))
            assert problem.level == f"{len(terms_of(problem))} terms"
        assert Counter(problem.level for problem in problems) == {f"{n} terms": each for n in (3, 4, 5, 6)}
        assert len({problem.question for problem in problems}) == len(problems)
        kept.append({tuple(sorted(terms_of(problem))) for problem in problems})
    assert len(kept[1]) == 80 and not kept[0] & kept[1]
    assert make_problems(100, 20, seed=1) == (training, validation)
    assert make_problems(100, 20, seed=2)[1] != validation


def test_as_many_problems_as_there_can_be() -> None:
    training, validation = make_problems(3, 121, seed=1)
    assert len(validation) == 4 * 121 and len(training) == 4 * 3
    with pytest.raises(ValueError, match="--validation-problems 122 should be from 1 to 121"):
        make_problems(1, 122, seed=1)
    with pytest.raises(ValueError, match="--training-problems 670 should be from 1 to 669"):
        make_problems(670, 10, seed=1)


@pytest.mark.parametrize(
    ("style", "draws", "response"),
    [
        ("full", (), " 3+14=17,17+9=26 </think> <answer> 26 </answer>"),
        ("abbreviated", (), " 17,26 </think> <answer> 26 </answer>"),
        ("bare", (), " </think> <answer> 26 </answer>"),
        ("rambling", (0.6, 0.4), " 3+14=17,17+9=26,wait 17+9=26 </think> <answer> 26 </answer>"),
        ("boxed", (), " \\boxed{26}"),
    ],
)
def test_the_styles(style: str, draws: tuple, response: str) -> None:
    """A flawless one draws a number for each step or for the guess, those of the style, and one for the format."""
    n_checks = 1 if style in ("bare", "boxed") else 2
    rng = Scripted(*[0.9] * n_checks, *draws, 0.9)
    assert make_response([3, 14, 9], style, Mixture(), rng) == response
    assert rng.numbers == ([0.9] if style == "boxed" else []), "a box has one format"


def test_a_wrong_step_is_carried_on_and_a_format_is_broken() -> None:
    rng = Scripted(0.01, 0.9, 0.01)
    assert make_response([3, 14, 9], "full", Mixture(), rng) == " 3+14=7,7+9=16 <answer> 16 </answer>"
    assert make_response([3, 14, 9], "bare", Mixture(), Scripted(0.1, 0.9)) == " </think> <answer> 16 </answer>"


def test_shares_are_as_stated() -> None:
    training, _ = make_problems(500, 32, seed=1)
    mixture = Mixture((0.4, 0.3, 0.2, 0.1), 0.1, 0.3, 0.25, 0.5)
    rows = make_demonstrations(training, TEMPLATES, 6, mixture, seed=1)
    truth = {template.replace("{question}", p.question): p for p in training for template in TEMPLATES}
    right, styles = Counter(), Counter()
    for row in rows:
        problem, style = truth[row["prompt"]], row["style"]
        answer = (question_only_answer if style == "boxed" else r1_zero_answer)(row["response"])
        key = (style, len(terms_of(problem))) if style in ("full", "abbreviated", "rambling") else style
        styles[style] += 1
        right[key, "malformed" if answer is None else "right" if answer == problem.answer else "wrong"] += 1
    n = len(rows)
    assert n == 12_000
    shares = {"full": 0.2, "abbreviated": 0.15, "bare": 0.1, "rambling": 0.05, "boxed": 0.5}
    for style, share in shares.items():  # within four standard errors
        assert styles[style] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)

    def check(key: object, outcome: str, share: float) -> None:
        drawn = sum(count for (other, _), count in right.items() if other == key)
        assert right[key, outcome] / drawn == pytest.approx(share, abs=4 * (share * (1 - share) / drawn) ** 0.5)

    check("boxed", "right", 0.7)
    check("bare", "malformed", 0.25)
    check("bare", "right", 0.75 * 0.7)
    check(("full", 3), "right", 0.75 * 0.9**2)
    check(("abbreviated", 3), "right", 0.75 * 0.9**2)


def test_demonstrations_fit_what_the_runs_sample() -> None:
    training, _ = make_problems(500, 32, seed=1)
    rows = make_demonstrations(training, TEMPLATES, 1, FLAWLESS, seed=1)
    tokenizer = tiny.build_tokenizer()
    lengths: dict[str, list[int]] = {}
    for row in rows[:1000]:
        lengths.setdefault(row["style"], []).append(len(tokenizer(row["response"]).input_ids))
    means = {style: sum(each) / len(each) for style, each in lengths.items()}
    assert means["boxed"] < means["bare"] < means["abbreviated"] < means["full"] < means["rambling"] < 70
    assert max(lengths["full"]) < 60 and sum(length > 96 for length in lengths["rambling"]) < 20
    assert make_demonstrations(training, TEMPLATES, 1, FLAWLESS, seed=1) == rows


def make_chains(*options: str | Path) -> forked.subprocess.CompletedProcess:
    return forked.run([sys.executable, SCRIPT, *map(str, options)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_make_chains(tmp_path: Path) -> None:
    output = tmp_path / "chains"
    options = ("--output", output, "--steps", 1, "--demonstrations-each", 1, "--training-problems", 20, "--seed", 5)
    result = make_chains(*options)
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    training, validation = (load_problems(output / f"{name}.jsonl") for name in ("train", "validation"))
    assert (training, validation) == make_problems(20, 32, seed=5)
    rows = [json.loads(row) for row in (output / "demonstrations.jsonl").read_text().splitlines()]
    assert rows == make_demonstrations(training, TEMPLATES, 1, Mixture(), seed=5)
    assert not {row["prompt"] for row in rows} & {
        t.replace("{question}", p.question) for p in validation for t in TEMPLATES
    }
    before = contents(output)
    assert "already there" in make_chains(*options).stdout
    assert make_chains(*options[:-1], 6).returncode == 2
    assert contents(output) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--share-boxed", "1.5"), "--share-boxed 1.5 should be from 0 to 1"),
        (("--share-wrong-steps", "nan"), "--share-wrong-steps nan should be from 0 to 1"),
        (("--steps", "0"), "--steps 0 should be 1 or more"),
        (("--training-problems", "600"), "--training-problems 600 should be from 1 to 537"),
        (("--validation-problems", "122"), "--validation-problems 122 should be from 1 to 121"),
        (("--styles", "0.5", "0.5", "0.5", "0"), "--styles 0.5 0.5 0.5 0.0 should be 4 shares"),
        (("--styles", "2", "-1", "0", "0"), "--styles 2.0 -1.0 0.0 0.0 should be 4 shares"),
        (("--steps", "3", "--save-at", "4"), "--save-at 4 is not one of the 3 --steps"),
    ],
)
def test_make_chains_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: tuple, complaint: str
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "play-scripts")
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys, "argv", ["make_chains.py", "--output", str(tmp_path / "new"), *options])
    assert script["run_command"](script["build_parser"](), script["make"]) == 2
    assert capsys.readouterr().err.startswith(f"make_chains.py: {complaint}")
    assert not any(tmp_path.iterdir())
