"""For TRL's GRPOTrainer, release 1.16: the arguments of GRPOConfig, read against its source."""

from __future__ import annotations

from configs.defaults import Config
from utils.export.translation import Translation, off_fields, render, skip_alike
from utils.export.trl_loss import tell_loss

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit", "adamw8bit_master": "adamw_bnb_8bit"}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def to_trl(config: Config, n_gpus: int = 1) -> Translation:
    """The config for GRPOTrainer on so many GPUs. Raises ValueError if the batch sizes do not go with them."""
    t = config.training
    uses_vllm = t.rollout_engine == "vllm" or (t.rollout_engine == "auto" and t.device != "cpu")
    to = Translation("TRL", config, n_gpus, not_needed=off_fields(config, uses_vllm))
    _inputs(to)
    _batches(to)
    tell_loss(to, uses_vllm)
    _precision(to)
    _optimizer(to)
    _sampling(to, uses_vllm)
    if uses_vllm:
        _vllm(to)
    _reports(to)
    skip_alike(to)
    return to.check_complete()


def trl_text(to: Translation) -> str:
    """The YAML file, with what goes to GRPOTrainer beside it."""
    beside = "".join(f"\n  {name}={value}" for name, value in to.beside.items())
    start = "python" if to.n_gpus == 1 else f"accelerate launch --num_processes {to.n_gpus}"
    return render(
        to,
        f"For TRL's GRPOTrainer, on {to.n_gpus} GPU{'' if to.n_gpus == 1 else 's'}; start your script with `{start}`.\n"
        "  args = GRPOConfig(**yaml.safe_load(open(this_file)))\n"
        f"Arguments of GRPOTrainer beside args, the datasets and reward_funcs:{beside}",
    )


def _inputs(to: Translation) -> None:
    t, paths = to.config.training, to.config.paths
    to.translate("paths.model_path", {"model": repr(paths.model_path)}, beside=True)
    to.translate("paths.output_dir", {"output_dir": paths.output_dir})
    to.lack(
        "paths.train_data_file paths.val_data_file paths.prompt_template_file",
        "give GRPOTrainer datasets whose column `prompt` is the filled template; the reward function gets the others",
    )
    if t.use_chat_template:
        to.lack("use_chat_template system_prompt", "make prompts lists of messages, the system's among them")
    else:
        to.skip("use_chat_template", "a prompt that is a text is sent as it is")
    if t.max_prompt_tokens is not None:
        to.lack("max_prompt_tokens", "leave longer prompts out of the dataset")
    else:
        to.skip("max_prompt_tokens", "only the model's context limits a prompt")
    to.lack("reward_fn", "give it in reward_funcs: it is called with prompts, completions and columns, returns floats")
    if t.extra_rewards:
        weights = [1.0, *t.extra_rewards.values()]
        to.translate("extra_rewards", {"reward_weights": weights}, "the functions go to reward_funcs, after reward_fn")
    to.lack("overlong_buffer", "add trl.rewards.get_soft_overlong_punishment(max_tokens, overlong_buffer) as a reward")
    to.lack("refill_groups max_generation_rounds", "groups that teach nothing stay in the batch, with advantage 0")


