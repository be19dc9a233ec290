"""Time and peak memory of a GRPO step, with each optimization switched off in turn, and of TRL's GRPOTrainer.

    python play-scripts/bench/step.py --output results/speed/quickstart
    python play-scripts/bench/step.py --model data/smollm2/model
    python play-scripts/bench/step.py --shape qwen2.5-1.5b --config configs/hardware/h100.yaml --response-tokens 350

By default the quickstart's model samples (with `--model` another checkpoint, on four-shot prompts). Responses have
`--response-tokens` tokens, no fewer and no more, and rewards are drawn, so that every variant and TRL have the same
work. With `--shape` a model of that shape has random weights, ids are random, nothing is sampled, and response lengths
vary around `--response-tokens`: the training half of the step.
Each measurement is a process of its own, a warm-up step and then `--steps`; the variants take turns `--rounds` times,
and ratios are between the medians of one call, of wall and of processor time. TRL joins where it is installed and
something is sampled: as it comes, and with our attention kernel and float32 products.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, TRL, TRL_OUR_KERNELS, hardware
from options import MKL, VARIANTS, parse_arguments, resolve_config

from utils.preflight.memory_estimate import count_parameters, estimate_peak_memory

# FLOP/s in bfloat16, dense, sums in float32, as NVIDIA's datasheets give them
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165.2e12}


def make_shape(name: str, folder: Path) -> None:
    """Save a randomly initialised model of a shape."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[name]), dtype=torch.bfloat16).save_pretrained(folder)


