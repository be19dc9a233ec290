from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from utils import tiny
from utils.problems import (
    ProblemStream,
    build_prompts,
    fixed_subset,
    load_problems,
    load_template,
    notes_on_data,
    read_problems,
    save_problems,
)
from utils.records import Problem

REPOSITORY = Path(__file__).parents[1]
R1_ZERO = REPOSITORY / "data" / "r1_zero.prompt"


def write_rows(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"problem": "1+1?", "answer": " 2 "}, Problem("1+1?", "2")),
        ({"question": "How far?", "answer": "3 + 4 = <<3+4=7>>7 km\n#### 7"}, Problem("How far?", "7")),
        ({"question": "q", "answer": "#### -1,234,567.5"}, Problem("q", "-1234567.5")),
        ({"question": "q", "answer": "first #### 1\n#### 2"}, Problem("q", "2")),
        ({"problem": "list x", "answer": "1,234"}, Problem("list x", "1,234")),  # a comma of the answer's own
        ({"question": "list x", "answer": "#### 1,23"}, Problem("list x", "1,23")),
        ({"problem": "x", "answer": ["1/2", "0.5"]}, Problem("x", ("1/2", "0.5"))),
        ('{"problem": "x", "answer": [0.50, 1e2, 7]}', Problem("x", ("0.50", "1e2", "7"))),
        ('{"problem": "x", "answer": 12345678901234567890.10}', Problem("x", "12345678901234567890.10")),
        (
            {"problem": "p", "question": "q", "answer": "a", "level": "Level 5", "subject": "Algebra", "id": [1]},
            Problem("p", "a", "Level 5", "Algebra"),
        ),
        ('{"problem": "p", "answer": "a", "level": 5, "subject": null}', Problem("p", "a", "5")),
        ({"problem": " keeps {its} spaces\n", "answer": "a"}, Problem(" keeps {its} spaces\n", "a")),
        ('{"problem": "one\u2028line", "answer": "a"}', Problem("one\u2028line", "a")),
        ('\ufeff{"problem": "p", "answer": "a"}', Problem("p", "a")),
    ],
)
def test_a_row_becomes_a_problem(tmp_path: Path, row: dict | str, problem: Problem) -> None:
    assert load_problems(write_rows(tmp_path / "p.jsonl", row)) == [problem]


GOOD = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"problem": "x", ', "not JSON"),
        ('["x", "y"]', "expected a JSON object, not list"),
        ({"answer": "2"}, r"no `problem` \(or `question`\) among the keys \['answer'\]"),
        ({"problem": "x", "solution": "2"}, r"no `answer` among the keys \['problem', 'solution'\]"),
        ({"problem": "  ", "answer": "2"}, "`problem` is empty"),
        ({"question": None, "answer": "2"}, "`question` should be text, not null"),
        ({"problem": "x", "answer": None}, "`answer` should be text, not null"),
        ({"problem": "x", "answer": True}, "`answer` should be text, not true"),
        ({"problem": "x", "answer": {"value": 2}}, "`answer` should be text, not "),
        ({"problem": "x", "answer": ["1", None]}, "`answer` should be text, not null"),
        ({"problem": "x", "answer": ["1", " "]}, "one of the answers in the list `answer` is empty"),
        ({"problem": "x", "answer": "2", "level": ["5"]}, "`level` should be text"),
        ('{"problem": "x", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"problem": "x", "answer": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
        ('{"problem": "x", "answer": [' + "[" * 400 + "]" * 401 + "}", "`answer` should be text, not list"),
        ('{"problem": "half a pair \\ud800", "answer": "2"}', "`problem` is not valid Unicode"),
        ({"problem": "x", "answer": " "}, "`answer` is empty"),
        ({"problem": "x", "answer": []}, "`answer` is empty"),
        ({"question": "x", "answer": "worked out\n####  "}, "`answer` is empty"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict | str, complaint: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(ValueError, match=f"p.jsonl:3: .*{complaint}"):
        load_problems(path)


def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"problem": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:2: not JSON: .*utf-8"):
        load_problems(tmp_path / "p.jsonl")


def test_a_file_without_problems_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p.jsonl: the file is empty"):
        load_problems(write_rows(tmp_path / "p.jsonl", "", "  "))
    with pytest.raises(ValueError, match=r"q.jsonl: no such file"):
        load_problems(tmp_path / "q.jsonl")


def test_few_empty_answers_are_left_out_with_a_warning_and_many_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = {"problem": "x", "answer": ""}
    path = write_rows(tmp_path / "p.jsonl", empty, *[GOOD] * 198, empty)
    with caplog.at_level(logging.WARNING):
        assert load_problems(path) == [Problem("1+1?", "2")] * 198
    assert "left out 2 rows with an empty answer (lines 1, 200)" in caplog.text
    assert read_problems(path) == ([Problem("1+1?", "2")] * 198, [1, 200])
    with pytest.raises(ValueError, match=r"p.jsonl:1: `answer` is empty, and so are 1 more"):
        load_problems(write_rows(path, empty, *[GOOD] * 197, empty))


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
answers = texts.map(str.strip).filter(lambda text: "####" not in text)
problems = st.builds(
    Problem, texts, answers | st.lists(answers, min_size=1).map(tuple), st.none() | texts, st.none() | texts
)


def test_validation_that_is_trained_on_is_counted() -> None:
    train = [Problem(f"What is {i} + 1?", str(i + 1)) for i in range(8)]
    apart = [Problem("What is 9 + 1?", "10")]
    assert notes_on_data(train, apart, prompts_per_step=8) == []
    (note,) = notes_on_data(train, [*apart, train[3], Problem(" What is  4 + 1?\n", "5")], prompts_per_step=8)
    assert "also in the training data: 2 of 3" in note


def test_fewer_problems_than_a_step_has_prompts_are_told() -> None:
    (note,) = notes_on_data([Problem("p", "1")] * 3, [Problem("q", "1")], prompts_per_step=4)
    assert "3 training problems" in note and "4 prompts per GRPO step" in note and "more than once" in note


@given(written=st.lists(problems, min_size=1, max_size=5))
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, written: list[Problem]) -> None:
    path = tmp_path_factory.mktemp("problems") / "p.jsonl"
    save_problems(path, written)
    assert load_problems(path) == written


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("{question}\n", "{question}"),
        ("{question}", "{question}"),
        ("Q: {question}\n\n", "Q: {question}\n"),
        ("Q: {question}\r\nA:", "Q: {question}\nA:"),
        ("  {question} ", "  {question} "),
    ],
)
def test_a_template_is_the_file_without_one_newline_at_its_end(tmp_path: Path, text: str, template: str) -> None:
    (tmp_path / "t.prompt").write_bytes(text.encode())
    assert load_template(tmp_path / "t.prompt") == template


