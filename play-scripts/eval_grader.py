"""Measure the grader on labelled answers, beside Math-Verify alone.

    python play-scripts/eval_grader.py
    python play-scripts/eval_grader.py --pairs pairs.jsonl probes.jsonl --hostile hostile.jsonl --output results/grader

`--pairs`: JSONL rows with `truth`, `prediction`, `match` (the verdict they deserve) and `group`; without it, the sample
of our own, data/grader_sample.jsonl. Prints a table by group: answers graded rightly, wrong answers accepted, answers
per second. `--hostile`: rows with `truth` and `prediction`; prints how long the slowest took, how many were accepted,
and the largest worker. Workers are warm when the clock starts. Math-Verify runs as its README shows, in one killable
process with a memory limit. `--output`: a folder for README.md, the page of both tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from utils.problems import read_rows
from utils.rewards.grader import Grader

Pair = tuple[str, str]
Verdicts = Callable[[list[Pair]], list[bool]]

SAMPLE = Path(__file__).parents[1] / "data" / "grader_sample.jsonl"
MATH_VERIFY_LIMIT = 10.0  # seconds per answer: its own two timeouts are 5 s each
MATH_VERIFY_MEMORY = 2 * 2**30
EXAMPLES = 3  # mistakes per group on the page
SHOWN = 20  # wrong verdicts printed per grader
COLUMNS = ("answers", "right %", "wrong ones accepted", "answers per second")


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


INTRODUCTION = """# The grader beside Math-Verify

Labelled answers, graded by `utils/rewards/grader.py` and by Math-Verify alone, whose parser ours uses. "Right" is
the share of answers that got the verdict that they deserve; an accepted wrong answer is what a policy learns to write.
The groups `math_*` are answers to MATH problems: the same one, another problem's, the same value written otherwise, or
one that is close and wrong. `pairs`, `probes` and the hostile answers are third parties' data and are not in this
repository; `grader_sample` is data/grader_sample.jsonl, written for this project. A few of the hostile answers are
right and may be accepted. Answers per second are one machine's, with its other work. The command:
"""
WHAT_GOES_WRONG = """## What Math-Verify alone gets wrong

It reads answers generously, which suits the evaluation of honest models and is unsafe as a reward. It drops what it
does not know: the base of `204_5`, most units, names and the order that they give (`x=4, y=3` for 3, 4), the left side
of an equation (1 for `x+y=1`), a second guess after an approximation sign (`5\\approx 7` for 5). It reads `1/2x` as
1/(2x) and `2(3)` as 5, takes `10:20` for `5:10` in times of day, and cannot tell two tiny irrational numbers apart. It
also refuses right answers: inequalities joined by words, sets in terms of their members, vectors written as columns,
units spelt in two ways. It has no limit on memory, and its time limits use signals, which work in the main thread only.
Rows of the sample that it gets wrong, at most three per group:
"""


@dataclass
class GroupResult:
    """How one grader did on the rows of one group: counts, and the seconds that they took."""

    rows: list[dict]
    verdicts: list[bool]
    seconds: float

    def cells(self) -> list[str]:
        """One text per entry of COLUMNS."""
        right = sum(verdict == row["match"] for verdict, row in zip(self.verdicts, self.rows, strict=True))
        wrong_answers = sum(not row["match"] for row in self.rows)
        accepted = sum(verdict and not row["match"] for verdict, row in zip(self.verdicts, self.rows, strict=True))
        return [
            str(len(self.rows)),
            f"{100 * right / len(self.rows):.2f}",
            f"{accepted} of {wrong_answers}" if wrong_answers else "-",
            f"{len(self.rows) / self.seconds:.0f}",
        ]

    def mistakes(self) -> list[tuple[dict, bool]]:
        return [
            (row, verdict) for row, verdict in zip(self.rows, self.verdicts, strict=True) if verdict != row["match"]
        ]


def read_labelled(paths: Iterable[Path], labelled: bool) -> list[dict]:
    """Rows with `truth` and `prediction`, and `match` where `labelled`. Raises ValueError with file and line.

    A row's `group` gets its file's name in front; rows of a file without groups are one group.
    """
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
            group = f"{path.stem}/{row['group']}" if "group" in row else path.stem
            rows.append(row | {"group": group, "file": path.stem})
    return rows


def measure(rows: list[dict], grade: Verdicts) -> dict[str, GroupResult]:
    """A grader's results by group, in order of name, and of "all"."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    grade([(row["prediction"], row["truth"]) for row in rows[:200]])  # warm-up
    results = {}
    for name, members in sorted(groups.items()):
        start = time.perf_counter()
        verdicts = grade([(row["prediction"], row["truth"]) for row in members])
        results[name] = GroupResult(members, verdicts, time.perf_counter() - start)
    results["all"] = GroupResult(
        [row for result in results.values() for row in result.rows],
        [verdict for result in results.values() for verdict in result.verdicts],
        sum(result.seconds for result in results.values()),
    )
    return results


