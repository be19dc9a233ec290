"""Every parameter: its default, its one-line doc, and the values it may take. Standard library only.

A YAML file holds only what differs from these. `python train_grpo.py --help` prints this file as a table.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any


def option(default: Any, doc: str, **rules: Any) -> Any:
    """A config field: a default, a doc, and rules: `low`/`high` (inclusive), `above`/`below` (exclusive), `choices`."""
    metadata = {"doc": doc, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(config_field: Any) -> Any:
    """The default of a dataclass field, whether it was given as a value or as a factory."""
    return config_field.default if config_field.default is not MISSING else config_field.default_factory()


@dataclass
class Paths:
    """Files read and the folder written. Relative paths start at the folder you run from."""

    train_data_file: str = option("data/math/train.jsonl", "problems to train on, JSONL")
    val_data_file: str = option("data/math/validation.jsonl", "held-out problems to evaluate on, JSONL")
    prompt_template_file: str = option("data/r1_zero.prompt", "prompt template, a text that holds {question}")
    model_path: str = option("Qwen/Qwen2.5-Math-1.5B", "checkpoint folder, or a model's name on the Hugging Face hub")
    output_dir: str = option("runs/grpo", "where the run writes; a folder that already holds a run is refused")


@dataclass
class Training:
    """The algorithm, its optimizer, and how often to look at it."""

    seed: int = option(1337, "seed of every random stream", low=0, high=2**63 - 1)
    device: str = option("cuda:0", "where the policy trains: cuda:0, cpu, ...")
    dtype: str = option("bfloat16", "dtype of weights, gradients and optimizer state", choices=["bfloat16", "float32"])
    autocast_dtype: str | None = option(
        None, "compute in this dtype while the weights stay in `dtype`; null computes in `dtype`", choices=["bfloat16"]
    )
    attention_type: str = option(
        "sdpa", "attention kernel", choices=["sdpa", "flash_attention_2", "flash_attention_3", "eager"]
    )
    cpu_threads: int | None = option(None, "threads that torch computes with on the CPU; null: torch decides", low=1)
    use_onednn: bool = option(
        False, "CPU: float32 products by oneDNN, up to twice as fast as MKL on AMD; best with attention_type eager"
    )
    use_compile: bool = option(False, "run the policy's forward pass through torch.compile")

    n_grpo_steps: int = option(10, "GRPO steps: one rollout batch each", low=1)
    rollout_batch_size: int = option(256, "rollouts a GRPO step", low=1)
    group_size: int = option(8, "rollouts a problem", low=1)
    epochs_per_rollout_batch: int = option(1, "passes over each rollout batch", low=1)
    train_batch_size: int = option(256, "rollouts an optimizer step", low=1)
    gradient_accumulation_steps: int = option(256, "microbatches an optimizer step", low=1)
    use_packing: bool = option(
        True, "train without padding, a prompt once for its rollouts; models unknown to it run padded"
    )
    max_tokens_per_microbatch: int | None = option(
        None, "cut microbatches by this many tokens, padding counted, in place of gradient_accumulation_steps", low=1
    )
    loss_type: str = option(
        "grpo_clip",
        "per-token loss",
        choices=["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"],
    )
    use_std_normalization: bool = option(True, "divide advantages by the group's standard deviation")
    advantage_eps: float = option(1e-6, "added to that standard deviation", low=0.0)
    cliprange: float = option(0.2, "grpo_clip: how far the ratio may go from 1", above=0.0, below=1.0)
    normalize_mode: str = option(
        "mean",
        "a sequence's loss is the sum over its tokens divided by: its own length, a constant, the microbatch's longest",
        choices=["mean", "constant", "microbatch"],
    )
    normalize_constant: float = option(1024.0, "the divisor of normalize_mode constant", above=0.0)
    skip_zero_advantage: bool = option(True, "leave rollouts that have no gradient out of forward and backward")

    learning_rate: float = option(1e-5, "AdamW's learning rate, constant", above=0.0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", low=0.0)
    adam_beta1: float = option(0.9, "AdamW's first decay rate", low=0.0, below=1.0)
    adam_beta2: float = option(0.95, "AdamW's second decay rate", low=0.0, below=1.0)
    adam_eps: float = option(1e-8, "AdamW's epsilon", above=0.0)
    max_grad_norm: float = option(1.0, "clip the total gradient norm to this", above=0.0)
    max_nonfinite_steps: int = option(3, "stop after so many skipped optimizer steps in a row (NaN, infinity)", low=1)

    rollout_engine: str = option(
        "auto",
        "what samples responses; auto is vllm where it is installed with a GPU, transformers elsewhere",
        choices=["auto", "vllm", "transformers"],
    )
    generation_batch_size: int = option(256, "sequences that the transformers engine samples at once", low=1)
    temperature: float = option(1.0, "sampling temperature, of rollouts and evaluation", above=0.0)
    top_p: float = option(1.0, "nucleus sampling: smallest set of tokens with this probability", above=0.0, high=1.0)
    min_tokens: int = option(4, "shortest response, tokens", low=0)
    max_tokens: int = option(1024, "longest response, tokens", low=1)
    max_prompt_tokens: int | None = option(
        None, "leave out longer prompts (counted); null: what the model's context leaves beside max_tokens", low=1
    )
    stop: list[str] = option(["</answer>"], "strings that end a response")
    include_stop_str_in_output: bool = option(True, "keep the stop string in the response")
    use_chat_template: bool = option(False, "put the filled prompt through the tokenizer's chat template, as the user")
    system_prompt: str = option("", "system message of the chat template; empty is none")

    reward_fn: str = option("r1_zero", "reward function")
    extra_rewards: dict[str, float] = option({}, "more reward functions, each with the weight it is added with")

    eval_interval: int | None = option(4, "evaluate every so many GRPO steps; null is never", low=1)
    max_val_examples: int | None = option(1024, "problems in the fixed validation subset; null is all", low=1)
    checkpoint_interval: int | None = option(4, "save every so many GRPO steps; null is only at the end", low=1)
    checkpoint_keep: int = option(2, "newest checkpoints kept, beside the best and the last", low=1)
    max_hours: float | None = option(
        None, "end the run in time for its last save within so many hours, counted anew with each --resume", above=0.0
    )
    n_rollouts_to_log: int = option(16, "rollouts written at every evaluation, of training and validation each", low=0)
    wandb_project: str = option("", "Weights & Biases project; empty is off")
    wandb_run_name: str = option("", "name of the run there; empty lets it choose")
    wandb_tags: list[str] = option([], "tags of the run there")

    track_peak_memory: bool = option(True, "report peak memory at the key points of the step")
    use_gradient_checkpointing: bool = option(True, "recompute activations in the backward pass, to save memory")
    use_vllm_sleep_mode: bool = option(True, "let vLLM give its GPU memory back while the policy trains")
    use_bnb_adamw8bit: bool = option(True, "bitsandbytes' 8-bit AdamW in place of torch's fused AdamW")
    old_log_probs_train_size: int = option(2, "sequences a forward pass when old log-probs are computed", low=1)
    log_prob_chunk_size: int = option(2048, "response tokens that go through the language-model head at once", low=1)
    try_longest_microbatch: bool = option(
        True, "on a GPU: try a longest-case microbatch at the start, to run out of memory early"
    )

    @property
    def microbatch_size(self) -> int:
        """Sequences in a microbatch, where no token budget cuts it."""
        return self.train_batch_size // self.gradient_accumulation_steps


@dataclass
class Vllm:
    """The vLLM engine; nothing here matters to the transformers engine."""

    gpu_memory_utilization: float = option(0.2, "share of the GPU's memory that vLLM may take", above=0.0, high=1.0)
    dtype: str = option("bfloat16", "dtype that vLLM computes in", choices=["bfloat16", "float16", "float32"])
    enable_prefix_caching: bool = option(True, "reuse the KV cache of prompts with a common beginning")
    enforce_eager: bool = option(
        False, "no CUDA graphs: slower, starts sooner, takes less memory (always so on the CPU)"
    )
    max_model_len: int | None = option(None, "longest prompt and response; null derives it from the data", low=1)
    max_num_seqs: int = option(256, "sequences generated at once", low=1)
    sleep_level: int = option(2, "1 keeps the weights in host memory while asleep, 2 drops them", choices=[1, 2])
    cpu_kv_cache_mb: int = option(256, "KV cache of the CPU build, MiB", low=1)
    check_interval: int | None = option(10, "compare log-probs with the trainer's every so many GRPO steps", low=1)
    check_tolerance: float | None = option(
        None, "largest mean absolute difference accepted there, nats; null: by dtype", above=0.0
    )


@dataclass
class Grader:
    """The processes that decide whether two answers are equal."""

    workers: int = option(2, "worker processes", low=1)
    time_limit: float = option(1.0, "seconds of processor time that one answer may take", above=0.0)
    memory_limit_mb: int = option(450, "memory that one worker may take, MiB", low=200)


@dataclass
class Guard:
    """When a run counts as collapsed, and when it is worth a warning (utils/run/guard.py)."""

    action: str = option("warn", "what a collapse does to the run", choices=["stop", "warn", "off"])
    patience: int = option(
        5, "GRPO steps in a row that a fault has to last; a fall of the reward: twice as many", low=1
    )
    repeat_interval: int = option(20, "GRPO steps until the same warning is said again", low=1)
    runaway_share: float = option(
        0.9, "runaway: share of responses (of tokens) that reach max_tokens", above=0.0, high=1.0
    )
    ended_share: float = option(0.75, "and the share that once was no more than this", low=0.0, below=1.0)
    shrunk_share: float = option(0.5, "shrinking, reward down: share of the longest mean length", above=0.0, below=1.0)
    vanished_share: float = option(0.25, "shrinking, reward unknown or not up: share of it", above=0.0, below=1.0)
    kept_share: float = option(0.85, "reward is down below this share of its best", above=0.0, below=1.0)
    noise_std_errors: float = option(
        2.0, "and if chance does not explain it: standard errors beyond the best of as many", low=0.0
    )
    fallen_evaluations: int = option(3, "falling: evaluations in a row that reward is down", low=1)
    truncated_warning: float = option(0.25, "warn if more responses than this are truncated", low=0.0, high=1.0)
    high_format_reward: float = option(0.8, "warn if format reward is at least this and answers get worse", low=0.0)
    sampler_kl_growth: float = option(3.0, "warn if the sampler's KL has grown by this factor", above=1.0)
    sampler_kl_floor: float = option(1e-3, "and is at least this, nats", low=0.0)


@dataclass
class Config:
    """The whole configuration of a run."""

    paths: Paths = field(default_factory=Paths)
    training: Training = field(default_factory=Training)
    vllm: Vllm = field(default_factory=Vllm)
    grader: Grader = field(default_factory=Grader)
    guard: Guard = field(default_factory=Guard)
