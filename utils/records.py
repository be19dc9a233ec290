"""The nouns that travel between the parts. Standard library only, so that anything may import it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Problem:
    """One row of a data file. `answer` is the ground truth; a tuple means that any of its members is right."""

    question: str
    answer: str | tuple[str, ...]
    level: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A problem put into the prompt template, as text and as the token ids that the policy sees."""

    problem: Problem
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt, exactly as it was sampled.

    `response_ids` holds the end id where one was sampled; `sampler_log_probs` (same length, nats) are those of the
    distribution that was sampled from, temperature and top-p applied. `finish_reason` is "stop" (end id or stop string)
    or "length" (ran into max_tokens). `n_end_tokens` counts the end ids and the tokenizer's other special tokens, which
    the text never shows.
    """

    prompt: Prompt
    response: str
    response_ids: tuple[int, ...]
    sampler_log_probs: tuple[float, ...]
    finish_reason: str
    n_end_tokens: int = 0

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Reward:
    """The reward of one response. `total` is what the policy is trained on."""

    format: float
    answer: float
    total: float


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    min_tokens: int
    max_tokens: int
    stop: tuple[str, ...]
    include_stop_str_in_output: bool


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to learn, as token ids; `response_ids` ends with the end token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class RolloutEngine(Protocol):
    """What samples responses. Every engine samples as `sampling` says, whose values come from the config."""

    name: str
    sampling: Sampling

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        temperature: float | None = None,
        label: str = "rollouts",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """Sample n responses per prompt: len(prompts) * n rollouts, those of one prompt side by side.

        Response j of prompt i is sampled with the seed `seed + i * n + j`, so equal arguments and weights give equal
        rollouts. `temperature` replaces `sampling.temperature` (0: greedy); `label` names the progress bar.

        `should_stop` is called at every token; if it returns True, the result is an empty list.
        """

    def update_weights(self, policy: torch.nn.Module) -> dict[str, float]:
        """Make the engine sample from the policy's current weights; wakes it if it sleeps. Returns metrics, if any."""

    def sleep(self) -> dict[str, float]:
        """Give accelerator memory back until the next `update_weights`, where possible. Returns metrics, if any."""

    def close(self) -> None:
        """Free everything. Called again, it does nothing."""
