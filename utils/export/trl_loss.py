"""The loss of a config in the words of TRL's GRPOConfig, read against `GRPOTrainer._compute_loss`."""

from __future__ import annotations

from utils.export.translation import Translation

NO_CLIP = 1.0e9  # half of an interval that no ratio leaves
LOSS_OF_AGGREGATION = {"mean": "grpo", "constant": "dr_grpo", "token": "dapo"}
OWN_AGGREGATION = {"cispo": "token", "sapo": "mean"}  # TRL aggregates these losses in one way
CORRECTIONS = {"tis": "token_truncate", "icepop": "token_mask", "mis": "sequence_mask"}
ADVANTAGE_EPS = 1e-4  # TRL's, which no field changes


def tell_loss(to: Translation, uses_vllm: bool) -> None:
    """All that decides what a token adds to the loss."""
    _loss(to)
    _advantages(to)
    _corrections(to, uses_vllm)


def _loss(to: Translation) -> None:
    t = to.config.training
    name = LOSS_OF_AGGREGATION.get(t.normalize_mode, "grpo")
    if t.loss_type in OWN_AGGREGATION:
        to.translate("loss_type", {"loss_type": t.loss_type})
    elif t.loss_type in ("grpo_clip", "gspo", "grpo_no_clip"):
        level = "sequence" if t.loss_type == "gspo" else "token"
        to.translate("loss_type", {"loss_type": name, "importance_sampling_level": level})
    elif t.loss_type == "reinforce_with_baseline" and t.optimizer_steps_per_rollout_batch == 1:
        to.translate("loss_type", {"loss_type": name}, "its loss is -r A with r = 1: another number, the same gradient")
    else:
        to.lack("loss_type", f"GRPOTrainer has no such loss; what is written here trains with loss_type {name}")
        to.values["loss_type"] = name
    if t.loss_type in ("grpo_no_clip", "reinforce_with_baseline"):
        to.values |= {"epsilon": NO_CLIP, "epsilon_high": NO_CLIP}
    if t.loss_type in ("grpo_clip", "gspo"):
        high = t.cliprange if t.cliprange_high is None else t.cliprange_high
        to.translate("cliprange cliprange_high", {"epsilon": t.cliprange, "epsilon_high": high})
        if t.dual_clip is not None and t.dual_clip < 1 + high:
            to.lack("dual_clip", "GRPOTrainer's delta is the same only from 1 + cliprange_high on")
        elif t.dual_clip is not None:
            to.translate("dual_clip", {"delta": t.dual_clip})
    if t.loss_type == "cispo":
        to.translate("cispo_max_ratio", {"epsilon_high": t.cispo_max_ratio})
    if t.loss_type == "sapo":
        positive, negative = t.sapo_tau_positive, t.sapo_tau_negative
        to.translate("sapo_tau_positive", {"sapo_temperature_pos": positive})
        to.translate("sapo_tau_negative", {"sapo_temperature_neg": negative})
    to.lack("dppo_delta dppo_max_ratio", "GRPOTrainer has no such loss")
    _aggregation(to)


def _aggregation(to: Translation) -> None:
    """TRL ties it to the loss, which is then what carries it."""
    t, loss_type = to.config.training, to.values["loss_type"]
    carried = OWN_AGGREGATION.get(t.loss_type, t.normalize_mode)
    if carried != t.normalize_mode or t.normalize_mode not in LOSS_OF_AGGREGATION:
        to.lack("normalize_mode normalize_constant", f"GRPOTrainer aggregates loss_type {loss_type} in another way")
        return
    steps, difference = t.optimizer_steps_per_rollout_batch, ""
    if t.normalize_mode == "token" and steps > 1:
        difference = "it divides by the rollout batch's tokens / optimizer steps, and not by those of the minibatch"
    to.translate("normalize_mode", {"loss_type": loss_type}, difference)
    if t.normalize_mode == "constant" and t.normalize_constant == t.max_tokens:
        to.translate("normalize_constant", {"max_completion_length": t.max_tokens})
    else:
        factor = t.normalize_constant / t.max_tokens
        to.lack(
            "normalize_constant", f"it divides by max_completion_length, so gradients are {factor:g} times as large"
        )


def _advantages(to: Translation) -> None:
    t = to.config.training
    g = t.group_size
    if t.loss_type == "no_baseline":
        to.values["scale_rewards"] = "none"  # told at loss_type
    elif t.advantage == "group":
        to.translate("advantage", {"num_generations": g})
    elif t.advantage == "rloo":
        to.lack("advantage", f"the group's mean is subtracted: advantages are {g - 1}/{g} of those of rloo")
    else:
        to.lack("advantage", "the group's mean is subtracted, and nothing divides by it")
    scale = t.std_scope if t.use_std_normalization else "none"
    to.translate("use_std_normalization std_scope", {"scale_rewards": scale})
    if t.advantage_eps == ADVANTAGE_EPS:
        to.skip("advantage_eps", "it is the same there")
    else:
        to.lack("advantage_eps", f"it is {ADVANTAGE_EPS:g}")


def _corrections(to: Translation, uses_vllm: bool) -> None:
    t = to.config.training
    to.values["vllm_importance_sampling_correction"] = False
    if t.sampler_correction in CORRECTIONS and uses_vllm:
        low, high = {"tis": (None, t.tis_cap), "icepop": (t.icepop_low, t.icepop_high), "mis": (None, t.mis_cap)}[
            t.sampler_correction
        ]
        bounds = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
        mode = {"vllm_importance_sampling_mode": CORRECTIONS[t.sampler_correction]}
        to.translate("sampler_correction", {"vllm_importance_sampling_correction": True, **mode})
        to.translate("tis_cap icepop_low icepop_high mis_cap", bounds)
    else:
        to.lack("sampler_correction tis_cap icepop_low icepop_high mis_cap", "without vLLM tokens have no weights")
    to.lack("geo_low geo_high", "GRPOTrainer has no such correction")
    if t.negative_mask is not None:
        to.translate("negative_mask", {"off_policy_mask_threshold": t.negative_mask})
    if t.mask_truncated and t.stop:
        to.lack("mask_truncated", "left out: what ends with a stop string and not with the end id would be masked too")
    elif t.mask_truncated:
        to.translate("mask_truncated", {"mask_truncated_completions": True})
    to.translate("kl_coef", {"beta": t.kl_coef})
    if t.kl_coef:
        _kl(to)


def _kl(to: Translation) -> None:
    t = to.config.training
    if t.kl_estimator != "k3":
        to.lack("kl_estimator", "GRPOTrainer has k3 alone")
    elif t.loss_type == "gspo":
        difference = "it multiplies k3 by the sequence's ratio, and not by the token's"
        to.translate("kl_estimator", {"use_bias_correction_kl": True}, difference)
    else:
        to.translate("kl_estimator", {"use_bias_correction_kl": True})
    if t.reference_path is None:
        to.skip("reference_path", "the reference is the model that training starts from")
    else:
        to.lack("reference_path", "the reference is the model that training starts from")
    if t.reference_dtype == t.dtype:
        to.skip("reference_dtype", "the reference has the policy's dtype")
    else:
        to.lack("reference_dtype", "the reference has the policy's dtype")
