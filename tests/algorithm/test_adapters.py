"""LoRA: its gradients, its merged weights, its files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, PreTrainedModel
from update_cases import ON_POLICY, make_batch

from train_grpo import update_policy
from utils import tiny
from utils.adapter_files import ADAPTER_CONFIG, ORIGIN_FILE
from utils.algorithm.adapters import describe, trained_adapter_off
from utils.algorithm.batch import take_microbatch
from utils.algorithm.head import find_head
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.packing import is_packable
from utils.algorithm.policy import build_optimizer, full_weights, load_policy, load_reference, save_policy, trainable
from utils.algorithm.update import frozen_log_probs, with_reference_log_probs
from utils.run.background_save import BackgroundSaver
from utils.run.checkpoint import Checkpoints, TrainState

RANK, ALPHA = 3, 12
LORA = replace(ON_POLICY, lora_rank=RANK, lora_alpha=ALPHA, dtype="float64")


def adapted(model_dir: Path, **changes: object) -> PreTrainedModel:
    """A policy whose adapter is not 0, as it is before the first step."""
    policy = load_policy(str(model_dir), replace(LORA, **changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(policy):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return policy


def by_hand(policy: PreTrainedModel, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights from the definition, W + alpha / r B A; `leaves` are A and B by their names."""
    weights = {}
    for name, tensor in policy.state_dict().items():
        if "lora_" in name:
            continue
        place = name.removesuffix("base_layer.weight")
        if place != name:
            b, a = (leaves[f"{place}lora_{letter}.default.weight"] for letter in "BA")
            tensor = tensor + ALPHA / RANK * sum(torch.outer(b[:, i], a[i]) for i in range(RANK))
        weights[name.replace(".base_layer", "")] = tensor
    return weights


def log_probs_of(policy: PreTrainedModel, training: object = LORA) -> Tensor:
    batch = make_batch()
    return policy_log_probs(policy, take_microbatch(policy, batch, torch.arange(8)), training)[0]


@pytest.mark.parametrize("use_packing", [False, True])
def test_log_probs_of_merged_weights_are_the_policys(tiny_model_dir: Path, use_packing: bool) -> None:
    policy = adapted(tiny_model_dir, use_packing=use_packing)
    assert is_packable(policy) == use_packing and find_head(policy) is not None
    plain = load_policy(str(tiny_model_dir), replace(LORA, lora_rank=None, use_packing=use_packing))
    before = log_probs_of(plain)
    plain.load_state_dict(dict(full_weights(policy)))
    difference = (log_probs_of(plain) - log_probs_of(policy)).abs().max()
    assert difference <= 1e-12
    assert (log_probs_of(plain) - before).abs().max() > 0.01


def test_gradients_are_the_adapters_alone_and_equal_autograds(tiny_model_dir: Path) -> None:
    """Against the plain model as a function of A and B, through its full logits."""
    policy = adapted(tiny_model_dir)
    (-log_probs_of(policy).sum()).backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.named_parameters() if "lora_" in name
    }
    plain = load_policy(str(tiny_model_dir), replace(LORA, lora_rank=None, use_packing=False))
    leaves = {name: p.detach().clone().requires_grad_() for name, p in policy.named_parameters() if "lora_" in name}
    batch = make_batch()
    weights = {name: tensor for name, tensor in by_hand(policy, leaves).items() if name != "lm_head.weight"}  # tied
    logits = torch.func.functional_call(plain, weights, (batch.input_ids,)).logits[:, :-1]
    slow = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    expected = torch.autograd.grad(-slow[batch.response_mask].sum(), list(leaves.values()))
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(dict(policy.named_parameters())[name].grad, gradient, rtol=1e-8, atol=1e-9)


