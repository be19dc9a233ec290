"""How far a slash reaches: a canonical formula with slashes -> the same with `\\frac`, as a reader would group it.

The grammar takes everything that is multiplied on to the right of a slash into the denominator. Readers do not:

    1/2x, -3/2 x     a fraction of numbers is one factor: x/2, -3x/2
    a/b x, x/(2) y   a space or a closed bracket ends the denominator: ax/b, xy/2
    -b/2a, 1/xy      otherwise what is written without a gap belongs together: -b/(2a), 1/(xy)
    5!/2!3!          so do factorials, and brackets side by side: 1/(x+1)(x+2)

A whole number before a fraction of numbers is a mixed number here too: `1 1/2 x` and `1\\frac{1}{2}x` are 3x/2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from utils.rewards.limits import MAX_DEPTH, nesting

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\s+|.", re.S)
CLOSING = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1}
FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|sec|csc|cot)h?|\\log|\\ln|\\exp")
BREAKS = {"+", "-", "\\cdot", ",", ")", "]", "}", "\\rfloor", "\\rceil", "|"}
SUFFIXES = {"!", "'"}
PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
SIMPLE_FRACTION = re.compile(r"\\frac\{[0-9]+\}\{[0-9]+\}")
MAX_SLASHES = 3  # of one term; more are left to the grammar


@dataclass
class Factor:
    """One factor of a product, with its scripts and the space before it."""

    text: str
    space: str = ""
    apart: bool = False  # the space says something: it does not only end a macro's name

    @property
    def bracketed(self) -> bool:
        return self.text.startswith("(") and self.text.endswith(")")

    @property
    def constant(self) -> bool:
        return not re.search("[a-zA-Z]", re.sub(r"\\(?:pi|sqrt|frac|binom)(?![a-zA-Z])", "", self.text))


def group_slashes(formula: str) -> str:
    """The formula with every slash written as `\\frac`, but for those that are better left to the grammar."""
    if "/" not in formula and "\\frac" not in formula:
        return formula
    grouped = _Reader(formula).sequence(until="")
    return grouped if nesting(grouped) <= MAX_DEPTH else formula


class _Reader:
    """Reads products term by term. Its caller has bounded the length and the nesting of the text."""

    def __init__(self, text: str):
        self.tokens = TOKEN.findall(text)
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        self.position += 1
        return self.tokens[self.position - 1]

    def sequence(self, until: str) -> str:
        """Terms and the signs between them, up to the closing bracket and with it."""
        pieces = []
        while self.peek():
            if self.peek() == until:
                pieces.append(self.take())
                break
            pieces.append(self.term())
            if self.peek() in BREAKS and self.peek() != until:
                pieces.append(self.take() + " " * (self.tokens[self.position - 1][-1].isalpha()))
        return "".join(pieces)

    def term(self) -> str:
        """One product: its parts between slashes, put together again."""
        parts: list[list[Factor]] = [[]]
        while self.peek() and self.peek() not in BREAKS:
            space, apart = self.space()
            if self.peek() == "/":
                self.take()
                parts.append([])
            elif self.peek() and self.peek() not in BREAKS:
                parts[-1].append(Factor(self.factor(), space, apart))
        return _fractions(parts)

    def space(self) -> tuple[str, bool]:
        """The white space that follows, and whether it says something: after a macro's name it only ends the name."""
        before = self.tokens[self.position - 1] if self.position else ""
        space = self.take() if self.peek().isspace() else ""
        return space, bool(space) and not re.fullmatch(r"\\[a-zA-Z]+", before)

    def factor(self) -> str:
        token = self.take()
        text = token
        if token in CLOSING:
            text = token + " " * token[-1].isalpha() + self.sequence(CLOSING[token])
        for _ in range(ARGUMENTS.get(token, 0)):
            text += self.script("[") + self.script("{")
        while self.peek() in ("^", "_", *SUFFIXES):
            text += self.take()
            if text[-1] in "^_":
                text += self.script("{")
        return text

    def script(self, opening: str) -> str:
        """An argument in brackets, if one follows."""
        start = self.position
        self.space()
        if self.peek() != opening:
            self.position = start
            return ""
        self.take()
        return opening + self.sequence(CLOSING[opening])


def _fractions(parts: list[list[Factor]]) -> str:
    """The text of a product, of which slashes separate the parts."""
    parts = [_mixed_number(part) for part in parts]
    unclear = not all(parts) or len(parts) > MAX_SLASHES + 1
    if len(parts) == 1 or unclear or any(FUNCTION.match(factor.text) for factor in parts[0]):
        return "/".join(map(_product, parts))
    whole = parts[0].pop(0) if _begins_mixed_number(parts) else None
    before = parts[0]
    for part in parts[1:]:
        count = _reach(before, part)
        fraction = f"\\frac{{{_product(before).strip()}}}{{{_product(part[:count]).strip()}}}"
        before = [Factor(fraction, before[0].space), *part[count:]]
    if whole:
        before[0] = Factor(f"({whole.text}+{before[0].text.strip()})", whole.space)
    return _product(before)


def _product(factors: list[Factor]) -> str:
    return "".join(factor.space + factor.text for factor in factors)


def _begins_mixed_number(parts: list[list[Factor]]) -> bool:
    """`1 1/2 x`: two whole numbers before the slash and one after it."""
    numbers = [factor.text for factor in [*parts[0], parts[1][0]]]
    return len(numbers) == 3 and all(map(str.isdigit, numbers)) and parts[0][1].apart


def _mixed_number(part: list[Factor]) -> list[Factor]:
    """`1\\frac{1}{2}` at the start of a product becomes one factor."""
    if len(part) < 2 or not part[0].text.isdigit() or not SIMPLE_FRACTION.fullmatch(part[1].text):
        return part
    return [Factor(f"({part[0].text}+{part[1].text})", part[0].space, part[0].apart), *part[2:]]


def _reach(numerator: list[Factor], factors: list[Factor]) -> int:
    """How many of the factors behind a slash are its denominator."""
    first = factors[0]
    if FUNCTION.match(first.text):
        return len(factors)
    if PLAIN.fullmatch(first.text) and all(factor.constant for factor in numerator):
        return 1
    if first.bracketed and not (len(factors) > 1 and factors[1].bracketed):
        return 1
    return next((i for i, factor in enumerate(factors) if i and factor.apart), len(factors))
