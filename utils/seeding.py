"""Named, separate random streams: what one part draws never shifts what another part draws."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """The seed of a named stream, e.g. `derive_seed(1337, "rollouts", grpo_step)`: 48 bits, the same on every machine.

    A hash, not a sum: neighbouring steps and streams share nothing, and 48 bits leave room to add a request's index.
    """
    text = "/".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, which only library code draws from."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global generators back as they were: some libraries reseed them in passing."""
    import numpy as np
    import torch

    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
