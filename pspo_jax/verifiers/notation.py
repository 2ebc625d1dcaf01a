"""The notation of answers: the place where a text states one, one spelling for many, and the members of lists.

Completions are written by a model that is rewarded for finding holes. So every pattern takes time linear in the text's
length, and a text that hedges ("4 or 5") or negates ("not 5") stays a list or a text, which never equals one answer.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from pspo_jax.verifiers.quantities import NUMBER_WORDS, SCALES

_TEXT = (
    r"text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mbox|mathrm|mathbf|mathit|mathsf|mathtt|bf|operatorname"
)
_TEXT_COMMAND = re.compile(rf"\\(?:{_TEXT})\s*\{{([^{{}}]*)\}}")
_WRAPPER = re.compile(r"\\(?:boxed|fbox|framebox|underline|bm|boldsymbol)\s*\{")
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align|gathered|equation|split|displaymath|center)\*?\}")
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{(?:[bpvBV]?matrix|array|cases)\*?\}(?:\s*\{[clr|]*\})?")
_SIZES = re.compile(
    r"(?<!\\)\\(?:left|right|big|Big|bigg|Bigg|bigl|bigr|Bigl|Bigr|displaystyle|textstyle|limits|"
    r"tiny|small|normalsize|large|Large|LARGE|huge|Huge|checkmark|!)(?![A-Za-z])\.?"
)
_SPACES = re.compile(
    r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\\(?:hspace|hskip|phantom)\s*\{[^{}]*\}|"
    r"\\(?:thin|med|thick)space(?![A-Za-z])"
)
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])")
_TRIGONOMETRY = re.compile(r"\\?(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+(?:\.\d+)?)\s*°\s*[)}]?")
_TURN = re.compile(
    r"(?:\\(?:operatorname|text|mathrm)\s*\{\s*cis\s*\}|\\?(?<![A-Za-z])cis(?![A-Za-z]))\s*"
    r"(?:\(([^()]*)\)|\{([^{}]*)\}|((?:\d+\s*)?\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|[\d.]+\s*°|(?:[\d.]+\s*)?\\pi(?:\s*/\s*\d+)?))"
)
"""cis x, which means cos x + i sin x."""
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\w+))")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"), "，": ",", "．": ".", "：": ":", "（": "(", "）": ")", "％": "%", "÷": "/",
        "≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "±": r"\pm ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "′": "'", "’": "'",
        "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ", "º": "°", "∘": "°", "⁄": "/", "⋃": r"\cup ",
    }
)  # fmt: skip
_NAMES = (
    (re.compile(r"\\varnothing(?![A-Za-z])|\\empty(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\leqslant(?![A-Za-z])|\\leq(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\geqslant(?![A-Za-z])|\\geq(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![A-Za-z])"), "["),
    (re.compile(r"\\rbrack(?![A-Za-z])"), "]"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\([ij])math(?![A-Za-z])"), r"\1"),
    (re.compile(r"\\pounds(?![A-Za-z])"), "£"),
    (re.compile(r"\\euro(?![A-Za-z])"), "€"),
    (re.compile(r"\\mp(?![A-Za-z])"), r"\\pm"),
    (re.compile(r"\\bigcup(?![A-Za-z_])"), r"\\cup"),
    (re.compile(r"\{([^{}\\]{1,40})\\choose(?![A-Za-z])([^{}\\]{1,40})\}"), r"\\binom{\1}{\2}"),
    (
        re.compile(r"\\\{\s*([a-z])(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid(?![A-Za-z])|\||:)([^{}|:]{3,80})\\\}"),
        r"\2",
    ),
)
_ALL_REALS = re.compile(r"\s*(?:\\mathbb\s*\{?R\}?|\\R|\\text\{\s*all real numbers\s*\}|all real numbers)\s*")
_BRACED_COMMA = re.compile(r"(?<=\d)\s*(?:\{,\}|,?\\[,!;:])\s*(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_BRACED_SIGN = re.compile(r"(?<=\d)\s*(?:\\math(?:bin|rel|ord|punct|op)\s*)?\{\s*([.:/-])\s*\}\s*(?=\d)")
"""9{:}45, where the braces take the spaces of a relation away."""
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d,/])")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|is|are|it|this|we|get|have|the|my|our|final|correct|answers?|result|value|solution|"
    r"equals|about|approximately|exactly|only|just|either|both|simply)\b(?=[\s:]+\S)|\\approx|\\therefore|≈|→|⇒|∴|=>|->|=|:|a:(?=\s+[-$\\\d])|"
    r"\+(?=\s?[\d.])|,|(?:\\to|\\Rightarrow|\\implies|\\rightarrow)(?![A-Za-z]))\s*",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"(?<=[\d}.)])\s*(?:\\?%|percent(?:age)?(?![a-z])|pct(?![a-z]))", re.IGNORECASE)
_SCALED = re.compile(rf"(?<=\d)\s*({'|'.join(SCALES)})(?![a-z])s?", re.IGNORECASE)
_MINUS = re.compile(r"(?<![\d)}]\s)\b(?:negative|minus)\s+(?=[\d\\])", re.IGNORECASE)
_NUMBER_WORD = re.compile(rf"({'|'.join(NUMBER_WORDS)})(?=\s|$|[.,])", re.IGNORECASE)
_STATEMENT = re.compile(
    r"\b(?:answers?|results?|solutions?|roots?)\b\**(?:[^\n.:=?]{0,60}?\b(?:is|are|was|equals|be)\b"
    r"(?!\s+(?:that|because|as follows))|"
    r"[^\n.:=?]{0,20}?[:=])\s*",
    re.IGNORECASE,
)
_QUESTION = re.compile(r"(?:[^\n.;!?]|\.(?=\d)){0,80}\?")
"""Text behind an "Answer:" that is a question."""
_DOLLAR = re.compile(r"(?<!\\)\$")
_DOLLARS = re.compile(r"(?<!\\)(?:\$\$?|\\[()\[\]])")
_MARKUP = re.compile(r"\*\*|__|`+|(?<!\\)\$\$|^#+\s*|^>(?!\s*[-$\d])\s*")
_SENTENCE = re.compile(
    r"(?:[.;?]|(?<!\d)!)(?=\s|$)|,(?=\s+(?:so|not|because|since|which|as|where|but)\b)|\s(?=(?:because|since|which)\b)"
)
_IS = re.compile(r"\b(?:is|are|was|were|equals)\b")
_FULL_STOP = re.compile(r"[.;?](?=\s|$)|,(?=\s+not\b)")
_END = re.compile(r"(?<=[.!?])\s+")
_BOUND = (
    r"either|neither|nor|between|not|never|cannot|except|at least|at most|up to|from|no (?:more|less|fewer)(?: than)?|"
    r"(?:greater|more|less|fewer|smaller|larger|bigger|other|different) (?:than|from)|over|under|"
    r"wrong|incorrect|if (?:the answer|it)"
)
_DENIED = re.compile(r"\b(?:not|never|cannot|neither)\b|n['’]t\b", re.IGNORECASE)
_HEDGE = re.compile(rf"\b(?:or|{_BOUND})\b|n['’]t\b|≠|\\neq?(?![a-z])", re.IGNORECASE)
_BEFORE = re.compile(
    rf"(?:\bor\s|\b(?:half|third|quarter|twice|thrice|double|triple|square|cube|root|log|ln|reciprocal|anything but|"
    rf"all but)(?:\s+(?:of|the))*\s|(?:\b(?:{_BOUND})|n['’]t)\b[^\d=]{{0,20}}|"
    r"\b(?:between\s+\S+\s+and|from\s+\S+\s+to)\s|\b(?:step|part|question|case|problem|equation|figure)\s)[\s$]*$",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"\s*(?:[^\W\d]+\s+)?(?:or\b|nor\b|(?:to|through|times|plus|minus|over|divided by|multiplied by|modulo|mod|choose|"
    r"vs\.?|versus|(?:less|more|fewer) than)\s+[$\d])|\s*(?:squared|cubed|factorial)\b|"
    r"\s*,\s*(?:maybe|perhaps|possibly)\b|\s*(?:if|when|unless)\b[^.]*(?:\botherwise\b|,\s*(?:and\s+)?\d)|"
    r"\s*(?:is|are|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false|impossible|(?:also )?possible))\b|"
    r"\s*-\s*\d|\s*/\s*[$\d]",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*(?:and|or)\b|[,;]|\b(?:and|or)\b|\\(?:lor|vee|land|wedge|cup)(?![A-Za-z])|\\\\)\s*"
)
_EQUAL = re.compile(r"(=|\\approx(?![A-Za-z])|≈|(?:,\s*)?(?:\\text\s*\{\s*or\s*\}|\bor\b))")
_REMARK = re.compile(r"([^()=]*[^()=\s])\s+\(([^()=]+)\)")
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{[^{}]*\}))?(?:\s*\([^()]*\))?")
_MARKED = re.compile(
    r"\\(?:text|textrm|textnormal|mbox|mathrm|textbf)\s*\{([^{}]*)\}(?:\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d))?"
)
_JOINT = re.compile(r"\s*(?:(?:/|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|\*|\.)\s*)?(\(?)\s*")
"""The signs between the parts of a unit: kg \\cdot m / s^2, J / (mol \\cdot K)."""
_INNER = r"((?:[^{}]|\{[^{}]*\})*)"
_UPRIGHT = rf"\{{(?=\s*\\(?:text|mathrm|mbox)){_INNER}\}}"
_UNIT_FRACTION = re.compile(rf"\\frac\s*{_UPRIGHT}\s*{_UPRIGHT}")
_VERB = (
    r"(?:(?:will|can|could|would|must|should|did)\s+\w+|have|has|had|are|were|is|was|gets?|got|makes?|made|sells?|sold|buys?|"
    r"bought|bakes?|eats?|ate|owns?|weighs?|takes?|took|earns?|pays?|paid|spends?|spent|gives?|gave|collects?|receives?|"
    r"contains?|produces?|wins?|won|finds?|found|catch|caught|\w{3,}ed)"
)
_TOLD = re.compile(
    rf"\d+\s+(?:[^\W\d]+\s+){{1,6}}?{_VERB}\s+(?:(?:a|an|in|total|of|all|altogether|together|about|exactly|only|just|up|out)\s+)*"
    r"[$€£]?\d[\d,.]*[^\d]*"
)
_PART = re.compile(rf"(\d+|\b(?:{'|'.join(NUMBER_WORDS)}))[\s-]([A-Za-z]+)(?:\s*,)?(?:\s+and)?\s+$", re.IGNORECASE)
_OPEN, _CLOSE = "([{", ")]}"
MOST_PARTS = 64
"""Members of the longest list that is taken apart; a longer one is compared as one text."""


class Group(NamedTuple):
    """A list, with the brackets around it: ("", "") for none, ("\\\\{", "\\\\}") for a set."""

    opening: str
    closing: str
    members: list[str]


def respelled(text: str) -> str:
    """An answer in one spelling, out of the many of LaTeX and prose, and without dollar signs."""
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2]}}}", text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text).translate(_SIGNS)
    text = "".join(_ascii(char) for char in text)
    text = _COLOUR.sub(
        "", _ENVIRONMENT.sub("", text).replace("&", "") if "matrix" not in text and "array" not in text else text
    )
    text = _BRACED_SIGN.sub(r"\1", _DECIMAL_COMMA.sub(".", _BRACED_COMMA.sub("", text)))
    text = _SPACES.sub(" ", _SIZES.sub("", text))
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    text = _ALL_REALS.sub(r"(-\\infty,\\infty)", text) if _ALL_REALS.fullmatch(text.strip()) else text
    text = _DEGREES.sub("°", text)
    text = _TURN.sub(lambda m: "(\\cos({0})+i\\sin({0}))".format(m[1] or m[2] or m[3] or ""), text)
    text = _TRIGONOMETRY.sub(r"\\\1(\\frac{\2\\pi}{180})", text)
    return _trimmed(text)


def _ascii(char: str) -> str:
    """Digits and letters of full width, and the digits of every script, as ASCII."""
    if char < "\x80":
        return char
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    return unicodedata.normalize("NFKC", char) if "\uff00" <= char <= "\uffef" else char


def _trimmed(text: str) -> str:
    """An answer without its surroundings: markup, quotes, a full stop, a comma, "The answer is", braces around all."""
    for _ in range(8):
        before = text
        text = _DOLLARS.sub(" ", text) if "\\[" in text or "\\(" in text else text
        text = text.strip(' \t\r\n`*"_').rstrip(" ,;")
        text = text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
        text = text[1:].lstrip() if text[:1] == "'" else text
        if (signs := len(_DOLLAR.findall(text))) and signs % 2 == 0:
            text = _DOLLAR.sub(" ", text)  # $ around formulas; a single one is money
        if found := _LEAD.match(text):
            text = text[found.end() :]
        if (found := _WRAPPER.match(text) or re.match(r"\{", text)) and _end_of(text, found.end() - 1) == len(text):
            text = text[found.end() : -1]
        if text == before:
            return text
    return text


def plain(text: str) -> str:
    """A respelled text without text commands around words, and with scales, percents and number words as symbols."""
    text = _TEXT_COMMAND.sub(r" \1 ", _TEXT_COMMAND.sub(r" \1 ", text)).replace("\\$", "$")
    text = _PERCENT.sub(r"\\%", text)
    text = _MINUS.sub("-", text)
    text = _SPACED_THOUSANDS.sub(lambda m: m[1] + m[2].replace(" ", ""), text)
    text = _SCALED.sub(lambda m: f" \\times 10^{{{SCALES[m[1].lower()]}}}", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = (
        _NUMBER_WORD.sub(lambda m: str(NUMBER_WORDS[m[1].lower()]), text, count=1) if _NUMBER_WORD.match(text) else text
    )
    return _trimmed(text)


def words(text: str) -> str | None:
    """A text of words alone, such as Monday or even, in lower case; None for formulas and for products such as ab."""
    marked = bool(_TEXT_COMMAND.search(text))
    bare = plain(text)
    if re.search(r"[\\^_={}<>+*/$|]|\d[a-z]", bare):
        return None
    letters = re.sub(r"[^\w]", "", bare)
    if not re.search(r"[^\W\d_]", letters) or not (marked or _is_word(bare)):
        return None
    spelled = re.sub(r"[^\w'-]", " ", re.sub(r"^(?:the|a|an)\s+", "", bare.casefold())).split()
    return " ".join(word[:-1] if len(word) > 4 and word.endswith("s") else word for word in spelled)


def _is_word(text: str) -> bool:
    """Whether a text has four letters in a row, or is three capitals or a code.

    Evelyn, CBA and A1B2 are words; xy and abc are products.
    """
    return bool(
        re.search(r"[^\W\d_]{4}", text)
        or re.fullmatch(r"[A-Z]{3}|[Yy]es|[Nn]o|[Oo]dd|(?=.[A-Z0-9]*[A-Z])[A-Z][A-Z0-9]*\d[A-Z0-9]*", text)
    )


def group(text: str) -> Group:
    """The members of a list, and its brackets; a text that is no list is a group of one without brackets."""
    for opening, closing in (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}"), ("\\langle", "\\rangle")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            if _end_of(text, len(opening) - 1 if len(opening) < 3 else 0) != len(text) and opening != "\\langle":
                continue
            inner = text[len(opening) : -len(closing)]
            members = split(inner)
            if len(members) > 1 or opening == "\\{":
                return Group(opening.replace("\\langle", "("), closing.replace("\\rangle", ")"), members)
            if (opening, closing) == ("(", ")"):
                return group(inner.strip())
    return Group("", "", split(text))


def split(text: str) -> list[str]:
    """Members of a list, separated by commas, semicolons, "and" or "or" outside of brackets; `a \\pm b` is two."""
    if "\\begin" in text:
        return [text]
    depth, start, out = 0, 0, []
    separators = {m.start(): m.end() for m in _SEPARATOR.finditer(text)}
    i = 0
    while i < len(text):
        char = text[i]
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif depth <= 0 and i in separators and separators[i] > i:
            out.append(text[start:i])
            i = start = separators[i]
            continue
        i += 1
    out.append(text[start:])
    parts = [part.strip() for part in out if part.strip()]
    if not parts or len(parts) > MOST_PARTS:
        return [text]
    return [signed for part in parts for signed in _both_signs(part)]


def sides(text: str) -> list[tuple[str, bool]]:
    """The sides of the equations in a respelled text, each with whether it is only approximately equal.

    "or" counts as a sign of equality, as does a remark in parentheses: 0.5 (50 %). A name on the left is left out.
    """
    remark = _REMARK.fullmatch(text)
    parts = [remark[1], "=", remark[2]] if remark else _EQUAL.split(text)
    found = [
        (part.strip(), sign in (r"\approx", "≈")) for part, sign in zip(parts[::2], ["", *parts[1::2]], strict=True)
    ]
    return found[1:] if len(found) > 1 and _NAME.fullmatch(found[0][0]) else found


def _both_signs(text: str) -> list[str]:
    """The two values of an expression with \\pm; any other text alone."""
    if text.count("\\pm") != 1:
        return [text]
    left, _, right = text.partition("\\pm")
    first = left.rstrip()
    minus = f"{left}-{right}"
    return [f"{left}+{right}" if first and first[-1] not in "(={[" else f"{left}{right}", minus]


def _end_of(text: str, begin: int) -> int | None:
    """The index after the bracket that closes the one at `begin`; round and square brackets may close each other."""
    depth = 0
    for i in range(begin, len(text)):
        if text[i] in _OPEN:
            depth += 1
        elif text[i] in _CLOSE:
            depth -= 1
            if not depth:
                return i + 1
    return None


def stated(text: str) -> tuple[str, bool]:
    """The sentence of a prose text that gives its answer, and whether it says so ("the answer is", "Answer:").

    It is the last sentence that says so, or else the last sentence of the last line that holds a letter or digit.
    """
    statements = [
        m for m in _STATEMENT.finditer(text) if not _DENIED.search(m[0]) and not _QUESTION.match(text, m.end())
    ]
    found = statements[-1] if statements else None
    lines = [line for line in (text[found.end() :] if found else text).split("\n") if re.search(r"\w", line)]
    if not lines:
        return "", False
    if found:
        return _sentence(lines[0]), True
    sentences = [part for part in _END.split(lines[-1]) if re.search(r"\w", part)]
    if sentences[-1].rstrip().endswith("?"):
        return "", False
    sentence = _sentence(sentences[-1], explicit=False)
    behind = _IS.split(sentence)[-1].strip()
    said = behind != sentence and not _DENIED.search(sentence[: len(sentence) - len(behind)])
    if said and (is_bare(behind) or (behind.isalpha() and not re.search(r"\d", sentence))) and not hedged(behind):
        return behind, True
    return sentence, False


def tells(text: str) -> bool:
    """Whether a plain sentence only says how many did what: "3 of them baked 84 cookies" is no list of two amounts."""
    return bool(_TOLD.fullmatch(text)) and not hedged(text)


def larger_part(text: str) -> tuple[str, str] | None:
    """The number and the unit at the end of a text that goes on with a smaller unit: "it takes three hours and"."""
    found = _PART.search(text[-60:])
    return (str(NUMBER_WORDS.get(found[1].lower(), found[1])), found[2]) if found else None


def unmarked(line: str) -> str:
    """A line without markup."""
    return _MARKUP.sub("", line.strip(" \t*_:"))


def marked_unit(text: str) -> tuple[str, str] | None:
    """The value and the unit of a respelled text that ends with a unit, every part of which is in a text command.

    9.8 \\mathrm{ m} / \\mathrm{s}^2 is such a text. None for any other.
    """
    text = _UNIT_FRACTION.sub(r" \1/(\2)", text).rstrip()
    parts = list(_MARKED.finditer(text))[-8:]
    end = len(text.rstrip(" )"))
    closed = text.count(")", end)
    if not parts or parts[-1].end() != end or closed > 1:
        return None
    opened, start = 0, parts[-1].start()
    for before, part in zip(parts[-2::-1], parts[:0:-1], strict=True):
        joint = _JOINT.fullmatch(text, before.end(), part.start())
        if not joint:
            break
        opened += len(joint[1])
        start = before.start()
    core, unit = text[:start].rstrip(), text[start:]
    if opened != closed or not core or core[-1] in ",/*^_=(+-":
        return None
    return core, " ".join(_TEXT_COMMAND.sub(r" \1 ", unit).split())


def _sentence(line: str, explicit: bool = True) -> str:
    """A line up to its first full stop, without markup, dollar signs around formulas, and GSM8K's notes (<<1+1=2>>).

    Args:
      explicit: the line follows "the answer is", and also ends before "because" and similar words.
    """
    line = _MARKUP.sub("", re.sub(r"<<[^<>]*>>", "", line).strip(" \t*_:"))
    if len(_DOLLAR.findall(line)) % 2 == 0:
        line = _DOLLAR.sub(" ", line)
    # A denial after an answer is dropped ("42, not 43"), but never one before it ("not 42").
    ends = _SENTENCE if explicit else _FULL_STOP
    found = next((m for m in ends.finditer(line) if re.search(r"\w", line[: m.start()])), None)
    return (line[: found.start()] if found else line).strip()


def hedged(text: str) -> bool:
    """Whether prose offers a choice, a bound, or denies: "4 or 5", "at least 4", "not 5"."""
    return bool(_HEDGE.search(text))


def qualified(text: str, begin: int, end: int) -> bool:
    """Whether the words around a number in prose change it: "42 or 43", "more than 42", "not 42"."""
    return bool(_BEFORE.search(text[max(0, begin - 60) : begin]) or _AFTER.match(text[end : end + 60]))


def is_bare(text: str) -> bool:
    """Whether a text is an expression or a list of expressions alone, without words of prose."""
    symbols = _MATRIX.sub("", plain(respelled(text)))
    return not re.search(r"(?<![\\A-Za-z])[^\W\d_]{2,}", re.sub(r"\b(?:and|or)\b|\\[A-Za-z]+", "", symbols))
