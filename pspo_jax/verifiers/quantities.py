"""Numbers, units, dates and times as answers write them, read without sympy in time linear in the text."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_DIGITS = 60
"""Characters of the longest number that is read here; sympy reads longer ones, so that no exponent costs memory."""
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)\s*({_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?")
_SCIENTIFIC = re.compile(
    rf"([+-]?)\s*({_DECIMAL})\s*(?:\\times|\\cdot|×|·|\*|x)\s*10\s*(?:\^|\*\*)\s*[({{]?\s*([+-]?\d{{1,3}})\s*[)}}]?"
)
_RATIO = re.compile(rf"([+-]?)\s*({_DECIMAL})\s*/\s*([+-]?)({_DECIMAL})")
_FRACTION = re.compile(
    rf"([+-]?)\s*(\d*)\s*\\[dtc]?frac\s*(?:\{{\s*([+-]?)({_DECIMAL})\s*\}}|()(\d))\s*"
    rf"(?:\{{\s*([+-]?)({_DECIMAL})\s*\}}|()(\d))"
)
_MIXED = re.compile(r"([+-]?)\s*(\d+)(?:\s|\\ |\\,|~|-(?=\d+/))+(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?")
_LITERAL = re.compile(
    r"\d+(?:-\d+)+|\d+(?:\.\d+){2,}|\d+(?:/\d+){2,}|\d+(?::\d+){2,}|\d{1,2}:[0-5]\d|\+?\(?\d+\)?(?:[ -]\d+){2,}"
)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)")
_WORD = r"[^\W\d_](?:[^\W\d_]|['.-](?=[^\W\d_]))*\.?"
_UNIT = rf"(?:{_WORD}|°\s?[CFcf]?(?!\w)|[€£¥₹¢]|\\%)(?:\s*(?:\^\s*\{{?\s*-?\d\s*\}}?|²|³))?"
_UNITS = rf"{_UNIT}(?:[\s/·]{{1,3}}{_UNIT}){{0,5}}"
_SYMBOL = (
    r"(?:[mckn]?m|[mk]?g|[mk]?s|mi|ft|in|min|hr?|[mM]?[lL]|mol|rad|k?J|k?W|k?Pa|Hz|[NVKCA])"
    r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
)
PER = re.compile(rf"(\S.{{0,60}}?)(\s+){_SYMBOL}(?:\s*/\s*{_SYMBOL}){{1,2}}")
"""A number, a space, and a quotient of units: 9.8 m/s^2."""
_PER_GROUP = re.compile(r"(?:/|\bper\b)\s*\(([^()]*)\)")
_SEQUENCE = re.compile(rf"({_DECIMAL})\s*({_UNITS})(?:\s*,\s*|\s+)?(?:and\s+)?")

NUMBER_WORDS = dict(
    zip(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ],
        range(21),
        strict=True,
    )
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""The power of ten of each word that multiplies the number before it."""

_BASE = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "m meter metre": "1",
        "km kilometer kilometre": "1000", "in inch inches": "127/5000", "ft foot feet": "381/1250",
        "yd yard": "1143/1250", "mi mile": "201168/125", "nm nanometer nanometre": "1/1000000000",
    },
    "time": {
        "s sec second": "1", "min minute": "60", "h hr hour": "3600", "d day": "86400", "wk week": "604800",
        "ms millisecond": "1/1000", "month": "2629746", "yr year": "31556952",
    },
    "mass": {
        "mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000", "lb pound": "45359237/100000",
        "oz ounce": "45359237/1600000", "ton": "907184.74", "tonne": "1000000",
    },
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1", "gal gallon": "3.785411784",
               "qt quart": "0.946352946", "pt pint": "0.473176473", "cup": "0.2365882365"},
    "dollar": {"$ dollar usd buck": "1", "cent ¢": "1/100"},
    "euro": {"€ euro eur": "1"},
    "pound sterling": {"£ gbp": "1"},
    "yen": {"¥ yen jpy": "1"},
    "rupee": {"₹ rupee inr rs": "1"},
    "angle": {"° degree deg": "1"},
    "arc": {"rad radian": "1"},
    "celsius": {"celsius °c": "1"},
    "fahrenheit": {"fahrenheit °f": "1"},
    "temperature": {"k kelvin": "1"},
    "speed": {"mph": "1"},
    "voltage": {"v volt": "1", "mv millivolt": "1/1000"},
    "current": {"a amp ampere": "1", "ma milliampere": "1/1000"},
    "resistance": {"ω ohm": "1"},
    "frequency": {"hz hertz": "1", "khz kilohertz": "1000"},
    "amount": {"mol mole": "1"},
    "pressure": {"pa pascal": "1", "kpa kilopascal": "1000"},
    "force": {"n newton": "1"},
    "energy": {"j joule": "1", "kj kilojoule": "1000"},
    "power": {"w watt": "1", "kw kilowatt": "1000"},
    "half of the day before noon": {"am a.m": "1"},
    "half of the day after noon": {"pm p.m": "1"},
}  # fmt: skip
_KNOWN = {
    name: (dimension, Fraction(size))
    for dimension, units in _BASE.items()
    for names, size in units.items()
    for name in names.split()
}
_ANY_UNIT = frozenset({"unit", "units"})
_NO_NOUNS = frozenset(
    [
        "or",
        "and",
        "to",
        "by",
        "at",
        "least",
        "most",
        "more",
        "less",
        "fewer",
        "than",
        "not",
        "plus",
        "minus",
        "nor",
        "if",
        "when",
        "but",
        "over",
        "squared",
        "cubed",
        "factorial",
        "modulo",
        "mod",
        "divided",
        "multiplied",
        "versus",
        "vs",
        "isn",
        "wasn",
        "wrong",
        "incorrect",
        "otherwise",
    ]
)
"""Words behind a number that change its value, and so are no unit: "5 or more" is not 5."""
_NO_UNIT = frozenset(["the", "a", "an", "of", "in", "total", "is", "each", "exactly", "about", "approximately"])
_ADJECTIVES = frozenset(["long", "tall", "wide", "high", "deep", "old", "away", "altogether"])
"""Words behind a unit that say what was measured, as in 5 cm long."""


