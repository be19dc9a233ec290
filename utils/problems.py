"""From data files and prompt templates to problems and prompts, and the streams and subsets drawn from them by seed.

`load_problems`, `read_problems`, `save_problems`, `load_template`, `build_prompts`, `notes_on_data`, `fixed_subset`,
`ProblemStream`.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from utils.records import Demonstration, Problem, Prompt
from utils.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

QUESTION = "{question}"
GSM8K_MARK = "####"
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
# Of MATH's 7,500 training problems two have no boxed answer, so a few are left out; more is a mistake in the file.
MAX_SHARE_WITHOUT_ANSWER = 0.01


def load_problems(path: str | Path) -> list[Problem]:
    """The problems of `read_problems`. A warning is logged if rows were left out."""
    problems, without_answer = read_problems(path)
    if without_answer:
        lines = ", ".join(map(str, without_answer))
        logger.warning("%s: left out %d rows with an empty answer (lines %s)", path, len(without_answer), lines)
    return problems


def read_problems(path: str | Path) -> tuple[list[Problem], list[int]]:
    """Read a JSONL file of problems: `problem` or `question`, `answer`, and if known `level` and `subject`.

    An answer is a string, a number, or a list of either, any of which is right. GSM8K's worked answers are cut to what
    follows `####`, without thousands commas. Blank lines are skipped. Rows with an empty answer can't be scored: if
    they are at most one in a hundred, they are left out and their line numbers are returned. Raises ValueError with
    file and line for every other bad row, and for a file without problems.
    """
    problems, without_answer = [], []
    for line_number, row in read_rows(path):
        try:
            problem = problem_from_row(row)
        except ValueError as error:
            raise ValueError(f"{path}:{line_number}: {error}") from error
        if problem is None:
            without_answer.append(line_number)
        else:
            problems.append(problem)
    if not problems and not without_answer:
        raise ValueError(f"{path}: the file is empty; expected one JSON object per line with `problem` and `answer`")
    if len(without_answer) > MAX_SHARE_WITHOUT_ANSWER * (len(problems) + len(without_answer)):
        others = f", and so are {len(without_answer) - 1} more" if without_answer[1:] else ""
        raise ValueError(f"{path}:{without_answer[0]}: `answer` is empty{others}; give it an answer or delete the row")
    return problems, without_answer


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers; numbers stay strings, spelled as in the file.

    Raises ValueError if there is no such file, and with file and line for a line that is not a JSON object.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected JSONL, one JSON object per line")
    with Path(path).open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}:{line_number}", parse_int=str, parse_float=str)
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line_number}: expected a JSON object, not {type(row).__name__}")
            yield line_number, row


def parse_json(text: bytes, place: str, **options: Any) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError, which begins with the place, if it cannot be read."""
    try:
        return json.loads(text.decode("utf-8-sig"), **options)
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ValueError(f"{place}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: its lists or objects are nested too deeply to be read") from error


