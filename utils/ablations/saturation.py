"""Saturation curves (ScaleRL, arXiv:2510.13786, equation 1): what reward a run tends to, and how sure that is."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from utils.ablations.compare import by_setting, measured
from utils.plots.history import Run
from utils.plots.summary import COLLAPSED, estimate, markdown_rows

LEAST_EVALUATIONS = 8  # after the one before training
LEAST_EXPLAINED = 0.5  # of the rewards' variance
LEAST_RISE = 0.05  # of reward: what is flatter is noise about a line
WIDEST = 0.2  # standard error of A, as a share of A - R0
TRIES = 2000  # evaluations of the curve, after which there is no convergence
HEADER = ("run", "fitted", "R0", "A", "C_mid", "B", "error of A in one fit")


class NoFit(Exception):
    """A curve is not fitted; the text says why."""


@dataclass(frozen=True)
class Saturation:
    """R(C) = start + (limit - start) / (1 + (middle / C)^steepness), and the standard errors of what was fitted."""

    start: float  # R0, the evaluation before training: measured, not fitted
    limit: float  # A
    middle: float  # C_mid, GRPO steps to half of the rise
    steepness: float  # B
    limit_error: float
    middle_error: float
    steepness_error: float


def curve(steps: np.ndarray, start: float, limit: float, middle: float, steepness: float) -> np.ndarray:
    """The reward after `steps` > 0."""
    return start + (limit - start) / (1 + (middle / steps) ** steepness)


def fit(steps: Sequence[int], rewards: Sequence[float]) -> Saturation:
    """Fit the curve by least squares to rewards at ascending steps, the first of which is 0.

    The logarithms of C_mid and B are fitted, so that both stay above 0. Standard errors are from the covariance, which
    takes the evaluations as independent. Raises NoFit with the reason.
    """
    if not steps or steps[0] != 0:
        raise NoFit("no evaluation before training")
    if len(steps) - 1 < LEAST_EVALUATIONS:
        raise NoFit(f"fewer than {LEAST_EVALUATIONS} evaluations after the first")
    start, x, y = rewards[0], np.array(steps[1:], float), np.array(rewards[1:])

    def model(x: np.ndarray, limit: float, log_middle: float, log_steepness: float) -> np.ndarray:
        return curve(x, start, limit, np.exp(log_middle), np.exp(log_steepness))

    guess = (y[-3:].mean(), np.log(np.median(x) / 2), 0.0)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("error", OptimizeWarning)
            (limit, *logs), covariance = curve_fit(model, x, y, p0=guess, maxfev=TRIES)
            fitted = model(x, limit, *logs)
            (middle, steepness), errors = np.exp(logs), np.sqrt(np.diag(covariance))
    except (RuntimeError, OptimizeWarning, ValueError):
        raise NoFit("no convergence") from None
    result = Saturation(start, limit, middle, steepness, errors[0], middle * errors[1], steepness * errors[2])
    _check(result, x, y, fitted)
    return result


def _check(result: Saturation, x: np.ndarray, y: np.ndarray, fitted: np.ndarray) -> None:
    """Raise NoFit if the curve does not describe the rewards, or the rewards do not determine the curve."""
    spread = ((y - y.mean()) ** 2).sum()
    if not ((y - fitted) ** 2).sum() < (1 - LEAST_EXPLAINED) * spread:
        raise NoFit(f"the curve explains less than {100 * LEAST_EXPLAINED:.0f} % of the variance")
    if result.limit < result.start + LEAST_RISE:
        raise NoFit(f"no rise of {LEAST_RISE}")
    if result.middle > x[-1]:
        raise NoFit("half of the rise would come after the run's end")
    if result.middle < x[0] / 2:
        raise NoFit("half of the rise came before the first evaluations")
    if not result.limit_error <= WIDEST * (result.limit - result.start):
        raise NoFit(f"A is not known to {100 * WIDEST:.0f} % of the rise")
    if not result.steepness_error <= result.steepness:
        raise NoFit("B is not known to its own size")


def fit_run(run: Run, metric: str) -> Saturation:
    """Of an evaluated metric over GRPO steps. Raises NoFit."""
    if run.ending == COLLAPSED:
        raise NoFit("collapsed")
    points = [(step, point.value) for step, point in sorted(run.curves.get(metric, {}).items())]
    points = [(step, value) for step, value in points if np.isfinite(value)]
    return fit([step for step, _ in points], [value for _, value in points])


def saturation_parts(runs: Sequence[Run], metric: str) -> list[str]:
    """A section with a row per setting of which most seeds have a fit, and why the other runs have none."""
    rows, without = [HEADER], []
    for name, seeds in by_setting(runs).items():
        fits, reasons = [], Counter()
        for run in seeds:
            try:
                fits.append(fit_run(run, metric))
            except NoFit as reason:
                reasons[str(reason)] += 1
        if 2 * len(fits) > len(seeds):
            rows.append(_row(name, fits, len(seeds)))
        elif fits:
            reasons["fitted, but most seeds are not"] = len(fits)
        if reasons:
            without.append(f"`{name}` ({', '.join(f'{n}: {reason}' for reason, n in reasons.items())})")
    parts = [f"## Where `{metric}` tends to"]
    if len(rows) > 1:
        parts += [
            markdown_rows(rows),
            "R = R0 + (A - R0) / (1 + (C_mid / C)^B) over C GRPO steps (ScaleRL, arXiv:2510.13786, equation 1), fitted "
            "to each run. R0 is its evaluation before training. A row is there if most seeds are fitted: their mean ± "
            "standard error over seeds, and the mean standard error of A from one fit's covariance, which is too small "
            "where evaluations share their noise, as those of the same problems do. Where A is beyond the last "
            "evaluations, it is extrapolated.",
        ]
    return [*parts, f"Seeds without a row or left out of it: {'; '.join(without)}."] if without else parts


def _row(name: str, fits: Sequence[Saturation], n_seeds: int) -> tuple[str, ...]:
    columns = ([getattr(fit, field) for fit in fits] for field in ("start", "limit", "middle", "steepness"))
    means = [measured(estimate([float(value) for value in values])) for values in columns]
    error = float(np.mean([fit.limit_error for fit in fits]))
    return name, f"{len(fits)} of {n_seeds}", *means, f"{error:.2g}"
