"""Units: what stands after a value (or, for a currency, before it), and when two of them agree."""

from __future__ import annotations

import re

# One spelling a unit. A word that is not here is its own spelling, less a plural s.
SPELLINGS = {
    "percent": "% percent percentage pct percentage-points",
    "degree": "degrees deg °",
    "dollar": "dollars usd $ us-dollars bucks",
    "cent": "cents ¢",
    "euro": "euros eur",
    "pound": "pounds lb lbs gbp",
    "meter": "m meters metre metres",
    "centimeter": "cm cms centimeters centimetre centimetres",
    "millimeter": "mm millimeters millimetres",
    "kilometer": "km kilometers kilometre kilometres",
    "inch": "in inches",
    "foot": "ft feet",
    "yard": "yd yds yards",
    "mile": "mi miles",
    "gram": "g gm gms grams",
    "kilogram": "kg kgs kilograms",
    "ounce": "oz ounces",
    "liter": "l liters litres litre",
    "milliliter": "ml milliliters",
    "second": "s sec secs seconds",
    "minute": "min mins minutes",
    "hour": "h hr hrs hours",
    "day": "days",
    "mph": "miles-per-hour mi/h mi/hr",
}
CANONICAL = {spelling: unit for unit, spellings in SPELLINGS.items() for spelling in [unit, *spellings.split()]}
BARE_UNITS = {word for word in CANONICAL if len(word) > 1 and word.isalpha()} - {"in", "min"}
# Words that may not be dropped after a value: they change it, or say that something else was meant.
NOT_UNIT = re.compile(
    "am|pm|or|and|not|mod|base|hundred|thousand|million|billion|trillion|dozen|over|times|plus|minus|less|more|than|"
    "where|if|for|to|is|are|undefined|infinity|dne"
)

TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
# A unit may be several words, powers and quotients: cm^2, m/s, square feet.
TRAILING_TEXT = re.compile(
    r"^(?P<value>.*?[^\s\\{(,]) ?(?P<unit>\\text ?\{[^{}]*\}(?:[\s/.]|\^ ?\{ ?-?[0-9] ?\}|\\text ?\{[^{}]*\})*)$", re.S
)
TRAILING_WORDS = re.compile(
    r"^(?P<value>.*[0-9}\])!]|.*\\pi) ?"
    r"(?P<unit>(?<![a-zA-Z\\])[a-zA-Z]{2,}(?:[ /.-]+[a-zA-Z]+)*(?: ?\^ ?\{ ?[0-9] ?\})?)\.?$",
    re.S,
)
LEADING = re.compile(r"^(?P<sign>-?) ?\\text ?\{ ?(?P<unit>[^{}]*?) ?\} ?(?P<value>[^\s].*)$", re.S)


def unit_name(text: str) -> str:
    """One spelling for a unit: `\\text{ sq. cm}` and `cm^{2}` -> `centimeter^2`."""
    words = TEXT.sub(r" \1 ", text).lower().replace("^", " ^").replace("{", "").replace("}", "").replace(".", " ")
    power, names = "", []
    for word in words.replace("/", " / ").replace(" per ", " / ").split():
        if word in ("square", "sq", "squared"):
            power = "^2"
        elif word in ("cubic", "cu", "cubed"):
            power = "^3"
        elif word.startswith("^"):
            power = word
        elif word != "of":
            names.append(CANONICAL.get(word, word.removesuffix("s") if len(word) > 3 else word))
    return "".join(names) + power


def _unit_words(text: str) -> list[str]:
    """The words of what may be a unit; none where one of them says that it is not."""
    words = re.findall(r"[a-z]+", TEXT.sub(r" \1 ", text).lower())
    return [] if any(NOT_UNIT.fullmatch(word) for word in words) else words


def _is_bare_unit(value: str, unit: str, text: str) -> bool:
    """Whether words outside `\\text{}` are a unit: known ones, or long ones that stand apart from the value."""
    words = _unit_words(unit)
    apart = text[len(value) : len(value) + 1] == " "
    return any(word in BARE_UNITS for word in words) or (apart and bool(words) and min(map(len, words)) >= 4)


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit) of a canonical text; the unit is "" where there is none.

    A unit stands in `\\text{}`, or is a known one, or a plain word that no product of variables looks like: `306x`
    and `5abcd` hold none.
    """
    if (match := LEADING.match(text)) and CANONICAL.get(match["unit"].lower()) in ("dollar", "euro", "pound", "cent"):
        value, trailing = split_unit(match["sign"] + match["value"])
        return value, trailing or CANONICAL[match["unit"].lower()]
    if (match := TRAILING_TEXT.match(text)) and _unit_words(match["unit"]):
        return match["value"].strip(), unit_name(match["unit"])
    if (match := TRAILING_WORDS.match(text)) and _is_bare_unit(match["value"], match["unit"], text):
        return match["value"].strip(), unit_name(match["unit"])
    return text, ""


def units_agree(one: str, other: str) -> bool:
    """Whether two answers may carry these units: the same, or one of them none."""
    return not one or not other or one == other
