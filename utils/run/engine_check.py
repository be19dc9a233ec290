"""Does the engine sample from the policy's weights? Its log-probs, compared with the trainer's on the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from configs.defaults import Config
from utils.algorithm.batch import make_train_batch
from utils.algorithm.log_probs import response_log_probs
from utils.algorithm.parallel import n_ranks
from utils.engines.transformers_engine import sampling_mode
from utils.records import Rollout, RolloutEngine
from utils.run.learner import Learner

logger = logging.getLogger(__name__)

N_ROLLOUTS = 8

# Largest mean absolute difference accepted, nats. Measured with a 0.6 M-parameter model on the CPU, vLLM against
# transformers: 7e-7 in float32, 1e-2 in bfloat16. On CUDA, attention kernels may round float32 to TF32.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}


class EngineOutOfStep(RuntimeError):
    """The engine's log-probs are not those of the policy."""


def log_prob_gap(sampler_log_probs: Tensor, trainer_log_probs: Tensor, mask: Tensor, top_p: float) -> Tensor:
    """How far the engine's log-probs lie from where the trainer's allow, for each token under the mask: (N,), nats.

    All (B, T-1). With top_p the engine's distribution is the trainer's cut to a nucleus of mass between top_p and 1
    and scaled up by it, so that sampler minus trainer may lie anywhere between 0 and -log(top_p).
    """
    difference = (sampler_log_probs - trainer_log_probs)[mask].double()
    allowed = -torch.tensor(top_p, dtype=torch.float64).log()
    return torch.maximum(-difference, difference - allowed).clamp(min=0.0)


def tolerance_of(config: Config) -> float:
    """`vllm.check_tolerance`, or by the coarser of the dtypes that the engine and the trainer compute in."""
    if config.vllm.check_tolerance is not None:
        return config.vllm.check_tolerance
    dtypes = {config.vllm.dtype, config.training.autocast_dtype or config.training.dtype}
    if config.training.device != "cpu":
        dtypes.add("tf32")
    return max(TOLERANCE[dtype] for dtype in dtypes)


class EngineCheck:
    """Compares the engine's log-probs with the trainer's after the first push, and every `vllm.check_interval` steps.

    The transformers engine samples from the policy itself, so it is not checked.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._checked = False

    def if_due(self, learner: Learner, rollouts: Sequence[Rollout], steps_done: int) -> dict[str, float]:
        """The metrics of `compare_log_probs`, if it is due. Raises EngineOutOfStep."""
        interval = self._config.vllm.check_interval
        if interval is None or learner.engine.name == "transformers":
            return {}
        due = steps_done % interval == 0
        if self._checked and not due:
            return {}
        differences = compare_log_probs(learner.engine, learner.policy, rollouts, self._config, len(learner.tokenizer))
        self._checked = True
        return differences if due else {}  # a resumed run's extra check is in no row


def compare_log_probs(
    engine: RolloutEngine,
    policy: torch.nn.Module,
    rollouts: Sequence[Rollout],
    config: Config,
    vocabulary_size: int | None = None,
) -> dict[str, float]:
    """Compare log-probs on a few of these rollouts, sampled by `engine` at its own temperature from `policy` as it is.

    Tokens before `min_tokens` are left out: there the engine forbids the end ids, and the trainer does not.
    Returns the mean and the largest difference in nats. Raises EngineOutOfStep if the mean is above the tolerance.
    """
    n_compared = max(N_ROLLOUTS, n_ranks())  # spread over the batch, so that they come from every rank's engine
    step = max(1, len(rollouts) // n_compared)
    chosen = rollouts[::step][:n_compared]
    unused = torch.zeros(len(chosen))
    batch = make_train_batch(chosen, rewards=unused, advantages=unused)
    mask = batch.response_mask & (batch.response_mask.cumsum(-1) > engine.sampling.min_tokens)
    if not mask.any():
        logger.warning("self-check: no response is longer than min_tokens, so nothing could be compared")
        return {}
    with sampling_mode(policy, config.training.autocast_dtype):
        trainer_log_probs, _ = response_log_probs(
            policy,
            batch.input_ids.to(policy.device),
            batch.response_mask.to(policy.device),
            temperature=engine.sampling.temperature,
            chunk_size=config.training.log_prob_chunk_size,
            vocabulary_size=vocabulary_size,
            head_dtype=config.training.head_dtype,
        )
    gap = log_prob_gap(batch.sampler_log_probs, trainer_log_probs.cpu(), mask, engine.sampling.top_p)
    mean, largest, tolerance = gap.mean().item(), gap.max().item(), tolerance_of(config)
    if not mean <= tolerance:  # NaN counts as out of step
        raise EngineOutOfStep(
            f"the {engine.name} engine is out of step with the policy: on {len(gap)} tokens of {len(chosen)} rollouts"
            f" at temperature {engine.sampling.temperature} its log-probs differ from the trainer's by {mean:.2g} nats"
            f" on average and {largest:.2g} at most; accepted is {tolerance:g} on average (vllm.check_tolerance)."
            " Likely causes: weights were not pushed after the last update; sleep lost them (try vllm.sleep_level=1 or"
            " training.use_vllm_sleep_mode=false); the prefix cache outlived a push (try"
            " vllm.enable_prefix_caching=false); the two compute differently (vllm.dtype, training.dtype,"
            " training.attention_type)"
        )
    return {"check_mean_diff": mean, "check_max_diff": largest}
