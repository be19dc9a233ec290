"""Settings compared seed by seed: differences with a paired t-test, and whether a published claim holds here."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from scipy.stats import t as student_t

from utils.ablations.published import Claim
from utils.plots.history import Run
from utils.plots.style import in_order
from utils.plots.summary import COLLAPSED, Estimate, end_value, estimate, finite

SIGNIFICANCE = 0.05


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {name: [run for run in runs if run.name == name] for name in in_order(run.name for run in runs)}


def by_seed(seeds: Sequence[Run], metric: str) -> dict[int | None, float]:
    """One value per seed that has the metric: where `eval/*` ended, and the mean over all GRPO steps of `train/*`."""
    with_it = [run for run in seeds if finite(run, metric)]
    evaluated = metric.startswith("eval/")
    return {run.seed: end_value(run, metric) if evaluated else fmean(finite(run, metric)) for run in with_it}


def differences(a: dict[int | None, float], b: dict[int | None, float]) -> list[float]:
    """a - b for each seed that both have: it gave them the same problems, in order, and the same evaluations."""
    return [a[seed] - b[seed] for seed in a if seed in b]


def direction(differences: Sequence[float]) -> int | None:
    """The mean's sign if a two-sided t-test at 5 % tells it from 0, else 0. None with fewer than two seeds."""
    if len(differences) < 2:
        return None
    gap = estimate(differences)
    critical = student_t.ppf(1 - SIGNIFICANCE / 2, len(differences) - 1)
    if abs(gap.mean) <= critical * gap.standard_error:
        return 0
    return 1 if gap.mean > 0 else -1


def measured(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3g}" + ("" if value.standard_error is None else f" ± {value.standard_error:.3g}")


def judged(gaps: Sequence[float]) -> str:
    """The mean difference, with a star if it is significant."""
    return measured(estimate(gaps)) + (" \\*" if direction(gaps) else "")


def check(claim: Claim, settings: dict[str, list[Run]]) -> str | None:
    """Whether a claim holds for these runs, with the numbers. None if they lack its settings or its metric."""
    seeds = settings.get(claim.run, [])
    if not seeds:
        return None
    if claim.relation == "collapses":
        n = sum(run.ending == COLLAPSED for run in seeds)
        return f"**{'yes' if n == len(seeds) else 'no' if n == 0 else 'in part'}**: {n} of {len(seeds)} seeds"
    a, b = by_seed(seeds, claim.metric), by_seed(settings.get(claim.other, []), claim.metric)
    if not a or not b:
        return None
    gaps = differences(a, b)
    if not gaps:
        return "**not judged**: no seed in common"
    means = [fmean(values[seed] for seed in a if seed in b) for values in (a, b)]
    numbers = f"{means[0]:.3g} against {means[1]:.3g}, difference {measured(estimate(gaps))}"
    sign = direction(gaps)
    if sign is None:
        return f"**not judged**, one seed: {numbers}"
    if claim.relation == "equals" and not any(gaps):
        return f"**yes**, equal in every seed: {numbers}"
    if sign == 0:
        return f"**cannot be told apart**: {numbers}"
    return f"**{'yes' if claim.relation == 'above' and sign == 1 else 'no'}**: {numbers}"
