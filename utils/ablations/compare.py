"""Settings compared seed by seed: paired t-tests, corrected for their number, and whether published claims hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student_t

from utils.ablations.published import Claim
from utils.plots.history import Run
from utils.plots.style import in_order
from utils.plots.summary import COLLAPSED, Estimate, end_value, estimate, finite

SIGNIFICANCE = 0.05
POWER = 0.8
YES, NO, IN_PART, OPEN, UNJUDGED = "yes", "no", "in part", "cannot be told apart", "not judged"


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired t-test of a mean difference, as one of several.

    `p` is corrected. `level` is what Holm's procedure held the test's own p value against.
    """

    gap: Estimate
    n: int  # seeds
    p: float
    level: float

    @property
    def direction(self) -> int:
        """The mean difference's sign if it is told from 0, else 0."""
        return 0 if self.p >= SIGNIFICANCE else 1 if self.gap.mean > 0 else -1

    @property
    def visible(self) -> float:
        """The smallest true difference that is told from 0 in 80 % of repetitions, with the standard error seen here.

        That is the minimum detectable effect of Bloom (1995), by the noncentral t distribution.
        """
        critical = student_t.isf(self.level / 2, self.n - 1)
        shift = brentq(lambda shift: nct.sf(critical, self.n - 1, shift) - POWER, critical / 2, 2 * critical)
        return shift * self.gap.standard_error


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


def p_value(gaps: Sequence[float]) -> float:
    """Of a two-sided t-test of the mean difference against 0. Expects two differences or more."""
    gap = estimate(gaps)
    if not gap.standard_error:
        return float(gap.mean == 0)
    return float(2 * student_t.sf(abs(gap.mean / gap.standard_error), len(gaps) - 1))


def holm(p_values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The p values as Holm (1979) corrects them for their number, and the level that each was held against.

    The smallest of m is held against 0.05 / m, the next against 0.05 / (m - 1), up to the first that fails; all after
    it fail too.
    """
    m, corrected, levels = len(p_values), [0.0] * len(p_values), [0.0] * len(p_values)
    highest, left = 0.0, m
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        left = m - rank if highest < SIGNIFICANCE else left
        highest = max(highest, min(1.0, (m - rank) * p_values[i]))
        corrected[i], levels[i] = highest, SIGNIFICANCE / left
    return corrected, levels


def paired_tests(family: Sequence[Sequence[float]], looks: int = 1) -> list[PairedTest | None]:
    """A test of each list of differences, corrected for all of them; None for fewer than two differences.

    If seeds were added after a look at the first ones, there were two looks. A p value times their number is then below
    u with a chance of at most u, whatever decided on the seeds (the union bound), so that is what is corrected.
    """
    tested = [i for i, gaps in enumerate(family) if len(gaps) > 1]
    corrected, levels = holm([min(1.0, looks * p_value(family[i])) for i in tested])
    tests: list[PairedTest | None] = [None] * len(family)
    for i, p, level in zip(tested, corrected, levels, strict=True):
        tests[i] = PairedTest(estimate(family[i]), len(family[i]), p, level / looks)
    return tests


def measured(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3g}" + ("" if value.standard_error is None else f" ± {value.standard_error:.3g}")


def marked(gaps: Sequence[float], test: PairedTest | None) -> str:
    """The mean difference, with a star if it is told from 0."""
    return measured(estimate(gaps)) + (" \\*" if test and test.direction else "")


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds here. `test` is None if nothing was tested."""

    claim: Claim
    answer: str  # YES, NO, IN_PART, OPEN or UNJUDGED
    numbers: str
    remark: str = ""  # after the answer
    test: PairedTest | None = None

    def __str__(self) -> str:
        numbers = f": {self.numbers}" if self.numbers else ""
        return f"**{self.answer}**{f', {self.remark}' if self.remark else ''}{numbers}"


def judge(claims: Sequence[Claim], settings: dict[str, list[Run]], looks: int = 1) -> list[Verdict]:
    """A verdict on each claim whose settings and metric these runs have. Their tests are corrected together."""
    judged = [(claim, *_values(claim, settings)) for claim in claims if _can_be_judged(claim, settings)]
    same = [claim.relation == "equals" and bool(gaps) and not any(gaps) for claim, gaps, _ in judged]
    tests = paired_tests([[] if equal else gaps for (_, gaps, _), equal in zip(judged, same, strict=True)], looks)
    verdicts = []
    for (claim, gaps, numbers), equal, test in zip(judged, same, tests, strict=True):
        if claim.relation == "collapses":
            verdicts.append(_collapse(claim, settings[claim.run]))
        elif not gaps:
            verdicts.append(Verdict(claim, UNJUDGED, "no seed in common"))
        elif len(gaps) < 2:
            verdicts.append(Verdict(claim, UNJUDGED, numbers, "one seed"))
        elif equal:
            verdicts.append(Verdict(claim, YES, numbers, "equal in every seed"))
        else:
            held = claim.relation == "above" and test.direction == 1
            verdicts.append(Verdict(claim, OPEN if not test.direction else YES if held else NO, numbers, "", test))
    return verdicts


def _can_be_judged(claim: Claim, settings: dict[str, list[Run]]) -> bool:
    if claim.relation == "collapses":
        return bool(settings.get(claim.run))
    return all(by_seed(settings.get(name, []), claim.metric) for name in (claim.run, claim.other))


def _values(claim: Claim, settings: dict[str, list[Run]]) -> tuple[list[float], str]:
    """The seeds' differences that a claim is about, and its numbers as text."""
    if claim.relation == "collapses":
        return [], ""
    a, b = (by_seed(settings[name], claim.metric) for name in (claim.run, claim.other))
    gaps = differences(a, b)
    if not gaps:
        return [], ""
    means = [fmean(values[seed] for seed in a if seed in b) for values in (a, b)]
    return gaps, f"{means[0]:.3g} against {means[1]:.3g}, difference {measured(estimate(gaps))}"


def _collapse(claim: Claim, seeds: Sequence[Run]) -> Verdict:
    n = sum(run.ending == COLLAPSED for run in seeds)
    return Verdict(claim, YES if n == len(seeds) else NO if n == 0 else IN_PART, f"{n} of {len(seeds)} seeds")


def standard_errors(test: PairedTest) -> float:
    """How many standard errors the difference is from 0."""
    gap = test.gap
    return abs(gap.mean) / gap.standard_error if gap.standard_error else math.inf if gap.mean else 0.0
