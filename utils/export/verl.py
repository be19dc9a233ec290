"""For verl, release 0.9: what differs from its `ppo_trainer.yaml`, read against its source."""

from __future__ import annotations

from configs.defaults import Config
from utils.export.translation import Translation, off_fields, render, skip_alike
from utils.export.verl_loss import ACTOR, SHORT, tell_loss
from utils.preflight.prompt_lengths import longest_prompt

ROLLOUT, MODEL = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def to_verl(config: Config, n_gpus: int = 1) -> Translation:
    """The config for verl on so many GPUs of one node. Raises ValueError if the batch sizes do not go with them."""
    t = config.training
    uses_vllm = t.rollout_engine != "transformers"  # it has no other that is this project's
    to = Translation("verl", config, n_gpus, not_needed=off_fields(config, uses_vllm))
    _inputs(to)
    _batches(to)
    tell_loss(to)
    _precision(to)
    _optimizer(to)
    _sampling(to)
    if uses_vllm:
        _vllm(to)
    _reports(to)
    skip_alike(to)
    return to.check_complete()


def verl_text(to: Translation) -> str:
    """The YAML file, which composes with verl's own defaults."""
    to.values = {"hydra.searchpath": ["pkg://verl.trainer.config"], "defaults": ["ppo_trainer", "_self_"]} | to.values
    return render(
        to,
        f"For verl, on {to.n_gpus} GPU{'' if to.n_gpus == 1 else 's'} of one node:\n"
        "  python -m verl.trainer.main_ppo --config-path FOLDER_OF_THIS_FILE --config-name NAME_WITHOUT_YAML \\\n"
        "      data.train_files=... data.val_files=... reward.custom_reward_function.path=...",
    )


def _inputs(to: Translation) -> None:
    t, paths = to.config.training, to.config.paths
    to.translate("paths.model_path", {f"{MODEL}.path": paths.model_path})
    to.translate("paths.output_dir", {"trainer.default_local_dir": paths.output_dir})
    to.lack(
        "paths.train_data_file paths.val_data_file paths.prompt_template_file",
        "make data.train_files and data.val_files of them: parquet with `prompt` (messages, the template filled in), "
        "`data_source` and `reward_model` (`ground_truth`)",
    )
    if t.use_chat_template:
        to.skip("use_chat_template", "verl always sends messages through the chat template")
        to.lack("system_prompt", "put it into the messages of each prompt")
    else:
        template = {f"{MODEL}.custom_chat_template": PLAIN_TEMPLATE}
        to.translate("use_chat_template", template, "messages always go through a template: one that adds nothing")
    n_tokens, difference = t.max_prompt_tokens, ""
    if n_tokens is None:
        n_tokens, difference = longest_prompt(to.config).tokens, "null is here the longest prompt, counted or assumed"
    length = {"data.max_prompt_length": n_tokens, "data.filter_overlong_prompts": True}
    to.translate("max_prompt_tokens", length, difference)
    to.lack(
        "reward_fn extra_rewards",
        "write a function that adds them up by their weights: reward.custom_reward_function.path and .name",
    )
    to.lack(
        "overlong_buffer",
        "set reward.reward_manager.name=dapo, and +reward.reward_kwargs.overlong_buffer_cfg with enable, len and "
        "penalty_factor",
    )
    if t.refill_groups:
        groups = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "reward"}
        to.translate("refill_groups", groups, "groups whose rewards are all equal are replaced")
        to.translate("max_generation_rounds", {"algorithm.filter_groups.max_num_gen_batches": t.max_generation_rounds})


