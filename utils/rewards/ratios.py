"""Ratios such as `1:2`, which are the same as `2:4`, and times of day such as `12:30`, which are not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from utils.rewards.numbers import parse_number

MAX_PARTS = 5
HOURS, MINUTES = re.compile(r"[01]?[0-9]|2[0-4]"), re.compile(r"[0-5][0-9](?: ?[ap]m)?")


def are_times(one: list[str], other: list[str]) -> bool:
    """Whether two answers, as their parts, are to be compared as times of day: `10:20` is not `20:40`.

    So they are if both may be times, or if one has a leading zero, or am or pm.
    """
    surely = any(re.search("^0[0-9]|[ap]m$", part) for part in [*one, *other])
    both = all(HOURS.fullmatch(parts[0]) and all(map(MINUTES.fullmatch, parts[1:])) for parts in (one, other))
    return surely or both


def same_time(one: list[str], other: list[str]) -> bool:
    """Whether two times are the same, apart from a leading zero of the hours."""
    return one[0].lstrip("0") == other[0].lstrip("0") and one[1:] == other[1:]


def same_ratio(one: list[str], other: list[str], equal: Callable[[str, str], bool]) -> bool:
    """Whether two ratios, each as its parts, are proportional. `equal` compares two formulas."""
    if len(one) != len(other) or len(one) > MAX_PARTS or not all([*one, *other]):
        return False
    numbers, others = [*map(parse_number, one)], [*map(parse_number, other)]
    pairs = list(itertools.combinations(range(len(one)), 2))
    if None in numbers or None in others:
        return all(equal(f"({one[i]})({other[j]})", f"({one[j]})({other[i]})") for i, j in pairs)
    signs_agree = all(a * b >= 0 for a, b in zip(numbers, others, strict=True))
    return (
        any(numbers)
        and any(others)
        and signs_agree
        and all(numbers[i] * others[j] == numbers[j] * others[i] for i, j in pairs)
    )
