"""The reward functions: what counts as formatted, and that nothing else scores."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from engine_cases import (
    prompt_of,
    sampling,
    tiny_policy,  # noqa: F401, the fixture `policy`
    tiny_tokenizer,  # noqa: F401, the fixture `tokenizer`
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.engines.transformers_engine import TransformersEngine
from utils.records import Problem, Prompt, Reward, Rollout
from utils.rewards.functions import (
    REWARD_FNS,
    RewardScorer,
    end_token_penalty,
    gsm8k_answer,
    question_only_reward_fn,
    r1_zero_reward_fn,
)
from utils.rewards.grader import Grader


def rollout(response: str, answer: str | tuple[str, ...] = "5") -> Rollout:
    prompt = Prompt(Problem("What is 2 + 3?", answer), "What is 2 + 3?", (1, 2))
    return Rollout(prompt, response, (3, 4), (-1.0, -1.0), "stop")


def score(name: str, *responses: str, answer: str | tuple[str, ...] = "5") -> list[tuple[float, float, float]]:
    with Grader() as grader:
        rewards = RewardScorer(name, {}, grader).score([rollout(response, answer) for response in responses])
    return [(reward.format, reward.answer, reward.total) for reward in rewards]


RIGHT, WRONG, UNFORMATTED = (1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)

R1_ZERO = [
    ("2 + 3 = 5 </think> <answer> 5 </answer>", RIGHT),
    ("2 + 3 = 5 </think> <answer>5</answer>\n\n", RIGHT),
    ("<think> again </think> <answer>5</answer>", RIGHT),
    (r"</think> <answer> It is \boxed{5}. </answer>", RIGHT),
    (r"</think> <answer> \boxed{4}, no, \boxed{\frac{10}{2}} </answer>", RIGHT),
    (r"</think> <answer> \boxed{5}, no, \boxed{4} </answer>", WRONG),
    ("</think> <answer> 6 </answer>", WRONG),
    (r"</think> <answer> 4 </answer> \boxed{5}", UNFORMATTED),
    ("</think> <answer> 5 </answer> 5", UNFORMATTED),
    ("</think> <answer> 4 </answer> <answer> 5 </answer>", UNFORMATTED),
    ("</think> <answer> 4 </answer></think> <answer> 5 </answer>", UNFORMATTED),
    ("</think> <answer> 4 <answer> 5 </answer>", UNFORMATTED),
    ("</think> <answer> 5 </answer> <answer>", UNFORMATTED),
    ("</answer> </think> <answer> 5", UNFORMATTED),
    ("</answer> </think> <answer> 5 </answer>", UNFORMATTED),
    ("<answer> 5 </answer> </think>", UNFORMATTED),
    ("</think> <answer>  </answer>", UNFORMATTED),
    ("</think> <answer></answer>", UNFORMATTED),
    (r"</think> <answer> \boxed{} </answer>", UNFORMATTED),
    ("</think> <answer> 5", UNFORMATTED),
    ("<answer> 5 </answer>", UNFORMATTED),
    ("</think><answer> 5 </answer>", UNFORMATTED),
    ("</think>  <answer> 5 </answer>", UNFORMATTED),
    ("</think>\n<answer> 5 </answer>", UNFORMATTED),
    ("</think> so <answer> 5 </answer>", UNFORMATTED),
    ("", UNFORMATTED),
]


@pytest.mark.parametrize(("response", "reward"), R1_ZERO)
def test_r1_zero(response, reward):
    assert score("r1_zero", response) == [reward]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"so \boxed{5}", RIGHT),
        (r"\boxed{4} is wrong, \fbox{5} is right", RIGHT),
        (r"\boxed{5} is wrong, \boxed{4} is right", WRONG),
        (r"\boxed{5} and \boxed{4", RIGHT),
        (r"\boxed{\frac{10}{2}}", RIGHT),
        (r"\boxed{}", UNFORMATTED),
        ("5", UNFORMATTED),
        ("", UNFORMATTED),
    ],
)
def test_question_only(response, reward):
    assert score("question_only", response) == [reward]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It is 5.\n#### 5", "5"),
        ("#### 4\n#### 5", "5"),
        ("<answer>5</answer>", "5"),
        ("<answer>4</answer>\n#### 5", "5"),
        ("#### 4\n<answer>\n5\n</answer>", "5"),
        ("<answer>4 <answer>5</answer>", "5"),
        ("####", None),
        ("<answer></answer>", None),
        ("5", None),
    ],
)
def test_gsm8k_answer(response, answer):
    assert gsm8k_answer(response) == answer


def test_gsm8k_compares_numbers_by_value():
    assert score("gsm8k", "#### 1,250", "#### 1250.00", "#### $1250", "#### 1251", answer="1250") == [RIGHT] * 3 + [
        WRONG
    ]


def test_any_of_several_truths():
    assert score("question_only", r"\boxed{7}", r"\boxed{8}", answer=("5", "7")) == [RIGHT, WRONG]


def test_a_batch_is_one_grading_call():
    class CountingGrader:
        calls: list[list] = []  # noqa: RUF012

        def grade(self, pairs):
            self.calls.append(list(pairs))
            return [True] * len(pairs)

    grader = CountingGrader()
    responses = [r"\boxed{1}", "none", r"\boxed{2}"]
    rewards = RewardScorer("question_only", {}, grader).score([rollout(response) for response in responses])
    assert grader.calls == [[("1", "5"), ("2", "5")]]
    assert [reward.total for reward in rewards] == [1.0, 0.0, 1.0]


def test_extra_rewards_add_to_the_total_alone():
    fives = [dataclasses.replace(rollout("#### 5"), n_end_tokens=n) for n in (1, 3)]
    with Grader() as grader:
        scorer = RewardScorer("gsm8k", {"end_token_penalty": 2.0}, grader)
        assert scorer.score([*fives, rollout("six")]) == [
            Reward(1.0, 1.0, 1.0),
            Reward(1.0, 1.0, pytest.approx(0.6)),
            Reward(0.0, 0.0, 0.0),
        ]


def test_unknown_names_list_the_choices():
    for reward_fn, extra in (("r2_zero", {}), ("r1_zero", {"end_penalty": 1.0})):
        with pytest.raises(ValueError, match=r"r1_zero, question_only, gsm8k, gsm8k_random, end_token_penalty"):
            RewardScorer(reward_fn, extra, Grader())


def test_every_reward_function_takes_an_empty_batch():
    with Grader() as grader:
        assert all(reward_fn([], grader) == [] for reward_fn in REWARD_FNS.values())


@pytest.mark.parametrize(
    ("n_end_tokens", "penalty"), [(0, 0), (1, 0), (2, -0.1), (3, -0.2), (11, -1), (12, -1), (500, -1)]
)
def test_end_token_penalty(n_end_tokens, penalty):
    (reward,) = end_token_penalty([dataclasses.replace(rollout("5"), n_end_tokens=n_end_tokens)], None)
    assert reward == Reward(0.0, 0.0, pytest.approx(penalty))


def only(policy: PreTrainedModel, *token_ids: int) -> PreTrainedModel:
    """A copy of the policy that samples the given tokens alone, each as likely as the others."""
    policy = copy.deepcopy(policy)

    def favour(module, inputs, logits):
        favoured = torch.full_like(logits, -1e4)
        favoured[..., list(token_ids)] = 0.0
        return favoured

    policy.lm_head.register_forward_hook(favour)
    return policy


def penalties(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *token_ids: int) -> list[float]:
    """The penalties of 8 responses of at most 16 tokens; their texts show no end token."""
    engine = TransformersEngine(only(policy, *token_ids), tokenizer, sampling(), batch_size=8)
    rollouts = engine.generate([prompt_of(tokenizer, "What is 2 + 3?")], n=8, seed=1)
    assert not any("<|" in rollout.response for rollout in rollouts)
    with Grader() as grader:
        rewards = RewardScorer("gsm8k", {"end_token_penalty": 0.5}, grader).score(rollouts)
    return [reward.total for reward in rewards]


def test_a_model_that_fills_its_length_with_end_tokens_is_penalised(policy, tokenizer):
    """Through an engine: end tokens at which it doesn't stop, as a base model emits them in a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    policy = copy.deepcopy(policy)
    policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    letter, stop = tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    assert penalties(policy, tokenizer, end) == [-0.5] * 8
    assert penalties(policy, tokenizer, end, pad) == [-0.5] * 8
    assert penalties(policy, tokenizer, letter) == [0.0] * 8
    assert penalties(policy, tokenizer, stop) == [0.0] * 8  # the engine stops at the first
    mixed = penalties(policy, tokenizer, letter, end, stop)
    assert len(set(mixed)) > 2 and min(mixed) < 0.0 and all(-0.5 <= penalty <= 0.0 for penalty in mixed)


