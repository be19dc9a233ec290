"""Loading a policy and building its optimizer: what saves memory changes no result beyond rounding."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    PreTrainedConfig,
    Qwen2Config,
    T5Config,
)
from update_cases import ON_POLICY, make_batch

from configs.defaults import Training
from train_grpo import update_policy
from utils import tiny
from utils.algorithm import policy as policy_module
from utils.algorithm.head import find_head
from utils.algorithm.policy import (
    build_optimizer,
    choose_cpu_products,
    context_length,
    load_policy,
    load_tokenizer,
    product_error,
    use_fused_kernels,
)


def weights_after_updates(model_dir: Path, training: Training, n_steps: int = 2) -> torch.Tensor:
    policy = load_policy(str(model_dir), training)
    optimizer = build_optimizer(policy, training)
    for step in range(n_steps):
        result = update_policy(policy, optimizer, make_batch(seed=step), training, step)
        assert result.n_optimizer_steps == 1
    return torch.cat([p.detach().float().flatten() for p in policy.parameters()])


@pytest.fixture(scope="module")
def plain_weights(tiny_model_dir: Path) -> torch.Tensor:
    return weights_after_updates(tiny_model_dir, ON_POLICY)


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    tiny_model_dir: Path, plain_weights: torch.Tensor
) -> None:
    training = replace(ON_POLICY, use_gradient_checkpointing=True)
    policy = load_policy(str(tiny_model_dir), training)
    find_head(policy)  # looks once, with a forward pass of its own
    forwards = []
    policy.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    one_microbatch = replace(training, gradient_accumulation_steps=1)
    update_policy(policy, build_optimizer(policy, training), make_batch(), one_microbatch, 0)
    assert len(forwards) == 2  # once forward, once more in the backward pass
    assert torch.equal(weights_after_updates(tiny_model_dir, training), plain_weights)


def test_attention_kernels_agree(tiny_model_dir: Path, plain_weights: torch.Tensor) -> None:
    eager = weights_after_updates(tiny_model_dir, replace(ON_POLICY, attention_type="eager"))
    torch.testing.assert_close(eager, plain_weights, atol=1e-4, rtol=0)


@pytest.fixture
def mkl_afterwards() -> Iterator[None]:
    yield
    choose_cpu_products(use_onednn=False)


@pytest.mark.usefixtures("mkl_afterwards")
@pytest.mark.parametrize("attention_type", ["sdpa", "eager"])
def test_products_by_onednn_agree(tiny_model_dir: Path, plain_weights: torch.Tensor, attention_type: str) -> None:
    weights = weights_after_updates(tiny_model_dir, replace(ON_POLICY, use_onednn=True, attention_type=attention_type))
    assert product_error() < 1e-6  # of float32, whoever makes the product
    torch.testing.assert_close(weights, plain_weights, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("mkl_afterwards")
def test_products_that_would_be_rounded_stay_with_mkl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matmul = torch.backends.mkldnn.matmul
    monkeypatch.setattr(policy_module, "product_error", lambda: 3e-3)
    choose_cpu_products(use_onednn=True)
    said = "note: training.use_onednn: oneDNN rounds to bfloat16 on this processor, so MKL is used\n"
    assert capsys.readouterr().err == said
    assert matmul.fp32_precision == "none"
    monkeypatch.setattr(policy_module, "product_error", lambda: 3e-7)
    choose_cpu_products(use_onednn=True)
    assert matmul.fp32_precision == "bf16"
    choose_cpu_products(use_onednn=False)
    assert matmul.fp32_precision == "none"


def test_compiled_policy_agrees_and_keeps_its_names(one_layer_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing, traced forward and backward; test_compile.py has the C++ compiler build it."""
    in_python = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", in_python)
    training = replace(ON_POLICY, use_compile=True, use_gradient_checkpointing=True)
    names = load_policy(str(one_layer_model_dir), training).state_dict().keys()
    assert names == load_policy(str(one_layer_model_dir), ON_POLICY).state_dict().keys()
    compiled, plain = (weights_after_updates(one_layer_model_dir, options) for options in (training, ON_POLICY))
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=0)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(tiny_model_dir: Path) -> None:
    policy = load_policy(str(tiny_model_dir), ON_POLICY)
    seen = []
    policy.get_decoder().layers[0].mlp.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    training = replace(ON_POLICY, autocast_dtype="bfloat16")
    update_policy(policy, build_optimizer(policy, training), make_batch(), training, 0)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_bfloat16_policy_trains_in_bfloat16(tiny_model_dir: Path) -> None:
    training = replace(ON_POLICY, dtype="bfloat16")
    policy = load_policy(str(tiny_model_dir), training)
    optimizer = build_optimizer(policy, training)
    update_policy(policy, optimizer, make_batch(), training, 0)
    assert all(p.dtype == torch.bfloat16 for p in policy.parameters())
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizer.state.values())


