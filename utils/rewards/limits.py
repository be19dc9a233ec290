"""What may be parsed at all: checks on the text alone, before any mathematics library sees it."""

from __future__ import annotations

import re

MAX_ANSWER_LENGTH = 2_000  # characters; a longer prediction can only match letter for letter
MAX_FORMULA_LENGTH = 300  # of one formula inside it
MAX_DEPTH = 10  # of brackets; the grammar takes exponential time in it
MAX_BARS = 6  # of absolute values, likewise
MAX_NUMBER_DIGITS = 60
MAX_EXPONENT_DIGITS = 4
MAX_FACTORIAL_DIGITS = 3
MAX_MATRIX_CELLS = 100
MAX_LIST_ITEMS = 200

GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|"
    "phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega"
)
FUNCTIONS = (
    "frac|sqrt|binom|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|pi|cdot|infty|"
    "lfloor|rfloor|lceil|rceil"
)
ALLOWED_MACRO = re.compile(rf"\\(?:{GREEK}|{FUNCTIONS})")
ALLOWED_CHARACTERS = re.compile(r"[a-zA-Z0-9+\-*/^_!|.'(){}\[\] ]*")
MACRO = re.compile(r"\\(?:[a-zA-Z]+|.)", re.DOTALL)
EXPONENT = re.compile(r"\^ ?\{([^{}]*)\}")


def refusal(formula: str) -> str | None:
    """Why a canonical formula must not be parsed, None if it may.

    Only macros that mean a number, a symbol or an elementary function are let through: no sums, integrals, limits,
    determinants, definitions or operator names.
    """
    if len(formula) > MAX_FORMULA_LENGTH:
        return "length"
    if not all(ALLOWED_MACRO.fullmatch(macro) for macro in MACRO.findall(formula)):
        return "macro"
    plain = MACRO.sub(" ", formula)
    if not ALLOWED_CHARACTERS.fullmatch(plain):
        return "character"
    if re.search(r"(?<![a-zA-Z'])'", plain):
        return "prime"
    if any(len(digits) > MAX_NUMBER_DIGITS for digits in re.findall(r"[0-9]+", plain)):
        return "digits"
    if nesting(plain) > MAX_DEPTH:
        return "depth"
    if plain.count("|") > MAX_BARS:
        return "bars"
    if "!!" in plain or re.search(rf"[0-9]{{{MAX_FACTORIAL_DIGITS + 1},}} ?!|[)}}] ?!", plain):
        return "factorial"
    if re.search(r"\} ?\^", plain) and re.search(r"\^ ?\{[^{}]*\} ?\^", plain):
        return "exponent"
    if any(_too_high(exponent) for exponent in EXPONENT.findall(formula)) or _tower(formula) > 2:
        return "exponent"
    return None


def nesting(text: str) -> int:
    """How deep brackets of any kind nest, matched or not."""
    depth = deepest = 0
    for char in text:
        if char in "({[":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")}]":
            depth -= 1
    return deepest


def _too_high(exponent: str) -> bool:
    return any(len(digits) > MAX_EXPONENT_DIGITS for digits in re.findall(r"[0-9]+", exponent))


def _tower(formula: str) -> int:
    """How many exponents are stacked on top of each other."""
    stack, highest = [], 0
    previous = ""
    for char in formula.replace(" ", ""):
        if char == "{":
            stack.append(previous == "^")
            highest = max(highest, sum(stack))
        elif char == "}" and stack:
            stack.pop()
        previous = char
    return highest
