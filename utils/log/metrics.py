"""Every metric that a run may log, in one line each: the source of docs/metrics.md, checked on every row.

Code that measures something uses the bare name, `reward`. `written_names` makes `train/reward` or `eval/reward` of it
when the row is written; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping

AXES: dict[str, str] = {
    "grpo_step": "GRPO steps completed: 1 is the first; x axis of `train/*`",
    "eval_step": "GRPO steps completed when evaluated: 0 is before training; x axis of `eval/*`",
    "optimizer_step": "optimizer steps completed, over all GRPO steps",
    "time": "seconds that this run has taken. Resumed parts add up; the time between them is not counted",
}

GRADING: dict[str, str] = {
    "answers": "answers that were graded",
    "fast": "answers decided in this process, without algebra",
    "algebra": "answers decided by a worker process",
    "refused": "answers that the grader refused to parse (too long, too deep, too large); they count as wrong",
    "crashes": "answers whose grading killed its worker process; they count as wrong",
    "timeouts": "answers whose grading took longer than `grader.time_limit`; they count as wrong",
}

METRICS: dict[str, str] = {
    "eval/reward": "mean reward over the fixed validation subset",
    "eval/format_reward": "share of the evaluation's responses that are in the required format",
    "eval/answer_reward": "share of the evaluation's responses that have the right answer",
    "eval/reward_std_error": "standard error of `eval/reward` over the problems",
    "eval/mean_response_length": "tokens per response in the evaluation",
    "eval/frac_truncated": "share of the evaluation's responses that reached `max_tokens`",
    "train/loss": "the loss, mean over the optimizer steps of a GRPO step. With a ratio loss, on-policy, "
    "and `normalize_mode` mean it is about 0, because advantages cancel out",
    "train/grad_norm": "total gradient norm before clipping, mean over the optimizer steps of a GRPO step",
    "train/frac_grad_clipped": "share of the optimizer steps whose gradient was clipped",
    "train/frac_trained_rollouts": "share of rollouts that went through forward and backward (`skip_zero_advantage`)",
    "train/trained_tokens": "response tokens that went through forward and backward, over all epochs",
    "train/nonfinite_steps": "optimizer steps that were skipped because the loss or the gradient was not finite",
    "train/reward": "mean reward of the rollouts",
    "train/format_reward": "mean format reward of the rollouts",
    "train/answer_reward": "mean answer reward of the rollouts",
    "train/reward_std": "standard deviation of the rollouts' rewards",
    "train/frac_zero_std_groups": "share of groups whose rewards are all equal, so that they give no gradient",
    "train/mean_response_length": "tokens per response",
    "train/frac_truncated": "share of responses that reached `max_tokens`",
    "train/entropy": "mean entropy of the next-token predictions, over trained tokens, nats",
    "train/mean_ratio": "mean ratio of policy to old probability, over trained tokens. On-policy it is 1",
    "train/clip_fraction": "share of trained tokens for which clipping changed the objective",
    "train/sampler_kl": "KL(sampler || trainer), nats, averaged over trained tokens. Its estimator is r - 1 - log r, "
    "where r is the trainer's probability over the sampler's. "
    "Losses with a ratio: all optimizer steps. Other losses: the first step only. If that step trains nothing: one of "
    "its microbatches",
    "train/reference_kl": "KL(policy || reference) by `kl_estimator`, averaged over trained tokens, nats",
    "train/sampler_weight": "mean weight that `sampler_correction` and `negative_mask` give a trained token",
    "train/effective_sample_size": "(sum of these weights)^2 / sum of their squares, per trained token",
    "train/frac_masked_tokens": "share of trained tokens whose weight is 0",
    "train/frac_masked_sequences": "share of trained responses all of whose tokens have weight 0",
    "train/frac_masked_shortest": "share of trained tokens whose weight is 0, in the shortest third of the "
    "rollout batch's responses",
    "train/frac_masked_longest": "share of trained tokens whose weight is 0, in the longest third: long answers "
    "must not vanish silently",
    "train/learning_rate": "AdamW's learning rate in the step",
    "train/loss_scale": "what the next optimizer step's loss is multiplied by, in float16",
    "train/loss_scale_skips": "optimizer steps that were skipped because the loss scale made the gradient too large "
    "for float16; the scale is then halved",
    "train/generation_rounds": "rounds of sampling that `refill_groups` needed",
    "train/sampled_rollouts": "rollouts sampled in all rounds, including those left out",
    "train/sampled_answer_reward": "mean answer reward of all sampled rollouts",
    "train/sampler_max_diff": "largest absolute difference of sampler and trainer log-probs on the tokens of "
    "`train/sampler_kl`, nats. Before `min_tokens` they differ, because the sampler may not choose an end id there",
    "train/frac_weights_moved": "share of the weights that the step changed, estimated from up to 65,536 per "
    "tensor; masters beside bfloat16 weights are not looked at",
    "train/rollout_dt": "seconds to generate the rollouts",
    "train/grading_dt": "seconds to score the rollouts",
    "train/train_dt": "seconds in the inner loop",
    "train/push_dt": "seconds to put the new weights into the engine",
    "train/eval_dt": "seconds in the evaluation; written in the evaluation's row",
    "train/step_dt": "seconds in the step, without evaluation",
    "train/tokens_per_second": "response tokens sampled per second of `train/step_dt`",
    "train/peak_memory_gb": "peak memory in the step, GB: of the policy's GPU, or of this process on the CPU",
    "train/rollout_peak_memory_gb": "peak memory while generating, GB",
    "train/grading_peak_memory_gb": "peak memory while scoring, GB",
    "train/train_peak_memory_gb": "peak memory in the inner loop, GB",
    "train/push_peak_memory_gb": "peak memory while pushing weights, GB",
    "train/push_gb": "weights that were pushed into the vLLM engine, GB",
    "train/sleep_freed_gb": "GPU memory that the vLLM engine released when it went to sleep, GB",
    "train/check_mean_diff": "mean absolute difference of vLLM's and the trainer's log-probs, nats, at steps that "
    "compare them",
    "train/check_max_diff": "largest absolute difference at these steps, nats",
    **{f"train/grader_{name}": meaning for name, meaning in GRADING.items()},
    **{f"eval/grader_{name}": f"{meaning} (in the evaluation)" for name, meaning in GRADING.items()},
}

OWN_NAMES = {
    "optimizer_step": "optimizer_step",  # an axis
    "eval_dt": "train/eval_dt",  # time that training takes, although it is in the evaluation's row
}


def written_names(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """{"reward": 0.5} -> {"train/reward": 0.5}; OWN_NAMES do not get the row's prefix.

    Raises ValueError for a name that is not described in METRICS.
    """
    written = {OWN_NAMES.get(name, prefix + name): value for name, value in metrics.items()}
    unknown = sorted(written.keys() - METRICS.keys() - AXES.keys())
    if unknown:
        raise ValueError(f"no metric is called {', '.join(unknown)}: describe it in utils/log/metrics.py")
    return written


def metrics_table() -> str:
    """The table of docs/metrics.md, Markdown."""
    rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in {**METRICS, **AXES}.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])
