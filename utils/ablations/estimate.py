"""Hours and cost of an ablation: expected before it runs, and used when it has run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from utils.ablations.jobs import Job, Progress
from utils.plots.history import load_runs
from utils.plots.summary import format_time

HOUR = 3600.0
SO_FAR, GIVEN, REPORTED, OTHERS = "the pace of runs so far", "elsewhere.seconds_per_step", "the times", "other settings"
NO_PACES: Mapping[str, float] = {}


@dataclass(frozen=True)
class Expected:
    """What one run still takes. `seconds` is None if nothing tells how long a step takes."""

    steps: int
    seconds: float | None
    price_per_hour: float | None
    basis: str  # one of the constants above


def reported_paces(jobs: Sequence[Job], results: Path) -> dict[str, float]:
    """Seconds per GRPO step, with evaluations, of each setting that an earlier report has the times of.

    Its runs may have been on another machine, and several at once.
    """
    paces = {}
    for topic in dict.fromkeys(job.topic for job in jobs if job.state == "waiting" and not job.same_as):
        path = results / topic / "metrics.csv"
        runs = load_runs([path])[0] if path.exists() else []
        for name in {run.name for run in runs}:
            timed = [run.seconds / run.last_step for run in runs if run.name == name and run.seconds and run.last_step]
            paces |= {f"{topic}/{name}": fmean(timed)} if timed else {}
    return paces


def expected(job: Job, jobs: Sequence[Job], reported: Mapping[str, float] = NO_PACES) -> Expected:
    """From the first pace that is known.

    Of its own steps, of another seed's, `elsewhere.seconds_per_step`, an earlier report's, the mean of other settings'.
    """
    progress, place = Progress(job), job.config.elsewhere
    seeds = [progress, *(Progress(other) for other in jobs if other.setting == job.setting and other is not job)]
    measured = next((seed.pace for seed in seeds if seed.pace is not None), None)
    known = ((measured, SO_FAR), (place.seconds_per_step, GIVEN), (reported.get(job.setting), REPORTED))
    pace, basis = next(((pace, basis) for pace, basis in known if pace is not None), (None, OTHERS))
    steps = max(0, progress.n_steps - progress.step)
    return Expected(steps, None if pace is None else steps * pace, place.price_per_hour, basis)


def with_others(runs: Sequence[Expected]) -> list[Expected]:
    """The same, with the mean time per step of the others where a run's own is unknown."""
    known = [run.seconds / run.steps for run in runs if run.seconds is not None and run.steps]
    pace = fmean(known) if known else None
    return [replace(run, seconds=run.steps * pace) if run.seconds is None and pace is not None else run for run in runs]


def estimate(jobs: Sequence[Job], at_once: int, results: Path | None = None) -> str | None:
    """A line about the runs that are still to be started; None if there are none. `results`: earlier reports."""
    waiting = [job for job in jobs if job.state == "waiting" and not job.same_as]
    if not waiting:
        return None
    reported = reported_paces(waiting, results) if results else NO_PACES
    runs = with_others([expected(job, jobs, reported) for job in waiting])
    work = f"estimate: {len(runs)} run{'s' if len(runs) > 1 else ''} with {sum(run.steps for run in runs):,} GRPO steps"
    if any(run.seconds is None for run in runs):
        return f"{work}; for hours and cost, give elsewhere.seconds_per_step, or let a run begin"
    total = sum(run.seconds for run in runs)
    at_least = max(run.seconds for run in runs)
    apart = "starting, evaluations" if any(run.basis == GIVEN for run in runs) else "starting"
    wall = format_time(max(at_least, total / min(at_once, len(runs))))
    return (
        f"{work}, {total / HOUR:.1f} hours on one machine ({basis_of(runs, results)}; {apart} and waiting apart)"
        f"{cost([(run.seconds, run.price_per_hour) for run in runs])}; {wall} with {at_once} at once"
    )


def basis_of(runs: Sequence[Expected], results: Path | None) -> str:
    """How many runs are estimated from what."""
    names = {REPORTED: f"the times in {results}, perhaps of another machine", OTHERS: "the mean of the other settings"}
    counts = Counter(run.basis for run in runs)
    words = [(count, names.get(basis, basis)) for basis, count in counts.items()]
    if len(words) == 1:
        return f"by {words[0][1]}"
    return ", ".join(f"{count} by {name}" for count, name in words)


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
