"""Are two mathematical answers equal? The reward is the whole signal, and the policy's text is hostile.

Most answers are decided in the calling process, as text or as exact numbers. What needs algebra goes to worker
processes with a hard time limit and a memory limit; nothing that an answer holds is ever executed.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Sequence
from types import TracebackType

from utils.rewards.client import GradingClient
from utils.rewards.compare import same
from utils.rewards.limits import MAX_ANSWER_LENGTH, nesting, refusal
from utils.rewards.normalize import TooDeepError, canonical
from utils.rewards.numbers import parse_number

Truth = str | Sequence[str]

PLAIN_NUMBER = re.compile(r"-?(?:[0-9]{1,20}|[0-9]{1,3}(?:,[0-9]{3}){1,6})(?:\.[0-9]{1,8})?")
MAX_CANONICAL_LENGTH = 2 * MAX_ANSWER_LENGTH
MAX_NESTING = 50
COUNTERS = ("answers", "fast", "algebra", "refused", "timeouts", "crashes")
COUNTED_AS = {"right": "algebra", "wrong": "algebra", "refused": "refused", "timeout": "timeouts", "crash": "crashes"}


class NeedsAlgebraError(Exception):
    """Text and numbers do not decide."""


class _NoAlgebra:
    """Stands in for the algebra in the calling process: it raises NeedsAlgebraError if the algebra would be needed.

    A formula that the guard lets into no parser equals nothing, and sets `refused`.
    """

    def __init__(self) -> None:
        self.refused = False

    def equal(self, one: str, other: str) -> bool:
        return self._ask(one, other)

    def proportional(self, one: tuple[str, str], other: tuple[str, str], positive: bool) -> bool:
        return self._ask(*one, *other)

    def rounds_to(self, formula: str, decimal: str) -> bool:
        return self._ask(formula)

    def _ask(self, *formulas: str) -> bool:
        if not any(map(refusal, formulas)):
            raise NeedsAlgebraError
        self.refused = True
        return False


_canonical_truth = functools.lru_cache(maxsize=4096)(canonical)


def check_truth(truth: Truth | None) -> None:
    """Raise ValueError if a truth cannot be graded against: None, empty, or not text."""
    members = truth if isinstance(truth, list | tuple) else [truth]
    if not members or not all(isinstance(member, str) and member.strip() for member in members):
        raise ValueError(f"truth {truth!r} is empty or not text; give an answer, or leave the problem out of the data")


def last_box(text: str) -> str | None:
    """What the last balanced `\\boxed{...}` or `\\fbox{...}` holds, stripped; None if absent.

    Of nested boxes it is the outer one.
    """
    opened: list[int | None] = []  # per open brace: where its box's content starts, None if it is no box's
    content = None
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}":
            start = opened.pop() if opened else None
            content = text[start : match.start()].strip() if start is not None else content
        elif match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if "box" in match[0] else None)
    return content


def decide_fast(prediction: str, truth: str) -> tuple[str, tuple[str, str] | None]:
    """("right" | "wrong" | "refused", None), or ("algebra", canonical pair) if text and numbers do not decide."""
    if truth.split() == prediction.split():
        return "right", None
    if max(len(prediction), len(truth)) > MAX_ANSWER_LENGTH:
        return "refused", None
    if PLAIN_NUMBER.fullmatch(prediction) and PLAIN_NUMBER.fullmatch(truth):
        return ("right" if parse_number(prediction) == parse_number(truth) else "wrong"), None
    algebra = _NoAlgebra()
    try:
        pair = canonical(prediction), _canonical_truth(truth)
        if max(map(len, pair)) > MAX_CANONICAL_LENGTH or max(map(nesting, pair)) > MAX_NESTING:
            return "refused", None
        if same(*pair, algebra):
            return "right", None
        return ("refused" if algebra.refused else "wrong"), None
    except NeedsAlgebraError:
        return "algebra", pair
    except (TooDeepError, RecursionError):
        return "refused", None


class Grader:
    """Grades batches of (prediction, truth) pairs. A context manager; callable from any thread and after a fork.

    `workers` processes are started when the first answer needs them. Each answer has `time_limit` seconds of processor
    time, each process `memory_limit_mb` MiB; an answer that breaks a limit is wrong, and counted.
    """

    def __init__(self, workers: int = 2, time_limit: float = 1.0, memory_limit_mb: int = 450):
        self.settings = (workers, time_limit, memory_limit_mb)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._drained = dict(self.counters)
        self._start_over()

    def _start_over(self) -> None:
        self._lock, self._client, self._owner = threading.Lock(), GradingClient(*self.settings), os.getpid()

    def grade(self, pairs: Sequence[tuple[str, Truth]]) -> list[bool]:
        """Whether each prediction equals its truth (any of them, if there are several), in order.

        Raises ValueError for an empty truth, and RuntimeError if the grading server cannot be started: a grader
        that does not work must not look like a policy that is always wrong.
        """
        if self._owner != os.getpid():  # a fork has neither the lock's holder nor a server of its own
            self._start_over()
        for _, truth in pairs:
            check_truth(truth)
        right = [False] * len(pairs)
        counts: dict[str, int] = dict.fromkeys(COUNTERS, 0) | {"answers": len(pairs)}
        undecided: dict[tuple[str, str], list[int]] = {}
        for i, (prediction, truth) in enumerate(pairs):
            outcomes = [decide_fast(prediction, member) for member in ([truth] if isinstance(truth, str) else truth)]
            right[i] = any(outcome == "right" for outcome, _ in outcomes)
            jobs = [] if right[i] else [pair for _, pair in outcomes if pair]
            for job in jobs:
                undecided.setdefault(job, []).append(i)
            if not jobs:
                refused = not right[i] and any(outcome == "refused" for outcome, _ in outcomes)
                counts["refused" if refused else "fast"] += 1
        if undecided:
            self._grade_by_algebra(undecided, right, counts)
        with self._lock:
            for name, count in counts.items():
                self.counters[name] += count
        return right

    def _grade_by_algebra(
        self, undecided: dict[tuple[str, str], list[int]], right: list[bool], counts: dict[str, int]
    ) -> None:
        """Fill `right` and `counts` in for what needs the workers; equal pairs are sent once."""
        with self._lock:
            verdicts = self._client.grade(list(undecided))
        for answers, verdict in zip(undecided.values(), verdicts, strict=True):
            for i in answers:
                right[i] = right[i] or verdict == "right"
                counts[COUNTED_AS[verdict]] += 1

    def drain_counters(self) -> dict[str, int]:
        """What was counted since the last call, to be logged with a step."""
        with self._lock:
            drained = {name: count - self._drained[name] for name, count in self.counters.items()}
            self._drained = dict(self.counters)
        return drained

    def close(self) -> None:
        """Stop the workers. Called again, it does nothing; a later `grade` starts them again."""
        if self._owner == os.getpid():
            with self._lock:
                self._client.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
