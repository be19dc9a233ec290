"""Hostile answers: nothing is executed, nothing hangs, nothing takes the caller down, and every loss is counted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sympy
from sympy.parsing import sympy_parser

from utils.rewards import client
from utils.rewards.client import GradingClient
from utils.rewards.grader import Grader, decide_fast
from utils.rewards.normalize import canonical
from utils.rewards.server import WARM_UP, verdict

ROOT = Path(__file__).parents[2]
HOSTILE = ROOT.parent / "shared" / "grader" / "hostile.jsonl"
NEEDS_ALGEBRA = (r"\sqrt{8}", r"2\sqrt{2}")

BOMBS = [
    "9^{9^{9}}",
    "9**9**9**9",
    r"((9!)!)!",
    "10^8!",
    r"2^{100000000}",
    r"\frac{100000000!}{99999999!}",
    r"e^{e^{e^{e^{e}}}}",
    "²" * 500,
    "9" * 100_000,
    "1 " * 50_000,
    "%" * 10_000,
    "}{" * 20_000,
    r"\frac " * 5_000,
    "1/" * 5_000 + "1",
    "5" + "\u0301" * 20_000,
    "(" * 5_000,
    r"\left(" * 2_000,
    r"\{" * 400 + r"\}" * 400,
    r"\sqrt{" * 30 + "2" + "}" * 30,
    "(" * 10 + "x" + ")" * 10,
    "|x" * 100,
    "|1|2|3",
    "a_{b}" * 60,
    "x'" * 100,
    r"\log_{2}" * 40 + "3",
    r"\arcsin(2)" * 29,
    "9999^{9999}" * 27,
    "999!" * 60,
    r"(\sqrt{2}+\sqrt{3})^{9999}",
    r"\cos(\frac{\pi}{65537})",
    r"\sin(10^{50})",
    r"\cosh(9999^{99})",
    r"\binom{999}{499}" * 15,
    r"\int \frac{x^3\sin x}{x^{10}+1} dx",
    r"\sum_{k=1}^{1000000000} \frac1k",
    r"\prod_{k=1}^{100000} k",
    r"\lim_{x\to0} x",
    r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10000000}",
    r"\begin{array}{*{1000000}{c}}1\end{array}",
    r"\operatorname{zeros}(100000,100000)",
    r"\begin{pmatrix}" + "&".join("1" * 900) + r"\end{pmatrix}",
    r"\{" + ",".join(map(str, range(20_000))) + r"\}",
    "+".join(rf"\sqrt{{{n}}}" for n in range(2, 30)),
    "x" * 1_900,
    "ab " * 600,
    "5 " + "word " * 390,
    r"x=\text{a}" + r"cm \text{a}" * 150,
    ",".join(f"x+{n}" for n in range(300)),
    r"\def\x{\x\x}\x",
    "(x:=5)",
    "[0]*10**9",
    "yield",
    "None",
    "lambda: 0",
    "1e308",
    "-inf",
    "nan",
    "0x10",
    "1_000",
    "5\0",
    "\x1b[31m5",
    "\ud800",
    "",
    " ",
    "=",
    ",",
    "()",
    "{}",
    r"\{\}",
    "&",
    ":",
    "<",
    "_",
    "^",
    "\\",
    "$",
    r"\boxed{",
    r"\text{",
    r"\begin{pmatrix}",
    "!",
    "!!",
    "1/0",
    "0^{-1}",
]


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def wait_until(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


@pytest.mark.slow
def test_bombs_come_back_and_match_nothing():
    truths = [
        r"\frac{1}{9}",
        "5!x",
        r"\{1,2\}",
        r"x^2+y^2=1",
        "(-\\infty,3]",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        "x>2",
    ]
    with Grader() as grader:
        verdicts = grader.grade([(bomb, truth) for bomb in BOMBS for truth in truths])
        assert not any(verdicts)
        assert grader.grade([NEEDS_ALGEBRA]) == [True]
        assert grader.counters["crashes"] == 0
        counted = {name: count for name, count in grader.counters.items() if name != "answers"}
        assert sum(counted.values()) == grader.counters["answers"] == len(BOMBS) * len(truths) + 1
        assert counted["refused"] > 100


@pytest.mark.skipif(not HOSTILE.exists(), reason=f"{HOSTILE} is not there")
@pytest.mark.slow
def test_hostile_file_stays_within_the_memory_limit():
    rows = [json.loads(line) for line in HOSTILE.read_text().splitlines()]
    with Grader() as grader:
        grader.grade([(row["prediction"], row["truth"]) for row in rows])
        server = grader._client.process.pid
        for pid in [server, *descendants(server)]:
            status = Path(f"/proc/{pid}/status").read_text()
            peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
            assert peak < 500 * 1024
        assert grader.counters["crashes"] == 0


PIECES = [
    r"\frac", "{", "}", "(", ")", "[", "]", r"\{", r"\}", "^", "_", "1", "2", "9", "10", "x", "y", "e", "i", r"\sqrt",
    r"\pi", r"\text{", r"\left", r"\cup", r"\pm", ",", ";", ":", "=", "<", r"\leq", r"\in", r"\infty",
    r"\begin{pmatrix}", r"\end{pmatrix}", "&", "\\\\", "%", "$", "!", "|", "'", r"\sin", r"\log", "-", "+", "/", "*",
    ".", " ", r"\boxed{", r"\binom", "°", "√", "½", r"\overline{", " or ", "answer is ",
]  # fmt: skip
ANSWERS = [
    r"\frac{1+\sqrt5}{2}", "-3", "(1,2)", r"x^2+1", r"\{1,2\}", r"(-\infty,3]", "x=5", r"10\text{ cm}", r"\text{even}",
    "204_5", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"1\frac12", r"\sin x", "4:30", r"50\%", r"2^{n-1}",
]  # fmt: skip


def random_bytes(rng: random.Random) -> str:
    return rng.randbytes(rng.randrange(60)).decode("latin-1")


def random_latex(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 20)))


def mutation(rng: random.Random) -> str:
    text = rng.choice(ANSWERS)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(["", *PIECES]) + text[place + rng.randrange(2) :]
    return text


@pytest.mark.slow
def test_fuzzing(capsys):
    """6,000 inputs: random bytes, random LaTeX, mutations of answers. The caller never sees an exception."""
    rng = random.Random(20_000)
    with Grader() as grader, capsys.disabled():
        for make in (random_bytes, random_latex, mutation):
            pairs = [(make(rng), rng.choice(ANSWERS)) for _ in range(2_000)]
            verdicts = grader.grade(pairs)
            assert len(verdicts) == len(pairs)
            counts = ", ".join(f"{name} {count}" for name, count in grader.drain_counters().items())
            print(f"\n{make.__name__}: {counts}, accepted {sum(verdicts)}", end="")
        assert grader.counters["answers"] == 6_000
        assert grader.counters["crashes"] == 0


CANARIES = [
    "__import__('os').system('touch {}')",
    "open('{}','w').write('1')",
    r"\text{{__import__('os').system('touch {}')}}",
    r"\operatorname{{__import__('os').system('touch {}')}}(x)",
    "exec(\"open('{}','w')\")",
    r"\frac{{__import__('os').system('touch {}')}}{{2}}",
    "().__class__.__bases__[0].__subclasses__() and open('{}','w')",
    "x=__import__('pathlib').Path('{}').touch()",
    r"\sqrt{{eval('open(chr(47)+\"{}\",\"w\")')}}",
    "\\write18{{touch {}}}",
    "$(touch {})",
    "`touch {}`",
    "1+1\nimport pathlib; pathlib.Path('{}').touch()",
    r"\left(lambda: open('{}','w')\right)()",
]


def test_nothing_in_an_answer_is_executed(tmp_path):
    with Grader() as grader:
        pairs = [(canary.format(tmp_path / f"canary{i}"), "5") for i, canary in enumerate(CANARIES)]
        pairs += [(prediction, prediction + "+0") for prediction, _ in pairs]
        grader.grade([*pairs, NEEDS_ALGEBRA])
    assert list(tmp_path.iterdir()) == []


def test_no_reader_of_python_expressions_sees_an_answer(monkeypatch):
    """No text goes to sympify, and so none to parse_expr, in any answer that reaches the parser."""

    def refuse(text, *args, **kwargs):
        raise AssertionError(f"sympy was asked to read {text!r}")

    monkeypatch.setattr(sympy_parser, "parse_expr", refuse)
    monkeypatch.setattr(sympy_parser, "eval_expr", refuse)
    pairs = [(r"0.25x", r"\frac{x}{4}"), (r"\binom{7}{3}+1", "36"), ("2x=3.0", "4x=6"), ("1.5y!", r"\frac32 y!")]
    assert [verdict(canonical(one), canonical(other)) for one, other in [*WARM_UP, *pairs]] == ["right"] * (
        len(WARM_UP) + 4
    )
    with pytest.raises(AssertionError, match="asked to read"):
        sympy.sympify("1 + 1")  # the guard of this test works


def test_an_overrun_costs_that_answer_alone():
    slow = ("9999^{9999}" * 27, "x")
    with Grader(workers=1, time_limit=0.05) as grader:
        grader.grade([slow])
        verdicts = grader.grade([slow, ("5", "5"), slow, ("(1,2)", "(1,2)")])
        assert verdicts == [False, True, False, True]
        assert grader.counters["timeouts"] >= 2
        assert grader.counters["crashes"] == 0
    with Grader(workers=1, time_limit=20.0) as grader:
        assert grader.grade([slow, NEEDS_ALGEBRA]) == [False, True]
        assert grader.counters["timeouts"] == 0


def freeze_the_only_worker(grader: Grader) -> int:
    """Stop an idle worker, so that it has its next answer and no processor."""
    assert grader.grade([NEEDS_ALGEBRA]) == [True]
    (worker,) = descendants(grader._client.process.pid)
    os.kill(worker, signal.SIGSTOP)
    return worker


def test_time_on_a_frozen_machine_does_not_count():
    with Grader(workers=1, time_limit=0.3) as grader:
        worker = freeze_the_only_worker(grader)
        threading.Timer(1.5, os.kill, (worker, signal.SIGCONT)).start()
        start = time.monotonic()
        assert grader.grade([(r"\sqrt{18}", r"3\sqrt{2}")]) == [True]
        assert time.monotonic() - start > 1.0  # it did wait, five times the limit
        assert descendants(grader._client.process.pid) == [worker]
        assert grader.counters["timeouts"] == 0


def test_a_worker_that_stays_frozen_is_replaced(monkeypatch):
    monkeypatch.setattr(client, "WALL_LIMIT", 1.0)
    with Grader(workers=1, time_limit=0.05) as grader:
        worker = freeze_the_only_worker(grader)
        assert grader.grade([(r"\sqrt{18}", r"3\sqrt{2}")]) == [True]
        assert worker not in descendants(grader._client.process.pid)
        assert grader.counters["timeouts"] == grader.counters["crashes"] == 0


def test_a_worker_out_of_memory_costs_that_answer_alone():
    with Grader(workers=1, time_limit=20.0, memory_limit_mb=1) as grader:
        assert grader.grade([NEEDS_ALGEBRA, ("5", "5")]) == [False, True]
        assert grader.counters["crashes"] == 1


def test_killed_workers_are_replaced():
    with Grader(workers=2, time_limit=20.0) as grader:
        assert grader.grade([NEEDS_ALGEBRA]) == [True]
        server = grader._client.process.pid
        for worker in descendants(server):
            os.kill(worker, signal.SIGKILL)
        assert grader.grade([(r"\sqrt{18}", r"3\sqrt{2}"), (r"\sqrt{32}", r"4\sqrt{2}")]) == [True, True]
        os.kill(server, signal.SIGKILL)
        assert grader.grade([(r"\sqrt{50}", r"5\sqrt{2}")]) == [True]


@pytest.mark.slow
def test_grading_while_workers_are_being_killed():
    """Each kill costs the answer being graded, at most; everything else is right."""
    pairs = [(rf"\sqrt{{{2 * n * n}}}", rf"{n}\sqrt{{2}}") for n in range(2, 120)]
    with Grader(workers=2, time_limit=20.0) as grader:
        assert grader.grade([NEEDS_ALGEBRA]) == [True]
        server, stop, kills = grader._client.process.pid, threading.Event(), []

        def kill_now_and_then() -> None:
            while not stop.wait(0.05):
                for worker in descendants(server)[:1]:
                    os.kill(worker, signal.SIGKILL)
                    kills.append(worker)

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        verdicts = grader.grade(pairs)
        stop.set()
        killer.join()
        assert kills
        assert verdicts.count(False) == grader.counters["crashes"] <= len(kills)


def test_grading_from_threads():
    results: dict[int, list[bool]] = {}
    with Grader(time_limit=20.0) as grader:

        def work(n: int) -> None:
            results[n] = grader.grade(
                [(rf"\sqrt{{{2 * n * n}}}", rf"{n}\sqrt{{2}}"), (rf"\sqrt{{{n}}}", rf"{n}\sqrt{{2}}")]
            )

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {n: [True, False] for n in range(2, 8)}


def _grade_in_fork(grader: Grader, answers) -> None:
    answers.put(grader.grade([NEEDS_ALGEBRA, (r"\sqrt{8}", "3")]))
    answers.put(grader._client.process.pid)
    grader.close()


def test_grading_after_a_fork():
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with Grader(time_limit=20.0) as grader:
        assert grader.grade([NEEDS_ALGEBRA]) == [True]
        child = context.Process(target=_grade_in_fork, args=(grader, answers))
        child.start()
        assert answers.get(timeout=60) == [True, False]
        assert answers.get(timeout=60) != grader._client.process.pid
        child.join()
        assert grader.grade([(r"\sqrt{18}", r"3\sqrt{2}")]) == [True]  # the fork has not taken ours down


def test_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from utils.rewards.grader import Grader\n"
        "grader = Grader(time_limit=20.0)\n"
        "print(grader.grade([(r'\\sqrt{8}', r'2\\sqrt{2}')]))\n"  # and no close: the server must end with its caller
        "print(grader._client.process.pid)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    verdicts, server = run.stdout.split("\n")[:2]
    assert verdicts == "[True]"
    wait_until(lambda: not Path(f"/proc/{server}").exists(), "the end of the server")


def test_the_server_holds_neither_torch_nor_a_gpu_nor_the_callers_files(tmp_path):
    with (tmp_path / "open.txt").open("w") as held, Grader(time_limit=20.0) as grader:
        os.set_inheritable(held.fileno(), True)
        grader.grade([NEEDS_ALGEBRA])
        server = grader._client.process.pid
        for pid in [server, *descendants(server)]:
            assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
            assert tmp_path / "open.txt" not in [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()]
        environment = Path(f"/proc/{server}/environ").read_text().split("\0")
        assert "CUDA_VISIBLE_DEVICES=" in environment


def test_a_server_that_cannot_start_is_an_error_and_not_a_zero(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot grade"), Grader() as grader:
        grader.grade([NEEDS_ALGEBRA])


def test_closing_ends_every_process_and_grading_starts_them_again():
    grader = Grader(time_limit=20.0)
    grader.grade([NEEDS_ALGEBRA])
    server = grader._client.process.pid
    family = [server, *descendants(server)]
    assert len(family) == 2  # one answer, one worker
    grader.close()
    grader.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "the end of the workers")
    assert grader.grade([NEEDS_ALGEBRA]) == [True]
    grader.close()


def test_large_batches_do_not_block_on_the_pipes():
    jobs = [(f"{n}" * 1_000, f"{n}" * 1_000) for n in range(1, 400)]  # 2 MB through pipes of 64 KB
    grading_client = GradingClient(2, 20.0, 450)
    assert grading_client.grade(jobs) == ["right"] * len(jobs)
    grading_client.close()


def test_the_calling_process_decides_in_bounded_time():
    """The fast path runs in the caller, where nothing could stop it: its patterns must not backtrack."""
    units = [
        "x", "1", "ab", "\\a", "'", "_{a}", "(", "|", ",", "1,234", " ", "{", "\\text{a}", "cm ", "^{2}", "\\pm", "-",
        ".", "/", "$", "\\\\", "U", " and ", "<", "\\approx ", "x>1 and ", " squared", "\\{x:", " to ", "m/", "about",
    ]  # fmt: skip
    for i, unit in enumerate(units):
        for other in units[i:]:  # the other way round it is the same, but for its two ends
            text = ((unit + other) * 1_000)[:1_000]
            start = time.process_time()
            for truth in ("x=5", "5\\text{ cm}", "(1,2)"):
                decide_fast(text, truth)
            assert time.process_time() - start < 0.5, (unit, other)
