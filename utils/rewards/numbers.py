"""Numbers as people write them -> exact fractions; number words. Python integers throughout, never floats."""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_DIGITS = 400
MAX_EXPONENT = 400  # of ten
MAX_FACTORIAL = 100
APPROXIMATION_DIGITS = 10  # a decimal with this many significant digits may stand for a number that has more

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
SIGN = r"(?P<sign>[+-]?) ?"
POWER = r"(?: ?\\cdot ?10\^\{ ?(?P<power>[+-]? ?[0-9]{1,4}) ?\}|[eE](?P<e_power>[+-]?[0-9]{1,4}))?"
PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"{SIGN}(?P<decimal>{DECIMAL}){POWER}",
        rf"{SIGN}\\frac\{{ ?(?P<top_sign>[+-]?) ?(?P<top>{DECIMAL}) ?\}}"
        rf"\{{ ?(?P<bottom_sign>[+-]?) ?(?P<bottom>{DECIMAL}) ?\}}",
        rf"{SIGN}(?P<top>{DECIMAL}) ?/ ?(?P<bottom_sign>[+-]?)(?P<bottom>{DECIMAL})",
        rf"{SIGN}(?P<whole>[0-9]+) ?\\frac\{{ ?(?P<top>[0-9]+) ?\}}\{{ ?(?P<bottom>[0-9]+) ?\}}",
        rf"{SIGN}(?P<whole>[0-9]+) (?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)",
        rf"{SIGN}(?P<decimal>[0-9]*\.[0-9]*)\\overline ?\{{(?P<repeated>[0-9]+)\}}",
    )
]

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = {word: value for value, word in enumerate(_UNITS)}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS, start=2)}
NUMBER_WORDS |= {
    f"{ten}-{unit}": 10 * tens + units
    for tens, ten in enumerate(_TENS, start=2)
    for units, unit in enumerate(_UNITS[:10])
    if units
}
_PARTS = ["half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
PARTS = {name: Fraction(1, n) for n, name in enumerate(_PARTS, start=2)}
PARTS |= {"fourth": Fraction(1, 4), "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000)}
PARTS |= {f"{name}s": part for name, part in PARTS.items()} | {"halves": Fraction(1, 2)}
MULTIPLES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _plain(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip(".") or "0")


def parse_number(text: str) -> Fraction | None:
    """The exact value of a canonical text that is one number and nothing else; None if it is anything else.

    Integers, decimals, thousands separators, fractions, mixed numbers, powers of ten and repeating decimals.
    """
    if len(text) > MAX_DIGITS or not any(char.isdigit() for char in text):
        return None
    if text.startswith("(") and text.endswith(")") and "," not in text:
        text = text[1:-1].strip()
    match = next(filter(None, (pattern.fullmatch(text) for pattern in PATTERNS)), None)
    if match is None:
        return None
    parts = match.groupdict()
    value = _plain(parts["decimal"]) if parts.get("decimal") else Fraction(parts.get("whole") or 0)
    if parts.get("repeated"):
        places = len(parts["decimal"].partition(".")[2])
        value += Fraction(int(parts["repeated"]), (10 ** len(parts["repeated"]) - 1) * 10**places)
    if parts.get("bottom"):
        bottom = _plain(parts["bottom"])
        if not bottom:
            return None
        value += _plain(parts["top"]) / bottom
    power = int((parts.get("power") or parts.get("e_power") or "0").replace(" ", ""))
    if abs(power) > MAX_EXPONENT:
        return None
    negative = sum(parts.get(sign) == "-" for sign in ("sign", "top_sign", "bottom_sign")) % 2
    return (-value if negative else value) * Fraction(10) ** power


def parse_number_words(text: str) -> Fraction | None:
    """`four`, `twenty-five`, `3 million`, `two thirds`, `negative 5`, `6 squared` -> their value; None if not such."""
    words = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text.strip().lower()).split()
    if len(words) < 2:
        return _simple(words)
    if words[0] in ("negative", "minus"):
        value = None if words[-1] in OPERATIONS else parse_number_words(" ".join(words[1:]))
        return -value if value is not None and value >= 0 else None
    if words[-1] in PARTS and "and" in words:  # two and a half
        whole, part = words[: words.index("and")], parse_number_words(" ".join(words[words.index("and") + 1 :]))
        value = _simple(whole)
        return value + part if value is not None and part is not None and 0 < part < 1 else None
    *head, last = words
    if last in MULTIPLES or last in PARTS:
        count = Fraction(1) if head in (["a"], ["one"]) else parse_number_words(" ".join(head))
        return None if count is None else count * (MULTIPLES.get(last) or PARTS[last])
    if last in OPERATIONS:
        value = _simple(head)
        return None if value is None else OPERATIONS[last](value)
    return _simple(words)


def _simple(words: list[str]) -> Fraction | None:
    """The value of digits, or of a number up to 99 in words."""
    value = NUMBER_WORDS.get("-".join(words), PARTS["half"] if words == ["half"] else None)
    return parse_number(" ".join(words)) if value is None else Fraction(value)


def _factorial(value: Fraction) -> Fraction | None:
    whole = value.denominator == 1 and 0 <= value <= MAX_FACTORIAL
    return Fraction(math.factorial(int(value))) if whole else None


OPERATIONS = {"squared": lambda value: value**2, "cubed": lambda value: value**3, "factorial": _factorial}


def approximates(decimal: str, value: Fraction) -> bool:
    """Whether a long decimal is the value, rounded or cut off: 0.0833333333333333 is 1/12, 0.083 is not."""
    whole, point, places = decimal.strip().lstrip("+-").partition(".")
    if not point or not (whole + places).isascii() or not (whole + places).isdigit():
        return False
    if len((whole + places).lstrip("0")) < APPROXIMATION_DIGITS:
        return False
    return abs(Fraction(decimal.strip()) - value) <= Fraction(1, 10 ** len(places))


def rounds_to(value: Fraction, decimal: str) -> bool:
    """Whether a decimal of any length is the value, rounded or cut off: 2.83, 2.8, 3 and 2.828 are 2 sqrt(2)."""
    if not re.fullmatch(r"-?[0-9]{1,60}(?:\.[0-9]{1,60})?", decimal):
        return False
    ulp = Fraction(1, 10 ** len(decimal.partition(".")[2]))
    error = value - Fraction(decimal)
    return 2 * abs(error) <= ulp or (abs(error) < ulp and error * value > 0)