def print_results(title: str, results: dict[str, GroupResult]) -> None:
    """Print one grader's table, then rows that it graded wrongly."""
    widths = [max(map(len, results)), *(max(len(column), 8) for column in COLUMNS)]
    table = [["group", *COLUMNS], *([name, *result.cells()] for name, result in results.items())]
    print(f"\n{title}")
    for name, *cells in table:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    mistakes = results["all"].mistakes()
    for row, verdict in mistakes[:SHOWN]:
        outcome = "accepted" if verdict else "missed"
        print(f"  {outcome}: truth {row['truth']!r}, prediction {row['prediction'][:100]!r}")
    if len(mistakes) > SHOWN:
        print(f"  ... and {len(mistakes) - SHOWN} more")


def face(rows: list[dict], grade: Verdicts) -> str:
    """One sentence on what became of hostile answers, each graded in a call of its own."""
    times = []
    for row in rows:
        start = time.perf_counter()
        accepted = grade([(row["prediction"], row["truth"])])[0]
        times.append((time.perf_counter() - start, row.get("name", row["prediction"][:40]), accepted))
    seconds, name, _ = max(times)
    over, accepted = sum(seconds > 2 for seconds, *_ in times), sum(t[2] for t in times)
    return f"{len(rows)} hostile answers: slowest {seconds:.2f} s ({name}), over 2 s: {over}, accepted: {accepted}"


def grade_with_ours(pairs: list[dict], hostile: list[dict], workers: int) -> tuple[dict[str, GroupResult], list[str]]:
    """Results by group, and sentences about the rest."""
    with Grader(workers=workers) as grader:
        results = measure(pairs, grader.grade)
        grader.grade([(r"2\sqrt{2}", r"\sqrt{8}")])
        notes = [face(hostile, grader.grade)] if hostile else []
        notes.append("counters: " + ", ".join(f"{name} {count}" for name, count in grader.counters.items()))
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return results, [*notes, f"largest process: {largest:.0f} MiB"]


def grade_with_math_verify(pairs: list[dict], hostile: list[dict]) -> tuple[dict[str, GroupResult], list[str]]:
    """As `grade_with_ours`."""
    math_verify = MathVerify()
    results = measure(pairs, math_verify.grade)
    notes = [face(hostile, math_verify.grade)] if hostile else []
    notes.append(f"answers that hung for {MATH_VERIFY_LIMIT:.0f} s or killed its process: {math_verify.lost}")
    math_verify.close()
    return results, notes


def page(
    ours: tuple[dict[str, GroupResult], list[str]], theirs: tuple[dict[str, GroupResult], list[str]], command: list[str]
) -> str:
    """The page of both graders: the command, the table by group, and Math-Verify's mistakes in the sample."""
    (results, notes), (their_results, their_notes) = ours, theirs
    columns = ["answers", "right %", "wrong ones accepted", "per second"]
    header = ["group", *columns, *(f"Math-Verify: {column}" for column in columns[1:])]
    table = [[name, *result.cells(), *their_results[name].cells()[1:]] for name, result in results.items()]
    lines = [INTRODUCTION, "```bash", "python " + " ".join(command), "```", "", markdown_table(header, table), ""]
    lines += [f"- This grader: {note}" for note in notes] + [f"- Math-Verify alone: {note}" for note in their_notes]
    lines += ["", WHAT_GOES_WRONG, markdown_table(["group", "truth", "answer", "Math-Verify"], examples(their_results))]
    return "\n".join(lines) + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def examples(results: dict[str, GroupResult]) -> list[list[str]]:
    """For the page: a few mistakes per group of the sample, which is our own; the other files keep their licence."""
    rows = []
    for name, result in results.items():
        for row, accepted in [mistake for mistake in result.mistakes() if mistake[0]["file"] == SAMPLE.stem][:EXAMPLES]:
            texts = [f"`{row[key]}`".replace("|", "\\|") for key in ("truth", "prediction")]
            rows += [[name.partition("/")[2], *texts, "accepts" if accepted else "refuses"]] if name != "all" else []
    return rows


def shown_command() -> list[str]:
    """The command line with file names in place of this machine's paths."""
    return [
        argument if not Path(argument).is_absolute() else Path(argument).name
        for argument in ["play-scripts/eval_grader.py", *sys.argv[1:]]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[SAMPLE], help="JSONL of labelled pairs")
    parser.add_argument("--hostile", type=Path, nargs="+", default=[], help="JSONL of hostile predictions")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of our grader")
    parser.add_argument("--no-math-verify", action="store_true", help="leave Math-Verify out")
    parser.add_argument("--output", type=Path, help="folder that gets the tables as README.md")
    args = parser.parse_args()
    if args.output and args.no_math_verify:
        parser.error("--output writes both graders' tables: leave out --no-math-verify")
    try:
        pairs, hostile = read_labelled(args.pairs, labelled=True), read_labelled(args.hostile, labelled=False)
    except ValueError as error:
        parser.error(str(error))

    outcomes = {"utils.rewards.grader": grade_with_ours(pairs, hostile, args.workers)}
    if not args.no_math_verify:
        outcomes["Math-Verify alone"] = grade_with_math_verify(pairs, hostile)
    for title, (results, notes) in outcomes.items():
        print_results(f"{title}, {args.workers if 'utils' in title else 1} workers", results)
        print("\n".join(notes))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "README.md").write_text(page(*outcomes.values(), command=shown_command()))


if __name__ == "__main__":
    main()
