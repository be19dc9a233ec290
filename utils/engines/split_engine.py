"""Sampling on several ranks: each engine samples its share of the prompts, and every rank gets all rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from utils.algorithm import parallel
from utils.records import Prompt, Rollout, RolloutEngine


class SplitEngine:
    """A `RolloutEngine` over the one of this rank.

    A response has the seed that it would have with one rank, so the rollouts are the same, up to rounding.
    """

    def __init__(self, own: RolloutEngine) -> None:
        self._own = own
        self.name, self.sampling = own.name, own.sampling

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        temperature: float | None = None,
        label: str = "rollouts",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """See `utils.records.RolloutEngine`. If `should_stop` returned True on any rank, the result is empty on all."""
        share = parallel.own_slice(len(prompts))
        own, first_seed = prompts[share], seed + share.start * n
        rollouts = self._own.generate(own, n, first_seed, temperature, label, should_stop) if own else []
        if parallel.agree(bool(own) and not rollouts):
            return []
        # without the prompts, which every rank has: a stream knows its prompts as these very objects
        gathered = parallel.gather([replace(rollout, prompt=None) for rollout in rollouts])
        responses = [rollout for each in gathered for rollout in each]
        return [replace(rollout, prompt=prompts[i // n]) for i, rollout in enumerate(responses)]

    def update_weights(self, policy: torch.nn.Module) -> dict[str, float]:
        return self._own.update_weights(policy)

    def sleep(self) -> dict[str, float]:
        return self._own.sleep()

    def close(self) -> None:
        self._own.close()
