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


def capture_random_state() -> dict:
    """The state of the global generators of Python, NumPy and torch, JSON-able."""
    import numpy as np
    import torch

    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict) -> None:
    """Undo what was drawn since `capture_random_state`. GPUs that this machine lacks are left out."""
    import numpy as np
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    for device, bytes_ in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(bytes_, dtype=torch.uint8), device)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global generators back as they were: some libraries reseed them in passing."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
