"""One formula: parsed by Math-Verify's LaTeX grammar, then evaluated at a point. Runs in the worker only.

The parser builds a tree and evaluates nothing; the evaluator below walks it under its own limits. Neither hands text to
Python's or sympy's expression readers.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Callable
from fractions import Fraction

import mpmath
import sympy
from antlr4 import Token
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy.core.function import AppliedUndef

from utils.rewards.limits import refusal
from utils.rewards.numbers import parse_number
from utils.rewards.slashes import group_slashes

Number = Fraction | mpmath.mpf | mpmath.mpc

MAX_EXACT_BITS = 20_000
MAX_EXPONENT = 10**6
MAX_FACTORIAL = 1_000
MAX_ARGUMENT = 10**9  # of functions other than the logarithm


class UnsupportedError(ValueError):
    """The formula cannot be parsed, has no value, or would take too much to evaluate."""


class _Parser(_Latex2Sympy):
    """Math-Verify's converter, with numbers read exactly and nothing evaluated early."""

    def __init__(self) -> None:
        super().__init__(is_real=None, convert_degrees=False, config=ConversionConfig(lowercase_symbols=False))

    def parse(self, latex_str: str) -> sympy.Expr:
        """Read one expression and nothing else: the grammar's rules for sets and relations are slow, and not needed."""
        parser = self.create_parser(latex_str)
        tree = parser.expr()
        if parser.getCurrentToken().type != Token.EOF:
            raise UnsupportedError("more than one expression")
        return self.convert_expr(tree)

    def parse_number(self, text: str) -> sympy.Rational:
        value = parse_number(text)
        if value is None:
            raise UnsupportedError(f"number {text[:40]}")
        return sympy.Rational(value.numerator, value.denominator)

    def convert_postfix_list(self, factors: list, start: int = 0) -> sympy.Expr:
        """A product. The converter's own rule for mixed numbers makes 2(3) a 5; `group_slashes` wrote them as sums."""
        values = [self.convert_postfix(factor) for factor in factors[start:]]
        if not all(isinstance(value, sympy.Expr) for value in values):
            raise UnsupportedError("no product of expressions")
        return functools.reduce(self.mul_flat, values)

    def convert_binom(self, binom: object) -> sympy.Expr:
        return sympy.binomial(self.convert_expr(binom.upper), self.convert_expr(binom.lower), evaluate=False)

    def handle_exp(self, func: object) -> sympy.Expr:
        power = func.supexpr()
        if not power:
            return sympy.E
        exponent = self.convert_expr(power.expr()) if power.expr() else self.convert_atom(power.atom())
        return sympy.Pow(sympy.E, exponent, evaluate=False)


@functools.lru_cache(maxsize=256)
def parse(formula: str) -> sympy.Expr:
    """The tree of a canonical formula. Raises UnsupportedError."""
    reason = refusal(formula)
    if reason:
        raise UnsupportedError(reason)
    try:
        tree = _Parser().parse(group_slashes(formula).replace("'", "_{prime}"))
    except (RecursionError, MemoryError):
        raise
    except Exception as error:  # the grammar raises plain Exception for what it does not read
        raise UnsupportedError(f"grammar: {error}") from error
    if not isinstance(tree, sympy.Expr):
        raise UnsupportedError(f"no expression but {type(tree).__name__}")
    return tree


def _point(name: str, trial: int) -> Fraction:
    """A value for a variable: arbitrary, of either sign, the same in every process."""
    number = int.from_bytes(hashlib.blake2b(f"{trial}/{name}".encode(), digest_size=4).digest(), "big")
    return Fraction(number % 4001 - 2000, 641) or Fraction(1, 3)


def as_float(value: Number) -> mpmath.mpf | mpmath.mpc:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _finite(value: Number) -> Number:
    """The value, unless it is infinite or no number, which every comparison with a tolerance would let through."""
    if not isinstance(value, Fraction) and not mpmath.isfinite(value):
        raise UnsupportedError("infinite")
    return value