def test_8_bit_adamw_stays_near_adamw(tiny_model_dir: Path, plain_weights: torch.Tensor) -> None:
    pytest.importorskip("bitsandbytes")
    start = torch.cat([p.detach().flatten() for p in load_policy(str(tiny_model_dir), ON_POLICY).parameters()])
    eight_bit = weights_after_updates(tiny_model_dir, replace(ON_POLICY, use_bnb_adamw8bit=True))
    moved, moved_plain = eight_bit - start, plain_weights - start
    assert torch.nn.functional.cosine_similarity(moved, moved_plain, dim=0) > 0.9


def test_optimizer_takes_every_hyperparameter_from_the_config(tiny_model_dir: Path) -> None:
    training = replace(ON_POLICY, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7, adam_eps=1e-3)
    (group,) = build_optimizer(load_policy(str(tiny_model_dir), training), training).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.7), 1e-3)
    assert (group["weight_decay"], group["fused"]) == (0.3, True)


def test_what_cannot_be_loaded_is_told(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"paths.model_path = '.*': cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"paths.model_path = '.*': cannot load the model"):
        load_policy(str(tmp_path), ON_POLICY)
    assert context_length(str(tiny_model_dir)) == 2048


def tiny_gpt2(**rates: float) -> GPT2Config:
    """GPT-2's defaults drop 0.1 of embeddings, attention and residuals."""
    tokenizer = tiny.build_tokenizer()
    return GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **rates,
    )  # fmt: skip


def tiny_qwen2(attention_dropout: float) -> Qwen2Config:
    config = tiny.build_model(seed=0).config
    config.attention_dropout = attention_dropout
    return config


@pytest.mark.parametrize("config", [tiny_gpt2(), tiny_qwen2(attention_dropout=0.5)], ids=["gpt2", "attention"])
def test_dropout_is_switched_off_and_told(
    config: PreTrainedConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At learning rate 0 two optimizer steps leave the ratio at 1: with dropout it would be noise."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert any(isinstance(value, float) and value > 0 for name, value in vars(config).items() if "drop" in name)
    model.save_pretrained(tmp_path)
    training = replace(ON_POLICY, train_batch_size=4, loss_type="grpo_clip", learning_rate=1e-30)
    policy = load_policy(str(tmp_path), training)
    assert f"note: {tmp_path}: its dropout is switched off" in capsys.readouterr().err
    assert policy.training
    metrics = update_policy(policy, build_optimizer(policy, training), make_batch(), training, 0).metrics
    assert metrics["mean_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_fraction"] == 0.0


def test_a_model_without_causal_head_is_refused_in_a_line(tmp_path: Path) -> None:
    T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no head that predicts the next token; take a causal") as refused:
        load_policy(str(tmp_path), ON_POLICY)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_model_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    """transformers loads BERT as a causal language model, and its attention runs in both directions."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"take a causal language model: it looks at the tokens that follow"):
        load_policy(str(tmp_path), ON_POLICY)


def test_a_tokenizer_without_end_token_is_refused_with_the_remedy(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"no end token.*`eos_token` in its tokenizer_config.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("model_type", "asked"), [("qwen2", True), ("nothing", False)])
def test_fused_kernels_leave_the_losses_out(
    model_type: str, asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What liger-kernel is asked for; its kernels themselves run on a GPU alone."""
    calls = []
    module = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": None}
    module._apply_liger_kernel_to_instance = lambda policy, **options: calls.append(options)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    policy = tiny.build_model(seed=0)
    policy.config.model_type = model_type
    use_fused_kernels(policy)
    assert bool(calls) == asked
    assert ("does not know nothing" in capsys.readouterr().err) != asked
    for options in calls:
        assert options["rms_norm"] and options["swiglu"] and options["rope"]
        assert not options["cross_entropy"] and not options["fused_linear_cross_entropy"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("use_packing", [True, False])
def test_fused_kernels_change_nothing_beyond_rounding(tiny_model_dir: Path, use_packing: bool) -> None:
    pytest.importorskip("liger_kernel")
    ends = []
    for use_liger_kernel in (True, False):
        training = replace(ON_POLICY, device="cuda:0", use_liger_kernel=use_liger_kernel, use_packing=use_packing)
        policy = load_policy(str(tiny_model_dir), training)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
        update_policy(policy, optimizer, make_batch(), training, 0)
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-4)
