"""A look at a model before it is trained: whole groups are sampled, counted, and two responses shown in full."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from configs.defaults import Training
from utils.log.terminal import visible
from utils.preflight.loss_rules import LOSSES_WITHOUT_BASELINE
from utils.problems import fixed_subset
from utils.records import Prompt, Reward, Rollout, RolloutEngine
from utils.rewards.functions import RewardScorer
from utils.seeding import derive_seed

LOOK_RESPONSES = 64  # enough to tell 0 % from 5 %, and a small part of most evaluations
PROMPT_END = 300  # characters of the prompt that are shown


@dataclass(frozen=True)
class Look:
    """Groups of responses with their rewards, and what is counted in them."""

    rollouts: Sequence[Rollout]
    rewards: Sequence[Reward]
    training: Training
    scorer: RewardScorer

    @property
    def groups(self) -> list[Sequence[Reward]]:
        size = self.training.group_size
        return [self.rewards[i : i + size] for i in range(0, len(self.rewards), size)]

    @property
    def n_groups_with_signal(self) -> int:
        """Groups whose rewards differ: only these have advantages other than 0. For a loss that reads raw rewards, and
        for groups of 1: groups with a reward other than 0."""
        raw = self.training.loss_type in LOSSES_WITHOUT_BASELINE or self.training.group_size == 1
        values = [{reward.total for reward in group} for group in self.groups]
        return sum(totals != {0.0} if raw else len(totals) > 1 for totals in values)

    def warning(self) -> str | None:
        """A warning if no sampled group could teach anything; else None."""
        if self.n_groups_with_signal:
            return None
        equal = f"none of {len(self.groups)} groups of {self.training.group_size} responses has a signal"
        return f"before training, {equal}: {self.why_zero() or 'the rewards within each are equal'}"

    def lines(self) -> Iterator[str]:
        """The table, why rewards are 0, and two responses."""
        n, groups, t = len(self.rollouts), self.groups, self.training
        yield f"a look before training: {n} responses, {t.group_size} to each of {len(groups)} validation problems"
        for name, count in self.counts().items():
            total = len(groups) if name == "groups with a signal" else n
            yield f"  {visible(name):28} {count / total:7.1%}  {count} of {total}"
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        shown = f"mean {statistics.fmean(lengths):.1f}, median {statistics.median(lengths):g}, longest {max(lengths)}"
        yield f"  {'response length':28} {shown} tokens (max_tokens {t.max_tokens})"
        reason = self.why_zero()
        if reason is not None:
            yield f"  {reason}"
        for i in self.examples():
            yield from self.response_lines(i)

    def counts(self) -> dict[str, int]:
        """Name -> how many responses, or groups, it describes."""
        truncated = sum(rollout.truncated for rollout in self.rollouts)
        return {
            "right answer": sum(reward.answer > 0 for reward in self.rewards),
            "groups with a signal": self.n_groups_with_signal,
            "in the asked-for format": sum(reward.format > 0 for reward in self.rewards),
            **{f"hold {spelled(texts)}": sum(map(holds(texts), self.rollouts)) for texts in self.scorer.needs},
            "ran into max_tokens": truncated,
        }

    def why_zero(self) -> str | None:
        """How many responses have no reward, by reason, each counted once; None if all have a reward."""
        pairs = zip(self.rollouts, self.rewards, strict=True)
        reasons = Counter(reason for pair in pairs if (reason := self.reason(*pair)) is not None)
        if not reasons:
            return None
        parts = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"why {reasons.total()} of {len(self.rollouts)} responses have no reward: {parts}"

    def reason(self, rollout: Rollout, reward: Reward) -> str | None:
        """Why a response has no reward, from what the reward function looks for; None if it has one."""
        name = self.scorer.name
        if reward.total > 0:
            return None
        if reward.format > 0:
            return "in the right format, with a wrong answer"
        if rollout.truncated:
            return f"ran into max_tokens = {self.training.max_tokens}"
        lacking = [spelled(texts) for texts in self.scorer.needs if not holds(texts)(rollout)]
        if lacking:
            return f"without {' and '.join(lacking)}, which {name} looks for"
        return f"with all that {name} looks for, but not as it asks" if self.scorer.needs else f"scored so by {name}"

    def examples(self) -> list[int]:
        """One response with a reward and one without; if not both exist, the first of two groups."""
        by_outcome = {self.rewards[i].total > 0: i for i in reversed(range(len(self.rewards)))}
        if len(by_outcome) == 2:
            return sorted(by_outcome.values())
        return [0, self.training.group_size][: len(self.groups)]

    def response_lines(self, i: int) -> Iterator[str]:
        """The end of a prompt, a response in full, and its reward."""
        rollout, reward = self.rollouts[i], self.rewards[i]
        text, truth = rollout.prompt.text, rollout.prompt.problem.answer
        yield f"response {i + 1} of {len(self.rollouts)}, after a prompt that ends with"
        yield from _indented(("..." if len(text) > PROMPT_END else "") + text[-PROMPT_END:])
        yield f"is ({len(rollout.response_ids)} tokens)"
        yield from _indented(rollout.response)
        truth = truth if isinstance(truth, str) else " or ".join(truth)
        reason = self.reason(rollout, reward)
        scores = f"reward {reward.total:g} (format {reward.format:g}, answer {reward.answer:g})"
        yield f"{scores}{': ' + reason if reason else ''}; truth: {visible(truth)}"


def look_before_training(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    scorer: RewardScorer,
    training: Training,
    n_responses: int = LOOK_RESPONSES,
    should_stop: Callable[[], bool] = lambda: False,
) -> Look | None:
    """Sample about `n_responses` in groups of the run's own size, with a seed of their own; None if stopped."""
    n_groups = max(2, n_responses // training.group_size)
    chosen = fixed_subset(prompts, n_groups, training.seed)
    seed = derive_seed(training.seed, "look")
    rollouts = engine.generate(
        chosen, n=training.group_size, seed=seed, label="a look before training", should_stop=should_stop
    )
    return Look(rollouts, scorer.score(rollouts), training, scorer) if rollouts else None


def spelled(texts: Sequence[str]) -> str:
    """('####', '</answer>') -> '`####` or `</answer>`'."""
    return " or ".join(f"`{text}`" for text in texts)


def holds(texts: Sequence[str]) -> Callable[[Rollout], bool]:
    """Whether a response holds one of the texts."""
    return lambda rollout: any(text in rollout.response for text in texts)


def _indented(text: str) -> Iterator[str]:
    yield from (f"  | {line}" for line in visible(text).split("\n"))
