"""An answer as a model wrote it -> one canonical LaTeX spelling. Text in, text out; nothing is evaluated.

Canonical means: ASCII, no styling or math delimiters, `\\frac`, `\\binom`, `\\sqrt`, `^` and `_` with all their braces,
words in `\\text{}`, single spaces. Every pattern is linear in the length of the text, which the caller has bounded.
"""

from __future__ import annotations

import re

from pylatexenc.latexencode import get_builtin_uni2latex_dict

MAX_DEPTH = 40  # of arguments inside arguments; no answer that people write comes near


class TooDeepError(ValueError):
    """The text nests deeper than any answer does."""


def _symbol_table() -> dict[int, str]:
    """Unicode mathematics -> LaTeX: pylatexenc's table for what is mathematics, and ours for the rest."""
    prefix, suffix = "\\ensuremath{", "}"
    table = {
        code: f"{latex.removeprefix(prefix).removesuffix(suffix)} "
        for code, latex in get_builtin_uni2latex_dict().items()
        if latex.startswith(prefix + "\\")
    }
    ours = {
        "−": "-", "–": "-", "—": "-", "‐": "-", "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "×": r"\times ",
        "÷": "/", "⁄": "/", "∕": "/", "√": r"\sqrt ", "°": r"^{\circ}", "º": r"^{\circ}", "…": r"\ldots ", "′": "'",
        "’": "'", "‘": "'", "∅": r"\emptyset ", "∣": "|", "，": ",", "。": ".", "∆": r"\triangle ", "△": r"\triangle ",
        "€": r"\text{euros}", "£": r"\text{pounds}", "¥": r"\text{yen}",
        "\u00a0": " ", "\u2002": " ", "\u2003": " ", "\u2009": " ", "\u202f": " ",
        "\u200b": "", "\u2060": "", "\ufeff": "", "\u2061": "", "\u2062": "",
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in "，"},
    }  # fmt: skip
    vulgar = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
              "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
              "⅑": (1, 9), "⅒": (1, 10)}  # fmt: skip
    ours |= {char: rf"\frac{{{top}}}{{{bottom}}}" for char, (top, bottom) in vulgar.items()}
    return table | {ord(char): latex for char, latex in ours.items()}


SYMBOLS = _symbol_table()
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
DEGREE = r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])"
ANGLE_FUNCTIONS = "sin|cos|tan|sec|csc|cot"
ABOUT = r"(?<![a-zA-Z\\])(?:approximately|approx|about|roughly)\.?"
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|log|ln|exp|gcd|lcm|max|min|det"


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