def _batches(to: Translation) -> None:
    t, steps = to.config.training, to.config.training.optimizer_steps_per_rollout_batch
    size, at_once = t.microbatch_size, t.microbatch_size * to.n_gpus
    if t.train_batch_size % at_once:
        raise ValueError(
            f"--gpus {to.n_gpus}: training.train_batch_size = {t.train_batch_size} does not divide into microbatches "
            f"of {size} on each GPU; set training.gradient_accumulation_steps so that it does"
        )
    if t.group_size < 2:
        raise ValueError("training.group_size = 1: GRPOTrainer compares the responses to a prompt, and needs 2 or more")
    to.translate("n_grpo_steps", {"max_steps": t.n_grpo_steps * steps})
    to.translate("rollout_batch_size", {"generation_batch_size": t.rollout_batch_size})
    to.translate("group_size", {"num_generations": t.group_size})
    to.translate("epochs_per_rollout_batch", {"num_iterations": t.epochs_per_rollout_batch})
    to.translate(
        "train_batch_size gradient_accumulation_steps",
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": t.train_batch_size // at_once},
        "rollouts are shuffled once, so that every epoch takes the same minibatches" if steps > 1 else "",
    )
    to.translate("seed", {"seed": t.seed % 2**32}, "its random streams are others, and so are prompts and samples")
    faster = "speed and memory alone; the numbers are the same to rounding"
    to.skip("use_packing old_log_probs_train_size max_tokens_per_microbatch", faster)
    to.translate("use_gradient_checkpointing", {"gradient_checkpointing": t.use_gradient_checkpointing})
    to.translate("use_compile", {"torch_compile": t.use_compile})


def _precision(to: Translation) -> None:
    t = to.config.training
    to.translate("device", {"use_cpu": t.device == "cpu"}, "" if t.device == "cpu" else "accelerate picks the GPUs")
    to.translate("dtype", {"model_init_kwargs.dtype": t.dtype})
    half = {"bf16": t.autocast_dtype == "bfloat16", "fp16": t.autocast_dtype == "float16"}
    to.translate("autocast_dtype", half)
    to.translate("attention_type", {"model_init_kwargs.attn_implementation": t.attention_type})
    if t.head_dtype is not None:
        difference = "in the trainer alone, and only where the head is not tied to the embeddings"
        to.translate("head_dtype", {"cast_lm_head_to_fp32": True}, difference)
    if t.load_in_4bit:
        compute = f'bnb_4bit_compute_dtype="{t.autocast_dtype or t.dtype}"'
        options = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, {compute}'
        to.translate("load_in_4bit", {"quantization_config": f"BitsAndBytesConfig({options})"}, beside=True)
    if t.lora_rank is not None:
        matrices = "all-linear" if t.lora_target == "all-linear" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        options = f"r={t.lora_rank}, lora_alpha={t.lora_alpha}, lora_dropout=0.0, target_modules={matrices!r}"
        lora = {"peft_config": f'peft.LoraConfig({options}, task_type="CAUSAL_LM")'}
        to.translate("lora_rank lora_alpha lora_target", lora, beside=True)


def _optimizer(to: Translation) -> None:
    t, steps = to.config.training, to.config.training.optimizer_steps_per_rollout_batch
    name = "optimizer use_bnb_adamw8bit" if t.optimizer is None else "optimizer"
    no_masters = "it keeps no masters, so updates of bfloat16 weights are rounded away"
    masters = no_masters if t.optimizer_name == "adamw8bit_master" else ""
    to.translate(name, {"optim": OPTIMIZERS[t.optimizer_name]}, masters)
    to.translate("learning_rate", {"learning_rate": t.learning_rate})
    to.translate(
        "warmup_steps",
        {"warmup_steps": t.warmup_steps * steps},
        "it rises per optimizer step, from 0 at the first" if t.warmup_steps else "",
    )
    falls = "" if t.lr_schedule == "constant" else "it falls per optimizer step"
    to.translate("lr_schedule", {"lr_scheduler_type": SCHEDULES[t.lr_schedule]}, falls)
    decay = "norms and biases are left out" if t.weight_decay else ""
    to.translate("weight_decay", {"weight_decay": t.weight_decay}, decay)
    to.translate("adam_beta1", {"adam_beta1": t.adam_beta1})
    to.translate("adam_beta2", {"adam_beta2": t.adam_beta2})
    to.translate("adam_eps", {"adam_epsilon": t.adam_eps})
    to.translate("max_grad_norm", {"max_grad_norm": t.max_grad_norm})