def test_cs336_signatures():
    right = {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}
    wrong = {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0.0}
    neither = {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}
    assert r1_zero_reward_fn("x </think> <answer> 10/2 </answer>", "5") == right
    assert r1_zero_reward_fn("x </think> <answer> 6 </answer>", "5") == wrong
    assert r1_zero_reward_fn(r"\boxed{5}", "5") == neither
    assert question_only_reward_fn(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == right
    assert question_only_reward_fn(r"\boxed{6}", "5") == wrong
    assert question_only_reward_fn("5", "5") == neither


def test_random_rewards_say_nothing_and_still_measure() -> None:
    rollouts = [replace_log_probs(rollout(f"#### {i % 10}"), -i / 7) for i in range(400)]
    with Grader() as grader:
        scorer = RewardScorer("gsm8k_random", {}, grader)
        rewards = scorer.score(rollouts)
        assert scorer.score(rollouts) == rewards  # as a resumed run would
    assert [reward.answer for reward in rewards] == [float(i % 10 == 5) for i in range(400)]
    assert all(reward.format == 1.0 for reward in rewards)
    for answer in (0.0, 1.0):  # right or wrong, a reward of 1 is as likely: within four standard errors
        totals = [reward.total for reward in rewards if reward.answer == answer]
        assert set(totals) == {0.0, 1.0} and abs(sum(totals) / len(totals) - 0.5) < 2 / len(totals) ** 0.5
    same = scorer.main([rollout("#### 5")] * 20, grader=FixedGrader())
    assert {reward.total for reward in same} == {0.0, 1.0}  # also for responses that are equal to the last bit


def replace_log_probs(one: Rollout, log_prob: float) -> Rollout:
    return dataclasses.replace(one, sampler_log_probs=(log_prob, log_prob))


class FixedGrader:
    def grade(self, pairs: list) -> list[bool]:
        return [True] * len(pairs)
