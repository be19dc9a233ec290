"""Are two canonical answers equal? Structure first (lists, tuples, relations, matrices, units), formulas last.

The structure is compared here, without any algebra; two formulas that are not plainly the same text or number go to
the `Algebra` that the caller gives.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Protocol

from utils.rewards.intervals import AND, as_condition, named_interval
from utils.rewards.limits import MAX_LIST_ITEMS, MAX_MATRIX_CELLS
from utils.rewards.matrices import MATRIX, is_determinant, matrix_rows
from utils.rewards.numbers import parse_number
from utils.rewards.plain import same_numbers, same_text, same_words
from utils.rewards.ratios import are_times, same_ratio, same_time
from utils.rewards.structure import (
    FLIPPED,
    LIST_SEPARATORS,
    RELATIONS,
    enclosed,
    is_name,
    named_value,
    split_top,
    squash,
)
from utils.rewards.twice import agree, split_approximation
from utils.rewards.units import split_unit, units_agree


class Algebra(Protocol):
    """Decides about formulas: canonical LaTeX without lists, relations, units or words."""

    def equal(self, one: str, other: str) -> bool:
        """Whether two formulas have the same value, for all values of their variables."""

    def proportional(self, one: tuple[str, str], other: tuple[str, str], positive: bool) -> bool:
        """Whether left - right of the one is a constant times (a positive one?) left - right of the other."""

    def rounds_to(self, formula: str, decimal: str) -> bool:
        """Whether a decimal is the value of a formula without variables, rounded or cut off."""


IN_BASE = re.compile(r"-?[0-9][0-9A-Za-z.]*_\{[^{}]*\}|-?[0-9A-F.]+_\{[0-9]+\}")
UNORDERED = ("list", "braces", "set", "union")
OR = {"or", "\\text{or}"}


def same(prediction: str, truth: str, algebra: Algebra) -> bool:
    """Whether two canonical answers are equal."""
    if not squash(prediction) or not squash(truth):
        return False
    if same_text(prediction, truth):
        return True
    for decide in (same_numbers, same_words):
        verdict = decide(prediction, truth)
        if verdict is not None:
            return verdict
    given_twice = split_approximation(prediction), split_approximation(truth)
    if any(given_twice):
        return _same_given_twice(prediction, truth, given_twice, algebra)
    prediction, truth = as_condition(prediction), as_condition(truth)
    one, other = _Collection(prediction), _Collection(truth)
    if one.kind or other.kind:
        return one.equals(other, algebra)
    return _same_single(prediction, truth, algebra)


def _same_given_twice(
    prediction: str, truth: str, pairs: tuple[tuple[str, str] | None, tuple[str, str] | None], algebra: Algebra
) -> bool:
    """`2\\sqrt{2} \\approx 2.83` against `2\\sqrt{2}`, or against the decimal alone."""
    if not all(agree(*pair, algebra.rounds_to) for pair in pairs if pair):
        return False
    exact, other_exact = (pair[0] if pair else text for pair, text in zip(pairs, (prediction, truth), strict=True))
    if not all(pairs):
        decimal, alone = (pairs[0][1], truth) if pairs[0] else (pairs[1][1], prediction)
        if "." in alone and same_numbers(decimal, alone):
            return True
    return same(exact, other_exact, algebra)


class _Collection:
    """An answer of several members.

    `kind` is "list" (bare), "and" (conditions that hold together), "braces" (bare, in braces that LaTeX does not
    print), "set", "union", the brackets of an ordered one, such as "()" or "[)", or "" for an answer that is none.
    `alternatives`: its members are separated by "or" alone.
    """

    def __init__(self, text: str):
        self.kind, self.members = "", [text]
        parts, separators = split_top(text, LIST_SEPARATORS)
        self.alternatives = bool(separators) and set(separators) <= OR
        around = enclosed(text)
        if len(parts) > 1:
            self.kind, self.members = "list", _excluded(_pair_up(text, parts))
            if AND.intersection(separators) and not OR.intersection(separators) and _bound_one_name(self.members):
                self.kind = "and"
        elif "\\cup" in text and len(union := split_top(text, {"\\cup"})[0]) > 1:
            self.kind, self.members = "union", union
        elif around and around[0] in ("\\{", "{"):
            self.kind = "set" if around[0] == "\\{" else "braces"
            self.members = split_top(around[1], LIST_SEPARATORS)[0]
        elif around and len(members := split_top(around[1], {",", ";"})[0]) > 1:
            self.kind, self.members = around[0] + around[2], members
        self.members = [member for member in self.members if member]
        if self.kind in ("", *UNORDERED) and any("\\pm" in member for member in self.members):
            self.kind = self.kind or "list"
            self.members = [signed for member in self.members for signed in _both_signs(member)]
        if all(map(enclosed, self.members)):
            self.members = list({squash(member): member for member in self.members}.values())  # a solution given twice

    def equals(self, other: _Collection, algebra: Algebra) -> bool:
        if not self.members or not other.members:
            return False
        if len(self.members) == 1 and len(other.members) == 1:
            unordered = all(kind in ("", *UNORDERED) for kind in (self.kind, other.kind))
            return unordered and same(self.members[0], other.members[0], algebra)
        if not self.kind:
            return other._versus_single(self.members[0], algebra)
        if not other.kind:
            return self._versus_single(other.members[0], algebra)
        if len(self.members) != len(other.members) or len(self.members) > MAX_LIST_ITEMS:
            return False
        if "and" in (self.kind, other.kind):
            same_sense = {self.kind, other.kind} <= {"and", "list"} and not (self.alternatives or other.alternatives)
            return same_sense and _same_in_any_order(self.members, other.members, algebra)
        if self.kind in UNORDERED and other.kind in UNORDERED:
            if (self.kind == "union") != (other.kind == "union") and not (self._relations() or other._relations()):
                return False
            compare = _same_in_any_order if self._named() == other._named() else _same_in_order
            return compare(self.members, other.members, algebra)
        return self._ordered_like(other) and _same_in_order(self.members, other.members, algebra)

    def _ordered_like(self, other: _Collection) -> bool:
        """Whether both have the same brackets, or one of them is a tuple and the other `{1,3}` or `x=1, y=3`."""
        bare = [collection for collection in (self, other) if collection.kind != "()"]
        return self.kind == other.kind or (len(bare) == 1 and (bare[0].kind == "braces" or bare[0]._named()))

    def _relations(self) -> bool:
        return all(split_top(member, set(FLIPPED))[1] for member in self.members)

    def _named(self) -> bool:
        """Whether the members belong to different names, so that their order counts if names are left out."""
        return len({named_value(member)[0] for member in self.members} - {""}) > 1

    def _versus_single(self, single: str, algebra: Algebra) -> bool:
        """Against an answer that is no collection itself: `(x,y) = (1,2)`, `x \\in [1,2]`, `1 < x < 2`, a column."""
        if self.kind == "list" and self.alternatives and not split_top(single, set(FLIPPED))[1]:
            return all(same(member, single, algebra) for member in self.members)  # one value, written in two ways
        name, value = named_value(single)
        if name:
            return self.equals(_Collection(value), algebra)
        if self.kind == "()" and (matrix := MATRIX.fullmatch(single)) and not is_determinant(matrix):
            rows = matrix_rows(matrix)
            return all(len(row) == 1 for row in rows) and _same_in_order(
                self.members, [row[0] for row in rows], algebra
            )
        interval = named_interval(single)
        return interval is not None and self.equals(_Collection(interval[1]), algebra)


def _bound_one_name(members: list[str]) -> bool:
    """Whether the members are conditions on one name, at least one of them an inequality."""
    names, bounds = [], 0
    for member in members:
        sides, relations = split_top(member, RELATIONS)
        names.append({squash(side) for side in sides if is_name(squash(side))} if relations else set())
        bounds += any(relation in FLIPPED for relation in relations)
    return bounds > 0 and bool(set.intersection(*names))


def _excluded(members: list[str]) -> list[str]:
    """`x \\neq 1, 2` -> `x \\neq 1`, `x \\neq 2`."""
    sides, relations = split_top(members[0], RELATIONS)
    if relations != ["\\neq"] or any(split_top(member, RELATIONS)[1] for member in members[1:]):
        return members
    return [members[0], *(f"{sides[0]}\\neq {member}" for member in members[1:])]


def _pair_up(text: str, parts: list[str]) -> list[str]:
    """`p=5,q=2;p=7,q=2` are two pairs, not four numbers."""
    groups = split_top(text, LIST_SEPARATORS - {","})[0]
    members = [[part for part in split_top(group, {","})[0] if part] for group in groups]
    if len(groups) > 1 and all(len(group) > 1 and all(named_value(m)[0] for m in group) for group in members):
        names = [[named_value(member)[0] for member in group] for group in members]
        if all(group == names[0] for group in names):
            return ["(" + ",".join(named_value(member)[1] for member in group) + ")" for group in members]
    return parts


def _both_signs(member: str) -> list[str]:
    if "\\pm" not in member:
        return [member]
    plus = re.sub(r"\\pm ?", "+", member).replace("\\mp", "-")
    minus = re.sub(r"\\pm ?", "-", member).replace("\\mp", "+")
    return [plus.removeprefix("+"), minus]


def _same_in_order(ones: list[str], others: list[str], algebra: Algebra) -> bool:
    return len(ones) == len(others) and all(same(a, b, algebra) for a, b in zip(ones, others, strict=True))


def _same_in_any_order(ones: list[str], others: list[str], algebra: Algebra) -> bool:
    """Match members one to one: first those whose text is the same, then the rest, which must be few."""
    left, right = Counter(map(squash, ones)), Counter(map(squash, others))
    rest_left, rest_right = list((left - right).elements()), list((right - left).elements())
    if len(rest_left) != len(rest_right):
        return False
    by_text = {squash(member): member for member in [*ones, *others]}
    remaining = [by_text[text] for text in rest_right]
    numbers = [parse_number(member) for member in remaining]
    if None not in numbers and None not in (mine := [parse_number(by_text[text]) for text in rest_left]):
        return sorted(mine) == sorted(numbers)
    for text in rest_left:
        match = next((i for i, member in enumerate(remaining) if same(by_text[text], member, algebra)), None)
        if match is None:
            return False
        del remaining[match]
    return True


def _same_single(prediction: str, truth: str, algebra: Algebra) -> bool:
    one, other = split_top(prediction, RELATIONS), split_top(truth, RELATIONS)
    if one[1] or other[1]:
        return _same_relation(prediction, truth, one, other, algebra)
    matrices = MATRIX.fullmatch(prediction), MATRIX.fullmatch(truth)
    if any(matrices):
        return all(matrices) and _same_matrix(*matrices, algebra)
    ratios = split_top(prediction, {":"})[0], split_top(truth, {":"})[0]
    if len(ratios[0]) > 1 or len(ratios[1]) > 1:
        if are_times(*ratios):
            return same_time(*ratios)
        return same_ratio(*ratios, algebra.equal) or _same_in_order(*ratios, algebra)
    return _same_formula(prediction, truth, algebra)


def _same_relation(prediction: str, truth: str, one: tuple, other: tuple, algebra: Algebra) -> bool:
    names = named_value(prediction), named_value(truth)
    intervals = named_interval(prediction), named_interval(truth)
    if not one[1] or not other[1]:
        if any(name for name, _ in names):
            return same(names[0][1], names[1][1], algebra)
        if any(intervals):
            mine, others = (interval and interval[1] for interval in intervals)
            return same(mine or prediction, others or truth, algebra)
        (chain, relations), single = (one, truth) if one[1] else (other, prediction)
        return set(relations) == {"="} and all(same(member, single, algebra) for member in chain)  # 10^2 = 100
    if all(intervals) and (["\\in"] in (one[1], other[1]) or len(one[1]) != len(other[1])):
        return intervals[0][0] == intervals[1][0] and same(intervals[0][1], intervals[1][1], algebra)
    if names[0][0] and names[0][0] == names[1][0]:
        return same(names[0][1], names[1][1], algebra)
    (left, relations), (right, others) = one, other
    if len(relations) == 1 and len(others) == 1:
        return _same_two_sides((left, relations[0]), (right, others[0]), algebra)
    if relations != others:
        left, relations = left[::-1], [FLIPPED.get(relation, relation) for relation in relations[::-1]]
    return relations == others and _same_in_order(left, right, algebra)


def _same_two_sides(one: tuple[list[str], str], other: tuple[list[str], str], algebra: Algebra) -> bool:
    (left, relation), (right, other_relation) = one, other
    if relation in (">", "\\geq"):
        left, relation = left[::-1], FLIPPED[relation]
    if other_relation in (">", "\\geq"):
        right, other_relation = right[::-1], FLIPPED[other_relation]
    if relation != other_relation:
        return False
    if [squash(side) for side in left] == [squash(side) for side in right]:
        return True
    symmetric = relation in ("=", "\\neq", "\\approx", "\\equiv")
    if symmetric and [squash(side) for side in left] == [squash(side) for side in right[::-1]]:
        return True
    if relation in ("\\in", "\\equiv", "\\approx"):
        return _same_in_order(left, right, algebra)
    return algebra.proportional(tuple(left), tuple(right), positive=not symmetric)


def _same_matrix(one: re.Match[str], other: re.Match[str], algebra: Algebra) -> bool:
    if is_determinant(one) != is_determinant(other):
        return False
    rows = matrix_rows(one), matrix_rows(other)
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]] or sum(map(len, rows[0])) > MAX_MATRIX_CELLS:
        return False
    return all(_same_in_order(left, right, algebra) for left, right in zip(*rows, strict=True))


def _same_formula(prediction: str, truth: str, algebra: Algebra) -> bool:
    (value, unit), (true_value, true_unit) = split_unit(prediction), split_unit(truth)
    if not units_agree(unit, true_unit):
        return False
    if unit or true_unit:
        return not (split_unit(value)[1] or split_unit(true_value)[1]) and same(value, true_value, algebra)
    if any(IN_BASE.fullmatch(squash(side)) or "\\infty" in side for side in (value, true_value)):
        return False  # the text differs, and neither infinity nor a spelling such as `204_5` has a value to compare
    return algebra.equal(value, true_value)
