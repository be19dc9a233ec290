"""A reward of your own: the answer in double brackets, with a little less for long responses.

training.reward_fn=docs/examples/reward.py:bracketed
training.extra_rewards='{docs/examples/reward.py:brief: 0.1}'
"""

import re


def bracketed(rollout):
    """1 for [[the right answer]], as the last of its kind; the format is right if there is any such answer."""
    answers = re.findall(r"\[\[(.*?)\]\]", rollout.response)
    right = bool(answers) and answers[-1].strip() == rollout.prompt.problem.answer
    return {"format": float(bool(answers)), "answer": float(right), "total": float(right)}


bracketed.needs = ("[[", "]]")  # what a response must hold; a look at responses counts them, and no reward hangs on it


def brief(rollout):
    """0 for an empty response, -1 for one of 1,000 tokens or more, and for one that ran into max_tokens."""
    if rollout.finish_reason == "length":
        return -1.0
    return -min(1.0, len(rollout.response_ids) / 1000)
