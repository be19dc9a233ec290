"""The groups of one GRPO step: all that were sampled, or only those that teach something."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from configs.defaults import Training
from utils.records import Prompt, Reward, Rollout
from utils.seeding import derive_seed


class GroupCollector:
    """Collects the rollouts of one GRPO step, in one round of sampling or, with `refill_groups`, in several.

    With `refill_groups` a group is kept if some of its answers are right and some are wrong (DAPO, arXiv:2503.14476,
    equation 11). `Reward.answer` says whether an answer is right, not a shaped total. If the last round still leaves
    room, it is filled with groups that were left out, whose advantages are mostly 0.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._n_wanted = training.rollout_batch_size // training.group_size
        self._kept: list[tuple[Sequence[Rollout], Sequence[Reward]]] = []
        self._spare: list[tuple[Sequence[Rollout], Sequence[Reward]]] = []
        self.n_rounds = 0

    @property
    def n_missing(self) -> int:
        """Prompts to draw for the next round; 0 once the batch is full."""
        return self._n_wanted - len(self._kept)

    def seed(self, steps_done: int) -> int:
        """The seed of this round: the first round takes the GRPO step's, and each later round has its own."""
        later = [self.n_rounds] if self.n_rounds else []
        return derive_seed(self._training.seed, "rollouts", steps_done, *later)

    def add(self, rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> None:
        """The outcome of a round: whole groups, those of one prompt side by side."""
        size, t = self._training.group_size, self._training
        self.n_rounds += 1
        for start in range(0, len(rollouts), size):
            group = rollouts[start : start + size], rewards[start : start + size]
            n_right = sum(reward.answer > 0 for reward in group[1])
            (self._kept if not t.refill_groups or 0 < n_right < size else self._spare).append(group)
        if t.refill_groups and self.n_rounds == t.max_generation_rounds:
            n_missing = self.n_missing
            self._kept, self._spare = self._kept + self._spare[:n_missing], self._spare[n_missing:]

    @property
    def rollouts(self) -> list[Rollout]:
        """The rollouts to train on, those of one prompt side by side."""
        return [rollout for rollouts, _ in self._kept for rollout in rollouts]

    @property
    def rewards(self) -> list[Reward]:
        """Their rewards, in the same order."""
        return [reward for _, rewards in self._kept for reward in rewards]

    @property
    def n_sampled_tokens(self) -> int:
        """Response tokens of all groups, those left out included."""
        return sum(len(rollout.response_ids) for rollouts, _ in self._kept + self._spare for rollout in rollouts)

    def solved(self, pass_rate: float | None) -> list[Prompt]:
        """The sampled prompts whose group had at least this share right; empty if `pass_rate` is None."""
        if pass_rate is None:
            return []
        return [
            rollouts[0].prompt
            for rollouts, rewards in self._kept + self._spare
            if fmean(reward.answer > 0 for reward in rewards) >= pass_rate
        ]

    def metrics(self) -> dict[str, float]:
        """What several rounds sampled; empty without `refill_groups`."""
        if not self._training.refill_groups:
            return {}
        groups = self._kept + self._spare
        return {
            "generation_rounds": float(self.n_rounds),
            "sampled_rollouts": float(sum(len(rollouts) for rollouts, _ in groups)),
            "sampled_answer_reward": fmean(reward.answer for _, rewards in groups for reward in rewards),
        }
