"""Hours and cost of an ablation: expected before it runs, and used when it has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.ablations.jobs import Job, Progress
from utils.plots.summary import format_time

HOUR = 3600.0


@dataclass(frozen=True)
class Expected:
    """What one run still takes. `seconds` is None if nothing tells how long a step takes."""

    steps: int
    seconds: float | None
    price_per_hour: float | None
    is_measured: bool


def expected(job: Job, jobs: Sequence[Job]) -> Expected:
    """From the pace of its own steps, or else of another seed's, or else from `elsewhere.seconds_per_step`."""
    progress = Progress(job)
    seeds = [progress, *(Progress(other) for other in jobs if other.setting == job.setting and other is not job)]
    measured = next((seed.pace for seed in seeds if seed.pace is not None), None)
    place = job.config.elsewhere
    pace = measured if measured is not None else place.seconds_per_step
    steps = max(0, progress.n_steps - progress.step)
    return Expected(steps, None if pace is None else steps * pace, place.price_per_hour, measured is not None)


def estimate(jobs: Sequence[Job], at_once: int) -> str | None:
    """A line about the runs that are still to be started; None if there are none."""
    runs = [expected(job, jobs) for job in jobs if job.state == "waiting" and not job.same_as]
    if not runs:
        return None
    work = f"estimate: {len(runs)} run{'s' if len(runs) > 1 else ''} with {sum(run.steps for run in runs):,} GRPO steps"
    if any(run.seconds is None for run in runs):
        return f"{work}; for hours and cost, give elsewhere.seconds_per_step, or let a run of each setting begin"
    total = sum(run.seconds for run in runs)
    at_least = max(run.seconds for run in runs)
    wall = format_time(max(at_least, total / min(at_once, len(runs))))
    n_measured = sum(run.is_measured for run in runs)
    basis = {0: "by elsewhere.seconds_per_step", len(runs): "by the pace of runs so far"}.get(
        n_measured, f"{n_measured} by the pace of runs so far, the others by elsewhere.seconds_per_step"
    )
    return (
        f"{work}, {total / HOUR:.1f} hours on one machine ({basis}; starting, evaluations and waiting apart)"
        f"{cost([(run.seconds, run.price_per_hour) for run in runs])}; {wall} with {at_once} at once"
    )


def used(jobs: Sequence[Job]) -> str | None:
    """A line about the time that machines were held by this command; None if nothing ran."""
    seconds = sum(job.seconds for job in jobs)
    if not seconds:
        return None
    spent = cost([(job.seconds, job.config.elsewhere.price_per_hour) for job in jobs if job.seconds])
    return f"used: {seconds / HOUR:.2f} hours of machines{spent}"


def cost(runs: Sequence[tuple[float, float | None]]) -> str:
    """Dollars for seconds at prices per hour, for the end of a sentence; empty if a price is unknown."""
    if any(price is None for _, price in runs):
        return ""
    dollars = sum(seconds / HOUR * price for seconds, price in runs)
    prices = sorted({f"{price:.2f}" for _, price in runs})
    return f", about ${dollars:.2f} at ${' or $'.join(prices)} per hour"
