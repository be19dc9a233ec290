"""The loss of a config in the words of verl's actor and algorithm, read against its `core_algos.py`."""

from __future__ import annotations

from utils.export.translation import Translation

ACTOR = "actor_rollout_ref.actor"
NO_CLIP = 1.0e9  # half of an interval that no ratio leaves
LOSSES = {
    "reinforce_with_baseline": "gpg",
    "grpo_clip": "vanilla",
    "grpo_no_clip": "vanilla",
    "gspo": "gspo",
    "cispo": "cispo",
    "sapo": "sapo",
    "dppo": "dppo_tv",
}
AGGREGATIONS = {"mean": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm", "token": "token-mean"}
KL_ESTIMATORS = {"k1": "k1+", "k2": "k2", "k3": "k3+"}
ADVANTAGE_EPS = 1e-6  # verl's, which no field changes
SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def tell_loss(to: Translation) -> None:
    """All that decides what a token adds to the loss."""
    _loss(to)
    _aggregation(to)
    _advantages(to)
    _corrections(to)


def _loss(to: Translation) -> None:
    t = to.config.training
    if t.loss_type not in LOSSES:
        to.lack("loss_type", "verl has no such loss; what is written here trains with vanilla, the clipped surrogate")
        return
    difference = "it compares with old log-probs, and not with the sampler's" if t.loss_type == "dppo" else ""
    to.translate("loss_type", {f"{ACTOR}.policy_loss.loss_mode": LOSSES[t.loss_type]}, difference)
    low, high = t.cliprange, t.cliprange if t.cliprange_high is None else t.cliprange_high
    if t.loss_type in ("grpo_clip", "gspo"):
        _clip(to, "cliprange cliprange_high", low, high)
        if t.loss_type == "grpo_clip":
            limit = NO_CLIP if t.dual_clip is None else t.dual_clip
            to.values[f"{ACTOR}.clip_ratio_c"] = limit  # which verl always has, 3 by default
        if t.dual_clip is not None and t.loss_type == "grpo_clip":
            to.translate("dual_clip", {f"{ACTOR}.clip_ratio_c": t.dual_clip})
        elif t.dual_clip is not None:
            to.lack("dual_clip", "its gspo has no such limit")
    elif t.loss_type == "grpo_no_clip":
        _clip(to, "", NO_CLIP, NO_CLIP)
        to.values[f"{ACTOR}.clip_ratio_c"] = NO_CLIP
    elif t.loss_type == "cispo":
        _clip(to, "cispo_max_ratio", 1.0, t.cispo_max_ratio - 1)  # from 0 to the largest weight
    elif t.loss_type == "dppo":
        _clip(to, "dppo_delta", t.dppo_delta, t.dppo_delta)
        to.translate("dppo_max_ratio", {f"{ACTOR}.clip_ratio_c": t.dppo_max_ratio})
    elif t.loss_type == "sapo":
        to.translate("sapo_tau_positive", {f"{ACTOR}.tau_pos": t.sapo_tau_positive})
        to.translate("sapo_tau_negative", {f"{ACTOR}.tau_neg": t.sapo_tau_negative})


def _clip(to: Translation, names: str, low: float, high: float) -> None:
    to.translate(names, {f"{ACTOR}.clip_ratio_low": low, f"{ACTOR}.clip_ratio_high": high})


def _aggregation(to: Translation) -> None:
    t, key = to.config.training, f"{ACTOR}.loss_agg_mode"
    carried = AGGREGATIONS.get(t.normalize_mode, "seq-mean-token-mean")
    if t.loss_type == "sapo" and t.normalize_mode != "mean":
        to.lack("normalize_mode normalize_constant", "its sapo is always aggregated by seq-mean-token-mean")
        return
    if t.normalize_mode not in AGGREGATIONS:
        to.lack("normalize_mode", f"verl has no such aggregation; what is written here takes {carried}")
        to.values[key] = carried
        return
    to.translate("normalize_mode", {key: carried})
    if t.normalize_mode == "constant" and t.normalize_constant.is_integer():
        to.translate("normalize_constant", {f"{ACTOR}.loss_scale_factor": int(t.normalize_constant)})
    else:
        to.lack("normalize_constant", "it must be a whole number; null takes the longest response")


def _advantages(to: Translation) -> None:
    t = to.config.training
    estimator = "rloo" if t.advantage == "rloo" else "grpo"
    to.values["algorithm.adv_estimator"] = estimator
    if t.advantage == "maxrl":
        to.lack("advantage", "the group's mean is subtracted, and nothing divides by it")
    elif t.loss_type != "no_baseline":
        to.translate("advantage", {"algorithm.adv_estimator": estimator})
    divides = {"algorithm.norm_adv_by_std_in_grpo": t.use_std_normalization}
    to.translate("use_std_normalization", divides)
    if t.std_scope == "batch":
        to.lack("std_scope", "it divides by the deviation of each group")
    else:
        to.translate("std_scope", divides)
    if t.advantage_eps == ADVANTAGE_EPS:
        to.skip("advantage_eps", "it is the same there")
    else:
        to.lack("advantage_eps", f"it is {ADVANTAGE_EPS:g}")


def _corrections(to: Translation) -> None:
    t, key = to.config.training, "algorithm.rollout_correction"
    changes = "responses that are left out count in no mean"
    if t.sampler_correction == "tis":
        to.translate(
            "sampler_correction tis_cap", {f"{key}.rollout_is": "token", f"{key}.rollout_is_threshold": t.tis_cap}
        )
    elif t.sampler_correction == "icepop":
        bounds = {f"{key}.rollout_is_threshold": f"{t.icepop_low}_{t.icepop_high}"}
        to.translate("sampler_correction icepop_low icepop_high", {f"{key}.rollout_is": "token"} | bounds)
    elif t.sampler_correction == "mis":  # bounds must be above 0: the lower one is one that no response reaches
        bounds = {f"{key}.rollout_is_threshold": f"1e-09_{t.mis_cap}"}
        to.translate("sampler_correction mis_cap", {f"{key}.rollout_is": "sequence"} | bounds)
    elif t.sampler_correction == "geo":
        bounds = {f"{key}.rollout_rs": "seq_mean_k1", f"{key}.rollout_rs_threshold": f"{t.geo_low}_{t.geo_high}"}
        to.translate("sampler_correction geo_low geo_high", bounds, changes)
    to.lack("negative_mask", "all responses with a negative advantage are trained on")
    to.lack("mask_truncated", "truncated responses are trained on")
    _kl(to)


def _kl(to: Translation) -> None:
    t = to.config.training
    to.translate("kl_coef", {f"{ACTOR}.use_kl_loss": t.kl_coef > 0, f"{ACTOR}.kl_loss_coef": t.kl_coef})
    if not t.kl_coef:
        return
    difference = "without the ratio r"
    if t.kl_estimator != "k2":
        difference += ": on-policy, the gradient has the same expectation"
    to.translate("kl_estimator", {f"{ACTOR}.kl_loss_type": KL_ESTIMATORS[t.kl_estimator]}, difference)
    if t.reference_path is None:
        to.skip("reference_path", "the reference is the model that training starts from")
    else:
        to.lack("reference_path", "the reference is the model that training starts from")
    reference = {"actor_rollout_ref.ref.fsdp_config.model_dtype": SHORT[t.reference_dtype]}
    to.translate("reference_dtype", reference, "it computes in bfloat16")
