"""Collecting groups, retiring problems, the length penalty and the schedule, by hand and across a resume."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from configs.defaults import Training
from utils.algorithm.groups import GroupCollector
from utils.algorithm.update import learning_rate
from utils.problems import ProblemStream
from utils.records import Problem, Prompt, Reward, Rollout
from utils.rewards.functions import overlong_penalty, totals_with_overlong_penalty

SETTINGS = Training(rollout_batch_size=6, group_size=2, refill_groups=True, max_generation_rounds=3)


def group(name: str, *answers: float, length: int = 3) -> tuple[list[Rollout], list[Reward]]:
    prompt = Prompt(Problem(name, "1"), name, (1,))
    rollouts = [Rollout(prompt, "", (7,) * length, (-1.0,) * length, "stop") for _ in answers]
    return rollouts, [Reward(format=1.0, answer=a, total=a + 0.5) for a in answers]


def joined(*groups: tuple[list[Rollout], list[Reward]]) -> tuple[list[Rollout], list[Reward]]:
    rollouts = [rollout for rollouts, _ in groups for rollout in rollouts]
    return rollouts, [reward for _, rewards in groups for reward in rewards]


def names(groups: GroupCollector) -> list[str]:
    return [rollout.prompt.text for rollout in groups.rollouts[::2]]


def test_without_refill_one_round_is_the_batch() -> None:
    groups = GroupCollector(replace(SETTINGS, refill_groups=False))
    assert groups.n_missing == 3
    groups.add(*joined(group("a", 1, 1), group("b", 0, 0), group("c", 0, 1)))
    assert (groups.n_missing, names(groups), groups.metrics()) == (0, ["a", "b", "c"], {})


def test_refill_keeps_groups_that_are_right_in_part() -> None:
    """By correctness: the totals of the first two groups, shaped, differ from 0 and 1 as well."""
    groups = GroupCollector(SETTINGS)
    groups.add(*joined(group("a", 1, 1), group("b", 0, 1), group("c", 0, 0)))
    assert groups.n_missing == 2
    groups.add(*joined(group("d", 1, 0), group("e", 0, 1)))
    assert (groups.n_missing, names(groups)) == (0, ["b", "d", "e"])
    assert [reward.answer for reward in groups.rewards] == [0, 1, 1, 0, 0, 1]
    assert groups.metrics() == {"generation_rounds": 2.0, "sampled_rollouts": 10.0, "sampled_answer_reward": 0.5}
    assert groups.n_sampled_tokens == 30


def test_the_last_round_fills_up_with_what_was_left_out() -> None:
    groups = GroupCollector(SETTINGS)
    groups.add(*joined(group("a", 1, 1), group("b", 0, 1), group("c", 0, 0)))
    for name in "de":
        groups.add(*joined(group(name, 0, 0), group(name * 2, 1, 1)))
    assert (groups.n_missing, names(groups)) == (0, ["b", "a", "c"])


def test_solved_prompts_are_of_all_that_were_sampled() -> None:
    groups = GroupCollector(SETTINGS)
    groups.add(*joined(group("a", 1, 1), group("b", 0, 1), group("c", 0, 0)))
    assert [prompt.text for prompt in groups.solved(1.0)] == ["a"]
    assert {prompt.text for prompt in groups.solved(0.5)} == {"a", "b"}
    assert groups.solved(None) == []


def test_retired_items_are_left_out_of_later_epochs_and_all_come_back_if_none_is_left() -> None:
    items = [f"item {i}" for i in range(5)]
    stream = ProblemStream(items, seed=3)
    first = stream.draw(2)
    stream.retire(first[:1])
    assert sorted(first + stream.draw(3)) == items  # this epoch is as it was
    assert sorted(stream.draw(4)) == sorted(set(items) - {first[0]})
    stream.retire(items)
    assert sorted(stream.draw(5)) == items


def test_a_stream_goes_on_exactly_with_what_was_retired() -> None:
    items = [f"item {i}" for i in range(7)]
    stream, resumed = ProblemStream(items, seed=3), ProblemStream(items, seed=3)
    stream.draw(5)
    stream.retire(items[:2])
    stream.draw(4)
    stream.retire(items[4:5])
    resumed.load_state_dict(stream.state_dict())
    assert [stream.draw(3) for _ in range(8)] == [resumed.draw(3) for _ in range(8)]
    assert resumed.state_dict() == stream.state_dict()
    with pytest.raises(ValueError, match="does not fit a set of 3 items"):
        ProblemStream(items[:3], seed=3).load_state_dict(stream.state_dict())


def test_overlong_penalty_by_hand() -> None:
    lengths = (80, 81, 90, 100)
    assert [overlong_penalty(n, max_tokens=100, buffer=20) for n in lengths] == [0.0, -0.05, -0.5, -1.0]
    rollouts, rewards = group("a", 1, length=90)
    training = Training(max_tokens=100)
    assert totals_with_overlong_penalty(rollouts, rewards, training) == [1.5]
    assert totals_with_overlong_penalty(rollouts, rewards, replace(training, overlong_buffer=20)) == [1.0]


def test_learning_rates_by_hand() -> None:
    training = Training(learning_rate=1.0, warmup_steps=2, n_grpo_steps=6)

    def rates(schedule: str) -> list[float]:
        return [learning_rate(replace(training, lr_schedule=schedule), step) for step in range(6)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([0.5, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))])
