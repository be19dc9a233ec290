"""How a canonical answer is built: pieces, brackets, names and their values. Text in, text out."""

from __future__ import annotations

import re

from utils.rewards.units import TEXT

TOKEN = re.compile(
    r"\\text ?\{[^{}]*\}|\\begin ?\{[a-zA-Z]*\*?\}|\\end ?\{[a-zA-Z]*\*?\}|\\[a-zA-Z]+|\\.|[a-zA-Z]+|\s+|.", re.S
)
SPACES = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
OPENING = {"(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle"}
CLOSING = {")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle"}
LIST_SEPARATORS = {",", ";", "and", "or", "\\text{and}", "\\text{or}"}
RELATIONS = {"=", "<", ">", "\\leq", "\\geq", "\\neq", "\\in", "\\approx", "\\equiv"}
FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}

# Possessive throughout: a name can be read in one way only, so that no text makes the match backtrack.
_NOT_A_NAME = r"(?!\\(?:frac|sqrt|sin|cos|tan|log|ln|sec|csc|cot|binom|infty|pi)(?![a-z]))"
_NAMES = rf"(?:{_NOT_A_NAME}(?:\\[a-zA-Z]++|[a-zA-Z])'*+(?:_\{{[^{{}}]*+\}})?+)++"
NAME = re.compile(
    rf"{_NAMES}(?:\([^()]*+\)|(?:[:/]{_NAMES})++)?+|\\frac\{{{_NAMES}\}}\{{{_NAMES}\}}"
    rf"|\({_NAMES}(?:,{_NAMES})++\)|\|{_NAMES}\|"
)
MAX_NAME_LENGTH = 60


def is_name(text: str) -> bool:
    """Whether a squashed text names something: `x`, `AB`, `f(x)`, `x_{1}`, `(x,y)`, `|AB|`, `V_{1}:V_{2}`."""
    return len(text) <= MAX_NAME_LENGTH and NAME.fullmatch(text) is not None


def squash(text: str) -> str:
    """The text without the wrapping of words and without spaces, but for those between digits: `1 1` is not `11`."""
    return SPACES.sub("", TEXT.sub(r"\1", text).strip())


def split_top(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """The pieces of a text between separators outside all brackets, and those separators."""
    pieces, found_separators, current, depth = [], [], [], 0
    for token in TOKEN.findall(text):
        key = re.sub(r"\s+", "", token) if token.startswith("\\text") else token
        if token in OPENING or token.startswith("\\begin"):
            depth += 1
        elif token in CLOSING or token.startswith("\\end"):
            depth -= 1
        if depth == 0 and key in separators:
            pieces.append("".join(current).strip())
            found_separators.append(key)
            current = []
        else:
            current.append(token)
    return [*pieces, "".join(current).strip()], found_separators


def enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening, content, closing) if one pair of brackets encloses the whole text, such as `[0,1)`; else None."""
    tokens = TOKEN.findall(text)
    if len(tokens) < 2 or tokens[0] not in OPENING or tokens[-1] not in CLOSING:
        return None
    depth = 0
    for position, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0 and position < len(tokens) - 1:
            return None
    return tokens[0], "".join(tokens[1:-1]).strip(), tokens[-1]


def named_value(text: str) -> tuple[str, str]:
    """(name, value) of `x = 5`, `5 = x`, `(x,y) = (1,2)`, `x \\in [1,2]`, `z = 1 + 1 = 2`, `x \\approx 5`.

    ("", text) of anything else: `2x + z = 1` is an equation, since no side of it is a name.
    """
    members, relations = split_top(text, RELATIONS)
    if not relations or not (set(relations) == {"="} or relations in (["\\in"], ["\\approx"])):
        return "", text
    names = [squash(member) for member in members]
    name = next((name for name in names[:-1] if is_name(name)), "")
    if name:
        return name, members[-1]
    if relations[-1] == "=" and is_name(names[-1]):
        return names[-1], members[0]
    return "", text
