"""Do small updates add up? A thousand AdamW steps of each way to keep a weight, against float64.

    pip install --no-deps torchao torch-optimi
    python play-scripts/bench/small_updates.py --output results/precision

Weights are N(0, 0.02), exact in bfloat16. Every way gets the same gradients: a direction per weight and twice as much
noise per step. `bias` is by which share the updates' sum falls short along float64's movement, `error` the RMS distance
from it as a share of it. torchao and torch-optimi are measured if they are installed; training needs neither.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import hardware
from torch import Tensor

from utils.algorithm.optimizers import LOW_BITS, OPTIMIZERS, join

SHAPE = (128, 128)
BETAS, EPS = (0.9, 0.95), 1e-8
Maker = Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]


def ours(name: str) -> Maker:
    return lambda weights, rate: OPTIMIZERS[name](weights, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0)


def torchao(eight_bit: bool) -> Maker:
    """torchao compiles its step; without a compiler the same code runs as it is written."""

    def make(weights: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit
        from torchao.optim.adam import _AdamW

        torch.compiler.set_stance("force_eager")
        options = {"lr": rate, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "bf16_stochastic_round": True}
        return (AdamW8bit if eight_bit else _AdamW)(weights, **options)

    return make


def optimi(weights: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from optimi import AdamW

    return AdamW(weights, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0, kahan_sum=True, triton=False)


# name: maker, dtype of the weights, bytes per weight with the gradient, package
WAYS: dict[str, tuple[Maker, torch.dtype, float, str]] = {
    "float32, AdamW": (ours("adamw"), torch.float32, 16, "torch"),
    "float32, 8-bit AdamW": (ours("adamw8bit"), torch.float32, 10, "bitsandbytes"),
    "bfloat16, AdamW": (ours("adamw"), torch.bfloat16, 8, "torch"),
    "bfloat16, 8-bit AdamW": (ours("adamw8bit"), torch.bfloat16, 6, "bitsandbytes"),
    "bfloat16 and low bits of masters, 8-bit AdamW": (ours("adamw8bit_master"), torch.bfloat16, 8, "bitsandbytes"),
    "bfloat16, Kahan summation": (optimi, torch.bfloat16, 10, "optimi"),
    "bfloat16, stochastic rounding, AdamW": (torchao(False), torch.bfloat16, 8, "torchao"),
    "bfloat16, stochastic rounding, 8-bit AdamW": (torchao(True), torch.bfloat16, 6, "torchao"),
}


def start() -> Tensor:
    return (0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))).bfloat16()


def gradients(n_steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(SHAPE, generator=generator)
    for _ in range(n_steps):
        yield (1e-3 * (direction + 2 * torch.randn(SHAPE, generator=generator))).bfloat16()


def movement(make: Maker, dtype: torch.dtype, rate: float, n_steps: int) -> tuple[Tensor, float]:
    """Float64 movement of the weights and what is kept beside them; and the share that the first step moved."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(start().to(dtype, copy=True))
    optimizer, share = make([weight], rate), 0.0
    for step, gradient in enumerate(gradients(n_steps)):
        weight.grad = gradient.to(dtype)
        optimizer.step()
        if step == 0:
            share = (weight.detach().double() != start().double()).double().mean().item()
    state, end = optimizer.state[weight], weight.detach().double()
    if LOW_BITS in state:
        end = join(weight.detach(), state[LOW_BITS]).double()
    elif "kahan_comp" in state:
        end += state["kahan_comp"].double()
    return end - start().double(), share


def measure(rate: float, n_steps: int) -> Iterator[dict[str, Any]]:
    exact, _ = movement(ours("adamw"), torch.float64, rate, n_steps)
    for name, (make, dtype, size, package) in WAYS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed")
            continue
        moved, share = movement(make, dtype, rate, n_steps)
        yield {
            "way": name,
            "rate": rate,
            "bytes per weight": size,
            "moved in step 1": share,
            "bias": ((moved - exact) * exact.sign()).sum().item() / exact.abs().sum().item(),
            "error": ((moved - exact).norm() / exact.norm()).item(),
        }


def page(rows: list[dict[str, Any]], command: str, n_steps: int) -> str:
    lines = [
        f"# {n_steps:,} small updates of each way, against float64",
        "",
        "| way | rate | bytes per weight | moved in step 1 | bias | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{row[name]:.2%}" for name in ("moved in step 1", "bias", "error"))
        lines.append(f"| {row['way']} | {row['rate']:g} | {row['bytes per weight']} | {shares} |")
    about = "Bytes are of weight, gradient and optimizer state. What is kept beside a weight is added to it."
    return "\n".join([*lines, "", about, "", f"On {hardware('cpu')}, by", "", f"```bash\n{command}\n```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5], help="learning rates (1e-6 1e-5)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each (1000)")
    parser.add_argument("--output", default="results/precision", help="folder to write (results/precision)")
    args = parser.parse_args()
    rows = [row for rate in args.rates for row in measure(rate, args.steps)]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "small_updates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    rates = " ".join(f"{rate:g}" for rate in args.rates)
    text = page(rows, f"python play-scripts/bench/small_updates.py --rates {rates} --steps {args.steps}", args.steps)
    (folder / "small_updates.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
