"""The grading server: a clean process that keeps workers, each with a hard limit on processor time and on memory.

It imports the parser once and forks workers from there, so that replacing one takes milliseconds. It is started as a
program of its own (`python -m utils.rewards.server`), not by `multiprocessing`: it shares nothing with a caller that
holds CUDA, threads or other people's memory, and needs no `if __name__ == "__main__"` in the caller's script.

The time limit is a kernel timer on the worker's own processor time, so that a frozen or busy machine makes no answer
wrong. The wall-clock limit, many times longer, only replaces a worker that gets no processor at all; its answer goes to
another worker once.

Why not Pebble's ProcessPool: it grades as fast (436 to 477 answers with fractions and roots per second and worker, this
server 442 to 453), but its workers share one pipe under one lock. When a busy worker was killed, the pool stalled for
over 5 s in 11 of 40 trials, and the death of an idle worker broke the pool. Its time limit counts wall-clock time, and
from a caller with threads, which must not fork, it needs a `__main__` guard in the caller's script.

Lines in: `[id, prediction, truth]`, canonical texts. Lines out: `[id, verdict]`, in the order in which they are done.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import selectors
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TextIO

from utils.rewards.algebra import PointAlgebra
from utils.rewards.compare import same

Job = tuple[int, str, str]  # id, prediction, truth

READY = "ready"
RIGHT, WRONG, REFUSED, TIMEOUT, CRASH = "right", "wrong", "refused", "timeout", "crash"

ANSWERS_PER_WORKER = 2_000  # then it is replaced: the parser's and sympy's caches only grow
SETTINGS = (int, float, int, float)  # on the command line: workers, time limit, memory limit in MiB, wall-clock limit
WATCH_INTERVAL = 2.0  # seconds between looks at whether the caller still lives

# The parser builds its prediction tables as it meets new constructs; workers inherit those that these have built.
WARM_UP = (
    (r"\frac{1+\sqrt{5}}{2}", r"\frac{1}{2}+\frac{\sqrt{5}}{2}"),
    (r"x^{2}+2x+1", r"(x+1)^{2}"),
    (r"-2x^{8}+9x^{7}-\frac{3}{4}x", r"9x^{7}-2x^{8}-0.75x"),
    (r"2\sqrt[3]{4}\pi", r"\pi \cdot 2\sqrt[3]{4}"),
    (r"3+4i", r"4i+3"),
    (r"\sin x\cos 2x", r"\cos(2x)\sin(x)"),
    (r"\log_{2} 3+\ln x", r"\ln x+\log_{2} 3"),
    (r"e^{2x}-a_{1}", r"-a_{1}+e^{2x}"),
    (r"5!\binom{5}{2}", r"1200"),
    (r"|x|+f(x)+\lfloor x \rfloor", r"\lfloor x \rfloor +f(x)+|x|"),
    (r"2^{n-1}/3", r"\frac{2^{n-1}}{3}"),
    (r"x=y+1", r"2x-2y=2"),
    (r"\frac{a+b}{2c}", r"(a+b)/(2c)"),
)


def verdict(prediction: str, truth: str) -> str:
    """The verdict on one pair of canonical answers."""
    algebra = PointAlgebra()
    try:
        if same(prediction, truth, algebra):
            return RIGHT
    except RecursionError:
        return REFUSED
    return REFUSED if algebra.refused else WRONG


def serve_worker(requests: int, replies: int, time_limit: float, memory_limit_mb: int) -> None:
    """A worker's life: a line in, a line out, until the server closes the pipe. Never returns to the server's code."""
    limit = memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with os.fdopen(requests) as lines, os.fdopen(replies, "w") as out:
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, time_limit)  # at its end SIGPROF kills the process
            answer = verdict(*json.loads(line))
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write(answer + "\n")
            out.flush()


@dataclass
class Worker:
    """One forked process. `job` is the (id, prediction, truth) it works on, None while it waits.

    `deadline` is on the monotonic clock, in seconds.
    """

    pid: int
    requests: int
    replies: int
    job: Job | None = None
    deadline: float = 0.0
    answered: int = 0

    def send(self, job: Job, wall_limit: float) -> None:
        self.job, self.deadline = job, time.monotonic() + wall_limit
        data = json.dumps(job[1:]).encode() + b"\n"
        while data:
            data = data[os.write(self.requests, data) :]


@dataclass
class Pool:
    """The workers and the queue before them. `time_limit` is seconds of processor time, `wall_limit` of the clock."""

    size: int
    time_limit: float
    memory_limit_mb: int
    wall_limit: float
    selector: selectors.BaseSelector
    workers: list[Worker] = field(default_factory=list)
    queue: deque[Job] = field(default_factory=deque)
    tried_again: set[int] = field(default_factory=set)

    def fork(self) -> Worker:
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _close_all_but(request_read, reply_write)
                serve_worker(request_read, reply_write, self.time_limit, self.memory_limit_mb)
                status = 0
            finally:
                os._exit(status)
        os.close(request_read)
        os.close(reply_write)
        worker = Worker(pid, request_write, reply_read)
        self.workers.append(worker)
        self.selector.register(reply_read, selectors.EVENT_READ, worker)
        return worker

    def remove(self, worker: Worker) -> bool:
        """Kill a worker and forget it. True if its processor time had run out before."""
        self.selector.unregister(worker.replies)
        os.kill(worker.pid, signal.SIGKILL)
        status = os.waitpid(worker.pid, 0)[1]
        os.close(worker.requests)
        os.close(worker.replies)
        self.workers.remove(worker)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF

    def dispatch(self) -> None:
        """Give waiting answers to free workers, forking those that are missing."""
        while self.queue:
            worker = next((worker for worker in self.workers if worker.job is None), None)
            if worker is None and len(self.workers) == self.size:
                return
            worker = worker or self.fork()
            try:
                worker.send(self.queue[0], self.wall_limit)
            except BrokenPipeError:  # killed while it waited, which costs no answer
                self.remove(worker)
            else:
                self.queue.popleft()

    def receive(self, worker: Worker) -> tuple[int, str] | None:
        """The verdict that a worker has written, or what its death says; None if its answer is to be tried again."""
        line = os.read(worker.replies, 100).decode()
        job, worker.job = worker.job, None
        worker.answered += 1
        if not line:
            ran_out = self.remove(worker)
            return self.lost(job, TIMEOUT if ran_out else CRASH, final=ran_out) if job else None
        if worker.answered >= ANSWERS_PER_WORKER:
            self.remove(worker)
        self.tried_again.discard(job[0])
        return job[0], line.strip()

    def lost(self, job: Job, outcome: str, final: bool = False) -> tuple[int, str] | None:
        """The outcome of an answer whose worker has gone. Unless it is final, the answer is tried once more first."""
        if not final and job[0] not in self.tried_again:  # the worker may have been killed or frozen from outside
            self.tried_again.add(job[0])
            self.queue.appendleft(job)
            return None
        self.tried_again.discard(job[0])
        return job[0], outcome

    def overdue(self) -> list[tuple[int, str] | None]:
        """Replace the workers whose wall-clock time is up."""
        late = [worker for worker in self.workers if worker.job is not None and worker.deadline <= time.monotonic()]
        return [self.lost(worker.job, TIMEOUT, final=self.remove(worker)) for worker in late]

    def next_deadline(self) -> float:
        """Seconds until a worker's wall-clock time is up, at most WATCH_INTERVAL."""
        deadlines = [worker.deadline for worker in self.workers if worker.job is not None]
        return max(0.0, min([WATCH_INTERVAL, *(deadline - time.monotonic() for deadline in deadlines)]))