@pytest.mark.parametrize("text", ["Solve this.", "{ question }", "{question} again: {question}", "{Question}"])
def test_a_template_must_hold_the_question_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.prompt").write_text(text)
    with pytest.raises(ValueError, match=r"t.prompt: the template must hold \{question\} once, it holds it \d times"):
        load_template(tmp_path / "t.prompt")
    with pytest.raises(ValueError, match="no such prompt template"):
        load_template(tmp_path / "missing.prompt")


def test_the_templates_in_the_repository() -> None:
    assert load_template(REPOSITORY / "data" / "question_only.prompt") == "{question}"
    assert load_template(R1_ZERO).endswith("\nUser: {question}\nAssistant: <think>")
    assert all(tag in load_template(R1_ZERO) for tag in ("<think> ", " </think> <answer> ", " </answer>"))
    assert load_template(REPOSITORY / "data" / "tiny.prompt").endswith("Assistant: <think>")


def test_braces_survive_and_long_prompts_are_left_out_not_cut() -> None:
    tokenizer = tiny.build_tokenizer()
    questions = ["{x} and {question} and {0}", "a" * 30, "\\frac{1}{2}%s"]
    asked = [Problem(question, "1") for question in questions]
    prompts, n_left_out = build_prompts(asked, "Q {0}: {question}", tokenizer, max_prompt_tokens=34)
    assert [prompt.text for prompt in prompts] == [f"Q {{0}}: {questions[0]}", f"Q {{0}}: {questions[2]}"]
    assert n_left_out == 1
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [prompt.text for prompt in prompts]
    # the middle prompt has 7 + 30 tokens, a byte each: at its own length it stays
    assert build_prompts(asked, "Q {0}: {question}", tokenizer, max_prompt_tokens=37)[1] == 0
    assert build_prompts(asked, "Q {0}: {question}", tokenizer, max_prompt_tokens=36)[1] == 1
    with pytest.raises(ValueError, match=r"none of the 3 prompts fits: the shortest has \d+ tokens, .* is 5; raise it"):
        build_prompts(asked, "Q {0}: {question}", tokenizer, max_prompt_tokens=5)


def tokenizer_that_adds(single: str, token: str):
    """The tiny tokenizer with a template of its own, as Llama's or Gemma's have."""
    tokenizer = tiny.build_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def test_a_beginning_token_is_added_where_the_tokenizer_adds_one() -> None:
    plain, adding = tiny.build_tokenizer(), tokenizer_that_adds("<|pad|> $A", "<|pad|>")
    asked = [Problem("1+1", "2")]
    without = build_prompts(asked, "{question}", plain, 100)[0][0]
    with_one = build_prompts(asked, "{question}", adding, 100)[0][0]
    assert with_one.token_ids == (plain.pad_token_id, *without.token_ids)
    assert with_one.text == without.text == "1+1"


