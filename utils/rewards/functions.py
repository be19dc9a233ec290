"""Reward functions, and the one dict that names them.

Each takes a whole batch of rollouts and a `Grader`, so that one batch is one grading call. A main function gives
format, answer and total, where total is 1 only for a right answer in the right format. The last in the dict only adds
to a total: list it under `extra_rewards` with a weight.

A function may say what it looks for, in an attribute `needs`: texts that a response must hold to earn a reward, each as
a tuple of alternatives. `(("<answer>",), ("####", "="))` is `<answer>`, and `####` or `=`. It changes no reward; a look
at responses counts them, to tell why rewards are 0. `extract`, if it has one, finds the answer in a response's text.

A response's text holds no end token: engines decode without special tokens. What was sampled is in a rollout's ids.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from configs.defaults import Training
from utils.own_code import is_own
from utils.records import Reward, Rollout
from utils.rewards.grader import Grader, Truth, last_box
from utils.rewards.own import own_reward_fn

RewardFn = Callable[[Sequence[Rollout], Grader], list[Reward]]
Needs = tuple[tuple[str, ...], ...]  # all of these, each in one of its spellings

THINK_THEN_ANSWER = re.compile(r"</think> <answer>(?P<answer>.*)</answer>\s*\Z", re.DOTALL)
TAGS = ("</think>", "<answer>", "</answer>")
GSM8K_ANSWER = re.compile(r"####[ \t]*(?P<marked>[^\n]*)|<answer>(?P<tagged>(?:(?!<answer>).)*?)</answer>", re.DOTALL)
PENALTY_PER_END_TOKEN = 0.1


def r1_zero_answer(response: str) -> str | None:
    """The answer of a response formatted as `... </think> <answer> ... </answer>`; None if it is not.

    Each tag occurs once, one space separates the two in the middle, and only white space follows.
    """
    if any(response.count(tag) != 1 for tag in TAGS):
        return None
    match = THINK_THEN_ANSWER.search(response)
    if match is None:
        return None
    box = last_box(match["answer"])
    return (match["answer"].strip() if box is None else box) or None


def question_only_answer(response: str) -> str | None:
    """What the last balanced `\\boxed{...}` or `\\fbox{...}` holds; None if there is no box, or an empty one."""
    return last_box(response) or None


def gsm8k_answer(response: str) -> str | None:
    """The last `#### x` or `<answer>x</answer>`; None if there is neither."""
    answers = [match["marked"] or match["tagged"] or "" for match in GSM8K_ANSWER.finditer(response)]
    return (answers[-1].strip() or None) if answers else None


def graded(extract: Callable[[str], str | None], needs: Needs) -> RewardFn:
    """The reward function that grades what `extract` finds; a response without an answer has no format.

    `extract` finds nothing in a response that lacks one of the texts in `needs`.
    """

    def reward_fn(rollouts: Sequence[Rollout], grader: Grader) -> list[Reward]:
        answers = [extract(rollout.response) for rollout in rollouts]
        formatted = [i for i, answer in enumerate(answers) if answer is not None]
        verdicts = grader.grade([(answers[i], rollouts[i].prompt.problem.answer) for i in formatted])
        rewards = [Reward(format=0.0, answer=0.0, total=0.0)] * len(rollouts)
        for i, right in zip(formatted, verdicts, strict=True):
            rewards[i] = Reward(format=1.0, answer=float(right), total=float(right))
        return rewards

    reward_fn.needs, reward_fn.extract = needs, extract
    return reward_fn


def coin_flip(measured: RewardFn) -> RewardFn:
    """A control: totals are 0 or 1 at random, whatever was answered, while format and answer are still measured.

    A claim that training taught something needs a run in which the reward says nothing (Shao et al. 2025,
    arXiv:2506.10947). The coin is a hash of a rollout's log-probs and place, so that a resumed run flips the same.
    """

    def reward_fn(rollouts: Sequence[Rollout], grader: Grader) -> list[Reward]:
        totals = []
        for place, rollout in enumerate(rollouts):
            text = repr((place, rollout.response_ids, rollout.sampler_log_probs))
            totals.append(float(hashlib.sha256(text.encode()).digest()[0] % 2))
        return [replace(m, total=total) for m, total in zip(measured(rollouts, grader), totals, strict=True)]

    reward_fn.by_place = True  # a part of a batch would flip other coins
    return reward_fn


def end_token_penalty(rollouts: Sequence[Rollout], grader: Grader) -> list[Reward]:
    """-0.1 for every end token after the first, at most -1 per response.

    Engines stop at the first end id that they know. A model whose own end token is not among those (a base model in a
    chat template ends its turn with `<|im_end|>`) can fill its length with such tokens, and its text shows none.
    """
    totals = [-min(1.0, PENALTY_PER_END_TOKEN * max(0, rollout.n_end_tokens - 1)) for rollout in rollouts]
    return [Reward(format=0.0, answer=0.0, total=total) for total in totals]


REWARD_FNS: dict[str, RewardFn] = {
    "r1_zero": graded(r1_zero_answer, needs=(("</think> <answer>",), ("</answer>",))),
    "question_only": graded(question_only_answer, needs=(("\\boxed{", "\\fbox{"),)),
    "gsm8k": graded(gsm8k_answer, needs=(("####", "</answer>"),)),
    "gsm8k_random": coin_flip(graded(gsm8k_answer, needs=(("####", "</answer>"),))),
    "end_token_penalty": end_token_penalty,
}


def find_reward_fn(name: str) -> RewardFn:
    """One of REWARD_FNS, or the function that `path/to/file.py:function` names. Raises ValueError."""
    if is_own(name):
        return own_reward_fn(name)
    if name not in REWARD_FNS:
        names = ", ".join(REWARD_FNS)
        raise ValueError(f"unknown reward function {name!r}; choose from {names}, or path/to/file.py:function")
    return REWARD_FNS[name]


class RewardScorer:
    """Scores batches of rollouts: the main reward function, plus the weighted totals of the extra ones.

    Raises ValueError for a name that neither REWARD_FNS nor a file has.
    """

    def __init__(self, reward_fn: str, extra_rewards: dict[str, float], grader: Grader):
        self.grader, self.name = grader, reward_fn
        self.main = find_reward_fn(reward_fn)
        self.extras = [(find_reward_fn(name), weight) for name, weight in extra_rewards.items()]

    @property
    def needs(self) -> Needs:
        """What the main reward function looks for, as far as it says so."""
        return getattr(self.main, "needs", ())

    def score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        """One Reward per rollout, in order; `format` and `answer` are the main function's."""
        rewards = self.main(rollouts, self.grader)
        for reward_fn, weight in self.extras:
            extra = reward_fn(rollouts, self.grader)
            rewards = [
                Reward(format=reward.format, answer=reward.answer, total=reward.total + weight * more.total)
                for reward, more in zip(rewards, extra, strict=True)
            ]
        return rewards


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then falling to -1 at max_tokens: DAPO (arXiv:2503.14476), equation 13."""
    return min(0.0, (max_tokens - buffer - length) / buffer)


def totals_with_overlong_penalty(
    rollouts: Sequence[Rollout], rewards: Sequence[Reward], training: Training
) -> list[float]:
    """What rollouts are trained on: their totals, less a penalty for length if `overlong_buffer` is set."""
    buffer, totals = training.overlong_buffer, [reward.total for reward in rewards]
    if buffer is None:
        return totals
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return [t + overlong_penalty(n, training.max_tokens, buffer) for t, n in zip(totals, lengths, strict=True)]


@functools.cache
def _shared_grader() -> Grader:
    return Grader()


def _score_one(answer: str | None, ground_truth: Truth) -> dict[str, float]:
    right = answer is not None and _shared_grader().grade([(answer, ground_truth)])[0]
    return {"format_reward": float(answer is not None), "answer_reward": float(right), "reward": float(right)}


def r1_zero_reward_fn(response: str, ground_truth: Truth) -> dict[str, float]:
    """CS336's signature for `r1_zero`: format_reward, answer_reward and reward, each 0.0 or 1.0."""
    return _score_one(r1_zero_answer(response), ground_truth)


def question_only_reward_fn(response: str, ground_truth: Truth) -> dict[str, float]:
    """CS336's signature for `question_only`: format_reward, answer_reward and reward, each 0.0 or 1.0."""
    return _score_one(question_only_answer(response), ground_truth)