def _sampling(to: Translation, uses_vllm: bool) -> None:
    t = to.config.training
    to.translate("rollout_engine", {"use_vllm": uses_vllm})
    to.translate("temperature", {"temperature": t.temperature})
    to.translate("top_p", {"top_p": t.top_p})
    to.translate("max_tokens", {"max_completion_length": t.max_tokens})
    key = "min_tokens" if uses_vllm else "min_new_tokens"
    to.translate("min_tokens", {f"generation_kwargs.{key}": t.min_tokens})
    keep = t.include_stop_str_in_output
    if uses_vllm and t.stop:
        values = {"generation_kwargs.stop": t.stop, "generation_kwargs.include_stop_str_in_output": keep}
        to.translate("stop include_stop_str_in_output", values, "its logs count such responses as truncated")
    elif t.stop:
        to.lack("stop include_stop_str_in_output", "only the end id ends a response that transformers generates")
    else:
        to.skip("stop include_stop_str_in_output", "there are no stop strings")


def _vllm(to: Translation) -> None:
    t, knobs = to.config.training, to.config.vllm
    own_card = knobs.device is not None
    if own_card:
        difference = "start `trl vllm-serve` on that GPU, with its share of memory and its longest sequence"
        to.translate("vllm.device", {"vllm_mode": "server"}, difference)
    else:
        to.translate("vllm.device", {"vllm_mode": "colocate"})
        to.translate("use_vllm_sleep_mode", {"vllm_enable_sleep_mode": t.use_vllm_sleep_mode})
    if knobs.gpu_memory_utilization is None:
        to.lack("vllm.gpu_memory_utilization", "it is not derived from the card; GRPOConfig's own default is 0.3")
    else:
        to.translate("vllm.gpu_memory_utilization", {"vllm_gpu_memory_utilization": knobs.gpu_memory_utilization})
    if knobs.max_model_len is None:
        to.skip("vllm.max_model_len", "it is null, which there is the model's whole context")
    else:
        to.translate("vllm.max_model_len", {"vllm_max_model_length": knobs.max_model_len})
    if knobs.dtype == t.dtype:
        to.skip("vllm.dtype", "vLLM computes in the policy's dtype")
    else:
        to.lack("vllm.dtype", f"vLLM computes in the policy's dtype, {t.dtype}")
    to.skip("vllm.enable_prefix_caching vllm.enforce_eager vllm.max_num_seqs", "speed and memory alone")


def _reports(to: Translation) -> None:
    t, steps = to.config.training, to.config.training.optimizer_steps_per_rollout_batch
    to.values["logging_steps"] = 1
    if t.eval_interval is None:
        to.translate("eval_interval", {"eval_strategy": "no"})
    else:
        often = {"eval_strategy": "steps", "eval_steps": t.eval_interval * steps, "eval_on_start": True}
        to.translate("eval_interval", {**often, "num_generations_eval": 1}, "not once more at the end")
    to.lack("max_val_examples", "cut the validation dataset yourself")
    if t.checkpoint_interval is None:
        to.translate("checkpoint_interval", {"save_strategy": "no"}, "nothing is saved at a new best or at the end")
    else:
        often = {"save_strategy": "steps", "save_steps": t.checkpoint_interval * steps}
        to.translate("checkpoint_interval", often, "nothing is saved at a new best")
    to.translate("checkpoint_keep", {"save_total_limit": t.checkpoint_keep}, "the best is not kept apart")
    to.translate("n_rollouts_to_log", {"log_completions": t.n_rollouts_to_log > 0})
    if t.n_rollouts_to_log:
        to.values["num_completions_to_print"] = t.n_rollouts_to_log
    to.translate("trackers", {"report_to": t.tracker_names or "none"})
    to.translate("wandb_project", {"project": t.wandb_project or "grpo"}, "for wandb, set WANDB_PROJECT")
    name = t.wandb_run_name or to.config.paths.output_dir.rstrip("/").rpartition("/")[2]
    to.translate("wandb_run_name", {"run_name": name})
    to.lack("wandb_tags", "for wandb, set WANDB_TAGS")
