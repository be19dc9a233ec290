"""Ranks for tests: forked processes with the environment that torchrun gives."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from run_cases import launch

from utils.algorithm import parallel


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment_of(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks}
    return {name: str(value) for name, value in (numbers | {"MASTER_PORT": port}).items()} | {
        "MASTER_ADDR": "127.0.0.1"
    }


def on_ranks(n_ranks: int, function: Callable[[], Any]) -> list[Any]:
    """What the function returns on each of so many ranks that have met."""
    context, port, pipes = multiprocessing.get_context("fork"), free_port(), []
    for rank in range(n_ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = environment_of(rank, n_ranks, port)
        process = context.Process(target=_be_rank, args=(environment, function, sender))
        process.start()
        sender.close()
        pipes.append((process, receiver))
    results = []
    for process, receiver in pipes:
        results.append(receiver.recv() if receiver.poll(60) else "no answer")
        process.join(10)
    assert not any(isinstance(result, str) for result in results), results
    return results


def _be_rank(environment: dict[str, str], function: Callable[[], Any], sender: Connection) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        parallel.join()
        sender.send(function())
    except BaseException:  # noqa: BLE001 (told to the test)
        sender.send(traceback.format_exc())


def launch_ranks(
    n_ranks: int, options: list[str], before: Callable[[int], None] = lambda rank: None
) -> list[multiprocessing.Process]:
    """Start training on so many ranks; `before(rank)` is called in each first."""
    port = free_port()

    def begin(rank: int) -> None:
        os.environ.update(environment_of(rank, n_ranks, port))
        before(rank)

    return [launch(options, lambda rank=rank: begin(rank)) for rank in range(n_ranks)]


def finish_ranks(
    n_ranks: int, options: list[str], before: Callable[[int], None] = lambda rank: None
) -> list[int | None]:
    """Train on so many ranks to the end; their exit statuses, None for a rank that has not ended after a minute."""
    return statuses(launch_ranks(n_ranks, options, before))


def statuses(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
