"""Which of the processes that torchrun has started this one is. Standard library only: knowing it needs no torch."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

CARDS = "CUDA_VISIBLE_DEVICES"


class RankLost(RuntimeError):
    """Another rank has ended, or does not answer: this one cannot go on alone."""


class RanksDiffer(RuntimeError):
    """The ranks' weights, which every optimizer step should keep equal bit for bit, are not equal."""


@dataclass(frozen=True)
class Launch:
    """A process's place among those of its launch, over all machines and on its own one."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0
    n_local: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> Launch:
    """What torchrun has put into the environment; a process that nobody launched so is alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(os.environ.get(name, "").isdigit() for name in names) or "MASTER_ADDR" not in os.environ:
        return Launch()
    return Launch(*(int(os.environ[name]) for name in names))


def take_own_card() -> None:
    """Leave this process the one card of its local rank, which everything then knows as the first: cuda:0.

    It has to happen before anything asks CUDA. If there are too few cards, the rank sees none.
    """
    launch = launched()
    listed = os.environ.get(CARDS)
    cards = [str(launch.local_rank)] * launch.n_local if listed is None else listed.split(",")
    os.environ[CARDS] = cards[launch.local_rank].strip() if launch.local_rank < len(cards) else ""


def keep_quiet_unless_first() -> None:
    """Rank 0 speaks for all: on the others nothing goes to standard output, and no warning to the log of a library.

    What ends another rank alone still goes to its standard error.
    """
    if not launched().is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (until the process ends)
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        logging.disable(logging.WARNING)
