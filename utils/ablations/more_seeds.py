"""Further seeds where the first ones leave a claim unclear: which settings get them, and why."""

from __future__ import annotations

from collections.abc import Sequence

from utils.ablations.compare import OPEN, by_setting, judge, standard_errors
from utils.ablations.jobs import ENDED, Job
from utils.ablations.published import find_ablation
from utils.plots.history import load_run

CLEAR = 3.0  # standard errors from which a difference is clear, if it is also told from 0
NOISE = 1.0  # standard errors below which a few more seeds would not help


def unclear(topic: str, jobs: Sequence[Job]) -> dict[str, str]:
    """The settings of a topic that get further seeds, and the claim that asks for them.

    Its difference is between one and three standard errors, or larger and not told from 0 after the correction. Only
    the runs in `jobs` count, so that the same first seeds decide when the command goes on after some further ones.
    """
    ended = [job for job in jobs if job.topic == topic and job.state in ENDED]
    settings = by_setting([load_run(job.folder)[0] for job in ended])
    reasons: dict[str, str] = {}
    for verdict in judge(find_ablation(topic).claims, settings, looks=2):
        if verdict.test is None:
            continue
        distance = standard_errors(verdict.test)
        if distance >= NOISE and (distance <= CLEAR or verdict.answer == OPEN):
            claim = verdict.claim
            reason = f"{claim.run} and {claim.other} differ by {distance:.1f} standard errors in {claim.metric}"
            reasons |= {name: reason for name in (claim.run, claim.other) if name not in reasons}
    return reasons


def at_most(first: Sequence[Job], planned: Sequence[Job]) -> list[Job]:
    """Those of the planned jobs beyond the first ones that a claim could ask for."""
    folders = {job.folder for job in first}
    compared = {
        f"{topic}/{name}"
        for topic in {job.topic for job in first}
        for claim in find_ablation(topic).claims
        if claim.other
        for name in (claim.run, claim.other)
    }
    return [job for job in planned if job.folder not in folders and job.setting in compared]


def further(first: Sequence[Job], n_seeds: int) -> tuple[dict[str, int], list[str]]:
    """How many seeds each unclear setting is to have, by topic and name, and a line for each reason."""
    wanted, lines = {}, []
    for topic in dict.fromkeys(job.topic for job in first):
        reasons = unclear(topic, first)
        wanted |= {f"{topic}/{name}": n_seeds for name in reasons}
        lines += [f"{topic}: {n_seeds} seeds, as {reason}" for reason in dict.fromkeys(reasons.values())]
    return wanted, lines