# In this order. A macro's name ends if no letter follows.
REWRITES = _rules(
    (r"\\(?:[dtc]frac)(?![a-zA-Z])", r"\\frac"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:left|right|middle)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits)(?![a-zA-Z])", ""),
    (r"\\(?:phantom|hspace\*?|vspace\*?|label|tag\*?)\s*\{[^{}]*\}", " "),
    # Thousands: 1{,}234 and 1,\!234 and 1\,234 are one number; a bare comma is judged when numbers are read.
    (r"(?<=[0-9])(?:\{,\}|,\s*\\!|\\,|\\ )\s*(?=[0-9]{3}(?![0-9]))", ""),
    (r"\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|enspace|thinspace|medspace)(?![a-zA-Z])", " "),
    (r"\\(?:mbox|hbox|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|text)\s*\{", r"\\text{"),
    (r"\\(?:bf|it|rm|sf|em|cal)(?![a-zA-Z])", ""),
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathcal|mathnormal)\s*(?=\{)", ""),
    (rf"\\(?:operatorname\*?|mathrm|rm)\s*\{{\s*({FUNCTIONS})\s*\}}", r"\\\1 "),
    (r"\\(?:mathrm|mathop)\s*\{\s*([a-zA-Z0-9])\s*\}", r"\1"),
    (r"\\(?:mathrm|operatorname\*?)\s*\{", r"\\text{"),
    (r"\\text\{\s*([0-9]+)\s*\}", r"\1"),
    (rf"\\({ANGLE_FUNCTIONS})\s*[{{(]?\s*([0-9.]+)\s*{DEGREE}\s*[)}}]?", r"\\\1(\2\\pi /180)"),
    (rf"\\({ANGLE_FUNCTIONS})\s*[({{]?\s*([0-9.]+)\s*(?:{DEGREE})\s*[)}}]?", r"\\\1(\2\\pi /180)"),
    (DEGREE, r"\\text{degrees}"),
    (r"\\?%", r"\\text{percent}"),
    (r"\\(?:cdot|times|ast|bullet)(?![a-zA-Z])|(?<!\*)\*(?!\*)", r"\\cdot "),
    (r"\*\*", "^"),
    (r"\\div(?![a-zA-Z])", "/"),
    (r"\\(?:leq|leqslant|le)(?![a-zA-Z])|<=", r"\\leq "),
    (r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|>=", r"\\geq "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\neq "),
    (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\(?:lbrack)(?![a-zA-Z])", "["),
    (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\(?:approxeq|simeq|cong|doteq)(?![a-zA-Z])", r"\\approx "),
    (rf"\\text\{{\s*(\(?)\s*{ABOUT}\s*\}}|(\(?){ABOUT}(?=\s*[-0-9.])", r"\1\2\\approx "),
    (r"(?<=[0-9}])\s*\\text\{\s*to\s*\}\s*(?=[0-9\\])|(?<=[0-9])\s+to\s+(?=[0-9])", ":"),
    (r"\\(?:infin|infty)(?![a-zA-Z])|(?<![a-zA-Z\\])infinity(?![a-zA-Z])", r"\\infty "),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\\(?:varnothing|emptyset)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:dots|cdots|dotsc|ldots)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
    (r"\\(?:mathbb|Bbb)\s*\{?\s*R\s*\}?|\\R(?![a-zA-Z])", r"(-\\infty ,\\infty )"),
    (r"\\text\{\s*all real(?:s| numbers)\s*\}|all real(?:s| numbers)", r"(-\\infty ,\\infty )"),
    (r"\\(?:overline|triangle|angle|overrightarrow|overleftrightarrow)\s*\{?\s*([A-Z]{2,})\s*\}?", r"\1"),
    (r"(?<=[)\]}])\s*U\s*(?=[(\[\\])", r"\\cup "),
    (r"\\(?:i|j)math(?![a-zA-Z])", "i"),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\prime(?![a-zA-Z])", "'"),
    (r"\\(?:land|wedge)(?![a-zA-Z])", r"\\text{ and }"),
    (r"\\(?:lor|vee)(?![a-zA-Z])", r"\\text{ or }"),
    (r"\\&", r"\\text{ and }"),
    # What people type instead of LaTeX.
    (rf"(?<![a-zA-Z\\])(?!(?:sec|min)\.?\s*(?:/|$))({FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),  # 5 sec: no secant
    (r"(?<![a-zA-Z\\])(sqrt|pi|theta|alpha|beta)(?![a-zA-Z])", r"\\\1 "),
    (r"(?<=[0-9a-zA-Z])_([0-9]{2,})", r"_{\1}"),
    (r"_\s*\{?\s*\\text\{\s*(?:base)?\s*([^{}]*?)\s*\}\s*\}?", r"_{\1}"),
    (r"(?<=[0-9])\s*(?:\\text\{\s*)?[aA]\.?\s?[mM](?![a-zA-Z])\.?\s*\}?", " am"),
    (r"(?<=[0-9])\s*(?:\\text\{\s*)?[pP]\.?\s?[mM](?![a-zA-Z])\.?\s*\}?", " pm"),
)  # fmt: skip

ANSWER_PHRASE = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer(?:\s+is|\s*:|\s*=)+\s*", re.I
)
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\s+|.", re.DOTALL)
TEXT_GROUP = re.compile(r"\\(?:text|mbox|hbox|textbf|textit|textrm|textnormal|mathrm)\s*\{([^{}]*)\}")
ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1}


def unwrap(text: str) -> str:
    """Remove what surrounds an answer: math delimiters, Markdown, boxes, `the answer is`, a full stop."""
    previous = None
    while previous != text:
        previous = text
        text = ANSWER_PHRASE.sub("", text.strip(), count=1) if text.lstrip()[:1] in "sthfaSTHFA" else text.strip()
        text = text.rstrip(".,;: \n").removesuffix("\\") if not text.endswith("\\}") else text
        text = text.strip("`")
        for opening, closing in (("**", "**"), ("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("__", "__")):
            if len(text) > 4 and text.startswith(opening) and text.endswith(closing):
                text = text[2:-2]
        for box in ("\\boxed", "\\fbox"):
            if text.startswith(box) and text.endswith("}"):
                text = text[len(box) :].strip()[1:-1]
    return text


def _open_text(group: re.Match[str]) -> str:
    """Take numbers and lists out of `\\text{}`, so that they are read as such: `\\text{A, B}`, `\\text{4:30 p.m.}`."""
    words = group[1]
    if re.match(r"\s*[-+]?[.$]?[0-9]", words):
        return words
    return ",".join(f"\\text{{{part}}}" for part in words.split(","))


def _dollars(text: str) -> str:
    """Tell the two meanings of the dollar sign apart: a delimiter comes in pairs, a currency before a number."""
    text = text.replace("\\$", "\\text{dollars}")
    if text.count("$") % 2 == 0:
        return text.replace("$", " ")
    return text.replace("$", "\\text{dollars}")


class _Bracer:
    """Writes the arguments of macros and scripts with braces: `\\frac12` -> `\\frac{1}{2}`, `x^2` -> `x^{2}`."""

    def __init__(self, text: str):
        self.tokens = TOKEN.findall(text)
        self.position = 0

    def write(self, until: str | None = None, depth: int = 0) -> str:
        """The text up to the closing token, which is consumed."""
        pieces = []
        while self.position < len(self.tokens):
            token = self.tokens[self.position]
            if token == until:
                self.position += 1
                break
            pieces.append(self.item(depth))
        return "".join(pieces)

    def item(self, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise TooDeepError
        token = self.tokens[self.position]
        self.position += 1
        if token == "{":
            return "{" + self.write("}", depth + 1).strip() + "}"
        if token not in ARGUMENTS:
            return " " if token.isspace() else token
        root = self.optional(depth) if token == "\\sqrt" else ""
        return token + root + "".join(self.argument(token, depth) for _ in range(ARGUMENTS[token]))

    def skip_space(self) -> str:
        while self.position < len(self.tokens) and self.tokens[self.position].isspace():
            self.position += 1
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def optional(self, depth: int) -> str:
        if self.skip_space() != "[":
            return ""
        self.position += 1
        return "[" + self.write("]", depth + 1).strip() + "]"

    def argument(self, macro: str, depth: int) -> str:
        token = self.skip_space()
        if not token:
            return "{}"
        if token == "(" and macro in ("\\sqrt", "^"):  # sqrt(2), 2^(x+1): not LaTeX, but no one means anything else
            self.position += 1
            return "{" + self.write(")", depth + 1).strip() + "}"
        if token == "-" and macro == "^":  # 2^-3
            self.position += 1
            return "{-" + self.argument(macro, depth + 1)[1:]
        written = self.item(depth + 1)
        return written if written.startswith("{") else "{" + written + "}"


def canonical(text: str) -> str:
    """The canonical spelling of an answer. Raises TooDeepError."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda raised: "^{" + raised[0].translate(RAISED) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda lowered: "_{" + lowered[0].translate(LOWERED) + "}", text)
    text = re.sub(r"√\s*([0-9]+(?:\.[0-9]+)?)", r"\\sqrt{\1}", text).translate(SYMBOLS)
    if "\\\\begin" in text or ("\\begin" not in text and re.search(r"\\\\[a-zA-Z]", text)):
        text = text.replace("\\\\", "\\")  # escaped twice, as in JSON read without decoding
    text = _dollars(unwrap(text))
    text = TEXT_GROUP.sub(_open_text, text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = _Bracer(text).write()
    text = re.sub(r"\s+", " ", unwrap(text)).strip().removeprefix("\\approx").strip()
    return re.sub(r"^<([^<>=]+,[^<>=]+)>$", r"(\1)", text)
