"""Every parameter: its default, its one-line doc, and the values it may take. Standard library only.

A YAML file holds only what differs from these. `python train_grpo.py --help-config` prints every field.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

DEFAULT_PROJECT = "grpo"  # on a tracker


def option(default: Any, doc: str, **rules: Any) -> Any:
    """A config field: its default, doc and rules: `low`/`high` (inclusive), `above`/`below` (exclusive), `choices`.

    With `own_code` a field also takes `path/to/file.py:function`, see docs/own_code.md.
    `instead` says what to set in place of a value that others would expect among the choices.
    A field with a `heading` begins a group of fields, for `--help-config`.
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(config_field: Any) -> Any:
    """The default of a dataclass field, which is kept as a value or as a factory."""
    return config_field.default if config_field.default is not MISSING else config_field.default_factory()


@dataclass
class Paths:
    """The files that a run reads and the folder that it writes. Relative paths start at the folder you run from."""

    train_data_file: str = option("data/math/train.jsonl", "JSONL file of the problems to train on")
    val_data_file: str = option("data/math/validation.jsonl", "JSONL file of the held-out problems to evaluate on")
    prompt_template_file: str = option(
        "data/r1_zero.prompt", "text file of the prompt template, which holds {question} once"
    )
    model_path: str = option(
        "Qwen/Qwen2.5-Math-1.5B", "model to start from: a checkpoint folder, or a name on the Hugging Face hub"
    )
    output_dir: str = option(
        "runs/grpo", "folder that the run writes to; one that already holds a run is refused without --resume"
    )


