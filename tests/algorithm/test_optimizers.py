"""Each optimizer against float64: where updates are lost, where they are not, and at how many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from update_cases import ON_POLICY, assert_resumes_exactly

from configs.defaults import Training
from utils.algorithm.optimizers import LOW_BITS, OPTIMIZERS, join, split_
from utils.preflight.memory_estimate import optimizer_state_bytes

SHAPE = (64, 64)  # the smallest that bitsandbytes keeps in 8 bits
SMALL_RATE = 1e-6


def needs_bitsandbytes(name: str) -> None:
    if name.startswith("adamw8bit"):
        pytest.importorskip("bitsandbytes")


def start() -> torch.Tensor:
    """Weights of a usual size, exact in bfloat16."""
    return (0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))).bfloat16()


def gradients(n_steps: int) -> Iterator[torch.Tensor]:
    """A direction per weight, and twice as much noise in every step; exact in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(SHAPE, generator=generator)
    for _ in range(n_steps):
        yield (1e-3 * (direction + 2 * torch.randn(SHAPE, generator=generator))).bfloat16()


def after(name: str, dtype: torch.dtype, n_steps: int, rate: float = SMALL_RATE) -> torch.Tensor:
    """Float64: the weights after so many steps, their masters if the optimizer keeps any."""
    weight = torch.nn.Parameter(start().to(dtype))
    optimizer = OPTIMIZERS[name]([weight], lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for gradient in gradients(n_steps):
        weight.grad = gradient.to(dtype)
        optimizer.step()
    low_bits = optimizer.state[weight].get(LOW_BITS)
    return (weight.detach() if low_bits is None else join(weight.detach(), low_bits)).double()


def adamw_by_hand(n_steps: int, rate: float = SMALL_RATE) -> torch.Tensor:
    """Kingma and Ba 2015, algorithm 1, in float64."""
    weight, first, second = start().double(), torch.zeros(SHAPE).double(), torch.zeros(SHAPE).double()
    for step, gradient in enumerate(gradients(n_steps), 1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        weight = weight - rate * first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    return weight


def bias(weight: torch.Tensor, exact: torch.Tensor) -> float:
    """By which share of their sum the updates fall short of the exact ones (negative) or go beyond."""
    moved, should = weight - start().double(), exact - start().double()
    return ((moved - should) * should.sign()).sum().item() / should.abs().sum().item()


def test_a_thousand_small_updates_add_up_to_their_sum_where_masters_are_kept() -> None:
    pytest.importorskip("bitsandbytes")
    exact = adamw_by_hand(1000)
    assert abs(bias(after("adamw", torch.float32, 1000), exact)) < 0.01
    assert abs(bias(after("adamw8bit_master", torch.bfloat16, 1000), exact)) < 0.01
    assert bias(after("adamw", torch.bfloat16, 1000), exact) < -0.9  # nearly all of them are rounded away


@pytest.mark.parametrize("rate", [SMALL_RATE, 1e-2])
def test_masters_in_two_halves_are_float32_weights_to_the_last_bit(rate: float) -> None:
    pytest.importorskip("bitsandbytes")
    in_one = after("adamw8bit", torch.float32, 20, rate)
    assert torch.equal(after("adamw8bit_master", torch.bfloat16, 20, rate), in_one)


def test_one_step_of_plain_bfloat16_moves_only_weights_below_512_times_the_rate() -> None:
    weight, rate = start(), 3e-5
    moved = after("adamw", torch.bfloat16, 1, rate) != weight.double()
    small = weight.double().abs() < 512 * rate
    assert moved.double().mean() > 0.1
    assert not (moved & ~small).any()
    assert (moved & small).sum() > 0.4 * small.sum()  # between 256 and 512 times the rate it depends on the weight


def test_join_undoes_split_and_the_weight_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(-40, 30, (100_000,), generator=generator).double().exp2().float()
    master = torch.randn(100_000, generator=generator) * size
    master[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    weight, low_bits = torch.empty(100_000, dtype=torch.bfloat16), torch.empty(100_000, dtype=torch.int16)
    split_(master.clone(), weight, low_bits)
    assert torch.equal(join(weight, low_bits).view(torch.int32), master.view(torch.int32))
    tied = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tied], master[~tied].bfloat16())


WAYS = {
    "masters in two halves": {"dtype": "bfloat16", "optimizer": "adamw8bit_master"},
    "float32 under autocast": {"dtype": "float32", "optimizer": "adamw", "autocast_dtype": "bfloat16"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_save_loses_no_bit(tiny_model_dir: Path, tmp_path: Path, way: str) -> None:
    training = replace(ON_POLICY, **WAYS[way])
    needs_bitsandbytes(training.optimizer_name)
    assert_resumes_exactly(tiny_model_dir, tmp_path, training)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_takes_the_bytes_that_are_estimated(name: str, dtype: str) -> None:
    needs_bitsandbytes(name)
    if name == "adamw8bit_master" and dtype == "float32":
        pytest.skip("float32 weights need no masters")
    weight = torch.nn.Parameter(torch.zeros(512, 512, dtype=getattr(torch, dtype)))
    weight.grad = torch.ones_like(weight)
    optimizer = OPTIMIZERS[name]([weight], lr=1e-3)
    optimizer.step()
    state = optimizer.state[weight].items()
    measured = sum(t.nbytes for n, t in state if isinstance(t, torch.Tensor) and t.dim() and not n.startswith("qmap"))
    estimated = optimizer_state_bytes(weight.numel(), weight.element_size(), Training(dtype=dtype, optimizer=name))
    assert estimated == measured