class Quantity(NamedTuple):
    """A number as it is written, and its unit."""

    core: str
    unit: str


def number(text: str) -> Fraction | None:
    """The value of a number that is written out: 42, -3.5, 1/2, \\frac{1}{2}, 7 3/4, 1e-5, 3\\times10^8, 0.\\bar{3}.

    Returns:
      None for any other text, and for numbers of more than 60 characters.
    """
    text = text.strip()
    if not text or len(text) > _DIGITS:
        return None
    if found := _PLAIN.fullmatch(text) or _SCIENTIFIC.fullmatch(text):
        return _signed(found[1], Fraction(found[2]) * Fraction(10) ** int(found[3] or 0))
    if found := _RATIO.fullmatch(text):
        return _quotient(found[1] + found[3], "", found[2], found[4])
    if found := _FRACTION.fullmatch(text):
        top, bottom = found[4] or found[6], found[8] or found[10]
        return _quotient(found[1] + (found[3] or "") + (found[7] or ""), found[2], top, bottom)
    if found := _MIXED.fullmatch(text):
        return _quotient(found[1], found[2], found[3], found[4])
    if found := _REPEATING.fullmatch(text):
        places = 10 ** len(found[3])
        once = Fraction(int(found[2] + found[3] or "0"), places)
        return _signed(found[1], once + Fraction(int(found[4]), (10 ** len(found[4]) - 1) * places))
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign.count("-") % 2 else value


def _quotient(sign: str, whole: str, top: str, bottom: str) -> Fraction | None:
    if not Fraction(bottom):
        return None
    return _signed(sign, int(whole or 0) + Fraction(top) / Fraction(bottom))


def close(gold: Fraction, answer: Fraction, exact: bool) -> bool:
    """Whether two numbers are equal: exactly, or to six decimals (more for a gold answer below 0.001)."""
    if gold == answer or exact:
        return gold == answer
    places = 6
    while gold and abs(gold) * 10 ** (places - 3) < 1:
        places += 1
    return round(gold * 10**places) == round(answer * 10**places)


def literal(text: str) -> str | None:
    """A date, a time, a version or a telephone number in one spelling; None for any other text.

    2024-02-29 is no difference, 1/2/2024 no quotient, 1.2.3 no product, and 10:30 no ratio.
    """
    text = re.sub(r"\s*([:/.-])\s*", r"\1", text.strip())
    if not _LITERAL.fullmatch(text):
        return None
    clock = _CLOCK.fullmatch(text)
    return f"{int(clock[1])}:{clock[2]}" if clock else text


def quantity(text: str, marked: bool = False) -> Quantity | None:
    """`5 cm`, `$5` or `30°` in its parts; None for a text without a unit. Text commands must be gone.

    Args:
      marked: whether the unit was marked as text; then a single letter is one too, while unmarked 5x is a product.
    """
    text = text.strip()
    if text[:1] in ("$", "€", "£", "¥", "₹") and text[1:].strip():
        return Quantity(text[1:].strip(), text[0])
    if text[:2] == "-$":
        return Quantity("-" + text[2:].strip(), "$")
    start = _unit_start(text)
    unit = text[start:].strip() if start is not None else ""
    if not re.fullmatch(_UNITS, unit) or not (marked or _is_unit(text[:start], unit)) or not is_noun(unit):
        return None
    return Quantity(text[:start].strip(), unit)


def is_noun(unit: str) -> bool:
    """Whether words behind a number only say what it counts, which "or more" in "5 or more" does not."""
    words = set(re.findall(r"[^\W\d_]+", unit.lower()))
    digits = re.search(r"\d(?<!\^\d)(?<!\^-\d)(?<!\{\d)(?<!-\d)", unit)
    return bool(unit) and not digits and not words & (_NO_NOUNS | set(SCALES) | {"percent", "percentage"})


