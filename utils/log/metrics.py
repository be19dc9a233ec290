"""Every metric that a run may log, in one line each: the source of the README's table, checked on every row.

Code that measures something uses the bare name, `reward`. `written_names` makes `train/reward` or `eval/reward` of it
when the row is written; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping

AXES: dict[str, str] = {
    "grpo_step": "GRPO steps completed: 1 is the first; x axis of `train/*`",
    "eval_step": "GRPO steps completed when evaluated: 0 is before training; x axis of `eval/*`",
    "optimizer_step": "optimizer steps completed, all GRPO steps together",
    "time": "seconds this run has been running, its resumed parts added up; time between them is not counted",
}

GRADING: dict[str, str] = {
    "answers": "answers that the grader was asked about",
    "fast": "of these, decided in this process without algebra",
    "algebra": "of these, decided by a worker process",
    "refused": "answers that it refused to parse (too long, too deep, too large): graded wrong",
    "crashes": "answers whose grading killed its worker process: graded wrong",
    "timeouts": "answers whose grading ran over `grader.time_limit`: graded wrong",
}

METRICS: dict[str, str] = {
    "eval/reward": "mean reward over the fixed validation subset",
    "eval/format_reward": "share of those responses in the asked-for format",
    "eval/answer_reward": "share of those responses with the right answer",
    "eval/reward_std_error": "standard error of `eval/reward` over the problems",
    "eval/mean_response_length": "tokens per response in the evaluation",
    "eval/frac_truncated": "share of the evaluation's responses that ran into `max_tokens`",
    "train/loss": "the loss, mean over the step's optimizer steps; about 0 on-policy, where advantages cancel out",
    "train/grad_norm": "total gradient norm before clipping, mean over the step's optimizer steps",
    "train/frac_grad_clipped": "share of the step's optimizer steps whose gradient was clipped",
    "train/frac_trained_rollouts": "share of rollouts that went through forward and backward (`skip_zero_advantage`)",
    "train/trained_tokens": "response tokens that went through forward and backward, all epochs",
    "train/nonfinite_steps": "optimizer steps skipped because loss or gradient was not finite",
    "train/reward": "mean reward of the rollouts",
    "train/format_reward": "mean format reward of the rollouts",
    "train/answer_reward": "mean answer reward of the rollouts",
    "train/reward_std": "standard deviation of the rollouts' rewards",
    "train/frac_zero_std_groups": "share of groups whose rewards are all equal: they teach nothing",
    "train/mean_response_length": "tokens per response",
    "train/frac_truncated": "share of responses that ran into `max_tokens`",
    "train/entropy": "mean entropy of the next-token predictions over the tokens trained on, nats",
    "train/mean_ratio": "mean of policy over old probability of a token trained on; 1 on-policy",
    "train/clip_fraction": "share of the tokens trained on where clipping changed the objective",
    "train/sampler_kl": "KL(sampler || trainer) by the estimator r - 1 - log r, nats. Averaged over trained tokens. "
    "Losses with a ratio: all optimizer steps. Other losses: the first step only. If that step trains nothing: one of "
    "its microbatches",
    "train/sampler_max_diff": "largest absolute difference of sampler and trainer log-probs on these tokens, nats; up "
    "to `min_tokens` they differ by the end ids, which the sampler may not take there",
    "train/frac_weights_moved": "share of the weights that the step changed, from up to 65,536 of each tensor",
    "train/rollout_dt": "seconds to generate the rollouts",
    "train/grading_dt": "seconds to score them",
    "train/train_dt": "seconds in all inner steps",
    "train/push_dt": "seconds to put the new weights into the engine",
    "train/eval_dt": "seconds in the evaluation; it stands in the evaluation's row",
    "train/step_dt": "seconds in the step, evaluation left out",
    "train/tokens_per_second": "response tokens sampled, a second of `train/step_dt`",
    "train/peak_memory_gb": "peak memory in the step, GB: on the GPU, or of this process where it trains on the CPU",
    "train/rollout_peak_memory_gb": "the same while generating",
    "train/grading_peak_memory_gb": "the same while scoring",
    "train/train_peak_memory_gb": "the same in the inner steps",
    "train/push_peak_memory_gb": "the same while pushing weights",
    "train/push_gb": "weights that were put into the vLLM engine, GB",
    "train/sleep_freed_gb": "GPU memory that the vLLM engine gave back as it went to sleep, GB",
    "train/check_mean_diff": "mean absolute difference of vLLM's and trainer's log-probs where they are compared, nats",
    "train/check_max_diff": "largest such difference, nats",
    **{f"train/grader_{name}": meaning for name, meaning in GRADING.items()},
    **{f"eval/grader_{name}": f"{meaning} (in the evaluation)" for name, meaning in GRADING.items()},
}

OWN_NAMES = {
    "optimizer_step": "optimizer_step",  # an axis
    "eval_dt": "train/eval_dt",  # time that training takes, although it is in the evaluation's row
}


def written_names(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """{"reward": 0.5} -> {"train/reward": 0.5}; OWN_NAMES have none of the row's prefix.

    Raises ValueError for a name that is not described in METRICS.
    """
    written = {OWN_NAMES.get(name, prefix + name): value for name, value in metrics.items()}
    unknown = sorted(written.keys() - METRICS.keys() - AXES.keys())
    if unknown:
        raise ValueError(f"no metric is called {', '.join(unknown)}: describe it in utils/log/metrics.py")
    return written


def metrics_table() -> str:
    """The table of the README, Markdown."""
    rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in {**METRICS, **AXES}.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])
