"""Saturation curves: known parameters found again under noise, and curves that have none refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from utils.ablations.saturation import NoFit, curve, fit, fit_run, saturation_parts
from utils.plots.history import Point, Run

STEPS = [*range(0, 84, 4)]


def rewards(
    limit: float, middle: float, steepness: float, noise: float = 0.01, seed: int = 0, start: float = 0.3
) -> list[float]:
    values = curve(np.array(STEPS[1:], float), start, limit, middle, steepness)
    return [start, *(values + noise * np.random.default_rng(seed).standard_normal(len(values)))]


def run_of(values: list[float], seed: int = 1, name: str = "a", ending: str = "finished") -> Run:
    points = {step: Point(value) for step, value in zip(STEPS, values, strict=False)}
    return Run(name, "", "", seed, ending, curves={"eval/reward": points})


def test_the_curve_by_hand() -> None:
    # half of the rise at C_mid; at twice of it with B = 2, 1 / (1 + 1 / 4) = 0.8 of it
    assert curve(np.array([10.0, 20.0]), 0.2, 0.7, 10.0, 2.0) == pytest.approx([0.45, 0.6])


@pytest.mark.parametrize(("limit", "middle", "steepness"), [(0.9, 10.0, 1.5), (0.7, 25.0, 2.5), (0.95, 6.0, 1.2)])
def test_known_parameters_are_found_again(limit: float, middle: float, steepness: float) -> None:
    exact = fit(STEPS, rewards(limit, middle, steepness, noise=0.0))
    assert (exact.start, exact.limit, exact.middle, exact.steepness) == pytest.approx((0.3, limit, middle, steepness))
    fits = [fit(STEPS, rewards(limit, middle, steepness, 0.01, seed)) for seed in range(12)]
    for name, error, true in (
        ("limit", "limit_error", limit),
        ("middle", "middle_error", middle),
        ("steepness", "steepness_error", steepness),
    ):
        found, errors = ([getattr(one, field) for one in fits] for field in (name, error))
        assert np.mean(found) == pytest.approx(true, rel=0.1)
        # the errors that single fits give are those that the fits really have
        assert 0.5 < np.mean(errors) / np.std(found, ddof=1) < 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (rewards(0.9, 10, 1.5)[:8], "fewer than 8 evaluations"),
        (rewards(0.301, 10, 1.5, 0.02), "explains less|convergence"),  # flat
        (rewards(0.32, 10, 1.5, 0.001), "no rise"),
        ([0.3, *np.linspace(0.35, 0.5, 20)], "after the run's end|convergence|A is not known"),  # a line: no end in it
        ([0.3, 0.8, 0.9, *[0.1 + 0.2 * (i % 2) for i in range(18)]], "explains less|convergence"),  # it fell
        (rewards(0.1, 10, 1.5), "no rise"),
        ([0.3, *[0.9, 0.91] * 10], "explains less|before the first|convergence"),
        ([], "before training"),
    ],
)
def test_what_has_no_such_curve_is_refused(values: list[float], reason: str) -> None:
    with pytest.raises(NoFit, match=reason):
        fit(STEPS[: len(values)], values)


def test_a_run_without_its_first_evaluation_or_collapsed_is_refused() -> None:
    good = rewards(0.9, 10, 1.5)
    with pytest.raises(NoFit, match="collapsed"):
        fit_run(run_of(good, ending="collapsed"), "eval/reward")
    with pytest.raises(NoFit, match="before training"):
        fit_run(run_of([float("nan"), *good[1:]]), "eval/reward")
    with pytest.raises(NoFit, match="before training"):
        fit_run(run_of(good), "eval/other")
    gap = fit_run(run_of([*good[:5], float("nan"), *good[6:]]), "eval/reward")
    assert gap.limit == pytest.approx(0.9, abs=0.05)


def test_the_section_has_a_row_where_most_seeds_are_fitted() -> None:
    runs = [run_of(rewards(0.9, 10, 1.5, 0.0), seed) for seed in (1, 2)]
    runs += [run_of(rewards(0.8, 10, 1.5, 0.0), 3), run_of(rewards(0.9, 10, 1.5), 4, ending="collapsed")]
    runs += [run_of(rewards(0.9, 10, 1.5), 1, "b"), run_of(rewards(0.9, 10, 1.5)[:5], 2, "b")]
    heading, table, _, without = saturation_parts(runs, "eval/reward")
    assert heading.startswith("## Where `eval/reward`")
    (row,) = table.splitlines()[2:]
    assert row.startswith("| a | 3 of 4 | 0.3 ± ")  # A: 0.9, 0.9, 0.8, standard error 0.0577 / sqrt 3
    assert "| 0.867 ± 0.0333 | 10 ± " in row
    assert "`a` (1: collapsed)" in without
    assert "`b` (1: fewer than 8 evaluations after the first, 1: fitted, but most seeds are not)" in without