def _close_all_but(*kept: int) -> None:
    """Leave a forked worker its two pipes and nothing else: no sibling's pipe, no way to the caller, no terminal."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    start = 3
    for fd in sorted(kept):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, min(highest, 65_536))


class Requests:
    """Whole lines from the caller."""

    def __init__(self) -> None:
        self.unread = b""

    def read(self) -> list[Job] | None:
        """What has arrived; None at the end."""
        chunk = os.read(0, 65_536)
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [tuple(json.loads(line)) for line in lines] if chunk else None


def serve_once(pool: Pool, requests: Requests, out: TextIO) -> bool:
    """Wait for something to happen and deal with it. False once the caller has closed the pipe."""
    done: list[tuple[int, str] | None] = []
    for key, _ in pool.selector.select(pool.next_deadline()):
        if key.data is not None:
            done.append(pool.receive(key.data))
            continue
        arrived = requests.read()
        if arrived is None:
            return False
        pool.queue.extend(arrived)
    done += pool.overdue()
    out.writelines(json.dumps(reply) + "\n" for reply in done if reply)
    out.flush()
    pool.dispatch()
    return True


def main() -> None:
    size, time_limit, memory_limit_mb, wall_limit = (
        kind(text) for kind, text in zip(SETTINGS, sys.argv[1:], strict=True)
    )
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not reach the protocol
    caller = os.getppid()
    for prediction, truth in WARM_UP:
        assert verdict(prediction, truth) == RIGHT, (prediction, truth)
    gc.freeze()

    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    pool, requests = Pool(size, time_limit, memory_limit_mb, wall_limit, selector), Requests()
    out.write(READY + "\n")
    out.flush()
    while os.getppid() == caller and serve_once(pool, requests, out):
        pass
    for worker in list(pool.workers):
        pool.remove(worker)


if __name__ == "__main__":
    main()