def _power(base: Number, exponent: Number) -> Number:
    if abs(exponent) > MAX_EXPONENT:
        raise UnsupportedError("exponent")
    if isinstance(exponent, Fraction):
        if exponent.denominator > MAX_EXPONENT:
            raise UnsupportedError("exponent")
        if isinstance(base, Fraction):
            if exponent.denominator == 1:
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits * abs(exponent) <= MAX_EXACT_BITS and (base or exponent >= 0):
                    return base ** int(exponent)
            elif exponent.denominator == 2 and base >= 0 and abs(exponent) < 100:
                root = [sympy.integer_nthroot(part, 2) for part in (base.numerator, base.denominator)]
                if root[0][1] and root[1][1] and (base or exponent > 0):
                    return Fraction(int(root[0][0]), int(root[1][0])) ** exponent.numerator
            elif exponent.denominator % 2 and base < 0:  # the real cube root of a negative number
                return (-1) ** exponent.numerator * _power(-base, exponent)
    if base == 0 and not (isinstance(exponent, Fraction) and exponent > 0):
        raise UnsupportedError("power of zero")
    return _finite(mpmath.power(as_float(base), as_float(exponent)))


def _factorial(value: Number) -> Number:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= MAX_FACTORIAL:
        return Fraction(math.factorial(int(value)))
    if abs(value) > MAX_FACTORIAL:
        raise UnsupportedError("factorial")
    return _finite(mpmath.gamma(as_float(value) + 1))


def _binomial(top: Number, bottom: Number) -> Number:
    whole = all(isinstance(value, Fraction) and value.denominator == 1 for value in (top, bottom))
    if whole and 0 <= bottom <= top <= MAX_FACTORIAL:
        return _factorial(top) / (_factorial(bottom) * _factorial(top - bottom))
    if max(abs(top), abs(bottom)) > MAX_FACTORIAL:
        raise UnsupportedError("binomial")
    return _finite(mpmath.binomial(as_float(top), as_float(bottom)))


def _floor(value: Number) -> Number:
    return Fraction(value.numerator // value.denominator) if isinstance(value, Fraction) else mpmath.floor(value)


def _by_mpmath(name: str) -> Callable[..., Number]:
    def function(*values: Number) -> Number:
        if name != "log" and any(abs(value) > MAX_ARGUMENT for value in values):
            raise UnsupportedError("argument")
        return _finite(getattr(mpmath, name)(*map(as_float, values)))

    return function


TRANSCENDENTAL = ["sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "asec", "acsc", "acot"]
TRANSCENDENTAL += ["sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "exp", "log", "gamma"]
FUNCTIONS = {name: _by_mpmath(name) for name in TRANSCENDENTAL}
FUNCTIONS |= {"factorial": _factorial, "binomial": _binomial, "floor": _floor, "Abs": abs}
FUNCTIONS["ceiling"] = lambda value: -_floor(-value)


def evaluate(tree: sympy.Basic, trial: int) -> Number:
    """The value of a tree at the point of a trial: a Fraction while it is rational. Raises UnsupportedError."""
    if isinstance(tree, sympy.Rational):
        return Fraction(int(tree.p), int(tree.q))
    if tree is sympy.pi:
        return +mpmath.pi
    if tree is sympy.E:
        return +mpmath.e
    if tree is sympy.I or (isinstance(tree, sympy.Symbol) and tree.name == "i"):
        return mpmath.mpc(0, 1)
    if isinstance(tree, sympy.Symbol | sympy.NumberSymbol):
        return _point(str(tree), trial)
    values = [evaluate(argument, trial) for argument in tree.args]
    if isinstance(tree, sympy.Add):
        return combine(values, operator.add)
    if isinstance(tree, sympy.Mul):
        return combine(values, operator.mul)
    if isinstance(tree, sympy.Pow):
        return _power(*values)
    if isinstance(tree, AppliedUndef):  # f(2): any function will do, so long as it tells its arguments apart
        key = ",".join(mpmath.nstr(as_float(value), 30) for value in values)
        return _point(f"{tree.func.__name__}({key})", trial)
    function = FUNCTIONS.get(type(tree).__name__)
    if function is None:
        raise UnsupportedError(type(tree).__name__)
    return function(*values)


def combine(values: list[Number], operation: Callable[[Number, Number], Number]) -> Number:
    if not all(isinstance(value, Fraction) for value in values):
        values = [as_float(value) for value in values]
    result = functools.reduce(operation, values)
    if (
        isinstance(result, Fraction)
        and result.denominator.bit_length() + result.numerator.bit_length() > MAX_EXACT_BITS
    ):
        raise UnsupportedError("size")
    return _finite(result)
