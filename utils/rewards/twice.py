"""A value given twice: exactly, then as a decimal, `2\\sqrt{2} \\approx 2.83`."""

from __future__ import annotations

from collections.abc import Callable

from utils.rewards.numbers import parse_number, rounds_to
from utils.rewards.structure import RELATIONS, named_value, split_top
from utils.rewards.units import split_unit

APPROX = "\\approx"


def split_approximation(text: str) -> tuple[str, str] | None:
    """(exact, decimal) of a canonical text that ends in `\\approx` and a number; None if it does not."""
    if text.endswith(")") and APPROX in text:  # 2\sqrt{2} (\approx 2.83)
        exact, opening, decimal = text.rpartition("(")
        text = exact + decimal[:-1] if opening and decimal.strip().startswith(APPROX) else text
    members, relations = split_top(text, RELATIONS)
    if len(members) < 2 or relations[-1] != APPROX or not members[-2]:
        return None
    exact = text[: text.rindex(APPROX)].strip()
    bare_name = len(members) == 2 and named_value(f"{exact}=1")[0]
    return None if bare_name or parse_number(split_unit(members[-1])[0]) is None else (exact, members[-1])


def agree(exact: str, decimal: str, formula_rounds_to: Callable[[str, str], bool]) -> bool:
    """Whether the decimal is the exact value, rounded or cut off: what follows must not be a second guess."""
    value = split_unit(named_value(exact)[1])[0]
    digits = split_unit(decimal)[0].replace(",", "").replace(" ", "")
    if len(split_top(value, {",", ";", "=", "and", "or"})[0]) > 1:
        return False
    number = parse_number(value)
    return formula_rounds_to(value, digits) if number is None else rounds_to(number, digits)
