"""Sets of numbers written as inequalities -> intervals: `1 < x \\leq 2`, `x > 1 and x < 3`, `\\{x : x > 3\\}`."""

from __future__ import annotations

from utils.rewards.structure import FLIPPED, RELATIONS, enclosed, is_name, split_top, squash

AND = {"and", "\\text{and}"}


def as_condition(text: str) -> str:
    """A set in terms of its members as the condition on them, and two bounds as one chain; other texts as they are.

    `\\{x | x > 3\\}` -> `x > 3`; `x < 3 and x > 1` -> `1 < x < 3`.
    """
    text = _without_braces(text)
    parts = [part.rstrip(", ") for part in split_top(text, AND)[0]]
    if len(parts) != 2:
        return text
    bounds = [_upward(part) for part in parts]
    if None in bounds:
        return text
    for (low, first, name), (same_name, second, high) in (bounds, bounds[::-1]):
        if squash(name) == squash(same_name) and is_name(squash(name)):
            return f"{low} {first} {name} {second} {high}"
    return text


def _without_braces(text: str) -> str:
    around = enclosed(text)
    if not around or around[0] != "\\{":
        return text
    for separator in (":", "|"):
        head, separated, condition = around[1].partition(separator)
        name, *sets = split_top(head.strip(), {"\\in"})[0]
        everything = [squash(members) for members in sets] in ([], ["(-\\infty,\\infty)"])
        about_name = is_name(squash(name)) and squash(name) in squash(condition)
        if separated and everything and about_name and split_top(condition, RELATIONS)[1]:
            return condition.strip()
    return text


def _upward(text: str) -> tuple[str, str, str] | None:
    """(smaller, "<" or "\\leq", larger) of one inequality; None if it is anything else."""
    members, relations = split_top(text, RELATIONS)
    if len(relations) != 1 or relations[0] not in FLIPPED:
        return None
    if relations[0] in (">", "\\geq"):
        return members[1], FLIPPED[relations[0]], members[0]
    return members[0], relations[0], members[1]


def named_interval(text: str) -> tuple[str, str] | None:
    """The name and the interval, or the union of two, that a condition on it describes; None if it is none.

    `x < 5`, `1 < x \\leq 2`, `|x| > 3`, `x \\in [1,2]`.
    """
    members, relations = split_top(text, RELATIONS)
    if relations == ["\\in"] and is_name(squash(members[0])):
        return squash(members[0]), members[1]
    if not relations or any(relation not in FLIPPED for relation in relations) or len(members) > 3:
        return None
    if relations[0] in (">", "\\geq"):
        members, relations = members[::-1], [FLIPPED[relation] for relation in relations[::-1]]
    if any(relation in (">", "\\geq") for relation in relations):
        return None
    if len(members) == 2:
        name_first = is_name(squash(members[0]))
        members = ["-\\infty", *members] if name_first else [*members, "\\infty"]
        relations = ["<", *relations] if name_first else [*relations, "<"]
    low, name, high = members
    if not is_name(squash(name)):
        return None
    opening, closing = "[" if relations[0] == "\\leq" else "(", "]" if relations[1] == "\\leq" else ")"
    return squash(name).strip("|"), _interval(opening, low, high, closing, name.startswith("|"))


def _interval(opening: str, low: str, high: str, closing: str, absolute: bool) -> str:
    """The interval from low to high, of an absolute value together with its mirror image."""
    if not absolute:
        return f"{opening}{low},{high}{closing}"
    mirrored_opening, mirrored_closing = "[" if closing == "]" else "(", "]" if opening == "[" else ")"
    if low == "-\\infty":
        return f"{mirrored_opening}-({high}),{high}{closing}"
    negative_high = "-\\infty" if high == "\\infty" else f"-({high})"
    return f"{mirrored_opening}{negative_high},-({low}){mirrored_closing}\\cup {opening}{low},{high}{closing}"
