"""Peak memory and time of log-probs and entropy from hidden states, forward and backward: full logits against chunks.

    python play-scripts/bench/log_probs.py --tokens 8192 --dtype bfloat16

Variants: `plain` (full logits), `chunked` (utils/algorithm/log_probs.py), `chunked, no entropy`, and torch's
`linear_cross_entropy` with its options (torch 2.13 or newer), which gives no entropy. Every measurement is a process of
its own, as peak memory cannot be reset everywhere; variants take turns, and ratios are between medians of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import hardware, wait_for
from torch import Tensor
from torch.nn import functional as F

from utils.algorithm.log_probs import chunked_log_probs
from utils.algorithm.losses import compute_entropy
from utils.run.memory_tracker import MemoryTracker

VARIANTS = ("plain", "chunked", "chunked, no entropy", "linear_cross_entropy")
FIGURES = ("seconds", "cpu_seconds", "peak_bytes")  # of the processor: all threads; busy neighbours disturb it less


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, _chunk_size: int) -> Tensor:
    logits = (hidden @ weight.T).float()
    with torch.no_grad():
        compute_entropy(logits)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    return chunked_log_probs(hidden, weight, labels, chunk_size=chunk_size, with_entropy=True)[0]


def chunked_without_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    return chunked_log_probs(hidden, weight, labels, chunk_size=chunk_size)[0]


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = dict(
    zip(VARIANTS, (plain, chunked, chunked_without_entropy, torch_chunked), strict=True)
)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak bytes (beyond hidden states and weight) of forward and backward."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    hidden = random(args.tokens, args.hidden).requires_grad_()
    weight = (random(args.vocabulary, args.hidden) / args.hidden**0.5).requires_grad_()
    labels = torch.randint(args.vocabulary, (args.tokens,), generator=generator, device=device)
    # the gradient of a policy loss differs from token to token
    upstream = torch.randn(args.tokens, generator=generator, device=device)
    run = FUNCTIONS[args.variant]
    (run(hidden[:64], weight, labels[:64], args.chunk_size) * upstream[:64]).sum().backward()
    hidden.grad = weight.grad = None
    tracker = MemoryTracker(device, enabled=True)
    before = tracker.mark("inputs")
    wait_for(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    (run(hidden, weight, labels, args.chunk_size) * upstream).sum().backward()
    wait_for(device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": tracker.mark("head") - before}


def measure_in_process(args: argparse.Namespace, variant: str) -> dict[str, float]:
    """One measurement in a fresh process."""
    settings = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocabulary", "hidden", "dtype", "device")]
    command = [sys.executable, __file__, *settings, f"--chunk-size={args.chunk_size}", f"--variant={variant}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(args: argparse.Namespace) -> list[dict[str, float | str]]:
    """Every variant in turn, `repeats` times; medians, and ratios to the plain version."""
    variants = VARIANTS if hasattr(F, "linear_cross_entropy") else VARIANTS[:-1]
    runs = {variant: [] for variant in variants}
    for _ in range(args.repeats):
        for variant in variants:
            runs[variant].append(measure_in_process(args, variant))
    rows = []
    for variant in variants:
        medians = {key: statistics.median(run[key] for run in runs[variant]) for key in FIGURES}
        first = rows[0] if rows else {"variant": variant, **medians}
        rows.append(
            {
                "variant": variant,
                **medians,
                **{f"{key}_ratio": medians[key] / first[key] for key in FIGURES},
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=8192, help="response tokens (8192)")
    add("--vocabulary", type=int, default=151936, help="words of the vocabulary (151936)")
    add("--hidden", type=int, default=1536, help="size of the hidden states (1536)")
    add("--chunk-size", type=int, default=2048, help="tokens whose logits are held at once (2048)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of hidden states and weight (bfloat16)")
    add("--device", default="cpu", help="cpu or cuda:0 (cpu)")
    add("--repeats", type=int, default=3, help="turns (3)")
    add("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.variant:
        print(json.dumps(measure(args)))
        return
    rows = compare(args)
    print(f"{'':24}" + "".join(f" {name:>9} {'of plain':>9}" for name in ("seconds", "CPU s", "peak GiB")))
    for row in rows:
        columns = zip(FIGURES, (1, 1, 2**30), strict=True)
        print(
            f"{row['variant']:24}" + "".join(f" {row[k] / unit:9.2f} {row[f'{k}_ratio']:9.2f}" for k, unit in columns)
        )
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "variant")}
        record = {"hardware": hardware(args.device), "settings": settings, "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
