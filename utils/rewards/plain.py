"""Answers that need no structure and no algebra: the same text, two numbers with their units, words."""

from __future__ import annotations

import re
from fractions import Fraction

from utils.rewards.numbers import approximates, parse_number, parse_number_words
from utils.rewards.structure import squash
from utils.rewards.units import TEXT, split_unit, unit_name, units_agree

MAX_WORDS = 8
WORDS = re.compile(r"(?!.*\b(?:and|or)\b)[A-Za-z][A-Za-z0-9 '.-]*")


def same_text(prediction: str, truth: str) -> bool:
    one, other = squash(prediction), squash(truth)
    if "\\text" in prediction or "\\text" in truth:
        one, other = one.casefold(), other.casefold()
    return one == other


def same_numbers(prediction: str, truth: str) -> bool | None:
    """Whether two numbers are equal, units included; None if one of them is no number."""
    (value, unit), (true_value, true_unit) = _split_words(prediction), _split_words(truth)
    one, other = _number(value), _number(true_value)
    if one is None or other is None:
        return None
    equal = one == other or approximates(value, other) or approximates(true_value, one)
    return equal and units_agree(unit, true_unit)


def _split_words(text: str) -> tuple[str, str]:
    """As `split_unit`, for numbers in words too: `five apples` -> `five`, `apple`."""
    value, unit = split_unit(text)
    words = text.split()
    if unit or not 2 <= len(words) <= MAX_WORDS or not words[0].isalpha() or _number(text) is not None:
        return value, unit
    for length in range(len(words) - 1, 0, -1):
        number = parse_number_words(" ".join(words[:length]))
        # Behind digits, the rest is a unit or it is not.
        if number is not None and split_unit(" ".join(["2", *words[length:]]))[0] == "2":
            return " ".join(words[:length]), unit_name(" ".join(words[length:]))
    return value, unit


def _number(text: str) -> Fraction | None:
    number = parse_number(text)
    return number if number is not None else parse_number_words(TEXT.sub(r" \1 ", text))


def _words(text: str) -> str | None:
    """The words that a text consists of, in lower case, without a parenthesis around them; None if it is no words."""
    plain = " ".join(TEXT.sub(r" \1 ", text).split())
    if plain.startswith("(") and plain.endswith(")"):
        plain = plain[1:-1].strip()
    return plain.rstrip(".").lower() if WORDS.fullmatch(plain) else None


def _surely_words(text: str) -> bool:
    """Whether a text of letters is meant as words: `\\text{AB}` and `odd` are, the products `ab` and `xyz` are not."""
    if TEXT.search(text):
        return True
    runs = re.findall(r"[A-Za-z]+", text)
    return any((len(run) >= 3 and list(run) != sorted(set(run))) or run in ("no", "on") for run in runs)


def same_words(prediction: str, truth: str) -> bool | None:
    """Whether two answers in words are equal; None if words do not decide."""
    one, other = _words(prediction), _words(truth)
    if (one is None or not _surely_words(prediction)) and (other is None or not _surely_words(truth)):
        return None
    if one is not None and other is not None:
        return one == other
    return False
