"""What engines must agree on: which ids end a response, where a stop string cuts its text, what may be returned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from utils.records import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED_CHARACTER = "\ufffd"  # what decoding gives for the first bytes of a character


def end_ids_of(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a response: those of the generation config, the model's config and the tokenizer together."""
    end_ids: set[int] = set()
    for value in (policy.generation_config.eos_token_id, policy.config.eos_token_id, tokenizer.eos_token_id):
        end_ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(end_ids)


def special_ids_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that decoding leaves out of a text: the tokenizer's named special tokens and those added as special."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


class ResponseReader:
    """Reads sampled ids: has the response ended, and what is its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, end_ids: Iterable[int]):
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.end_ids = frozenset(end_ids)
        self._end_tokens = self.end_ids | special_ids_of(tokenizer)
        self._last_characters = {stop[-1] for stop in sampling.stop}
        self._may_complete: dict[int, bool] = {}

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether the last of these ids ends the response: an end id, or the token that completes a stop string."""
        if ids[-1] in self.end_ids:
            return True
        return self._may_complete_stop(ids[-1]) and self._text_end(ids) is not None

    def text(self, ids: Sequence[int]) -> str:
        """The response without its end id, cut behind or before the stop string that its last token completes."""
        if ids and ids[-1] in self.end_ids:
            return self._decode(ids[:-1])
        return self._decode(ids)[: self._text_end(ids)]

    def rollout(self, prompt: Prompt, ids: Sequence[int], log_probs: Sequence[float], finish_reason: str) -> Rollout:
        """One rollout, its text read from its ids."""
        n_end_tokens = sum(token_id in self._end_tokens for token_id in ids)
        return Rollout(prompt, self.text(ids), tuple(ids), tuple(log_probs), finish_reason, n_end_tokens)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _may_complete_stop(self, token_id: int) -> bool:
        """Cheap and remembered: False only if the token's own text rules out that it completes a stop string.

        Nothing is ruled out if that text depends on its neighbours: spaces that lead, characters of several bytes.
        """
        if token_id not in self._may_complete:
            text = self._decode([token_id])
            self._may_complete[token_id] = any(
                c in text or c.isspace() or not c.isascii() for c in self._last_characters
            )
        return self._may_complete[token_id]

    def _text_end(self, ids: Sequence[int]) -> int | None:
        """Where the text ends if the last token completes a stop string, else None.

        As in vLLM: stop strings count beyond `min_tokens` tokens only, and the first in the list wins.
        """
        if not self.sampling.stop or len(ids) <= self.sampling.min_tokens:
            return None
        text = self._decode(ids)
        text_before = self._decode(ids[:-1]).rstrip(UNFINISHED_CHARACTER)
        for stop in self.sampling.stop:
            start = text.find(stop, max(0, len(text_before) - len(stop) + 1))
            if start >= 0:
                return start + len(stop) if self.sampling.include_stop_str_in_output else start
        return None


def check_rollouts(rollouts: Sequence[Rollout], engine_name: str, vocabulary_size: int) -> None:
    """Raise RuntimeError if a log-prob is not finite or an id lies outside the tokenizer's vocabulary."""
    for index, rollout in enumerate(rollouts):
        if not all(map(math.isfinite, rollout.sampler_log_probs)):
            raise RuntimeError(
                f"the {engine_name} engine returned a log-prob that is not finite (rollout {index} of {len(rollouts)}):"
                " the policy's weights hold NaN or infinity, or overflow in the dtype that the engine computes in"
            )
        if max(rollout.response_ids, default=0) >= vocabulary_size:
            raise RuntimeError(
                f"the {engine_name} engine sampled id {max(rollout.response_ids)},"
                f" but the tokenizer has only {vocabulary_size}: the engine's vocabulary restriction is not in force"
            )