def test_an_update_moves_the_adapter_and_no_other_bit(tiny_model_dir: Path) -> None:
    training = replace(LORA, dtype="float32", use_gradient_checkpointing=True)
    policy = load_policy(str(tiny_model_dir), training)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = build_optimizer(policy, training)
    first = update_policy(policy, optimizer, make_batch(), training, 0).metrics
    second = update_policy(policy, optimizer, make_batch(seed=1), training, 1).metrics
    for name, parameter in policy.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora_" in name)
    assert 0 < first["frac_weights_moved"] < 1  # B is 0, so A has no gradient yet
    assert second["frac_weights_moved"] > 0.99
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable(policy)) == 2 * 14
    assert len(optimizer.state) == 2 * 14


def test_weights_are_frozen_in_bfloat16_and_trained_in_float32(tiny_model_dir: Path) -> None:
    """A push rounds once: W is 16 bits, B A is summed with it in float32."""
    policy = adapted(tiny_model_dir, dtype="bfloat16")
    assert {p.dtype for p in trainable(policy)} == {torch.float32}
    assert policy.model.layers[0].self_attn.q_proj(torch.ones(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    exact = by_hand(policy.double(), {n: p.double() for n, p in policy.named_parameters() if "lora_" in n})
    policy = adapted(tiny_model_dir, dtype="bfloat16")
    for dtype in (None, torch.float16):
        for name, tensor in full_weights(policy, dtype):
            rounded = exact[name].to(tensor.dtype)
            assert tensor.dtype == torch.bfloat16 or (dtype == tensor.dtype and "proj" in name)
            # float32's sum may lie on the other side of a midpoint, very rarely
            assert (tensor == rounded).double().mean() > 0.999
    log_probs_of(policy, replace(LORA, dtype="bfloat16")).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(policy))


def test_merging_holds_one_matrix_at_a_time(tiny_model_dir: Path) -> None:
    policy = adapted(tiny_model_dir)
    own = {p.data_ptr() for p in policy.parameters()}
    untouched = {name: p.detach().clone() for name, p in policy.named_parameters()}
    names = []
    for name, tensor in full_weights(policy):
        assert (tensor.data_ptr() in own) != name.endswith("proj.weight")
        names.append(name)
    assert names == list(tiny.build_model(0).state_dict())
    assert all(torch.equal(untouched[name], p) for name, p in policy.named_parameters())


def test_the_reference_is_the_policy_without_its_adapter(tiny_model_dir: Path) -> None:
    policy, batch = adapted(tiny_model_dir), make_batch()
    plain = load_policy(str(tiny_model_dir), replace(LORA, lora_rank=None))
    found = with_reference_log_probs(policy, batch, LORA).reference_log_probs
    assert torch.equal(found, frozen_log_probs(plain, batch, LORA))
    assert not torch.equal(found, frozen_log_probs(policy, batch, LORA))
    assert all(p.requires_grad for p in trainable(policy)) and len(trainable(policy)) == 2 * 14


def test_a_saved_adapter_is_loaded_by_peft_and_as_a_frozen_reference(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    policy, batch = adapted(tiny_model_dir), make_batch()
    save_policy(policy, tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch.input_ids).logits, policy(batch.input_ids).logits, rtol=0, atol=1e-12)
    loaded = load_policy(str(tmp_path), LORA)
    for ours, saved in zip(loaded.parameters(), policy.parameters(), strict=True):
        assert torch.equal(ours, saved)
    assert describe(loaded) == describe(policy) and f"rank {RANK} on 14 matrices" in describe(policy)
    # a reference that is an adapter keeps it, as it isn't what is trained
    reference = load_reference(str(tmp_path), policy, replace(LORA, reference_dtype="float64"))
    with trained_adapter_off(reference):
        assert torch.equal(frozen_log_probs(reference, batch, LORA), frozen_log_probs(policy, batch, LORA))


def test_it_resumes_exactly(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A step, a save in the background, and a step: the same bits from the checkpoint as without it."""
    training = replace(LORA, dtype="float32", kl_coef=0.1)

    def step(policy: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
        batch = with_reference_log_probs(policy, make_batch(seed=seed), training)
        assert update_policy(policy, optimizer, batch, training, seed).n_optimizer_steps == 1
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    policy = load_policy(str(tiny_model_dir), training)
    optimizer = build_optimizer(policy, training)
    step(policy, optimizer, 0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    saver = BackgroundSaver(checkpoints)
    saver.begin(TrainState(steps_done=1), policy, tiny.build_tokenizer(), optimizer, is_best=True)
    straight = step(policy, optimizer, 1)  # while it is written
    assert saver.wait() is None
    weights = tmp_path / "best" / "adapter_model.safetensors"
    assert weights.stat().st_size < 1.2 * sum(p.nbytes for p in trainable(policy))
    policy = load_policy(str(tmp_path / "last"), training)
    optimizer = build_optimizer(policy, training)
    checkpoints.load(tmp_path / "last", optimizer)
    assert torch.equal(step(policy, optimizer, 1), straight)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lora_rank": 65}, r"^training\.lora_rank = 65 .*k_proj is 64 x 128; give 64 or less"),
        ({"lora_rank": 129, "lora_target": "attention"}, "above the smallest dimension"),
    ],
)
def test_a_rank_above_the_smallest_dimension_is_refused_before_weights_are_read(
    tiny_model_dir: Path, tmp_path: Path, changes: dict, complaint: str
) -> None:
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())  # and no weights
    with pytest.raises(ValueError, match=complaint):
        load_policy(str(tmp_path), replace(LORA, **changes))


def test_a_target_that_matches_nothing_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_target = 'attention' matches no matrix of Mamba.*all-linear"):
        load_policy(str(tmp_path), replace(LORA, lora_target="attention"))


def test_another_base_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Other weights under the same path, and another shape where nothing was saved about the base."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny.build_model(seed=0).save_pretrained(base)
    save_policy(load_policy(str(base), LORA), adapter)
    tiny.build_model(seed=1).save_pretrained(base)
    with pytest.raises(ValueError, match="another base: the weights of"):
        load_policy(str(adapter), LORA)
    (adapter / ORIGIN_FILE).unlink()
    load_policy(str(adapter), LORA)
    tiny.build_model(seed=1, hidden_size=32).save_pretrained(base)
    with pytest.raises(ValueError, match=r"another base than .*28 tensors do not fit"):
        load_policy(str(adapter), LORA)


def test_a_saved_dropout_is_switched_off_and_said(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    save_policy(adapted(tiny_model_dir), tmp_path)
    saved = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(saved | {"lora_dropout": 0.5}))
    policy = load_policy(str(tmp_path), LORA)
    assert "lora_dropout of 0.5 is switched off" in capsys.readouterr().err
    assert torch.equal(log_probs_of(policy), log_probs_of(policy))


@pytest.mark.parametrize(
    ("beyond", "words"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens has other"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head has other"),
    ],
)
def test_more_than_lora_on_matrices_is_refused(
    tiny_model_dir: Path, tmp_path: Path, beyond: dict[str, object], words: str
) -> None:
    """Merging would leave it out."""
    save_policy(adapted(tiny_model_dir), tmp_path)
    saved = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(saved | beyond))
    with pytest.raises(ValueError, match=f"only plain LoRA|{words}") as refused:
        load_policy(str(tmp_path), LORA)
    assert words in str(refused.value)


def test_matrices_stored_the_other_way_round_are_merged_too(tmp_path: Path) -> None:
    """GPT-2's weights are (in, out). Its attention alone: c_proj is a name in its MLP as well."""
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = adapted(tmp_path, lora_target="attention")
    assert "on 4 matrices" in describe(policy)
    plain = load_policy(str(tmp_path), replace(LORA, lora_rank=None))
    plain.load_state_dict(dict(full_weights(policy)))
    torch.testing.assert_close(log_probs_of(plain), log_probs_of(policy), rtol=0, atol=1e-12)