@dataclass
class Training:
    """The algorithm, its optimizer, how responses are sampled and scored, and how often the run evaluates and saves."""

    seed: int = option(1337, "seed of every random stream", low=0, high=2**63 - 1, heading="Machine and numbers")
    device: str = option("cuda:0", "device that the policy trains on: cuda:0, cpu, ...")
    dtype: str = option(
        "bfloat16",
        "dtype of the weights, gradients and optimizer state",
        choices=["bfloat16", "float32"],
        instead={"float16": "float16 loses updates and overflows; set dtype to float32 and autocast_dtype to float16"},
    )
    autocast_dtype: str | None = option(
        None,
        "dtype to compute in while the weights stay float32; float16 comes with a dynamic loss scale; null computes in "
        "the weights' dtype",
        choices=["bfloat16", "float16"],
    )
    head_dtype: str | None = option(
        None,
        "float32 keeps the products of the language-model head in float32 where all else has 16 bits, in the trainer "
        "and in the engine; null rounds them as the model does",
        choices=["float32"],
    )
    attention_type: str = option(
        "sdpa", "attention kernel of the policy", choices=["sdpa", "flash_attention_2", "flash_attention_3", "eager"]
    )
    cpu_threads: int | None = option(
        None, "number of CPU threads that torch computes with; null lets torch decide", low=1
    )
    use_onednn: bool = option(
        False,
        "on the CPU, multiply float32 matrices with oneDNN instead of MKL: up to twice as fast on AMD processors, most "
        "of all with attention_type eager",
    )
    use_compile: bool = option(False, "compile the policy's forward pass with torch.compile")
    use_liger_kernel: bool = option(
        True,
        "on a GPU, use liger-kernel's fused norms, MLP and rotary embedding if it is installed and knows the model",
    )

    n_grpo_steps: int = option(
        10, "number of GRPO steps; each samples and trains on one rollout batch", low=1, heading="Batches and loss"
    )
    rollout_batch_size: int = option(256, "rollouts per GRPO step", low=1)
    group_size: int = option(8, "rollouts per prompt", low=1)
    epochs_per_rollout_batch: int = option(1, "passes over each rollout batch", low=1)
    train_batch_size: int = option(256, "rollouts per optimizer step", low=1)
    gradient_accumulation_steps: int = option(
        256, "microbatches per optimizer step; more of them need less memory", low=1
    )
    use_packing: bool = option(
        True,
        "train without padding, and compute a prompt once for all its rollouts in a microbatch; a model that does not "
        "support this is trained with padding",
    )
    max_tokens_per_microbatch: int | None = option(
        None,
        "most tokens per microbatch, padding included, in place of gradient_accumulation_steps; null is off; on a GPU "
        "it is derived from the card if neither of the two is set",
        low=1,
    )
    loss_type: str = option(
        "grpo_clip",
        "loss per token",
        choices=[
            "no_baseline",
            "reinforce_with_baseline",
            "grpo_clip",
            "grpo_no_clip",
            "gspo",
            "cispo",
            "sapo",
            "dppo",
        ],
        own_code=True,
    )
    advantage: str = option(
        "group",
        "what a reward is compared with: its group's mean (group), the mean of the others in its group (rloo), or its "
        "group's mean, by which the difference is then divided (maxrl)",
        choices=["group", "rloo", "maxrl"],
    )
    use_std_normalization: bool = option(True, "divide advantages by a standard deviation of the rewards")
    std_scope: str = option(
        "group",
        "whose rewards' standard deviation use_std_normalization divides by: each group's own, or the rollout batch's",
        choices=["group", "batch"],
    )
    advantage_eps: float = option(
        1e-6, "added to the standard deviation that advantages are divided by, so that it is never 0", low=0.0
    )
    cliprange: float = option(
        0.2, "how far loss_type grpo_clip or gspo lets the ratio move from 1", above=0.0, below=1.0
    )
    cliprange_high: float | None = option(
        None, "how far above 1 loss_type grpo_clip or gspo lets the ratio move; null is as far as cliprange", above=0.0
    )
    dual_clip: float | None = option(
        None,
        "most that a token with a negative advantage may add to loss_type grpo_clip or gspo, in multiples of the "
        "advantage; null is no limit",
        above=1.0,
    )
    cispo_max_ratio: float = option(5.0, "largest weight that loss_type cispo gives a token", above=0.0)
    sapo_tau_positive: float = option(
        1.0, "temperature of the gate of loss_type sapo for positive advantages", above=0.0
    )
    sapo_tau_negative: float = option(
        1.05, "temperature of the gate of loss_type sapo for negative advantages", above=0.0
    )
    dppo_delta: float = option(
        0.2, "loss_type dppo leaves out a token whose probability has moved further than this", above=0.0, below=1.0
    )
    dppo_max_ratio: float = option(20.0, "largest weight that loss_type dppo gives a token", above=0.0)
    normalize_mode: str = option(
        "mean",
        "what the sum over a response's tokens is divided by: its own length (mean), normalize_constant (constant), "
        "the longest response of its microbatch (microbatch), all tokens of the train batch (token), or all tokens of "
        "its prompt's responses (prompt)",
        choices=["mean", "constant", "microbatch", "token", "prompt"],
    )
    normalize_constant: float = option(1024.0, "what normalize_mode constant divides by", above=0.0)
    skip_zero_advantage: bool = option(
        True, "leave rollouts that have no gradient out of the forward and backward pass"
    )

    mask_truncated: bool = option(False, "train on no token of a response that reached max_tokens")
    sampler_correction: str | None = option(
        None,
        "weigh tokens by the trainer's probability over the engine's: capped per token (tis), left out per token "
        "outside a range (icepop), left out per response above a cap (mis) or outside a range of means (geo); null is "
        "off",
        choices=["tis", "icepop", "mis", "geo"],
        heading="Corrections and reference policy",
    )
    tis_cap: float = option(2.0, "largest weight that sampler_correction tis gives a token", above=0.0)
    icepop_low: float = option(0.5, "lowest weight that sampler_correction icepop keeps", above=0.0)
    icepop_high: float = option(5.0, "highest weight that sampler_correction icepop keeps", above=0.0)
    mis_cap: float = option(3.0, "highest weight of a whole response that sampler_correction mis keeps", above=0.0)
    geo_low: float = option(0.99, "lowest mean weight of a response that sampler_correction geo keeps", above=0.0)
    geo_high: float = option(1.01, "highest mean weight of a response that sampler_correction geo keeps", above=0.0)
    negative_mask: float | None = option(
        None,
        "leave out responses with a negative advantage whose mean log-prob under the policy is below the engine's by "
        "more than this, nats per token; null is off",
        above=0.0,
    )
    kl_coef: float = option(
        0.0, "weight in the loss of the KL divergence from a reference policy; 0 loads no reference", low=0.0
    )
    kl_estimator: str = option(
        "k3", "estimator of the KL divergence from the reference policy", choices=["k1", "k2", "k3"]
    )
    reference_path: str | None = option(
        None, "checkpoint folder or hub name of the reference policy; null is the model that training starts from"
    )
    reference_dtype: str = option(
        "bfloat16",
        "dtype of a reference policy that is loaded; the policy without its adapter keeps its own",
        choices=["bfloat16", "float32"],
    )

    optimizer: str | None = option(
        None,
        "AdamW of torch (adamw), of bitsandbytes with moments in 8 bits (adamw8bit), or that on float32 masters of "
        "bfloat16 weights, so that no update is rounded away, for 2 bytes per weight more (adamw8bit_master); null is "
        "adamw8bit or adamw, as use_bnb_adamw8bit says",
        choices=["adamw", "adamw8bit", "adamw8bit_master"],
        heading="Optimizer",
    )
    learning_rate: float = option(1e-5, "AdamW's learning rate, after its warm-up", above=0.0)
    warmup_steps: int = option(0, "GRPO steps over which the learning rate rises from 0", low=0)
    lr_schedule: str = option(
        "constant",
        "learning rate after the warm-up: constant, or falling to 0 at the last GRPO step",
        choices=["constant", "linear", "cosine"],
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", low=0.0)
    adam_beta1: float = option(0.9, "AdamW's decay rate of the first moment", low=0.0, below=1.0)
    adam_beta2: float = option(0.95, "AdamW's decay rate of the second moment", low=0.0, below=1.0)
    adam_eps: float = option(1e-8, "AdamW's epsilon, added to the denominator of its update", above=0.0)
    max_grad_norm: float = option(1.0, "largest total gradient norm; a larger gradient is scaled down to it", above=0.0)
    max_nonfinite_steps: int = option(
        3, "end the run once this many optimizer steps in a row have been skipped because of NaN or infinity", low=1
    )

    lora_rank: int | None = option(
        None,
        "rank of LoRA adapters: two thin matrices B and A beside each adapted weight, trained in place of it; null "
        "trains all weights",
        low=1,
        heading="Adapters",
    )
    lora_alpha: int = option(32, "an adapted weight is W + lora_alpha / lora_rank x B A", low=1)
    lora_target: str = option(
        "all-linear",
        "which matrices get an adapter: all but the embeddings and the head (all-linear), or those of attention",
        choices=["all-linear", "attention"],
    )
    load_in_4bit: bool = option(
        False,
        "with LoRA on CUDA, keep the frozen matrices in 4 bits (QLoRA: NF4 of bitsandbytes); the engine samples from "
        "what these 4 bits stand for",
    )

    rollout_engine: str = option(
        "auto",
        "engine that samples responses; auto is vllm if it is installed and the policy is on a GPU, else transformers",
        choices=["auto", "vllm", "transformers"],
        heading="Sampling",
    )
    generation_batch_size: int = option(256, "number of sequences that the transformers engine samples at once", low=1)
    temperature: float = option(1.0, "sampling temperature of rollouts and of evaluation", above=0.0)
    top_p: float = option(
        1.0,
        "nucleus sampling: sample from the smallest set of tokens with this total probability; 1 samples from all",
        above=0.0,
        high=1.0,
    )
    min_tokens: int = option(4, "tokens of the shortest response allowed", low=0)
    max_tokens: int = option(1024, "tokens of the longest response allowed", low=1)
    max_prompt_tokens: int | None = option(
        None,
        "leave out problems whose prompt has more tokens than this; null is the model's context less max_tokens",
        low=1,
    )
    stop: list[str] = option(["</answer>"], "strings that end a response")
    include_stop_str_in_output: bool = option(True, "keep the stop string at the end of the response")
    use_chat_template: bool = option(
        False, "send the filled prompt through the tokenizer's chat template, as the user's message"
    )
    system_prompt: str = option("", "system message for the chat template; empty is none")

    reward_fn: str = option(
        "r1_zero",
        "reward function that scores responses",
        own_code=True,
        heading="Rewards",
    )
    extra_rewards: dict[str, float] = option(
        {},
        "more reward functions; each reward is multiplied by its weight here and added",
        own_code=True,
    )
    overlong_buffer: int | None = option(
        None,
        "tokens before max_tokens over which a response loses up to 1 of its reward; null is off",
        low=1,
    )
    refill_groups: bool = option(
        False, "sample more prompts in place of groups whose responses are all right or all wrong"
    )
    max_generation_rounds: int = option(10, "most rounds of sampling per GRPO step with refill_groups", low=1)
    retire_pass_rate: float | None = option(
        None,
        "leave a problem out of later epochs once this share of its group was right; null is off",
        above=0.0,
        high=1.0,
    )

    eval_interval: int | None = option(
        4, "GRPO steps between evaluations; null is never", low=1, heading="Evaluation, checkpoints and logging"
    )
    max_val_examples: int | None = option(
        1024, "number of validation problems that evaluations use, always the same ones; null is all", low=1
    )
    checkpoint_interval: int | None = option(
        4, "GRPO steps between checkpoints, besides those at a new best and at the end; null is only those", low=1
    )
    checkpoint_keep: int = option(
        2, "how many of the newest checkpoints are kept, besides the best and the last", low=1
    )
    max_hours: float | None = option(
        None,
        "hours within which the run saves and ends, counted anew at each --resume; null is no limit",
        above=0.0,
    )
    n_rollouts_to_log: int = option(
        16,
        "rollouts written to rollouts.jsonl at every evaluation: this many from training, rounded up to whole groups, "
        "and this many from validation",
        low=0,
    )
    trackers: list[str] = option(
        [],
        "dashboards that also show the run; if empty, wandb_project alone turns wandb on",
        choices=["wandb", "trackio", "tensorboard"],
    )
    wandb_project: str = option("", f"project to log to, on every tracker; empty is {DEFAULT_PROJECT}")
    wandb_run_name: str = option("", "name of the run on every tracker; empty is the end of output_dir")
    wandb_tags: list[str] = option([], "tags of the run on every tracker")

    track_peak_memory: bool = option(
        True, "measure and log the peak memory of each phase of a step", heading="Memory and speed"
    )
    use_gradient_checkpointing: bool = option(True, "save memory by computing activations again in the backward pass")
    use_vllm_sleep_mode: bool = option(
        True, "let vLLM free its GPU memory while the policy trains; off if it has a GPU of its own (vllm.device)"
    )
    use_bnb_adamw8bit: bool = option(
        True, "if optimizer is null: use the 8-bit AdamW of bitsandbytes instead of torch's fused AdamW"
    )
    old_log_probs_train_size: int = option(2, "sequences per forward pass when old log-probs are computed", low=1)
    log_prob_chunk_size: int = option(
        2048, "number of response tokens that go through the language-model head at once", low=1
    )
    try_longest_microbatch: bool = option(
        True,
        "on a GPU, try a microbatch of the longest possible sequences at the start, to see early if memory suffices",
    )

    @property
    def optimizer_name(self) -> str:
        """The optimizer, where the older field may say which."""
        return self.optimizer or ("adamw8bit" if self.use_bnb_adamw8bit else "adamw")

    @property
    def tracker_names(self) -> list[str]:
        """The trackers that are on."""
        return self.trackers or (["wandb"] if self.wandb_project else [])

    @property
    def microbatch_size(self) -> int:
        """Rollouts per microbatch if no token budget cuts it."""
        return self.train_batch_size // self.gradient_accumulation_steps

    @property
    def optimizer_steps_per_rollout_batch(self) -> int:
        """From the second one on, training is off-policy."""
        return self.epochs_per_rollout_batch * self.rollout_batch_size // self.train_batch_size


@dataclass
class Vllm:
    """The vLLM engine. The transformers engine reads none of these fields."""

    device: str | None = option(
        None,
        "a GPU of vLLM's own, which then keeps its memory and never sleeps: cuda:0, with training.device=cuda:1; null "
        "is the policy's GPU",
    )
    gpu_memory_utilization: float | None = option(
        0.2,
        "share of the GPU's memory that vLLM may use; null, or set nowhere, derives it from the card",
        above=0.0,
        high=1.0,
    )
    dtype: str = option("bfloat16", "dtype that vLLM computes in", choices=["bfloat16", "float16", "float32"])
    enable_prefix_caching: bool = option(True, "compute the common beginning of prompts once and reuse its KV cache")
    enforce_eager: bool = option(
        False, "run without CUDA graphs: slower, but starts sooner and takes less memory; always so on the CPU"
    )
    max_model_len: int | None = option(
        None, "tokens of the longest prompt and response together; null derives it from the data and max_tokens", low=1
    )
    max_num_seqs: int = option(256, "number of sequences generated at once", low=1)
    sleep_level: int = option(
        2, "1 keeps the weights in the machine's memory while vLLM sleeps, 2 drops them", choices=[1, 2]
    )
    cpu_kv_cache_mb: int = option(256, "size of the KV cache of vLLM's CPU build, MiB", low=1)
    check_interval: int | None = option(
        10, "GRPO steps between comparisons of vLLM's log-probs with the trainer's; null is never", low=1
    )
    check_tolerance: float | None = option(
        None,
        "largest mean absolute difference, in nats, that a comparison of log-probs accepts; null depends on the dtype",
        above=0.0,
    )


@dataclass
class Grader:
    """The processes that decide whether two answers are equal."""

    workers: int = option(2, "number of processes that grade answers", low=1)
    time_limit: float = option(1.0, "seconds of processor time that grading one answer may take", above=0.0)
    memory_limit_mb: int = option(450, "memory that one grading process may take, MiB", low=200)


@dataclass
class Guard:
    """What happens if a run collapses. The thresholds are constants in utils/run/guard.py."""

    action: str = option("warn", "what a collapse does to the run", choices=["stop", "warn", "off"])
    patience: int = option(
        5, "GRPO steps in a row for which a fault must last; a fall in reward must last twice as long", low=1
    )


@dataclass
class Elsewhere:
    """Runs on other machines, see docs/elsewhere.md. Training reads none of these fields."""

    gpu: str = option("H100", "kind of GPU to rent from Modal, by Modal's name: H100, A100-80GB, L40S, ...")
    price_per_hour: float | None = option(
        None, "dollars per hour of the machine, from which a cost is printed; null prints hours alone", low=0.0
    )
    seconds_per_step: float | None = option(
        None,
        "seconds per GRPO step that hours are estimated from, until runs of the same setting have been measured",
        above=0.0,
    )
    timeout_hours: float = option(
        24.0,
        "hours after which Modal ends a container; the run saves before, and goes on in a new one",
        above=0.5,
        high=24.0,
    )
    secrets: list[str] = option([], "names of the Modal secrets that a run gets, for example [wandb, huggingface]")
    ray_gpus: float = option(
        1.0, "GPUs per run on Ray; a fraction lets runs share a card; a run on the CPU takes none", above=0.0
    )
    ray_cpus: float = option(1.0, "CPU cores per run on Ray", low=0.0)


@dataclass
class Config:
    """The whole configuration of a run."""

    paths: Paths = field(default_factory=Paths)
    training: Training = field(default_factory=Training)
    vllm: Vllm = field(default_factory=Vllm)
    grader: Grader = field(default_factory=Grader)
    guard: Guard = field(default_factory=Guard)
    elsewhere: Elsewhere = field(default_factory=Elsewhere)

    @property
    def vllm_sleeps(self) -> bool:
        """Whether vLLM is asked to free its memory while the policy trains: not on a GPU of its own."""
        return self.training.use_vllm_sleep_mode and self.vllm.device is None
