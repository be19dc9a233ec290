"""The word problems of a small pretrained model: right, reasoned out, and never the same on both sides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "play-scripts"))
    import make_word_problems

    return make_word_problems


def test_each_line_of_the_reasoning_is_right_and_ends_in_the_answer(script) -> None:
    for problem, reasoning in script.word_problems(600, seed=1):
        first, second, last = reasoning.splitlines()
        results = []
        for line in (first, second):
            left, operator, right, result = re.fullmatch(r"(\d+) ([*+-]) (\d+) = (\d+)", line).groups()
            value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operator]
            assert value == int(result)
            results.append(result)
        assert results[0] in second.split(" = ")[0].split()  # the second calculation builds on the first
        assert last == f"#### {problem.answer}" and results[1] == problem.answer
        numbers = set(re.findall(r"\d+", problem.question))
        assert set(re.findall(r"\d+", first.split(" = ")[0])) <= numbers and "{" not in problem.question


def test_no_problem_of_a_kind_has_the_same_numbers_twice(script) -> None:
    pairs = script.word_problems(2500, seed=1)
    assert pairs == script.word_problems(2500, seed=1) and pairs != script.word_problems(2500, seed=2)

    def without_names(question: str) -> str:
        for word in (*script.NAMES, *script.THINGS):
            question = re.sub(rf"\b{word}\b", "", question)
        return question

    questions = [without_names(problem.question) for problem, _ in pairs]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], ["--model nowhere", "make smollm2"]),
        (["--demonstrations", "0"], ["--demonstrations 0", "from 1 to 1000"]),
        (["--training", "5000"], ["--training 5000", "from 1 to 2000"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    script, arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = script.build_parser().parse_args(
        ["--output", str(tmp_path / "out"), "--model", str(tmp_path), *arguments]
    )
    with pytest.raises(ValueError) as error:
        script.make(options)
    assert all(word in str(error.value) for word in words) and not (tmp_path / "out").exists()
