"""Mathematical answers: where a completion gives one, and whether it equals the gold answer (math-verify).

Runs in worker processes, as math-verify can hang on hostile input; only `final_answer` runs in the main one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

from pspo_jax.verifiers import expressions, notation, quantities
from pspo_jax.verifiers.boxed import BOX, LONGEST_BOX, MOST_BOXES, box_ends, unboxed
from pspo_jax.verifiers.variable_names import name_of

T = TypeVar("T")

ALTERNATIVES = "\x1e"
"""The character between gold answers any of which is right."""
RULES = 4
"""Version of the rules of comparison, to be raised when a verdict may change, so that remembered checks expire."""
MAX_ANSWER = 2000
"""Characters; a longer answer is wrong unless the gold answer is as long."""
_TAIL = 500
"""Characters at the end of a completion without box or tags in which its answer is looked for."""
_DENIED = re.compile(r"(?:\bnot|n['’]t|\brather than|\binstead of|\\neq?)[\s($:be]*$", re.IGNORECASE)
"""Words right before a box that deny it."""
_GAP = r"(?:[\s$~]|\\[,;: ]|\\q?quad(?![a-z])|\\text\{\s*\})*"
_BETWEEN_BOXES = re.compile(
    rf"{_GAP}(?:[,;/|]|(?:,{_GAP})?(?:and|or|\\text\{{\s*(?:,\s*)?(?:and|or)\s*\}}|\\(?:lor|land|vee|wedge)(?![a-z]))){_GAP}"
)
_NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{[^{}]*\}))?'?(?:\([a-z]\))?"
_NAMED_BOX = re.compile(rf"{_BETWEEN_BOXES.pattern}({_NAME}){_GAP}={_GAP}")
_NAME_BEFORE = re.compile(rf"(?<![\w\\^+*/-])({_NAME}){_GAP}={_GAP}$")
_MEMBER = re.compile(r"\s*([A-Za-z])\s*=[^=]+")
_INDEX = re.compile(r"_(?:\w|\{[^{}]*\})")
_ONE_LETTER_UNIT = re.compile(r"(\S.{0,60}?)(\s*)[mslghLJNWVKCF]")
"""Behind a number without letters: 5 m, and 5m beside a plain number."""
_TAGS = ("<answer>", "</answer>")
_RATIO = re.compile(r"\s*([\d.]+)\s*(?::|to)\s*([\d.]+)\s*")
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:,\d{3})+)(?![\d,])")
_NAMES_BEFORE = re.compile(r"\(\s*[A-Za-z]\w?(?:\s*,\s*[A-Za-z]\w?)*\s*\)\s*=\s*(?=\()|[A-Za-z]\s*\\in\s*(?=[(\[\\])")
_NO_UNITS = ("in", "am", "a", "d", "k", "j", "n", "w", "v", "A")
"""Units that are also words or names in prose, and are no units there."""
_ONE_NUMBER = re.compile(
    r"(?:(?<![\w.)\s])[-+]|(?<=\s)[-+](?=\S)|(?<![\w.]))\$?\d(?:[\d,]*\d)?(?:\.\d+)?(?:/\d+)?(?:[eE][-+]?\d+)?(?:\s*\\?%)?"
)


def final_answer(completion: str) -> str | None:
    """The part of a completion that states its answer, or None if nothing is there. Linear in the text's length.

    Reasoning up to the last `</think>` is dropped. The part is the last `\\boxed{}` with the boxes joined to it ("3 and
    5"), else the last `<answer>` block with its tags, else the last 500 characters. In these, the worker looks
    for the words "the answer is", or else math-verify takes the last number or formula.
    """
    text = completion.rpartition("</think>")[2]
    if boxes := _last_boxes(text):
        return boxes
    before, tag, tail = text.rpartition(_TAGS[0])
    if tag and _TAGS[1] in tail and not _DENIED.search(before, max(0, len(before) - 20)):
        inner = tail.partition(_TAGS[1])[0]
        if inner.strip() and len(inner) <= _TAIL:
            return f"{tag}{inner}{_TAGS[1]}"
        text = inner
    return text[-_TAIL:].strip() or None


def _last_boxes(text: str) -> str | None:
    """The last complete box, with those before it that are joined to it; None without one."""
    ends = box_ends(text)
    begin = end = None
    start = len(text)
    for _ in range(MOST_BOXES):
        start = text.rfind(BOX, 0, start)
        if start < 0:
            break
        close = ends.get(start)
        if close is not None and (close - start - len(BOX) > LONGEST_BOX or (begin is not None and close > begin)):
            close = None  # too long, or it holds the box at `begin`
        if begin is None and (close is None or _DENIED.search(text, max(0, start - 20), start)):
            continue  # it is cut off, or denied; an earlier one may be complete
        if close is None:
            break
        if begin is not None and not (begin - close <= _TAIL and _joined(text, start, close, begin)):
            break
        begin, end = start, end or close
    return None if begin is None else text[begin:end]


def _joined(text: str, start: int, close: int, begin: int) -> bool:
    """Whether the box from `start` to `close` and the box at `begin` form one list, as "3 and 5" or "x=3 or x=5" do."""
    if _BETWEEN_BOXES.fullmatch(text, close, begin):
        return True
    second = _NAMED_BOX.fullmatch(text, close, begin)
    first = _NAME_BEFORE.search(text[max(0, start - 60) : start]) if second else None
    return bool(first and second and _INDEX.sub("", first[1]) == _INDEX.sub("", second[1]))


def score(gold: str, answer: str) -> tuple[float | None, str | None]:
    """The score of an answer, and the answer's name.

    The score is 1 if the answer equals a gold alternative, 0 if it equals none, None if no gold answer can be read.

    Args:
      gold: LaTeX or plain, alternatives separated by ALTERNATIVES.
      answer: the part of a completion that `final_answer` gave.
    """
    golds = [g.strip() for g in gold.split(ALTERNATIVES)]
    if len(answer) > max(MAX_ANSWER, 2 * max(map(len, golds))):
        return 0.0, None
    answers, named = _statements(answer), _tagged(answer)
    # Alternatives in the answer's spelling come first, as the comparison with the others may take for ever.
    spelled = {_spelling(text) for text in answers} - {""}
    golds.sort(key=lambda gold: _spelling(unboxed(gold)) not in spelled)
    readable = False
    for alternative in golds:
        wanted = unboxed(alternative)
        readable |= _readable(wanted)
        wordings = _restated(wanted) or [wanted]
        verbatim = _spelling(wanted) in spelled or _named(wanted, named)
        if readable and (verbatim or any(same(one, text) for one in wordings for text in answers)):
            return 1.0, canonical(BOX + wanted + "}")
    return (0.0 if readable else None), canonical(answer)


def _restated(gold: str) -> list[str]:
    """The wordings of a gold answer that states one value twice: 0.56 = 56 %, 1/2 or 0.5.

    The list is empty where there is arithmetic, as in 2 + 3 = 5, which may answer how 5 is written as a sum.
    """
    first, *others = notation.sides(notation.respelled(gold))
    if not others or len(others) > 4 or not all(_is_value(text) for text, _ in (first, *others)):
        return []
    equal = all(_rounded(first[0], text) if about else same(first[0], text) for text, about in others)
    return [text for text, _ in (first, *others)] if equal else []


def _is_value(text: str) -> bool:
    """Whether a text is one number or quantity, without arithmetic."""
    bare = notation.plain(text)
    one = quantities.quantity(bare)
    if quantities.number((one.core if one else bare).rstrip("%\\ ")) is not None:
        return True
    if re.search(r"[+*!,;]|(?!^)-|\\(?:times|cdot|div|pm)(?![A-Za-z])", bare):
        return False
    return expressions.float_of(bare) is not None


def _rounded(exact: str, text: str) -> bool:
    """Whether a decimal is a number rounded, or cut off, at the decimal's last place."""
    value, decimal = expressions.float_of(exact), quantities.number(notation.plain(text))
    places = len(text.strip().partition(".")[2])
    return value is not None and decimal is not None and abs(value - decimal) < 10.0**-places


def _tagged(answer: str) -> str | None:
    """The text within the tags of an answer, if it is one line that neither asks nor negates; None otherwise.

    Words are an answer there, unlike in prose.
    """
    if not answer.startswith(_TAGS[0]) or not answer.endswith(_TAGS[1]) or BOX in answer:
        return None
    text = answer[len(_TAGS[0]) : -len(_TAGS[1])].strip()
    return None if not text or re.search(r"[\n?]|[!~¬≠](?=.)", text) else text


def _named(gold: str, answer: str | None) -> bool:
    """Whether an answer in tags has the words of gold: March, May 5. Values are compared elsewhere."""
    if not answer:
        return False
    gold, answer = notation.respelled(gold), notation.respelled(notation.unmarked(answer))
    word = notation.words(gold)
    if word:
        return word == notation.words(answer)
    gold, answer = (notation.plain(text).casefold() for text in (gold, answer))
    return gold == answer and bool(re.fullmatch(r"(?=.*[^\W\d_]{3})[\w\s,.'-]+", gold))


def _spelling(text: str) -> str:
    """The one spelling of a text, for comparison as text."""
    return notation.plain(notation.respelled(text))


def _readable(gold: str) -> bool:
    """Whether a gold answer can be compared with at all."""
    text = notation.respelled(gold)
    return bool(text) and (quantities.number(text) is not None or bool(expressions.parse(expressions.in_box(text))))


def _statements(answer: str) -> list[str]:
    """Readings of an answer, the broadest first: a box's content; or the statement in prose, and the value in it."""
    if BOX in answer:
        return [] if _DENIED.search(answer, 0, answer.index(BOX)) else [unboxed(answer)]
    answer = answer.removeprefix(_TAGS[0]).removesuffix(_TAGS[1]) if answer.endswith(_TAGS[1]) else answer
    sentence, explicit = notation.stated(answer)
    bare = notation.plain(notation.respelled(sentence))
    one = quantities.quantity(bare)
    told = not explicit and notation.tells(bare)
    if notation.is_bare(one.core if one else sentence) or (quantities.amounts(bare) and not told):
        return [sentence] if sentence else []
    value = _value_in(bare, answer, explicit)
    return [text for text, given in ((sentence, explicit), (value, value)) if given and text]


def _value_in(bare: str, answer: str, explicit: bool) -> str | None:
    """The value that a sentence with words gives: behind its last "=", else the first number behind "the answer is",
    else the last number; math-verify's choice where there are formulas. None where the sentence hedges or denies it."""
    _, equals, right = bare.rpartition("=")
    numbers = list(_ONE_NUMBER.finditer(right))
    behind = bool(equals and numbers and not right[: numbers[0].start()].strip(" $"))
    if not behind and (re.search(r"\\(?!%)|[\^_]|\d[A-Za-z]", bare) or not numbers):
        found = expressions.parse(bare if explicit or (numbers and "\\end" not in bare) else answer)
        return str(found[-1]) if found and not notation.hedged(bare) else None
    number = numbers[0] if explicit or behind else numbers[-1]
    if notation.qualified(right, number.start(), number.end()):
        return None
    word = re.match(r"\s*([A-Za-z]+)\b", right[number.end() :])
    unit = word[1] if word and word[1] not in _NO_UNITS and quantities.converted(Fraction(1), word[1]) else ""
    scale = re.match(r" \\times [\d^{}]+", right[number.end() :])
    if unit and (larger := notation.larger_part(right[: number.start()])):
        sizes = [quantities.converted(Fraction(1), name) for name in (larger[1], unit)]
        if sizes[0] and sizes[1] and sizes[0][0] == sizes[1][0] and sizes[0][1] > sizes[1][1]:
            return f"{larger[0]} {larger[1]} {number[0]} {unit}"  # 20 is not all of "three hours and 20 minutes"
    return f"{number[0]}{scale[0] if scale else ''} {unit}"


def same(gold: str, answer: str) -> bool:
    """Whether two expressions without a box are one answer. Lists are compared member by member, units are read.

    There is no time limit here: math-verify may take for ever, and the pool enforces the deadline.
    """
    gold, answer = notation.respelled(gold), notation.respelled(answer)
    bare = [notation.plain(text) for text in (gold, answer)]
    if not bare[1] or not bare[0]:
        return False
    if bare[0] == bare[1]:
        return True
    if any(map(_THOUSANDS.search, bare)):
        joined = [_THOUSANDS.sub(lambda m: m[1] + m[2].replace(",", ""), text) for text in (gold, answer)]
        if same(*joined):
            return True
        if any(re.search(r"(?<!\d)0\d\d", text) or quantities.quantity(text) for text in bare):
            return False  # 1,000 is no list of 1 and 0, and $1,200 none of $1 and 200
    for rule in (_as_numbers, _as_literals, _as_amounts, _as_lists, _as_quantities, _as_words):
        verdict = rule((gold, answer), (bare[0], bare[1]))
        if verdict is not None:
            return verdict
    return expressions.verified(gold, answer)


Pair = tuple[str, str]
"""Gold and answer."""


def _as_numbers(_: Pair, bare: Pair) -> bool | None:
    """Numbers with or without a percent sign; a bare share and its percentage are one, 0.5 and 0.5 % are not."""
    gold, answer = (quantities.number(text.rstrip("%\\ ")) for text in bare)
    if gold is None or answer is None:
        ratios = [_RATIO.fullmatch(text) for text in bare]
        # 3:5 is no time of a day, so that 9:15 beside it is a ratio; beside a gold 9:15 nothing but 9:15 is right.
        if ratios[0] is None or ratios[1] is None or quantities.literal(bare[0]):
            return None
        return _equal_ratios(ratios[0], ratios[1])
    percent = [text.endswith("%") for text in bare]
    exact = not any("." in text and "\\" not in text for text in bare)
    if percent[0] == percent[1]:
        return quantities.close(gold, answer, exact)
    if abs(gold) > 1 and quantities.close(gold, answer, exact):
        return True  # the sign is left out
    return quantities.close(gold / (100 if percent[0] else 1), answer / (100 if percent[1] else 1), exact)


def _equal_ratios(gold: re.Match[str], answer: re.Match[str]) -> bool:
    (a, b), (c, d) = ([quantities.number(side) or 0 for side in ratio.groups()] for ratio in (gold, answer))
    return a * d == b * c and (a, b) != (0, 0) != (c, d)


def _as_literals(_: Pair, bare: Pair) -> bool | None:
    """Dates, times, versions and telephone numbers, which arithmetic would read as differences and quotients."""
    gold, answer = map(quantities.literal, bare)
    if gold or answer:
        difference = gold is None and answer and re.fullmatch(r"\d+-\d+", answer)
        return None if difference or any(quantities.quantity(text) for text in bare) else gold == answer
    return None


def _as_amounts(_: Pair, bare: Pair) -> bool | None:
    """2 hours 30 minutes: every part counts."""
    parts = [quantities.amounts(text) for text in bare]
    if parts[0] is None and parts[1] is None:
        return None
    totals = [_total(text, part) for text, part in zip(bare, parts, strict=True)]
    if totals[0] and totals[1]:
        return totals[0] == totals[1]
    if parts[0] and parts[1]:
        return _matched(parts[0], parts[1], lambda g, a: g[0] == a[0] and quantities.same_unit(g[1], a[1]))
    amounts, other = (parts[0], bare[1]) if parts[0] else (parts[1] or [], bare[0])
    values = [quantities.number(member) for member in notation.group(other).members]
    return values == [value for value, _ in amounts]


def _total(text: str, parts: list[tuple[Fraction, str]] | None) -> tuple[str, Fraction] | None:
    """The sum of amounts, or the one quantity of a text, in the base unit of its dimension."""
    if parts is not None:
        return quantities.total(parts)
    one = quantities.quantity(text)
    return _in_base(one) if one else None


def _in_base(one: quantities.Quantity) -> tuple[str, Fraction] | None:
    """The dimension of a quantity, and its value in that dimension's base unit; None where they are not known."""
    value = quantities.number(one.core)
    return None if value is None else quantities.converted(value, one.unit)


def _as_lists(_: Pair, bare: Pair) -> bool | None:
    """Members in any order; in the same one within ( ) and [ ], where also the brackets must agree."""
    gold, answer = (notation.group(_NAMES_BEFORE.sub("", text, count=1)) for text in bare)
    single = [len(each.members) == 1 for each in (gold, answer)]
    if any("\\cup" in text for text in bare):
        return True if _matched(gold.members, answer.members, same) else None
    if all(single):
        return False if "\\{" in (gold.opening, answer.opening) and "(" in (gold.opening, answer.opening) else None
    if any(single):
        one = bare[0] if single[0] else bare[1]
        return None if re.search(r"[<>]|\\(?:le|ge|lt|gt|cup|begin|in|mid)(?![A-Za-z])", one) else False
    if len(gold.members) != len(answer.members):
        return _equal_sets(gold, answer) if gold.opening == answer.opening == "\\{" else False
    if gold.opening and answer.opening and (gold.opening, gold.closing) != (answer.opening, answer.closing):
        return False
    ordered = "\\{" not in (gold.opening, answer.opening) and (gold.opening or answer.opening)
    if ordered:
        bracket = answer.opening if not gold.opening else gold.opening if not answer.opening else ""
        if bracket == "[" and len(gold.members) == 2:
            return False  # an interval is no list
        gold, answer = (side._replace(members=_by_name(side.members)) for side in (gold, answer))
        return all(map(same, gold.members, answer.members))
    if gold.opening == answer.opening == "\\{":
        return _equal_sets(gold, answer)
    return _matched(gold.members, answer.members, same)


def _by_name(members: list[str]) -> list[str]:
    """Members in the order of their names, where these are neighbours in the alphabet: y=3, x=2 is (2,3)."""
    found = [_MEMBER.fullmatch(member) for member in members]
    names = [match[1] if match else "" for match in found]
    if not all(names) or len(set(names)) < len(names) or ord(max(names)) - ord(min(names)) > 3:
        return members
    return [member for _, member in sorted(zip(names, members, strict=True))]


def _equal_sets(gold: notation.Group, answer: notation.Group) -> bool:
    """Whether each member of either set equals a member of the other."""
    pairs = ((gold.members, answer.members, False), (answer.members, gold.members, True))
    return all(
        all(any(same(b, a) if swap else same(a, b) for b in second) for a in first) for first, second, swap in pairs
    )


def _matched(gold: Sequence[T], answer: Sequence[T], equal: Callable[[T, T], bool]) -> bool:
    """Whether each member has its own partner. Equality is nearly transitive, so the first partner found is taken."""
    left = list(answer)
    for place, wanted in enumerate(gold):
        order = sorted(range(len(left)), key=lambda i: i != place - (len(gold) - len(left)))
        found = next((i for i in order if equal(wanted, left[i])), None)
        if found is None:
            return False
        del left[found]
    return not left


def _as_quantities(texts: Pair, bare: Pair) -> bool | None:
    """Numbers with units: these must agree where both are given; 500 cm is 5 m."""
    gold, answer = (_quantity(*both) for both in zip(texts, bare, strict=True))
    if gold is None and answer is None:
        return _without_letter(bare)
    if gold is None or answer is None:
        # A single letter is a unit beside a unit, as in 5 m; elsewhere it is a variable.
        if gold is None:
            gold = quantities.quantity(bare[0], marked=True)
        elif answer is None:
            answer = quantities.quantity(bare[1], marked=True)
    cores = [q.core if q else text for q, text in zip((gold, answer), bare, strict=True)]
    if gold and answer and not quantities.same_unit(gold.unit, answer.unit):
        totals = [_in_base(q) for q in (gold, answer)]
        return totals[0] is not None and totals[0] == totals[1]
    return same(cores[0], cores[1])


def _without_letter(bare: Pair) -> bool | None:
    """5 m and 5 m/s beside 5: letters are units where the other side has no letters at all."""
    matches = [_ONE_LETTER_UNIT.fullmatch(text) or quantities.PER.fullmatch(text) for text in bare]
    found = [match if match and quantities.number(match[1]) is not None else None for match in matches]
    if bool(found[0]) == bool(found[1]) or any(
        re.search("[A-Za-z]", t) for t, m in zip(bare, found, strict=True) if not m
    ):
        return None
    if found[0] and not found[0][2]:
        return None  # 5m as a gold answer is a product
    return same(*(match[1] if match else text for match, text in zip(found, bare, strict=True)))


def _quantity(text: str, bare: str) -> quantities.Quantity | None:
    """A number with its unit, which a text command may mark; None for any other text."""
    last = notation.marked_unit(text)
    if last is None:
        return quantities.quantity(bare)
    core, unit = last
    if "\\text" not in core and "\\mbox" not in core and quantities.is_noun(unit):
        return quantities.Quantity(notation.plain(core), unit) if quantities.may_be_unit(unit) else None
    return quantities.quantity(bare, marked=True)


def _as_words(texts: Pair, bare: Pair) -> bool | None:
    """Monday, even, CBA: texts are compared as texts, not as products of their letters."""
    found = [notation.words(text) for text in texts]
    if not any(found):
        return None
    keys = [(word or text).casefold() for word, text in zip(found, bare, strict=True)]
    return re.sub(r"[\W_]", "", keys[0]) == re.sub(r"[\W_]", "", keys[1])


def canonical(answer: str) -> str | None:
    """A short name of an answer's value, for majority votes: equal numbers get equal names. None = nothing was read.

    It names the expression that the check has parsed. That parse is remembered, so that a name costs next to nothing.
    """
    statements = _statements(answer) or [named for named in [_tagged(answer)] if named]
    if not statements:
        return None
    text = notation.respelled(statements[-1])
    bare = notation.plain(text)
    one = quantities.quantity(bare)
    value = quantities.number(one.core if one else bare)  # 20 cups are named 20, not as a product of letters
    if value is not None:
        from sympy import Rational

        return name_of(Rational(value.numerator, value.denominator))
    if word := notation.words(text):
        return name_of(word)  # March is no product of its letters
    parsed = expressions.parse(expressions.in_box(text)) if text else ()
    return name_of(parsed[0]) if parsed else None
