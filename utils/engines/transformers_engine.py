"""Rollouts by the policy itself, with Hugging Face transformers: no second copy of the weights, any device.

Slower than vLLM on a GPU, and it needs nothing but torch and transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.algorithm.head import head_of, next_token_logits
from utils.algorithm.policy import autocast
from utils.engines.responses import ResponseReader, check_rollouts, end_ids_of
from utils.log.progress import progress_bar
from utils.records import Prompt, Rollout, Sampling


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: one token per row, with one uniform number per row.

    `logits` (B, V) float32, -inf where forbidden; `uniforms` (B,) float64 in [0, 1). Returns token ids (B,) and their
    log-probs (B,) under the distribution sampled from: after temperature and top-p. Temperature 0 takes the likeliest
    token and gives its log-prob at temperature 1.
    """
    if temperature == 0.0:
        log_probs = logits.log_softmax(-1)
        ids = log_probs.argmax(-1)
        return ids, log_probs.gather(-1, ids[:, None])[:, 0]
    log_probs = (logits / temperature).log_softmax(-1)
    if top_p < 1.0:
        ordered, order = log_probs.sort(-1, descending=True)
        probability = ordered.exp()
        beyond = probability.cumsum(-1) - probability >= top_p  # the tokens before this one already hold top_p
        log_probs = log_probs.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf).log_softmax(-1)
    ids = first_above(log_probs.exp(), uniforms).clamp(max=logits.shape[-1] - 1)  # only where logits are NaN is it more
    return ids, log_probs.gather(-1, ids[:, None])[:, 0]


