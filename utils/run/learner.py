"""What a GRPO step needs. What surrounds a step is in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from utils.problems import ProblemStream
from utils.records import RolloutEngine
from utils.rewards.functions import RewardScorer


@dataclass
class Learner:
    """The parts of the outer loop."""

    policy: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    engine: RolloutEngine
    scorer: RewardScorer
    problem_stream: ProblemStream
    # what a KL term measures from: a frozen policy, or the policy itself, which then is asked without its adapter
    reference: torch.nn.Module | None = None
