"""Units: what follows a value (or, for a currency, precedes it), and when two of them agree.

A word counts as a unit only if dropping it leaves the value as it is: `6 apples` is 6, `6 squared` is not.
"""

from __future__ import annotations

import re
from collections import Counter

# The spellings of a unit, each of one or more words. A word that is not here is its own spelling, less a plural s.
SPELLINGS = {
    "percent": "%, percentage, pct, percentage point, percentage points",
    "degree": "degrees, deg, °, degree celsius, degrees celsius, degree fahrenheit, degrees fahrenheit, degrees c, "
    "degrees f",
    "radian": "radians, rad, rads",
    "dollar": "dollars, usd, $, us dollar, us dollars, u s dollar, u s dollars, buck, bucks",
    "cent": "cents, ¢, pennies, penny",
    "euro": "euros, eur",
    "pound": "pounds, lb, lbs, gbp",
    "meter": "m, meters, metre, metres",
    "centimeter": "cm, cms, centimeters, centimetre, centimetres",
    "millimeter": "mm, millimeters, millimetre, millimetres",
    "kilometer": "km, kms, kilometers, kilometre, kilometres",
    "inch": "in, inches",
    "foot": "ft, feet",
    "yard": "yd, yds, yards",
    "mile": "mi, miles",
    "gram": "g, gm, gms, grams",
    "milligram": "mg, mgs, milligrams",
    "kilogram": "kg, kgs, kilograms, kilo, kilos",
    "ounce": "oz, ounces, fluid ounce, fluid ounces, fl oz",
    "liter": "l, liters, litres, litre",
    "milliliter": "ml, mls, milliliters, millilitre, millilitres",
    "gallon": "gallons, gal, gals",
    "second": "s, sec, secs, seconds",
    "minute": "min, mins, minutes",
    "hour": "h, hr, hrs, hours",
    "day": "days",
    "week": "weeks, wk, wks",
    "month": "months",
    "year": "years, yr, yrs",
    "mile / hour": "mph, mi / h",
    "kilometer / hour": "kph, kmh, kmph",
    "mile / gallon": "mpg",
    "foot / second": "fps",
    "unit": "units",
}
CANONICAL = {spelling: unit for unit, spellings in SPELLINGS.items() for spelling in [unit, *spellings.split(", ")]}
MEASURES = {word for spelling in CANONICAL for word in spelling.split() if len(word) > 1 and word.isalpha()}
MEASURES -= {"point", "points", "us", "fluid"}
PRODUCTS = {"in", "min", "mi", "mg", "gm", "gal", "rad", "rads"}  # units only if a space precedes them
CURRENCIES = ("dollar", "euro", "pound", "cent")
LONGEST_SPELLING = max(len(spelling.split()) for spelling in CANONICAL)

# Words that may not be dropped after a value: they change it, or say that something else was meant.
FRACTIONS = "half|halve|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|hundredth|thousandth"
CHANGES_VALUE = re.compile(
    "am|pm|or|and|not|mod|modulo|base|over|times|plus|minus|less|more|fewer|than|where|if|for|to|is|are|undefined|infinity|"
    "dne|squared|cubed|choose|repeating|recurring|bar|decimal|below|above|under|short|wrong|false|opposite|conjugate|"
    "doubled|tripled|halved|twice|thrice|gross|(?:two|three|four|five|seven|eight|nine)s|sixes|"
    "(?:ten|dozen|score|hundred|thousand|million|billion|trillion|negative|positive|double|triple|root|factorial|"
    f"inverse|reciprocal|power|remainder|prime|{FRACTIONS})s?"
)
# Words of several things that do not end in s, and words that say nothing about a value.
COUNTED = re.compile(
    "people|children|grandchildren|men|women|mice|geese|fish|sheep|deer|cattle|dice|teeth|fruit|candy|money|water|ways?|"
    "each|total|altogether|left|remaining|apiece|daily|weekly|monthly|yearly|long|tall|wide|high|old|away"
)
PLURAL = re.compile(r"[a-z]{2,}[^\Wsui_]s")  # apples, but not glass, genus or axis

TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
# A unit may be several words, powers and quotients: cm^2, m/s, square feet.
TRAILING_TEXT = re.compile(
    r"^(?P<value>.*?[^\s\\{(,]) ?(?P<unit>\\text ?\{[^{}]*\}(?:[\s/.]|\^ ?\{ ?-?[0-9] ?\}|\\text ?\{[^{}]*\}"
    r"|(?<=/)[a-z]+|(?<=degrees\}) ?[CF]$)*)$",
    re.S,
)
TRAILING_WORDS = re.compile(
    r"^(?P<value>.*[0-9}\])!]|.*\\pi) ?"
    r"(?P<unit>(?:/ ?)?(?<![a-zA-Z\\])[a-zA-Z]+(?:[ /.-]+[a-zA-Z]+)*(?: ?\^ ?\{ ?-?[0-9] ?\})?)\.?$",
    re.S,
)
LEADING = re.compile(r"^(?P<sign>-?) ?\\text ?\{ ?(?P<unit>[^{}]*?) ?\} ?(?P<value>[^\s].*)$", re.S)
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
UNIT_TOKEN = re.compile(r"[a-z%$°¢]+|/|\^ ?-? ?[0-9]")


