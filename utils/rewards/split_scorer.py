"""Scoring on several ranks: each scores its share of the rollouts, and every rank gets all rewards."""

from __future__ import annotations

from collections.abc import Sequence

from utils.algorithm import parallel
from utils.records import Reward, Rollout
from utils.rewards.functions import RewardScorer


class SplitScorer(RewardScorer):
    """A reward is computed once and then sent, so that even one that a judge or chance decides is equal everywhere."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        functions = [self.main, *(function for function, _ in self.extras)]
        if any(getattr(function, "by_place", False) for function in functions):
            return parallel.first(super().score(rollouts) if parallel.is_first() else None)
        own = rollouts[parallel.own_slice(len(rollouts))]
        return [reward for each in parallel.gather(super().score(own) if own else []) for reward in each]
