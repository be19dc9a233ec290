"""Score a fixed problem set through any engine, and summarize the responses in metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from utils.records import Prompt, Reward, Rollout, RolloutEngine
from utils.rewards.functions import RewardScorer


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    scorer: RewardScorer,
    seed: int,
    n: int = 1,
    temperature: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[Rollout], list[Reward]]:
    """Sample n responses per prompt and score them: (metrics by bare names, rollouts, rewards), a prompt's in a row.

    The seed is the evaluation's own and the same every time, so that differences are the policy's. `temperature` and
    `should_stop` are those of `RolloutEngine.generate`: all three results are empty if the generation was stopped.
    """
    rollouts = engine.generate(
        prompts, n=n, seed=seed, temperature=temperature, label="evaluation", should_stop=should_stop
    )
    if not rollouts:
        return {}, [], []
    rewards = scorer.score(rollouts)
    metrics = response_metrics(rollouts, rewards)
    per_problem = [mean([r.total for r in rewards[i : i + n]]) for i in range(0, len(rewards), n)]
    metrics["reward_std_error"] = standard_error(per_problem)
    return metrics, rollouts, rewards


def response_metrics(rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> dict[str, float]:
    """Mean rewards, response length in tokens, and the share that ran into max_tokens."""
    return {
        "reward": mean([reward.total for reward in rewards]),
        "format_reward": mean([reward.format for reward in rewards]),
        "answer_reward": mean([reward.answer for reward in rewards]),
        "mean_response_length": mean([len(rollout.response_ids) for rollout in rollouts]),
        "frac_truncated": mean([rollout.truncated for rollout in rollouts]),
    }


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples of which n_right are.

    1 - C(n - n_right, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {n}")
    return 1.0 - math.comb(n - n_right, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """How often the answer that most of k samples give is right, over all blocks of k in a row.

    All right answers are one candidate; wrong ones are the same if they differ in white space at most. A sample without
    an answer (None) has no vote. Among candidates with equally many votes each is taken with equal chance.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs at least {k} samples per problem, there are {len(answers)}")
    shares = []
    for i in range(0, len(answers) - k + 1, k):
        block = zip(answers[i : i + k], right[i : i + k], strict=True)
        votes = Counter(None if is_right else "".join(text.split()) for text, is_right in block if text is not None)
        winners = [candidate for candidate, count in votes.items() if count == max(votes.values())]
        shares.append((None in winners) / len(winners) if winners else 0.0)
    return mean(shares)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the unbiased variance; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))
