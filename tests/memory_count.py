"""Bytes counted on fake tensors: a training microbatch of a model of any size, on a machine of any size."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from configs.defaults import Config, Training
from utils.algorithm import head
from utils.algorithm.adapters import inject, lora_config
from utils.algorithm.batch import Microbatch, make_train_batch, take_microbatch
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.packing import KERNELS, Packing
from utils.algorithm.policy import trainable
from utils.records import Problem, Prompt, Rollout

QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


class Counter(TorchDispatchMode):
    """Bytes of the tensors that are alive, their peak, and the bytes that operations read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.moved = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in written:
            self._count(tensor)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._add_traffic(func, read, written)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size

    def _add_traffic(self, func: Any, read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
        """A view moves nothing; an operation in place reads and writes its own."""
        sources = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in sources for t in written)
        if not is_view and "empty" not in func.__name__:
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))


def fake_policy(sizes: dict[str, Any], training: Training) -> PreTrainedModel:
    """Made under a FakeTensorMode, as `load_policy` would make it."""
    config = Qwen2Config(**sizes)
    config._attn_implementation = training.attention_type
    policy = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, training.dtype)).train()
    if training.use_gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if training.use_packing:
        policy.set_attn_implementation(KERNELS[training.attention_type])  # trying it out looks at numbers
    head._heads[policy] = head.Head()  # and so does this
    if training.lora_rank is not None:
        # moving a fake parameter is refused, and there is nowhere to move it to
        with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            inject(policy, lora_config(policy, "", training))
    return policy


def longest_microbatch(policy: PreTrainedModel, n_sequences: int, prompt: int, response: int) -> Microbatch:
    """Real tensors: sequences that share no prompt, as the trial at the start takes them."""
    prompts = [Prompt(Problem("", ""), "", (row,) * prompt) for row in range(n_sequences)]
    rollouts = [Rollout(each, "", (0,) * response, (0.0,) * response, "length") for each in prompts]
    batch = make_train_batch(rollouts, torch.ones(n_sequences), torch.ones(n_sequences), pad_id=0)
    return take_microbatch(policy, batch, torch.arange(n_sequences))


def as_fake(mode: FakeTensorMode, value: Any) -> Any:
    """The tensors of a microbatch without their numbers."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if isinstance(value, Microbatch | Packing):
        return replace(value, **{f.name: as_fake(mode, getattr(value, f.name)) for f in fields(value)})
    return value


@contextmanager
def counting() -> Iterator[Counter]:
    with Counter() as counter:
        yield counter


def count_training_peak(sizes: dict[str, Any], config: Config, optimizer_bytes: int, prompt: int, n: int) -> int:
    """Peak bytes of all tensors in a microbatch of `n` longest sequences, gradients and optimizer state in place."""
    t, mode = config.training, FakeTensorMode(allow_non_fake_inputs=True)
    with mode, counting() as counter:
        policy = fake_policy(sizes, t)
        state = torch.empty(optimizer_bytes, dtype=torch.uint8)
        for parameter in trainable(policy):
            parameter.grad = torch.zeros_like(parameter)
    microbatch = longest_microbatch(policy, n, prompt, t.max_tokens)
    with mode, counter:
        found, _ = policy_log_probs(policy, as_fake(mode, microbatch), t)
        found.sum().backward()
    assert state.numel() == optimizer_bytes
    return counter.peak