def test_a_tokenizer_that_ends_every_prompt_is_refused() -> None:
    adding = tokenizer_that_adds("$A <|endoftext|>", "<|endoftext|>")
    with pytest.raises(ValueError, match="ends every text, so every prompt, with its end token"):
        build_prompts([Problem("1+1", "2")], "{question}", adding, 100)


CHAT = (
    "{{ '<|pad|>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chat_template() -> None:
    tokenizer = tokenizer_that_adds("<|pad|> $A", "<|pad|>")
    asked = [Problem("{a}", "2")]
    with pytest.raises(ValueError, match="tokenizer has no chat template; turn it off"):
        build_prompts(asked, "{question}", tokenizer, 100, use_chat_template=True)
    tokenizer.chat_template = CHAT
    (prompt,), _ = build_prompts(asked, "Solve {question}", tokenizer, 100, use_chat_template=True, system_prompt="Be.")
    assert prompt.text == "<|pad|>[system]Be.\n[user]Solve {a}\n[assistant]"
    # one beginning token, the template's: the tokenizer adds no second one
    assert prompt.token_ids.count(tokenizer.pad_token_id) == 1
    assert prompt.token_ids[0] == tokenizer.pad_token_id
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    (prompt,), _ = build_prompts(asked, "{question}", tokenizer, 100, use_chat_template=True)
    assert prompt.text == "<|pad|>[user]{a}\n[assistant]"


sizes = st.integers(1, 12)
draws = st.lists(st.integers(0, 30), max_size=12)


@given(size=sizes, draws=draws, seed=st.integers(0, 2**40))
def test_every_item_comes_once_an_epoch(size: int, draws: list[int], seed: int) -> None:
    stream = ProblemStream(range(size), seed)
    drawn = [stream.draw(n) for n in draws]
    assert [len(items) for items in drawn] == draws
    flat = [item for items in drawn for item in items]
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size))
    rest = flat[len(flat) // size * size :]
    assert len(set(rest)) == len(rest)
    # how the draws are cut does not change what is drawn
    assert ProblemStream(range(size), seed).draw(len(flat)) == flat


@given(size=sizes, draws=draws, later=draws, seed=st.integers(0, 2**40))
def test_a_restored_stream_goes_on_as_if_uninterrupted(
    size: int, draws: list[int], later: list[int], seed: int
) -> None:
    uninterrupted = ProblemStream(range(size), seed)
    for n in draws:
        uninterrupted.draw(n)
    restored = ProblemStream(range(size), seed)
    restored.draw(3)
    restored.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert [restored.draw(n) for n in later] == [uninterrupted.draw(n) for n in later]
    assert restored.state_dict() == uninterrupted.state_dict()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream, other = ProblemStream(range(50), seed=1), ProblemStream(range(50), seed=2)
    first, second = stream.draw(50), stream.draw(50)
    assert len({tuple(order) for order in (range(50), first, second, other.draw(50))}) == 4


@pytest.mark.parametrize(
    "state", [{"epoch": 0, "position": 6}, {"epoch": 0, "position": -1}, {"epoch": -1, "position": 0}]
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"does not fit a set of 5 items; has the data changed\?"):
        ProblemStream(range(5), seed=1).load_state_dict(state)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the training set is empty"):
        ProblemStream([], seed=1)


def test_fixed_subset() -> None:
    items = [f"item {i}" for i in range(100)]
    ten, twenty = fixed_subset(items, 10, seed=1), fixed_subset(items, 20, seed=1)
    assert len(ten) == 10 and len(twenty) == 20
    assert set(ten) < set(twenty)
    assert twenty == sorted(twenty, key=items.index)
    assert ten != items[:10] and ten != fixed_subset(items, 10, seed=2)
    assert fixed_subset(items, None, seed=1) == fixed_subset(items, 1000, seed=1) == items


def test_math_rows_become_prompts(shared_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = load_problems(shared_dir / "data" / "math" / "train.jsonl")
    validation = load_problems(shared_dir / "data" / "math" / "validation.jsonl")
    assert (len(training), len(validation)) == (7498, 5000)  # two training problems come without an answer
    assert "left out 2 rows with an empty answer (lines 7037, 7437)" in caplog.text
    assert validation[1].answer == "\\dfrac{1}{9}"
    assert (validation[1].level, validation[1].subject) == ("Level 4", "Prealgebra")

    template, tokenizer = load_template(R1_ZERO), tiny.build_tokenizer()
    prompts, n_left_out = build_prompts(validation[:500], template, tokenizer, max_prompt_tokens=1000)
    lengths = [len(tokenizer(template.replace("{question}", p.question)).input_ids) for p in validation[:500]]
    assert n_left_out == sum(length > 1000 for length in lengths) > 0
    assert len(prompts) == 500 - n_left_out
    assert all(prompt.problem.question in prompt.text for prompt in prompts)


def test_gsm8k_rows_become_problems_with_plain_numbers(shared_dir: Path) -> None:
    loaded = load_problems(shared_dir / "data" / "gsm8k" / "train.jsonl")
    assert len(loaded) == 7473
    assert loaded[0].answer == "72" and loaded[0].question.startswith("Natalia sold clips to 48")
    for problem in loaded:
        float(problem.answer)  # raises for a comma, a mark, or a worked solution


def prepare(script: str, *options: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "data" / script, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_prepare_math_from_raw_files(tmp_path: Path) -> None:
    raw = {
        "train/algebra/10.json": ("ten", "so $\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}$.", "Algebra"),
        "train/algebra/9.json": ("nine", "$\\boxed{9}$", "Algebra"),
        "train/geometry/1.json": ("no box", "hence 3", "Geometry"),
        "test/algebra/1.json": ("a test", "$\\boxed{ x = {2} }$", "Algebra"),
    }
    for name, (problem, solution, subject) in raw.items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        row = {"problem": problem, "level": "Level 1", "type": subject, "solution": solution}
        (tmp_path / "raw" / name).write_text(json.dumps(row))
    result = prepare("prepare_math.py", "--raw", tmp_path / "raw", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert load_problems(tmp_path / "out" / "train.jsonl") == [
        Problem("nine", "9", "Level 1", "Algebra"),
        Problem("ten", "\\frac{1}{2}", "Level 1", "Algebra"),
    ]
    assert load_problems(tmp_path / "out" / "validation.jsonl") == [Problem("a test", "x = {2}", "Level 1", "Algebra")]
    assert "2 problems (published: 7500)" in result.stdout
    assert f"left out, as it has no answer: {tmp_path / 'raw/train/geometry/1.json'}" in result.stdout

    again = prepare("prepare_math.py", "--raw", tmp_path / "raw", "--output", tmp_path / "out")
    assert again.returncode == 2 and "train.jsonl: is already there" in again.stderr
    offline = prepare("prepare_math.py", "--output", tmp_path / "hub")  # conftest turns the hub off
    assert offline.returncode == 2 and "see --raw for files" in offline.stderr and "Traceback" not in offline.stderr


def test_prepare_math_from_jsonl(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "math").mkdir(parents=True)
    write_rows(raw / "math" / "train.jsonl", {"problem": "p", "answer": "1", "level": "Level 2", "unique_id": "a/1"})
    missing = prepare("prepare_math.py", "--raw", raw / "math", "--output", tmp_path / "out")
    assert missing.returncode == 2
    assert "holds no test.jsonl or validation.jsonl, and no test/<subject>/<number>.json" in missing.stderr
    nested = prepare("prepare_math.py", "--raw", raw, "--output", tmp_path / "out")
    assert nested.stderr.endswith(f"; did you mean --raw {raw / 'math'}?\n")

    write_rows(raw / "math" / "validation.jsonl", {"problem": "q", "solution": "$\\boxed{2}$", "type": "Algebra"})
    done = prepare("prepare_math.py", "--raw", raw / "math", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert load_problems(tmp_path / "out" / "train.jsonl") == [Problem("p", "1", "Level 2")]
    assert load_problems(tmp_path / "out" / "validation.jsonl") == [Problem("q", "2", None, "Algebra")]

    (tmp_path / "file").touch()
    file = prepare("prepare_math.py", "--raw", raw / "math", "--output", tmp_path / "file")
    assert file.returncode == 2 and "Traceback" not in file.stderr

    write_rows(raw / "math" / "test.jsonl", {"problem": "q", "answer": "2"})
    both = prepare("prepare_math.py", "--raw", raw / "math", "--output", tmp_path / "other")
    assert both.returncode == 2
    assert "test.jsonl and validation.jsonl: which is to be the validation set?" in both.stderr
    assert not (tmp_path / "other").exists()


def test_prepare_gsm8k_from_raw_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", {"question": "q", "answer": "1000 + 80\n#### 1,080"})
    write_rows(tmp_path / "test.jsonl", {"question": "q", "answer": "#### -7"}, {"question": "q"})
    result = prepare("prepare_gsm8k.py", "--raw", tmp_path, "--output", tmp_path / "out")
    assert result.returncode == 2 and "test.jsonl:2: no `answer` among the keys ['question']" in result.stderr
    assert not (tmp_path / "out").exists()
    write_rows(tmp_path / "test.jsonl", {"question": "q", "answer": "#### -7"})
    result = prepare("prepare_gsm8k.py", "--raw", tmp_path, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert load_problems(tmp_path / "out" / "train.jsonl") == [Problem("q", "1080")]
    assert load_problems(tmp_path / "out" / "validation.jsonl") == [Problem("q", "-7")]
