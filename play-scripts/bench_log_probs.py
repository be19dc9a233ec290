"""Peak memory and time of log-probs and entropy from hidden states, forward and backward: full logits against chunks.

    python play-scripts/bench_log_probs.py --tokens 8192 --dtype bfloat16

Variants: `plain` (full logits), `chunked` (utils/log_probs.py), `chunked, no entropy`, and torch's
`linear_cross_entropy` with its options (torch 2.13 or newer), which gives no entropy. Every measurement is a process of
its own, as peak memory cannot be reset everywhere; variants take turns, and ratios are between medians of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.grpo import compute_entropy
from utils.log_probs import chunked_log_probs
from utils.memory import MemoryTracker

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
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    (run(hidden, weight, labels, args.chunk_size) * upstream).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": tracker.mark("head") - before}


def hardware(device: str) -> str:
    """What the figures were measured on."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu_info = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpu_info.exists():
        model = cpu_info.read_text().split("model name")[1].split(":")[1].splitlines()[0].strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} ({capability}), {torch.get_num_threads()} torch thread(s), torch {torch.__version__}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="response tokens")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
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
