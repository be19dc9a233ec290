"""The reward functions: what counts as formatted, and that nothing else scores."""

from __future__ import annotations

import pytest

from utils.records import Problem, Prompt, Reward, Rollout
from utils.rewards.functions import (
    REWARD_FNS,
    RewardScorer,
    end_token_penalty,
    gsm8k_answer,
    integer_answer,
    question_only_reward_fn,
    r1_zero_reward_fn,
    soft_xml_format,
    strict_xml_format,
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


def test_r1_zero_lenient_takes_any_white_space_between_the_tags_and_nothing_else():
    gaps = ["", " ", "  ", "\n", " \n\t "]
    assert score("r1_zero_lenient", *(f"</think>{gap}<answer> 5 </answer>" for gap in gaps)) == [RIGHT] * 5
    others = [response for response, reward in R1_ZERO if reward is UNFORMATTED and "</think><" not in response]
    others = [response for response in others if not response.startswith(("</think>  <answer> 5 ", "</think>\n"))]
    assert score("r1_zero_lenient", *others) == [UNFORMATTED] * len(others)


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
    with Grader() as grader:
        scorer = RewardScorer("gsm8k", {"integer_answer": 0.5, "end_token_penalty": 2.0}, grader)
        assert scorer.score([rollout("#### 5"), rollout("#### 5.0</s></s></s>"), rollout("six")]) == [
            Reward(1.0, 1.0, 1.5),
            Reward(1.0, 0.0, pytest.approx(-0.4)),
            Reward(0.0, 0.0, 0.0),
        ]


def test_unknown_names_list_the_choices():
    for reward_fn, extra in (("r2_zero", {}), ("r1_zero", {"integer": 1.0})):
        with pytest.raises(ValueError, match=r"r1_zero, r1_zero_lenient, question_only, gsm8k"):
            RewardScorer(reward_fn, extra, Grader())


def test_every_reward_function_takes_an_empty_batch():
    with Grader() as grader:
        assert all(reward_fn([], grader) == [] for reward_fn in REWARD_FNS.values())


@pytest.mark.parametrize(
    ("response", "soft", "strict"),
    [
        ("<reasoning>\n2 + 3\n</reasoning>\n<answer>\n5\n</answer>\n", 1, 1),
        ("2 + 3\n</think>\n<answer>\n5\n</answer>", 1, 1),
        ("<reasoning>2 + 3</reasoning> <answer>5</answer>", 1, 0),
        ("<reasoning>\n2 + 3\n</reasoning>\n<answer>\n5\n</answer>\nbye", 1, 0),
        ("<reasoning>\n2 + 3\n</think>\n<answer>\n5\n</answer>\n", 1, 0),
        ("<reasoning>\n2 + 3\n</reasoning>\n<answer>\n5\n", 0, 0),
        ("<answer>\n5\n</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_xml_formats(response, soft, strict):
    assert (soft_xml_format(response), strict_xml_format(response)) == (soft, strict)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("#### -1,234", 1), ("<answer> 7 </answer>", 1), (r"\boxed{7}", 1), ("#### 7.0", 0), ("#### seven", 0), ("7", 0)],
)
def test_integer_answer(response, reward):
    assert integer_answer(response) == reward


@pytest.mark.parametrize(
    ("response", "penalty"),
    [
        ("5", 0),
        ("5<|im_end|>", 0),
        ("5<|im_end|><|im_end|>", -0.1),
        ("5</s><eos><|endoftext|>", -0.2),
        ("</s>" * 50, -1),
    ],
)
def test_end_token_penalty(response, penalty):
    assert end_token_penalty(response) == pytest.approx(penalty)


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
