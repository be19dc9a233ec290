"""Which fields may change when a run is resumed. Standard library only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

# Fields that may change when a run is resumed: none of them changes what the run investigates.
MAY_CHANGE = frozenset(
    {
        "paths.output_dir",
        # How long it runs, how often it evaluates and saves, what it reports.
        "training.n_grpo_steps",
        "training.max_hours",
        "training.max_nonfinite_steps",
        "training.eval_interval",
        "training.checkpoint_interval",
        "training.checkpoint_keep",
        "training.n_rollouts_to_log",
        "training.trackers",
        "training.wandb_project",
        "training.wandb_run_name",
        "training.wandb_tags",
        "training.track_peak_memory",
        # Hardware: the numbers stay the same up to rounding.
        "training.device",
        "training.cpu_threads",
        "training.attention_type",
        "training.use_onednn",
        "training.use_packing",
        "training.use_compile",
        "training.use_liger_kernel",
        "training.use_gradient_checkpointing",
        "training.use_vllm_sleep_mode",
        "training.gradient_accumulation_steps",
        "training.max_tokens_per_microbatch",
        "training.old_log_probs_train_size",
        "training.log_prob_chunk_size",
        "training.generation_batch_size",
        "training.try_longest_microbatch",
        "vllm.device",
        "vllm.gpu_memory_utilization",
        "vllm.enable_prefix_caching",
        "vllm.enforce_eager",
        "vllm.max_num_seqs",
        "vllm.sleep_level",
        "vllm.cpu_kv_cache_mb",
        "vllm.check_interval",
        "vllm.check_tolerance",
        "grader.workers",
        "grader.memory_limit_mb",
    }
)
MAY_CHANGE_SECTIONS = frozenset({"guard", "elsewhere"})  # one only watches the run, the other is where it runs


def changed_fields(saved: Any, config: Any) -> list[str]:
    """The fields in which two configs differ although they may not change on resume, each with both values."""
    old, new = asdict(saved), asdict(config)
    # `microbatch` divides by a microbatch's longest response, so the microbatch size changes the loss.
    fixed = {"training.gradient_accumulation_steps"} if config.training.normalize_mode == "microbatch" else set()
    if config.training.lr_schedule != "constant":  # it falls to 0 at the last step
        fixed.add("training.n_grpo_steps")
    return [
        f"{section}.{name}: saved {old[section].get(name)!r}, asked for {value!r}"
        for section in new
        if section not in MAY_CHANGE_SECTIONS
        for name, value in new[section].items()
        if old[section].get(name) != value and (f"{section}.{name}" in fixed or f"{section}.{name}" not in MAY_CHANGE)
    ]