def _tokens(text: str) -> list[str]:
    """The words, slashes and powers of a unit, known spellings of several words as one: `us dollars` -> `dollar`."""
    plain = TEXT.sub(r" \1 ", text).lower().replace("{", "").replace("}", "")
    words, tokens = UNIT_TOKEN.findall(re.sub(r"\b(?:per|an?)\b", " / ", plain)), []
    while words:
        lengths = range(min(LONGEST_SPELLING, len(words)), 0, -1)
        length = next((n for n in lengths if " ".join(words[:n]) in CANONICAL), 0)
        tokens += CANONICAL[" ".join(words[:length])].split() if length else words[:1]
        words = words[length or 1 :]
    return tokens


def unit_name(text: str) -> str:
    """One spelling for a unit: `\\text{ sq. cm}` and `cm^{2}` -> `centimeter^2`, `mph` -> `hour^-1 mile`.

    Of what is not measured only the noun counts: `red marbles` -> `marble`, `ounces of water` -> `ounce`.
    """
    powers: Counter[str] = Counter()
    power, sign, last, noun = 1, 1, "", ""
    for token in _tokens(text):
        exponent = POWERS.get(token) or (int(token[1:].replace(" ", "")) if token[0] == "^" else 0)
        if exponent and last and token not in ("square", "sq", "cubic", "cu"):
            powers[last] += (exponent - 1) * sign
        elif exponent:
            power = exponent
        elif token == "/":
            sign = -1
        elif token in ("of", "in", "on", "with"):
            break
        elif token in SPELLINGS:
            last = token
            powers[last] += power * sign
            power = 1
        elif not COUNTED.fullmatch(token) or token in ("people", "children", "men", "women"):
            noun = token.removesuffix("s") if len(token) > 3 else token
    names = [name if count == 1 else f"{name}^{count}" for name, count in sorted(powers.items()) if count]
    return " ".join(names) or noun or "unit"


def _may_be_dropped(unit: str) -> bool:
    """Whether no word of a unit changes the value. `squared` may accompany a measure: `6 squared meters`."""
    words = re.findall(r"[a-z]+", TEXT.sub(r" \1 ", unit).lower())
    measured = any(word in MEASURES or word in CANONICAL for word in words)
    return bool(words) and not any(
        CHANGES_VALUE.fullmatch(word) and not (measured and word in ("squared", "cubed")) for word in words
    )


def _is_bare_unit(value: str, unit: str, text: str) -> bool:
    """Whether words outside `\\text{}` are a unit: a measure, or a phrase whose noun is something counted."""
    apart = text[len(value) : len(value) + 1] == " "
    measures = MEASURES if apart else MEASURES - PRODUCTS
    if any(word in measures for word in re.findall("[a-z]+", unit.lower())) or (apart and unit.startswith("m/s")):
        return True
    head = re.split(r"\b(?:of|in|on|with|per|an?)\b|/", unit.lower().replace(".", " "), maxsplit=1)[0]
    words = head.replace("-", " ").split()
    if not apart or not words or min(map(len, words)) < 2:
        return False
    noun = words[-1]
    counted = COUNTED.fullmatch(noun) or (len(noun) >= 4 and PLURAL.fullmatch(noun))
    return bool(counted) or (value.strip() == "1" and len(noun) >= 3)


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit) of a canonical text; the unit is "" if absent.

    A unit is in `\\text{}`, or is a known one, or words that no product of variables looks like: `306x` and `5abcd`
    hold none.
    """
    if (match := LEADING.match(text)) and CANONICAL.get(match["unit"].lower()) in CURRENCIES:
        currency = CANONICAL[match["unit"].lower()]
        value, trailing = split_unit(match["sign"] + match["value"])
        return value, trailing if currency in trailing.split() else currency
    if (match := TRAILING_TEXT.match(text)) and _may_be_dropped(match["unit"]):
        return match["value"].strip(), unit_name(match["unit"])
    match = TRAILING_WORDS.match(text)
    if match and _may_be_dropped(match["unit"]) and _is_bare_unit(match["value"], match["unit"], text):
        return match["value"].strip(), unit_name(match["unit"])
    return text, ""


def units_agree(one: str, other: str) -> bool:
    """Whether two answers may carry these units: the same, or one of them none."""
    return not one or not other or one == other
