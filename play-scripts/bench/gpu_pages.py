"""The page of a GPU report, from its figures: what was measured beside what was estimated and published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Seconds of a step by docs/limits.md, within reach, and TFLOP/s of dense bfloat16 by NVIDIA's datasheets. As `step_dt`
# is without evaluation, so is its estimate.
ESTIMATES = {
    "rtx4090": {"rollout_dt": 7.3, "train_dt": 8.5, "push_dt": 0.5, "step_dt": 16.6},
    "h100": {"rollout_dt": 2.8, "train_dt": 2.2, "push_dt": 0.5, "step_dt": 5.8},
}
PUBLISHED = {"rtx4090": 84.0, "h100": 30.0}  # seconds per step, evaluations apart
PEAK_TFLOPS = {"4090": 165.2, "h100": 989.0, "h200": 989.0, "a100": 312.0}


def page(report: Mapping[str, Any]) -> str:
    """Markdown. A stage that has not run yet is left out."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# {report['card']}",
        "",
        "Written by `make gpu-report`; the figures are in `report.json`. "
        f"Overlay: {report['overlay'] or 'none'}. Versions: {versions}.",
        "",
    ]
    failures = {name: stage["failed"] for name, stage in report["stages"].items() if "failed" in stage}
    lines += ["## What failed", "", *(_failures(failures) if failures else ["Nothing so far."]), ""]
    for name, stage in report["stages"].items():
        lines += [f"## {name.replace('_', ' ')}", "", *_stage(name, stage, report), ""]
    return "\n".join(lines)


def _failures(failures: Mapping[str, str]) -> Iterator[str]:
    for name, reason in failures.items():
        yield f"- {name}:"
        yield from ["", "  ```", *(f"  {line}" for line in reason.splitlines()), "  ```", ""]


def _stage(name: str, stage: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    took = f"The stage took {stage['stage_seconds']} s."
    if "skipped" in stage:
        yield f"Skipped: {stage['skipped']}."
        return
    if name == "tests" and "tests" in stage:
        yield took
        yield from ["", "| test | outcome |", "|---|---|"]
        yield from (f"| {test} | {_one_cell(outcome)} |" for test, outcome in stage["tests"].items())
        return
    yield took
    if "failed" in stage:
        yield "It failed: see above."
        return
    yield from {"update": _update, "train": _train}.get(name, _plain)(stage, report)


def _update(stage: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    peak = next((most for card, most in PEAK_TFLOPS.items() if card in report["card"]), None)
    yield from ["", "| inner loop, all groups trained | |", "|---|---|"]
    yield f"| seconds per update | {stage['seconds_per_update']:.3g} |"
    yield f"| microbatches | {stage['microbatches']} |"
    for kind, rate in stage["tflops_per_second"].items():
        share = "" if peak is None else f", MFU {rate / peak:.1%}"
        yield f"| {stage['tokens'][kind]:,} {kind} tokens: TFLOP/s of forward and backward | {rate:.4g}{share} |"
    for kind, size in stage["peak_gb"].items():
        yield f"| peak memory, {kind} | {size:.2f} GB |"


def _train(stage: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    estimates = ESTIMATES.get(report["overlay"], {})
    yield from ["", "| mean of a step | measured | estimated (docs/limits.md) |", "|---|---|---|"]
    for name, value in stage["means"].items():
        yield f"| {name} | {value:.4g} | {estimates.get(name, '')} |"
    for seconds in stage["evaluation_seconds"]:
        yield f"| an evaluation, s | {seconds:.3g} | |"
    published = PUBLISHED.get(report["overlay"])
    if published is not None:
        yield from ["", f"Published for the same work: {published:g} s per step, evaluations apart."]


def _plain(stage: Mapping[str, Any], _report: Mapping[str, Any]) -> Iterator[str]:
    yield from ["", "| | |", "|---|---|"]
    for name, value in stage.items():
        shown = f"{value:.4g}" if isinstance(value, float) else _one_cell(str(value))
        yield f"| {name.replace('_', ' ')} | {shown} |"


def _one_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
