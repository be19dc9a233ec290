"""Are two formulas equal? They are compared by their values at a few points. Runs in the worker only.

Rational values are exact; others have 60 digits, which no two answers to one problem share by accident, and where they
do, 320 digits decide.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from fractions import Fraction

import mpmath

from utils.rewards.formulas import Number, UnsupportedError, as_float, combine, evaluate, parse
from utils.rewards.numbers import approximates, rounds_to

DIGITS = 60
MORE_DIGITS = 320  # what decides whether a tiny difference is one, or rounding
TOLERANCE = mpmath.mpf(10) ** -40  # of values that DIGITS give
FINE_TOLERANCE = mpmath.mpf(10) ** -240  # of values that MORE_DIGITS give
POINTS = 3


def _close(one: Number, other: Number) -> bool:
    """Whether two values may be equal: their difference is small, beside them or beside 1."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    one, other = as_float(one), as_float(other)
    return abs(one - other) <= TOLERANCE * max(1, abs(one), abs(other))


@functools.lru_cache(maxsize=1024)
def _value(formula: str, trial: int, digits: int = DIGITS) -> Number:
    """The value at the point of a trial. Raises UnsupportedError."""
    try:
        with mpmath.workdps(digits):
            return evaluate(parse(formula), trial)
    except (ZeroDivisionError, OverflowError, TypeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error


def _same_at(one: str, other: str, trial: int) -> bool:
    """Whether two formulas have the same value at the point of a trial.

    `e^{-100}` and 0 are close, and so are `1+e^{-100}` and 1. With more digits a difference stays if it is one, and
    shrinks with the precision if it is rounding, as in `\\sqrt{2}^2-2`.
    """
    values = _value(one, trial), _value(other, trial)
    if not _close(*values):
        return False
    if all(isinstance(value, Fraction) for value in values):
        return True
    with mpmath.workdps(MORE_DIGITS):
        finer = as_float(_value(one, trial, MORE_DIGITS)), as_float(_value(other, trial, MORE_DIGITS))
        rough, fine = abs(as_float(values[0]) - as_float(values[1])), abs(finer[0] - finer[1])
        return fine <= FINE_TOLERANCE * max(map(abs, finer)) or fine <= TOLERANCE * rough


def _names(formula: str) -> set[str]:
    return {symbol.name for symbol in parse(formula).free_symbols} - {"i"}


def _real_value(formula: str) -> Fraction | None:
    """The value of a formula as a fraction, good to DIGITS - 10 digits; None if it is not real or holds variables."""
    value = _value(formula, 0)
    if _names(formula) or (isinstance(value, mpmath.mpc) and value.imag):
        return None
    return value if isinstance(value, Fraction) else Fraction(mpmath.nstr(mpmath.re(value), DIGITS - 10))


def _approximates(decimal: str, formula: str) -> bool:
    return "." in decimal and (value := _real_value(formula)) is not None and approximates(decimal, value)


def _rounds_to(formula: str, decimal: str) -> bool:
    return (value := _real_value(formula)) is not None and rounds_to(value, decimal)


class PointAlgebra:
    """Compares formulas by their values at a few points. One without a value equals nothing, and sets `refused`."""

    def __init__(self) -> None:
        self.refused = False

    def equal(self, one: str, other: str) -> bool:
        return self._decide(_equal, one, other)

    def proportional(self, one: tuple[str, str], other: tuple[str, str], positive: bool) -> bool:
        return self._decide(_proportional, one, other, positive)

    def rounds_to(self, formula: str, decimal: str) -> bool:
        return self._decide(_rounds_to, formula, decimal)

    def _decide(self, decide: Callable[..., bool], *formulas: object) -> bool:
        with mpmath.workdps(DIGITS):
            try:
                return decide(*formulas)
            except UnsupportedError:
                self.refused = True
                return False


def _equal(one: str, other: str) -> bool:
    if _same_at(one, other, 0):
        return all(_same_at(one, other, trial) for trial in range(1, POINTS))
    if _names(one) or _names(other):
        return False
    return _approximates(one, other) or _approximates(other, one)


def _proportional(one: tuple[str, str], other: tuple[str, str], positive: bool) -> bool:
    if set.union(*map(_names, one)) != set.union(*map(_names, other)):
        return False
    ratios = []
    for trial in range(POINTS):
        left, right = [as_float(combine([_value(a, trial), -_value(b, trial)], operator.add)) for a, b in (one, other)]
        if abs(left) < TOLERANCE or abs(right) < TOLERANCE:
            return False
        ratios.append(left / right)
    if positive and not (mpmath.im(ratios[0]) == 0 and mpmath.re(ratios[0]) > 0):
        return False
    return all(_close(ratio, ratios[0]) for ratio in ratios[1:])
