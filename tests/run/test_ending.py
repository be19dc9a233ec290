"""Signals against real processes, and when the time limit ends a run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from utils.run.ending import Status, StoppedWhileLoading, StopRequest, TimeLimit

LOOP = """
import signal, time
from utils.run.ending import Status, StopRequest

signal.signal(signal.SIGHUP, signal.{hangup})
with StopRequest() as stop:
    {before}
    stop.install()
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    {after}
raise SystemExit(Status.STOPPED_BY_SIGNAL)
"""
HANG_IN_C = "import ctypes; ctypes.PyDLL(None).sleep(600)"  # holds the interpreter lock: no Python code runs


def start(before: str = "pass", after: str = "pass", hangup: str = "SIG_DFL") -> subprocess.Popen:
    code = LOOP.format(before=before, after=after, hangup=hangup)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_lets_the_program_end_by_itself(number):
    process = start()
    process.send_signal(number)
    output, errors = process.communicate()
    assert output == "saving\n"
    assert process.returncode == Status.STOPPED_BY_SIGNAL
    assert signal.Signals(number).name in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("hang", ["time.sleep(600)", HANG_IN_C], ids=["python", "c"])
def test_second_signal_ends_at_once_whatever_the_program_does(second, hang):
    process = start(after=hang)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(second)
    output, _ = process.communicate()
    assert process.returncode == -second  # which a shell shows as 128 + second
    assert output == ""


def test_handlers_that_a_library_installs_are_replaced():
    process = start(before="import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "saving\n"
    assert process.returncode == Status.STOPPED_BY_SIGNAL


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    process = start(hangup="SIG_IGN")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert output == "saving\n"
    assert "SIGHUP" not in errors


def test_a_request_while_loading_is_an_exception_that_says_that_nothing_was_saved():
    with StopRequest() as stop:
        stop.check_while_loading()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedWhileLoading, match=r"SIGTERM while loading: .*nothing was saved"):
            stop.check_while_loading()


def test_installing_again_after_the_first_signal_keeps_the_second_deadly():
    process = start(after="stop.install(); print('again', flush=True); time.sleep(600)")
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ["saving\n", "again\n"]
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM


def test_handlers_come_back_at_the_end():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest() as stop:
        assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert stop.signal is signal.SIGTERM
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


class Clock:
    """Seconds since an arbitrary moment, set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_limit(max_hours: float | None) -> tuple[TimeLimit, Clock]:
    clock = Clock()
    return TimeLimit(max_hours, clock), clock


def test_no_limit_allows_everything():
    limit, clock = make_limit(None)
    clock.now = 1e12
    assert limit.allows_another_step()


def test_limit_leaves_time_for_the_last_evaluation_and_save():
    """One hour; 100 s a step, 60 s an evaluation, 40 s a save: with a margin of a tenth, 220 s must be left."""
    limit, clock = make_limit(1.0)
    limit.record(step=100.0)
    limit.record(evaluation=60.0, save=40.0)
    clock.now = 1000 + 3600 - 220
    assert limit.allows_another_step()
    clock.now += 0.5
    assert not limit.allows_another_step()
    clock.now += 65
    assert limit.allows_another_step(evaluates=False)  # 154 s are enough without one
    clock.now += 1
    assert not limit.allows_another_step(evaluates=False)


def test_what_was_not_measured_is_taken_to_last_as_long_as_a_step():
    limit, clock = make_limit(1.0)
    clock.now = 1000 + 3600
    assert limit.allows_another_step()  # nothing is known yet
    limit.record(step=100.0)
    clock.now = 1000 + 3600 - 330
    assert limit.allows_another_step()
    clock.now += 0.5
    assert not limit.allows_another_step()


def test_a_slow_first_step_is_forgotten_and_a_slow_recent_one_is_not():
    limit, clock = make_limit(1.0)
    limit.record(step=3000.0, evaluation=0.0, save=0.0)
    clock.now = 1000 + 3600 - 200
    for duration in (10.0, 10.0):
        limit.record(step=duration)
        assert not limit.allows_another_step()
    limit.record(step=10.0)
    assert limit.allows_another_step()
    limit.record(step=300.0)
    limit.record(step=10.0)
    assert not limit.allows_another_step()


def test_statuses_are_the_documented_ones():
    assert [(status.name, int(status)) for status in Status] == [
        ("FINISHED", 0),
        ("ERROR", 1),
        ("USER_MISTAKE", 2),
        ("COLLAPSED", 3),
        ("STOPPED_BY_SIGNAL", 4),
        ("TIME_LIMIT", 5),
        ("NONFINITE", 6),
    ]