def first_above(probability: torch.Tensor, uniforms: torch.Tensor, block: int = 256) -> torch.Tensor:
    """(B,) int64: the first token of each row whose cumulative probability is above `uniforms` times the row's sum.

    `probability` (B, V) float32; sums are float64, and strictly above: a token of probability 0 is never chosen. The
    running sum over a vocabulary is most of what sampling costs on a CPU, so it runs over blocks, and then over the
    tokens of one.
    """
    n_rows, n_tokens = probability.shape
    blocks = torch.nn.functional.pad(probability, (0, -n_tokens % block)).view(n_rows, -1, block)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    thresholds = uniforms[:, None] * ends[:, -1:]
    chosen = torch.searchsorted(ends, thresholds, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(-1, chosen)
    tokens = blocks[torch.arange(n_rows, device=chosen.device), chosen[:, 0]].double().cumsum(-1)
    # the block's sum, rounded in another order, may end at or below the threshold
    highest = torch.nextafter(tokens[:, -1:], torch.zeros_like(tokens[:, -1:]))
    within = torch.searchsorted(tokens, torch.minimum(thresholds - before, highest), right=True)
    return (chosen * block + within)[:, 0]


class TransformersEngine:
    """Samples from the live policy with a KV cache, batch by batch; rows that have ended leave the computation.

    `batch_size` is the number of sequences sampled at once. `autocast_dtype`: compute in this dtype, as the trainer
    does; `head_dtype` "float32": keep the head's products in float32, as the trainer does. The policy's train mode, its
    gradient checkpointing and the global random state stay as they are.
    """

    name = "transformers"

    def __init__(
        self,
        policy: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int,
        autocast_dtype: str | None = None,
        head_dtype: str | None = None,
    ):
        self.sampling = sampling
        self.batch_size = batch_size
        self.autocast_dtype = autocast_dtype
        self._head = None if head_dtype is None else head_of(policy, head_dtype)
        self.update_weights(policy)
        self.reader = ResponseReader(tokenizer, sampling, end_ids_of(self._model, tokenizer))
        self._vocabulary_size = len(tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        temperature: float | None = None,
        label: str = "rollouts",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """See `utils.records.RolloutEngine`. Raises RuntimeError if a log-prob is not finite."""
        temperature = self.sampling.temperature if temperature is None else temperature
        requests = [(prompt, seed + i * n + j) for i, prompt in enumerate(prompts) for j in range(n)]
        # Prompts of one length need no padding, and attention is far faster without a padding mask.
        order = sorted(range(len(requests)), key=lambda k: len(requests[k][0].token_ids))
        rollouts: dict[int, Rollout] = {}
        with progress_bar(label, len(requests)) as advance, sampling_mode(self._model, self.autocast_dtype):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                sampled = self._sample_batch([requests[k] for k in batch], temperature, advance, should_stop)
                if not sampled:
                    return []
                rollouts.update(zip(batch, sampled, strict=True))
        in_order = [rollouts[k] for k in range(len(requests))]
        check_rollouts(in_order, self.name, self._vocabulary_size)
        return in_order

    def update_weights(self, policy: torch.nn.Module) -> dict[str, float]:
        """Sample from this policy from here on; its later changes need no further call."""
        self._model: PreTrainedModel = policy
        return {}

    def sleep(self) -> dict[str, float]:
        """Gives nothing back: the weights are the policy's, and the cache lasts for one batch."""
        return {}

    def close(self) -> None:
        """Let go of the policy."""
        self._model = None

    def _sample_batch(
        self,
        requests: list[tuple[Prompt, int]],
        temperature: float,
        advance: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> list[Rollout]:
        """One rollout per request (prompt, seed); none if `should_stop` returns True. `advance(n)`: n more ended."""
        sampling, device = self.sampling, self._model.device
        uniforms = torch.stack([uniform_numbers(request_seed, sampling.max_tokens) for _, request_seed in requests])
        uniforms = uniforms.to(device)
        logits, mask, cache = self._prefill([prompt for prompt, _ in requests])
        positions = mask.sum(-1)  # of the next token, a row each
        ids: list[list[int]] = [[] for _ in requests]
        log_probs: list[list[float]] = [[] for _ in requests]
        ended = [False] * len(requests)
        active = list(range(len(requests)))
        for t in range(sampling.max_tokens):
            if should_stop():
                return []
            self._forbid(logits, t)
            tokens, token_log_probs = sample_tokens(logits, uniforms[:, t], temperature, sampling.top_p)
            for row, token, log_prob in zip(active, tokens.tolist(), token_log_probs.tolist(), strict=True):
                ids[row].append(token)
                log_probs[row].append(log_prob)
                ended[row] = self.reader.ended(ids[row])
            unfinished = [k for k, row in enumerate(active) if not ended[row]]
            advance(len(active) - len(unfinished))
            if not unfinished or t + 1 == sampling.max_tokens:
                advance(len(unfinished))
                break
            if len(unfinished) < len(active):
                active = [active[k] for k in unfinished]
                keep = torch.tensor(unfinished, device=device)
                cache.reorder_cache(keep)
                tokens, positions, mask, uniforms = tokens[keep], positions[keep], mask[keep], uniforms[keep]
            mask = torch.cat([mask, mask.new_ones(len(unfinished), 1)], dim=1)
            logits, cache = self._forward(tokens[:, None], mask, positions[:, None], cache)
            positions = positions + 1
        return [
            self.reader.rollout(prompt, ids[row], log_probs[row], "stop" if ended[row] else "length")
            for row, (prompt, _) in enumerate(requests)
        ]

    def _prefill(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor, object]:
        """Each distinct prompt once, padded on the left: logits (B, V) of the first token, mask (B, T), cache."""
        rows: dict[tuple[int, ...], int] = {}
        row_of = torch.tensor([rows.setdefault(prompt.token_ids, len(rows)) for prompt in prompts])
        longest = max(map(len, rows))
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # the padding id matters to nobody: masked
        mask = torch.zeros_like(input_ids)
        for token_ids, row in rows.items():
            input_ids[row, longest - len(token_ids) :] = torch.tensor(token_ids)
            mask[row, longest - len(token_ids) :] = 1
        device = self._model.device
        input_ids, mask, row_of = input_ids.to(device), mask.to(device), row_of.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits, cache = self._forward(input_ids, mask, positions, None)
        cache.reorder_cache(row_of)
        return logits[row_of], mask[row_of], cache

    def _forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: object | None
    ) -> tuple[torch.Tensor, object]:
        """Logits (B, V) float32 of the token that follows the last column, and the cache with these columns added."""
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        if self._head is not None:
            return next_token_logits(self._model, self._head, **inputs, use_cache=True)
        output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float(), output.past_key_values

    def _forbid(self, logits: torch.Tensor, n_sampled: int) -> None:
        """In place: no id that the tokenizer lacks (models pad their vocabulary), no end id before min_tokens."""
        logits[:, self._vocabulary_size :] = -torch.inf
        if n_sampled < self.sampling.min_tokens:
            logits[:, list(self.reader.end_ids)] = -torch.inf


def uniform_numbers(seed: int, count: int) -> torch.Tensor:
    """(count,) float64 in [0, 1) from a generator of their own, on the CPU: the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def sampling_mode(model: torch.nn.Module, autocast_dtype: str | None) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled; afterwards every module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            torch.no_grad(),
            autocast(model, autocast_dtype, keep_copies=True),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