def may_be_unit(unit: str) -> bool:
    """Whether the content of a text command may be a unit; i, e and x are numbers or variables even there."""
    names = re.findall(r"[A-Za-z]+", re.sub(r"\\[a-z]+", "", unit))
    return any(len(name) > 1 for name in names) or all(name in "msglhdLJNWVKCFATHMGΩ" for name in names)


def _is_unit(core: str, unit: str) -> bool:
    first = re.split(r"[\s^/.]", unit, maxsplit=1)[0]
    return (
        unit[0] in "°€£¥₹¢"
        or (len(first) > 1 and _singular(first.lower()) in _KNOWN)
        or len(first) > 3
        or (len(first) > 2 and core.endswith(" "))
        or unit.lower().startswith(("sq.", "cu.", "a.m", "p.m", "sq ", "cu "))
    )


def _unit_start(text: str) -> int | None:
    """The index of the words at the end of a text; None if they do not follow a number, a brace or a parenthesis."""
    for found in re.finditer(r"(?<=[\d)}\]π!.])\s*(?=[^\W\d_]|[€£¥°₹¢])", text):
        rest = re.sub(r"\^\s*\{?-?\d\}?", "", text[found.end() :])
        if not re.search(r"[\\=+*()<>{}\[\]\d]", rest):
            return found.end()
    return None


def same_unit(gold: str, answer: str) -> bool:
    """Whether two units are one: cm and centimeters, square inches and in^2; words may be left out of either."""
    first, second = _words(gold), _words(answer)
    if first == second or _ANY_UNIT & set(first) or _ANY_UNIT & set(second):
        return _power(first) == _power(second)
    known = [any(word.partition("^")[0] in _KNOWN for word in words) for words in (first, second)]
    if any(known):
        return _factors(first) == _factors(second)
    return set(first) <= set(second) or set(second) <= set(first)


def converted(value: Fraction, unit: str) -> tuple[str, Fraction] | None:
    """The dimension of a single unit, and the value in that dimension's base unit; None for an unknown unit."""
    words = _words(unit)
    if len(words) != 1 or words[0] not in _KNOWN:
        return None
    dimension, size = _KNOWN[words[0]]
    return dimension, value * size


def amounts(text: str) -> list[tuple[Fraction, str]] | None:
    """The values and units of a text such as `2 hours 30 minutes`; None unless it consists of two or more of them."""
    text = text.strip()
    found: list[tuple[Fraction, str]] = []
    at = 0
    while at < len(text):
        part = _SEQUENCE.match(text, at)
        unit = re.sub(r"\s+and$", "", part[2]) if part else ""
        if part is None or len(found) > 20 or _NO_NOUNS & set(unit.lower().split()):
            return None
        found.append((Fraction(part[1]), unit))
        at = part.end()
    return found if len(found) > 1 else None


def total(parts: list[tuple[Fraction, str]]) -> tuple[str, Fraction] | None:
    """The dimension of amounts, and their sum in its base unit; None if they have no common one (10 boys, 12 girls)."""
    values = [converted(value, unit) for value, unit in parts]
    dimensions = {value[0] for value in values if value}
    if None in values or len(dimensions) != 1:
        return None
    return dimensions.pop(), sum((value[1] for value in values if value), Fraction(0))


def _words(unit: str) -> list[str]:
    """A unit's words in one spelling: singular, without articles, `square inches` as `inch^2`."""
    unit = re.sub(r"\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|[*·]", " ", unit.lower())
    unit = _PER_GROUP.sub(lambda m: " per " + " per ".join(re.sub(r"\s*\^\s*", "^", m[1]).split()), unit)
    unit = unit.replace("²", "^2").replace("³", "^3").replace("/", " per ")
    unit = re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", unit)
    unit = re.sub(r"\bmiles? per hour\b|\bmi per hr?\b", "mph", unit)
    out: list[str] = []
    power = ""
    for word in unit.split():
        word = word.rstrip(".,;")
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
            continue
        if not word or (word in _NO_UNIT | _ADJECTIVES and " " in unit.strip() and not (power and word == "in")):
            continue
        name, mark, exponent = word.partition("^")
        out.append(_singular(name) + (mark + exponent if mark else power))
        power = ""
    return out


def _singular(word: str) -> str:
    if word in _KNOWN:
        return word
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and word.removesuffix(ending) + instead in _KNOWN:
            return word.removesuffix(ending) + instead
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _factors(words: list[str]) -> dict[tuple[str, Fraction], int]:
    """The exponent of every part of a unit: m/s^2 and s^-2 m are one."""
    out: dict[tuple[str, Fraction], int] = {}
    sign = 1
    for word in words:
        if word == "per":
            sign = -1
            continue
        name, _, exponent = word.partition("^")
        readable = not exponent or re.fullmatch(r"-?[0-9]", exponent)
        key = _KNOWN.get(name, (name, Fraction(1))) if readable else (word, Fraction(1))
        out[key] = out.get(key, 0) + sign * (int(exponent) if exponent and readable else 1)
        sign = 1
    return {key: exponent for key, exponent in out.items() if exponent}


def _power(words: list[str]) -> list[str]:
    return [word.partition("^")[2] for word in words if "^" in word]
