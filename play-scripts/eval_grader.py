"""Measure the grader on labelled answers, beside Math-Verify alone.

    python play-scripts/eval_grader.py --pairs pairs.jsonl probes.jsonl --hostile hostile.jsonl

`--pairs`: JSONL rows with `truth`, `prediction`, `match` (the verdict they deserve) and `group` (or `class`); prints a
table by group: answers graded rightly, wrong answers accepted, answers per second. `--hostile`: rows with `truth` and
`prediction`; prints how long the slowest took, what became of them, and the largest worker. Workers are warm when the
clock starts. Math-Verify runs as its README shows, in one killable process with a memory limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from utils.problems import read_rows
from utils.rewards.grader import Grader

Pair = tuple[str, str]
Verdicts = Callable[[list[Pair]], list[bool]]

MATH_VERIFY_LIMIT = 10.0  # seconds an answer: its own two timeouts are 5 s each
MATH_VERIFY_MEMORY = 2 * 2**30
SHOWN = 20  # wrong verdicts printed per grader


def serve_math_verify(connection: Connection) -> None:
    """Grade pairs with Math-Verify's `parse` and `verify`, until the pipe closes."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MATH_VERIFY_MEMORY, MATH_VERIFY_MEMORY))
    while (pair := connection.recv()) is not None:
        prediction, truth = pair
        connection.send(bool(verify(parse(f"${truth}$"), parse(f"${prediction}$"))))


class MathVerify:
    """Math-Verify alone in a process of its own, replaced when it hangs or dies (counted in `lost`)."""

    def __init__(self) -> None:
        self.lost = 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=serve_math_verify, args=(far_end,), daemon=True)
        self.process.start()
        far_end.close()

    def grade(self, pairs: list[Pair]) -> list[bool]:
        return [self.grade_one(pair) for pair in pairs]

    def grade_one(self, pair: Pair) -> bool:
        try:
            self.connection.send(pair)
            if self.connection.poll(MATH_VERIFY_LIMIT):
                return self.connection.recv()
        except (EOFError, OSError):  # it died of the answer
            pass
        self.lost += 1
        self.close()
        self.start()
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def read_labelled(paths: Iterable[Path], labelled: bool) -> list[dict]:
    """Rows with `truth` and `prediction`, and `match` where `labelled`. Raises ValueError with file and line."""
    kinds = {"truth": str, "prediction": str} | ({"match": bool} if labelled else {})
    rows = []
    for path in paths:
        for line_number, row in read_rows(path):
            for key, kind in kinds.items():
                if key not in row:
                    raise ValueError(f"{path}:{line_number}: no `{key}` among the keys {sorted(row)}")
                if not isinstance(row[key], kind):
                    expected = "a text" if kind is str else "true or false"
                    raise ValueError(f"{path}:{line_number}: `{key}` should be {expected}, not {row[key]!r:.80}")
            rows.append(row)
    return rows


def table_row(name: str, rows: list[dict], verdicts: list[bool], seconds: float) -> str:
    right = sum(verdict == row["match"] for verdict, row in zip(verdicts, rows, strict=True))
    wrong_answers = sum(not row["match"] for row in rows)
    accepted = sum(verdict and not row["match"] for verdict, row in zip(verdicts, rows, strict=True))
    share = f"{100 * accepted / wrong_answers:.2f}" if wrong_answers else "-"
    return (
        f"{name:<18}{len(rows):>8}{100 * right / len(rows):>10.2f}{accepted:>7} of {wrong_answers:<6}{share:>7}"
        f"{len(rows) / seconds:>11.0f}"
    )


def compare(title: str, rows: list[dict], grade: Verdicts) -> None:
    """Print one grader's table, then the rows that it graded wrongly."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row.get("group") or row.get("class") or "all"].append(row)
    grade([(row["prediction"], row["truth"]) for row in rows[:200]])  # warm-up
    print(
        f"\n{title}\n{'group':<18}{'answers':>8}{'right %':>10}{'accepted wrongly':>17}{'in 100':>7}{'answers/s':>11}"
    )
    mistakes: list[tuple[dict, bool]] = []
    total_verdicts: list[bool] = []
    total_rows: list[dict] = []
    total_seconds = 0.0
    for name, members in sorted(groups.items()):
        start = time.perf_counter()
        verdicts = grade([(row["prediction"], row["truth"]) for row in members])
        seconds = time.perf_counter() - start
        print(table_row(name, members, verdicts, seconds))
        mistakes += [(row, v) for row, v in zip(members, verdicts, strict=True) if v != row["match"]]
        total_rows, total_verdicts, total_seconds = (
            total_rows + members,
            total_verdicts + verdicts,
            total_seconds + seconds,
        )
    print(table_row("all", total_rows, total_verdicts, total_seconds))
    for row, verdict in mistakes[:SHOWN]:
        print(
            f"  {'accepted' if verdict else 'missed'}: truth {row['truth']!r}, prediction {row['prediction'][:100]!r}"
        )
    if len(mistakes) > SHOWN:
        print(f"  ... and {len(mistakes) - SHOWN} more")


def face(title: str, rows: list[dict], grade: Verdicts) -> None:
    """Print what became of hostile answers, each graded in a call of its own."""
    times = []
    for row in rows:
        start = time.perf_counter()
        accepted = grade([(row["prediction"], row["truth"])])[0]
        times.append((time.perf_counter() - start, row.get("name", row["prediction"][:40]), accepted))
    slowest = max(times)
    print(f"\n{title}: {len(rows)} hostile answers, slowest {slowest[0]:.2f} s ({slowest[1]}), "
          f"over 2 s: {sum(seconds > 2 for seconds, *_ in times)}, accepted: {sum(t[2] for t in times)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[], help="JSONL of labelled pairs")
    parser.add_argument("--hostile", type=Path, nargs="+", default=[], help="JSONL of hostile predictions")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of our grader")
    parser.add_argument("--no-math-verify", action="store_true", help="leave Math-Verify out")
    args = parser.parse_args()
    if not args.pairs and not args.hostile:
        parser.error("nothing to grade: give --pairs, --hostile or both")
    try:
        pairs, hostile = read_labelled(args.pairs, labelled=True), read_labelled(args.hostile, labelled=False)
    except ValueError as error:
        parser.error(str(error))

    with Grader(workers=args.workers) as grader:
        if pairs:
            compare(f"utils.rewards.grader, {args.workers} workers", pairs, grader.grade)
        if hostile:
            grader.grade([(r"2\sqrt{2}", r"\sqrt{8}")])
            face("utils.rewards.grader", hostile, grader.grade)
        print("counters:", ", ".join(f"{name} {count}" for name, count in grader.counters.items()))
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest process of the grader: {largest:.0f} MiB")
    if args.no_math_verify:
        return
    math_verify = MathVerify()
    if pairs:
        compare("Math-Verify alone, 1 process", pairs, math_verify.grade)
    if hostile:
        face("Math-Verify alone", hostile, math_verify.grade)
    print(f"answers that hung for {MATH_VERIFY_LIMIT:.0f} s or killed it: {math_verify.lost}")
    math_verify.close()


if __name__ == "__main__":
    main()
