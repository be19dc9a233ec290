"""Several processes, the ranks, train one policy: each does its share, and they tell each other what came of it.

With one rank every function here does nothing, or returns what it was given. Ranks meet at the same calls in the same
order, so whatever decides on a call must be equal on all of them: see `agree`.

The ranks' groups are objects of this module and not torch's default group, which vLLM takes for itself and destroys.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.algorithm.policy import trainable
from utils.ranks import RankLost, RanksDiffer

T = TypeVar("T")

# A process that ends closes its connections, which the others notice at once. This is for a machine that vanishes, and
# longer than ranks ever wait for each other: for the longest responses, a slow reward function, a save.
PATIENCE = timedelta(minutes=30)
BUCKET = 2**24  # gradients summed at once: 64 MiB in float32

_groups: dict[str, Any] = {}  # device type -> process group; empty: one rank


def join() -> None:
    """Meet the other ranks that torchrun has started, over the machines' network."""
    store, rank, n_ranks = next(dist.rendezvous("env://", timeout=PATIENCE))
    # Every group of a library, such as vLLM's of this process alone, would look for torchrun's store too.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    _groups["cpu"] = dist.ProcessGroupGloo(dist.PrefixStore("ranks", store), rank, n_ranks, timeout=PATIENCE)
    _groups["store"] = store
    atexit.register(_groups.clear)  # a group that outlives the interpreter aborts the process


def join_cards() -> None:
    """Let the ranks' cards sum tensors among themselves, with NCCL."""
    if n_ranks() == 1:
        return
    options = dist.ProcessGroupNCCL.Options()
    options._timeout, options.global_ranks_in_group = PATIENCE, list(range(n_ranks()))
    torch.cuda.set_device(0)  # the one card that this rank sees
    store = dist.PrefixStore("cards", _groups["store"])
    _groups["cuda"] = dist.ProcessGroupNCCL(store, rank(), n_ranks(), options)


def rank() -> int:
    """This process's number among the ranks; 0 if it is alone."""
    return _groups["cpu"].rank() if _groups else 0


def n_ranks() -> int:
    return _groups["cpu"].size() if _groups else 1


def is_first() -> bool:
    """Whether this is rank 0, which writes all files."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """The value that each rank gives, in the order of the ranks. Raises RankLost."""
    if n_ranks() == 1:
        return [value]
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = [int(size) for size in _gather_tensors(torch.tensor([len(own)]))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(own)] = own
    received = zip(_gather_tensors(padded), sizes, strict=True)
    return [pickle.loads(data[:size].numpy().tobytes()) for data, size in received]  # noqa: S301 (from our own ranks)


def first(value: T) -> T:
    """Rank 0's value, on every rank."""
    return gather(value if is_first() else None)[0]


def agree(flag: bool) -> bool:
    """Whether the flag is up on any rank."""
    if n_ranks() == 1:
        return flag
    return bool(sum_tensor(torch.tensor(int(flag))))


def meet() -> None:
    """Go on when every rank has come this far."""
    agree(False)


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum over ranks of tensors of one shape, in place; equal bit for bit on every rank. Raises RankLost."""
    if n_ranks() > 1:
        _wait(lambda: _groups[tensor.device.type].allreduce([tensor]))
    return tensor


def sum_counts(counts: dict[str, float]) -> dict[str, float]:
    """The sum over ranks of numbers by name; a name may be absent on some."""
    each = gather(counts)
    names = dict.fromkeys(name for other in each for name in other)
    return {name: sum(other.get(name, 0) for other in each) for name in names}


def sum_gradients(gradients: Sequence[Tensor]) -> None:
    """Replace each gradient by its sum over ranks, computed in float32 at least, whatever dtype it is kept in."""
    if n_ranks() == 1:
        return
    if "cuda" in _groups:
        meet()  # a rank that is gone is noticed here, on the host, and not in a kernel that waits for it
    bucket: list[Tensor] = []
    for gradient in gradients:
        for piece in gradient.view(-1).split(BUCKET):
            if sum(map(len, bucket)) + len(piece) > BUCKET:
                _sum_bucket(bucket)
                bucket = []
            bucket.append(piece)
    _sum_bucket(bucket)


def _sum_bucket(pieces: list[Tensor]) -> None:
    """In place; all (n,) of one dtype or, beside each other, of several."""
    if not pieces:
        return
    wide = torch.promote_types(max((piece.dtype for piece in pieces), key=lambda dtype: dtype.itemsize), torch.float32)
    summed = sum_tensor(torch.cat([piece.to(wide) for piece in pieces]))
    for piece, values in zip(pieces, summed.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(values)


def own_slice(n: int) -> slice:
    """This rank's share of n things in a row: neighbours, as many as any other rank's or one more."""
    size, n_larger = divmod(n, n_ranks())
    start = rank() * size + min(rank(), n_larger)
    return slice(start, start + size + (rank() < n_larger))


def own_rows(rows: Tensor, sequence_lengths: Tensor, group_size: int = 1) -> Tensor:
    """This rank's share of rows (N,) of a batch, in the same order: about as many tokens as any other rank's.

    The rows of a group of `group_size`, which share a prompt, stay together. Groups are dealt, the largest first, each
    to the rank that has the fewest tokens by then.
    """
    if n_ranks() == 1:
        return rows
    groups, group_of = (rows // group_size).unique(return_inverse=True)
    tokens = torch.zeros(len(groups), dtype=torch.int64).index_add(0, group_of, sequence_lengths[rows])
    dealt, owner = [0] * n_ranks(), torch.zeros(len(groups), dtype=torch.int64)
    for group in tokens.argsort(descending=True, stable=True).tolist():
        owner[group] = dealt.index(min(dealt))
        dealt[owner[group]] += int(tokens[group])
    return rows[owner[group_of] == rank()]


def check_same_weights(policy: torch.nn.Module) -> None:
    """Raise RanksDiffer if what is trained is not equal, bit for bit, on all ranks: one pass over the weights."""
    if n_ranks() == 1:
        return
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = [parameter.detach() for parameter in trainable(policy)]
    sums = [p.view(integers[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    digests = gather(torch.stack(sums).tolist())
    others = [other for other, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RanksDiffer(
            f"the weights of ranks {others} are no longer those of rank 0: an operation gave different numbers on "
            "different ranks, most often because their cards, drivers or packages are not the same"
        )


def _gather_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor of each rank, all of one shape, on the CPU."""
    received = [torch.empty_like(tensor) for _ in range(n_ranks())]
    _wait(lambda: _groups["cpu"].allgather([received], [tensor]))
    return received


def _wait(begin: Any) -> None:
    """Do a piece of communication to its end. Raises RankLost for what the library raises if a rank is gone."""
    try:
        begin().wait()
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise RankLost(f"rank {rank()} of {n_ranks()} has lost another rank, which has ended ({reason})") from error
