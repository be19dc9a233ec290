"""Frozen weights in 4 bits: the code that a run uses on CUDA, with bitsandbytes' CPU kernels in place of CUDA's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from update_cases import ON_POLICY, make_batch

from configs.defaults import Config
from train_grpo import update_policy
from utils import tiny
from utils.algorithm.batch import take_microbatch
from utils.algorithm.four_bit import is_four_bit
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.packing import is_packable
from utils.algorithm.policy import (
    build_optimizer,
    count_full_weights,
    full_weights,
    load_policy,
    save_policy,
    trainable,
)
from utils.preflight.memory_estimate import count_parameters, estimate_peak_memory
from utils.preflight.model_files import model_config

modules = pytest.importorskip("bitsandbytes.nn.modules")
QLORA = replace(ON_POLICY, lora_rank=4, load_in_4bit=True)


def test_weights_in_four_bits_are_trained_beside_and_pushed_as_what_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on processors with AVX-512 it would lay out the weights anew for inference, in a way that has no gradient
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    tiny.build_model(seed=0, n_layers=1).save_pretrained(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), QLORA)
    assert is_packable(policy)
    frozen = {name for name, p in policy.named_parameters() if is_four_bit(p)}
    assert len(frozen) == 7 and all("proj.base_layer.weight" in name for name in frozen)

    plain = load_policy(str(tmp_path / "base"), replace(QLORA, lora_rank=None, load_in_4bit=False))
    for name, tensor in full_weights(policy):  # B is 0 yet
        original = plain.state_dict()[name]
        error = (tensor - original).norm() / original.norm().clamp(min=1e-9)
        # 16 levels fit a normal distribution with an error of about 9 %
        assert 0.05 < error < 0.15 if "proj.weight" in name else error == 0

    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = build_optimizer(policy, QLORA)
    for step in range(2):
        assert update_policy(policy, optimizer, make_batch(seed=step), QLORA, step).n_optimizer_steps == 1
    for name, parameter in policy.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora_" in name)
    plain.load_state_dict(dict(full_weights(policy)))
    log_probs = [
        policy_log_probs(each, take_microbatch(each, make_batch(), torch.arange(8)), QLORA)[0].detach()
        for each in (policy, plain)
    ]
    torch.testing.assert_close(*log_probs, rtol=0, atol=1e-5)

    sizes = model_config(str(tmp_path / "base"))
    assert count_full_weights(policy) == count_parameters(sizes)["total"]
    scales = sum(
        tensor.nbytes
        for p in policy.parameters()
        if is_four_bit(p)
        for tensor in (p.quant_state.absmax, p.quant_state.state2.absmax)
    )
    config = Config(training=QLORA)
    estimate = estimate_peak_memory(sizes, config, 64, uses_vllm=False)
    assert estimate["weights"] == pytest.approx(sum(p.nbytes for p in policy.parameters()) + scales, rel=1e-3)
    assert estimate["gradients"] == sum(p.nbytes for p in trainable(policy))

    save_policy(policy, tmp_path / "adapter")
    assert "quantization_config" not in (tmp_path / "adapter" / "config.json").read_text()
    again = load_policy(str(tmp_path / "adapter"), QLORA)
    for ours, saved in zip(again.parameters(), policy.parameters(), strict=True):
        assert torch.equal(ours, saved)