def problem_from_row(row: dict[str, Any]) -> Problem | None:
    """One row as a Problem, or None if its `answer` field is empty. Raises ValueError for any other fault."""
    key = "problem" if "problem" in row else "question"
    for needed in (key, "answer"):
        if needed not in row:
            name = "`problem` (or `question`)" if needed == "question" else f"`{needed}`"
            raise ValueError(f"no {name} among the keys {sorted(row)}")
    question = _text(key, row[key])
    if not question.strip():
        raise ValueError(f"`{key}` is empty")
    listed = isinstance(row["answer"], list)
    answers = [_answer(_text("answer", answer)) for answer in (row["answer"] if listed else [row["answer"]])]
    if not any(answers):
        return None
    if not all(answers):
        raise ValueError("one of the answers in the list `answer` is empty")
    extras = {key: _text(key, row[key]) for key in ("level", "subject") if row.get(key) is not None}
    return Problem(question, tuple(answers) if listed else answers[0], **extras)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        shown = type(value).__name__ if isinstance(value, list | dict) else json.dumps(value)
        raise ValueError(f"`{key}` should be text, not {shown}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise ValueError(f"`{key}` is not valid Unicode: {error}") from error
    return value


def _answer(text: str) -> str:
    """The ground truth in an answer field: what follows GSM8K's mark, or everything if there is no mark."""
    if GSM8K_MARK not in text:
        return text.strip()
    final = text.rpartition(GSM8K_MARK)[2].strip()
    return final.replace(",", "") if THOUSANDS.fullmatch(final) else final


def save_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as the JSONL that `load_problems` reads."""
    with Path(path).open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {"problem": problem.question} | {k: v for k, v in asdict(problem).items() if k != "question"}
            file.write(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")


def load_template(path: str | Path) -> str:
    """Read a prompt template: the whole file, without the one newline at its end that editors add.

    All braces but those of `{question}` are plain text. Raises ValueError if there is no such file, or if it doesn't
    hold `{question}` exactly once.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such prompt template")
    try:
        template = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    if (count := template.count(QUESTION)) != 1:
        raise ValueError(f"{path}: the template must hold {QUESTION} once, it holds it {count} times")
    return template


def build_prompts(
    problems: Sequence[Problem],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    use_chat_template: bool = False,
    system_prompt: str = "",
) -> tuple[list[Prompt], int]:
    """Put every problem into the template and tokenize it, once and for all.

    Returns the prompts, and how many were left out because they have more than `max_prompt_tokens` tokens.

    The tokenizer adds its beginning token if it is one that does. With `use_chat_template` the filled template is the
    user's message, after `system_prompt` unless that is empty, and only the chat template adds special tokens.
    Raises ValueError if the chat template is missing, if the tokenizer ends every text with its end token, and if no
    prompt is left.
    """
    texts = [template.replace(QUESTION, problem.question) for problem in problems]
    if use_chat_template:
        texts = [_in_chat_template(text, tokenizer, system_prompt) for text in texts]
    elif tokenizer("1").input_ids[-1] == tokenizer.eos_token_id:
        raise ValueError("the tokenizer ends every text, so every prompt, with its end token; turn add_eos_token off")
    # verbose: the tokenizer's own warning about long texts would come before ours, and once only.
    token_ids = tokenizer(texts, add_special_tokens=not use_chat_template, verbose=False).input_ids
    prompts = [
        Prompt(problem, text, tuple(ids))
        for problem, text, ids in zip(problems, texts, token_ids, strict=True)
        if len(ids) <= max_prompt_tokens
    ]
    if not prompts:
        shortest = min(map(len, token_ids), default=0)
        raise ValueError(
            f"none of the {len(problems)} prompts fits: the shortest has {shortest} tokens, "
            f"max_prompt_tokens is {max_prompt_tokens}; raise it or use a shorter prompt template"
        )
    return prompts, len(problems) - len(prompts)


def _in_chat_template(text: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> str:
    if not tokenizer.chat_template:
        raise ValueError("use_chat_template is on, but this model's tokenizer has no chat template; turn it off")
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def notes_on_data(train: Sequence[Problem], validation: Sequence[Problem], prompts_per_step: int) -> list[str]:
    """What is allowed but worth knowing: validation problems that are trained on, and too few training problems.

    Two questions are the same if they differ in white space at most.
    """
    notes = []
    questions = {" ".join(problem.question.split()) for problem in train}
    n_shared = sum(" ".join(problem.question.split()) in questions for problem in validation)
    if n_shared:
        notes.append(
            f"validation problems that are also in the training data: {n_shared} of {len(validation)}; the evaluation "
            "is not on held-out problems alone"
        )
    if len(train) < prompts_per_step:
        notes.append(
            f"{len(train)} training problems are fewer than the {prompts_per_step} prompts per GRPO step "
            "(rollout_batch_size / group_size), so a step draws some of them more than once"
        )
    return notes


def fixed_subset(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """n items drawn by seed, in their own order; all of them if n is None or larger than their number.

    A smaller n draws a subset of what a larger n draws.
    """
    order = list(range(len(items)))
    random.Random(derive_seed(seed, "validation_subset")).shuffle(order)
    return [items[i] for i in sorted(order[:n])]


class ProblemStream(Generic[Item]):
    """Endless shuffled epochs over the training items: each item comes once per epoch, in that epoch's own order.

    The order depends on the seed, the epoch and the number of items alone. Items that were retired are left out of
    later epochs; if none would be left, all come back.
    """

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        if not items:
            raise ValueError("there is nothing to draw from: the training set is empty")
        self._items = items
        self._seed = seed
        self._place = {id(item): i for i, item in enumerate(items)}
        self._left_out: set[int] = set()  # of this epoch
        self._retired: set[int] = set()  # of the next
        self._start_epoch(0)

    def _start_epoch(self, epoch: int, position: int = 0) -> None:
        self._epoch, self._position = epoch, position
        order = list(range(len(self._items)))
        random.Random(derive_seed(self._seed, "problems", epoch)).shuffle(order)
        self._order = [i for i in order if i not in self._left_out]

    def draw(self, n: int) -> list[Item]:
        """The next n items. A draw may run over the end of an epoch, or of several if n is larger than the set."""
        drawn: list[Item] = []
        while len(drawn) < n:
            if self._position == len(self._order):
                if len(self._retired) == len(self._items):
                    self._retired = set()
                self._left_out = set(self._retired)
                self._start_epoch(self._epoch + 1)
            taken = self._order[self._position : self._position + n - len(drawn)]
            self._position += len(taken)
            drawn.extend(self._items[i] for i in taken)
        return drawn

    def retire(self, items: Iterable[Item]) -> None:
        """Leave these very items out from the next epoch on."""
        self._retired |= {self._place[id(item)] for item in items}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the epoch, how many of its items are drawn, and which are left out. JSON-able."""
        state: dict[str, Any] = {"epoch": self._epoch, "position": self._position}
        if self._retired or self._left_out:
            state |= {"left_out": sorted(self._left_out), "retired": sorted(self._retired)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a stream over the same items with the same seed was.

        Raises ValueError if the position is beyond the set, as when the data has changed.
        """
        left_out, retired = set(state.get("left_out", ())), set(state.get("retired", ()))
        n_items = len(self._items)
        fits = 0 <= state["position"] <= n_items - len(left_out) and max(left_out | retired, default=0) < n_items
        if not fits or state["epoch"] < 0:
            raise ValueError(f"state {state} does not fit a set of {n_items} items; has the data changed?")
        self._left_out, self._retired = left_out, retired
        self._start_epoch(state["epoch"], state["position"])


def load_demonstrations(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Demonstration], int]:
    """Read and tokenize a JSONL file; returns the demonstrations and how many longer than max_tokens were left out.

    Raises ValueError with file and line for a row without the two texts, and if no demonstration is left.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so a response could not be taught to end")
    demonstrations, n_rows = [], 0
    for line_number, row in read_rows(path):
        n_rows += 1
        for key in ("prompt", "response"):
            if key not in row:
                raise ValueError(f"{path}:{line_number}: no `{key}` among the keys {sorted(row)}")
            try:
                is_empty = not _text(key, row[key])
            except ValueError as error:
                raise ValueError(f"{path}:{line_number}: {error}") from error
            if is_empty:
                raise ValueError(f"{path}:{line_number}: `{key}` is empty")
        prompt_ids = tokenizer(row["prompt"], verbose=False).input_ids
        response_ids = tokenizer(row["response"], add_special_tokens=False, verbose=False).input_ids
        demonstration = Demonstration(tuple(prompt_ids), (*response_ids, tokenizer.eos_token_id))
        if len(demonstration) <= max_tokens:
            demonstrations.append(demonstration)
    if not demonstrations:
        raise ValueError(f"{path}: none of its {n_rows} rows has {max_tokens} tokens or fewer")
    return demonstrations, n_rows - len(demonstrations)