def _batches(to: Translation) -> None:
    t = to.config.training
    if t.train_batch_size % t.group_size:
        raise ValueError(
            f"training.train_batch_size = {t.train_batch_size}: verl counts it in prompts; make it a multiple of "
            f"group_size, {t.group_size}"
        )
    if t.train_batch_size % (to.n_gpus * t.microbatch_size):
        raise ValueError(
            f"--gpus {to.n_gpus}: training.train_batch_size = {t.train_batch_size} does not divide into microbatches "
            f"of {t.microbatch_size} on each GPU; set training.gradient_accumulation_steps so that it does"
        )
    to.values |= {"trainer.nnodes": 1, "trainer.n_gpus_per_node": to.n_gpus}
    to.translate("n_grpo_steps", {"trainer.total_training_steps": t.n_grpo_steps})
    to.values["trainer.total_epochs"] = t.n_grpo_steps  # more than enough: the number of steps ends the run
    to.translate("rollout_batch_size", {"data.train_batch_size": t.rollout_batch_size // t.group_size})
    to.translate("group_size", {f"{ROLLOUT}.n": t.group_size})
    to.translate("epochs_per_rollout_batch", {f"{ACTOR}.ppo_epochs": t.epochs_per_rollout_batch})
    minibatch = {f"{ACTOR}.ppo_mini_batch_size": t.train_batch_size // t.group_size}
    shuffle = {f"{ACTOR}.shuffle": t.optimizer_steps_per_rollout_batch > 1}
    to.translate("train_batch_size", minibatch | shuffle)
    to.translate("gradient_accumulation_steps", {f"{ACTOR}.ppo_micro_batch_size_per_gpu": t.microbatch_size})
    if t.max_tokens_per_microbatch is not None:
        budget = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": t.max_tokens_per_microbatch}
        to.translate("max_tokens_per_microbatch", budget)
    size = t.old_log_probs_train_size
    sizes = {f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": size}
    to.translate("old_log_probs_train_size", sizes | {"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": size})
    seeds = {
        "data.seed": t.seed % 2**32,
        f"{ACTOR}.data_loader_seed": t.seed % 2**32,
        f"{ROLLOUT}.seed": t.seed % 2**32,
    }
    to.translate("seed", seeds, "its random streams are others, and so are prompts and samples")
    to.translate("use_packing", {f"{MODEL}.use_remove_padding": t.use_packing}, "a prompt is computed for each rollout")
    to.translate("use_gradient_checkpointing", {f"{MODEL}.enable_gradient_checkpointing": t.use_gradient_checkpointing})
    compiled = {f"{ACTOR}.use_torch_compile": t.use_compile, f"{ACTOR}.fsdp_config.use_torch_compile": t.use_compile}
    to.translate("use_compile", compiled, "what it compiles are the entropy and other small parts")


def _precision(to: Translation) -> None:
    t = to.config.training
    if t.device == "cpu":
        to.lack("device", "verl trains on GPUs")
    else:
        to.translate("device", {"trainer.device": "cuda"}, "Ray picks the GPUs")
    to.translate("dtype", {f"{ACTOR}.fsdp_config.model_dtype": SHORT[t.dtype]})
    to.translate("autocast_dtype", {f"{ACTOR}.fsdp_config.dtype": t.autocast_dtype or t.dtype})
    to.lack("head_dtype", "the head computes in the dtype of all else")
    to.translate("attention_type", {f"{MODEL}.override_config": {"attn_implementation": t.attention_type}})
    to.lack("load_in_4bit", "the frozen weights keep their dtype")
    if t.lora_rank is not None:
        # an adapter is pushed alone, so vLLM has to have read the base
        read = {f"{ROLLOUT}.load_format": "safetensors"}
        to.translate("lora_rank", {f"{MODEL}.lora_rank": t.lora_rank} | read)
        to.translate("lora_alpha", {f"{MODEL}.lora_alpha": t.lora_alpha})
        matrices = "all-linear" if t.lora_target == "all-linear" else ["q_proj", "k_proj", "v_proj", "o_proj"]
        to.translate("lora_target", {f"{MODEL}.target_modules": matrices})


def _optimizer(to: Translation) -> None:
    t, key = to.config.training, f"{ACTOR}.optim"
    in_8_bits = t.optimizer_name != "adamw"
    module = {f"{key}.optimizer": "AdamW8bit" if in_8_bits else "AdamW"}
    module[f"{key}.optimizer_impl"] = "bitsandbytes.optim" if in_8_bits else "torch.optim"
    name = "optimizer use_bnb_adamw8bit" if t.optimizer is None else "optimizer"
    no_masters = "it keeps no masters, so updates of bfloat16 weights are rounded away"
    to.translate(name, module, no_masters if t.optimizer_name == "adamw8bit_master" else "")
    to.translate("learning_rate", {f"{key}.lr": t.learning_rate})
    to.translate("warmup_steps", {f"{key}.lr_warmup_steps": t.warmup_steps, f"{key}.zero_indexed_step": False})
    if t.lr_schedule == "linear":
        to.lack("lr_schedule", "verl has constant and cosine; what is written here stays constant")
        to.values[f"{key}.lr_scheduler_type"] = "constant"
    else:
        falls = "" if t.lr_schedule == "constant" else "it is one step ahead"
        to.translate("lr_schedule", {f"{key}.lr_scheduler_type": t.lr_schedule, f"{key}.min_lr_ratio": 0.0}, falls)
    to.translate("weight_decay", {f"{key}.weight_decay": t.weight_decay})
    to.translate("adam_beta1 adam_beta2", {f"{key}.betas": [t.adam_beta1, t.adam_beta2]})
    to.translate("adam_eps", {f"{key}.override_optimizer_config": {"eps": t.adam_eps}})
    to.translate("max_grad_norm", {f"{key}.clip_grad": t.max_grad_norm, f"{ACTOR}.grad_clip": t.max_grad_norm})


def _sampling(to: Translation) -> None:
    t = to.config.training
    if t.rollout_engine == "transformers":
        to.lack("rollout_engine", "vLLM samples; verl has no engine that samples from the policy itself")
        to.values[f"{ROLLOUT}.name"] = "vllm"
    else:
        to.translate("rollout_engine", {f"{ROLLOUT}.name": "vllm"})
    to.values[f"{ROLLOUT}.tensor_model_parallel_size"] = 1  # an engine per GPU, as here; 2 by default
    validation = f"{ROLLOUT}.val_kwargs"
    to.translate("temperature", {f"{ROLLOUT}.temperature": t.temperature, f"{validation}.temperature": t.temperature})
    to.translate("top_p", {f"{ROLLOUT}.top_p": t.top_p, f"{validation}.top_p": t.top_p})
    to.values[f"{validation}.do_sample"] = True
    to.translate("max_tokens", {"data.max_response_length": t.max_tokens})
    if t.min_tokens:
        to.lack("min_tokens", "a response may end at once")
    else:
        to.skip("min_tokens", "0 is what it has")
    if t.stop:
        to.lack("stop include_stop_str_in_output", "only the end id ends a response")
    else:
        to.skip("stop include_stop_str_in_output", "there are no stop strings")


def _vllm(to: Translation) -> None:
    t, knobs = to.config.training, to.config.vllm
    if knobs.device is None:
        to.skip("vllm.device", "policy and engine share each GPU there too")
    else:
        to.lack("vllm.device", "policy and engine share each GPU")
    to.translate("use_vllm_sleep_mode", {f"{ROLLOUT}.free_cache_engine": t.use_vllm_sleep_mode})
    if knobs.gpu_memory_utilization is None:
        to.lack("vllm.gpu_memory_utilization", "it is not derived from the card; verl's own default is 0.5")
    else:
        to.translate("vllm.gpu_memory_utilization", {f"{ROLLOUT}.gpu_memory_utilization": knobs.gpu_memory_utilization})
    to.translate("vllm.dtype", {f"{ROLLOUT}.dtype": knobs.dtype})
    to.translate("vllm.enable_prefix_caching", {f"{ROLLOUT}.enable_prefix_caching": knobs.enable_prefix_caching})
    to.translate("vllm.enforce_eager", {f"{ROLLOUT}.enforce_eager": knobs.enforce_eager})
    to.translate("vllm.max_model_len", {f"{ROLLOUT}.max_model_len": knobs.max_model_len})
    to.translate("vllm.max_num_seqs", {f"{ROLLOUT}.max_num_seqs": knobs.max_num_seqs})


def _reports(to: Translation) -> None:
    t = to.config.training
    to.translate(
        "eval_interval",
        {"trainer.test_freq": t.eval_interval or -1, "trainer.val_before_train": t.eval_interval is not None},
    )
    sizes = {"data.val_max_samples": t.max_val_examples or -1}
    to.translate("max_val_examples", sizes, "the first of the file" if t.max_val_examples else "")
    best = "nothing is saved at a new best"
    to.translate("checkpoint_interval", {"trainer.save_freq": t.checkpoint_interval or -1}, best)
    to.translate("checkpoint_keep", {"trainer.max_actor_ckpt_to_keep": t.checkpoint_keep}, "the best is not kept apart")
    to.translate("n_rollouts_to_log", {"trainer.log_val_generations": t.n_rollouts_to_log}, "of validation alone")
    to.translate("trackers", {"trainer.logger": ["console", *t.tracker_names]})
    name = t.wandb_run_name or to.config.paths.output_dir.rstrip("/").rpartition("/")[2]
    to.translate("wandb_project", {"trainer.project_name": t.wandb_project or "grpo"})
    to.translate("wandb_run_name", {"trainer.experiment_name": name})
    to.lack("wandb_tags", "for wandb, set WANDB_TAGS")