def measure_in_turn(variants: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every variant in a process of its own, `rounds` times in turn."""
    runs = {variant: [] for variant in variants}
    for round_number in range(1, rounds + 1):
        for variant in variants:
            print(f"round {round_number} of {rounds}: {variant}", file=sys.stderr, flush=True)
            script = "step_trl.py" if variant in (TRL, TRL_OUR_KERNELS) else "step_ours.py"
            command = [sys.executable, str(Path(__file__).with_name(script)), *sys.argv[1:]]
            done = subprocess.run([*command, f"--variant={variant}"], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the measurement of {variant!r} ended with status {done.returncode}: see above")
            runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per variant: medians over all steps of all rounds, and ratios to the first variant."""
    rows: list[dict[str, Any]] = []
    for variant, measurements in runs.items():
        seconds, cpu_seconds = (
            statistics.median(s for run in measurements for s in run[key]) for key in ("seconds", "cpu_seconds")
        )
        peak = statistics.median(run["peak_bytes"] for run in measurements)
        names = {name for run in measurements for name in run["phases"]}
        phases = {name: statistics.median(run["phases"].get(name, 0.0) for run in measurements) for name in names}
        row = {"variant": variant, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "phases": phases}
        first = rows[0] if rows else row
        for ratio, key in (("time_ratio", "seconds"), ("cpu_ratio", "cpu_seconds"), ("peak_ratio", "peak_bytes")):
            row[ratio] = row[key] / first[key]
        rows.append(row | {name: measurements[-1][name] for name in ("metrics", "profile") if name in measurements[-1]})
    return rows


def model_flops(model_config: dict[str, Any], metrics: dict[str, float]) -> float:
    """FLOPs of forward and backward that the model asks for: 6 a weight and token, recomputation not counted.

    The head counts for response tokens alone. Attention: 12 a layer, width, query and key, of which causality needs
    half (Narayanan et al. 2021, arXiv:2104.04473, appendix).
    """
    layers = count_parameters(model_config)["layers"]
    head = model_config["vocab_size"] * model_config["hidden_size"]
    attention = 6 * model_config["num_hidden_layers"] * model_config["hidden_size"]
    return (
        6 * layers * metrics["bench/model_tokens"]
        + 6 * head * metrics["trained_tokens"]
        + attention * metrics["bench/squared_lengths"]
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    phases = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    print(
        f"{'':34} {'seconds':>8} {'ratio':>6} {'CPU s':>8} {'ratio':>6} {'peak GB':>8} {'ratio':>6} "
        + " ".join(f"{p:>13}" for p in phases)
    )
    for row in rows:
        parts = " ".join(f"{row['phases'].get(name, float('nan')):13.3f}" for name in phases)
        cpu = f"{row['cpu_seconds']:8.3f} {row['cpu_ratio']:6.2f}"
        sizes = f"{row['peak_bytes'] / 1e9:8.2f} {row['peak_ratio']:6.2f}"
        print(f"{row['variant']:34} {row['seconds']:8.3f} {row['time_ratio']:6.2f} {cpu} {sizes} {parts}")


def print_profile(parts: dict[str, list[list[Any]]]) -> None:
    """By part of the step, as torch's profiler saw it: operations by the time that is their own."""
    for part, operations in parts.items():
        print(f"{part}:")
        total = operations[0][2]
        for name, calls, milliseconds in operations:
            print(f"  {milliseconds:9.2f} ms {milliseconds / max(total, 1e-9):6.1%} {calls:7} x {name}")


def draw_chart(rows: list[dict[str, Any]], title: str, on_cpu: bool, path: Path) -> None:
    """Two bars per variant: seconds per step (on the CPU of processor time, which others disturb less), peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from utils.plots.style import COLOURS, STYLE

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.9 + 0.35 * len(rows)), sharey=True)
        names = [row["variant"] for row in rows]
        time_panel = ("seconds per step", "seconds", 1, "time_ratio")
        if on_cpu:
            time_panel = ("CPU seconds per step", "cpu_seconds", 1, "cpu_ratio")
        panels = [time_panel, ("peak memory, GB", "peak_bytes", 1e9, "peak_ratio")]
        for axis, (label, key, unit, ratio) in zip(axes, panels, strict=True):
            bars = axis.barh(names, [row[key] / unit for row in rows], color=COLOURS[1])
            axis.bar_label(bars, [f"{row[key] / unit:.2f} ({row[ratio]:.2f}x)" for row in rows], padding=3, fontsize=7)
            axis.set_xlabel(label)
            axis.margins(x=0.25)
        axes[0].invert_yaxis()
        figure.suptitle(title, fontsize=9)
        figure.savefig(path)


def main() -> None:
    args = parse_arguments(__doc__)
    config = resolve_config(args)
    if args.shape:
        make_shape(args.shape, Path(config.paths.model_path))
    has_trl = importlib.util.find_spec("trl") is not None and not args.shape
    on_cpu = config.training.device == "cpu"
    variants = [variant for variant in VARIANTS if on_cpu or variant != MKL]
    rows = summarize(
        measure_in_turn(args.only or [*variants, *([TRL, TRL_OUR_KERNELS] if has_trl else [])], args.rounds)
    )
    model_config = json.loads((Path(config.paths.model_path) / "config.json").read_text())
    device = config.training.device
    peak_flops = None
    if device.startswith("cuda"):
        peak_flops = next((f for n, f in PEAK_FLOPS.items() if n in torch.cuda.get_device_name(device)), None)
    for row in rows:
        if row["phases"]:
            model_seconds = row["phases"]["forward"] + row["phases"]["backward"]
            row["tokens_per_second"] = row["metrics"]["bench/sequence_tokens"] / model_seconds
            if peak_flops is not None:
                row["mfu"] = model_flops(model_config, row["metrics"]) / model_seconds / peak_flops
    machine = hardware(device)
    print(machine)
    print_table(rows)
    longest = (300 if args.shape else 64) + config.training.max_tokens
    total = torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None
    estimate = estimate_peak_memory(model_config, config, longest, total, uses_vllm=False)
    if args.profile:
        print_profile(rows[0]["profile"])
    print(f"estimated peak of the training phase: {estimate['training_peak'] / 1e9:.2f} GB")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": ["bench/step.py", *sys.argv[1:]], "hardware": machine, "estimate": estimate, "rows": rows}
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        draw_chart(rows, machine, on_cpu, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
