"""Multiple choice: the letter of the option that a completion settles on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pspo_jax.verifiers import notation
from pspo_jax.verifiers.boxed import BOX, unboxed
from pspo_jax.verifiers.math_answer import final_answer

_TAIL = 4000
"""Characters at the end of a completion in which a statement is looked for."""
_MOST_STATEMENTS = 8
"""Statements that are read, from the last one back."""
_HEDGED = ""
"""The "letter" of a text that offers several options, or denies one."""
_STATEMENT = re.compile(
    r"\b(?:answer|ans|choice|option|solution)s?\b"
    r"(?:[^\n.:?]{0,60}?\b(?:is|are|be|would be)\b|\**\s*:|\s*=|\s+[-–])[\s:*]*+",
    re.IGNORECASE,
)
_PREFIX = re.compile(
    r"(?:[\s*_\"'`#,]|\b(?:it['’]s|the|answer|correct|right|best|final|is|it|option|choice|letter|therefore|so|thus|hence|"
    r"must be|(?:i )?(?:choose|pick)|my|i would go with|i select|go with)\b\s*:?)*+",
    re.IGNORECASE,
)
_LETTER = re.compile(r"([(\[]?)\s*([A-Za-z])\s*([)\].:]?)(?![\w'’])")
_VERDICT = re.compile(r"[(\[]?\b([A-Z])\b[)\]]?\**\s+is\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best)(?!\w)")
_DENIED = re.compile(r"\b(?:not|cannot|never|neither|either|both|incorrect|wrong)\b|n['’]t\b", re.IGNORECASE)


def chosen(completion: str, options: int, texts: Sequence[str] = ()) -> str | None:
    """The letter that a completion settles on; None if there is none, or if it offers several ("A or B").

    The letter is looked for in the last `\\boxed{}` (with the boxes joined to it), else in the last `<answer>`, else
    behind the last "answer is" or before the last "is correct", else in the last line. It may have brackets, markup,
    "option" before it and its option's text behind it; the text of one option alone will do, too.

    Args:
      options: the number of options.
      texts: the texts of the options; empty = an answer has to give a letter.
    """
    text = completion.rpartition("</think>")[2]
    part = final_answer(text)
    if part is None:
        return None
    letters = [chr(ord("A") + i) for i in range(options)]
    if BOX in part and (found := _letter_in(unboxed(part), letters, texts)) is not None:
        return found or None
    _, tag, tail = text.rpartition("<answer>")
    inner, end, _ = tail.partition("</answer>")
    if tag and end and (found := _letter_in(inner, letters, texts)) is not None:
        return found or None
    return _in_prose(text[-_TAIL:], letters, texts) or None


def _in_prose(text: str, letters: Sequence[str], texts: Sequence[str]) -> str | None:
    """The letter of a text without box or tags; _HEDGED and None as in `_letter_in`."""
    statements = [match for match in _STATEMENT.finditer(text) if not _DENIED.search(match[0])]
    verdicts = [match for match in _VERDICT.finditer(text) if match[1] in letters]
    last_start = statements[-1].start() if statements else 0
    if verdicts and verdicts[-1].start() >= last_start and not _denies(text, verdicts[-1].start()):
        return verdicts[-1][1]
    for statement in reversed(statements[-_MOST_STATEMENTS:]):
        line = text[statement.end() : statement.end() + 500].lstrip().partition("\n")[0]
        if (found := _letter_in(line, letters, texts, prose=True)) is not None:
            return found
    last = text.strip().rpartition("\n")[2]
    return _letter_in(last, letters, texts)


def _denies(text: str, end: int) -> bool:
    """Whether the words before a verdict take it back or widen it: "not B is correct", "A or B is correct"."""
    return bool(
        re.search(r"(?:\bnot|\bor|\band|n['’]t|[/&]|\b[A-Z]\)?,)\s*(?:option\s*)?[(\[]?$", text[max(0, end - 20) : end])
    )


def _letter_in(text: str, letters: Sequence[str], texts: Sequence[str], prose: bool = False) -> str | None:
    """The letter of a short text; _HEDGED if it offers several or denies one, None if it holds no answer.

    Args:
      prose: more words may follow the letter, as in "B because A is too large".
    """
    bare = notation.plain(notation.respelled(text)).replace("**", "").strip(" *_`\"'$")
    if (alone := _by_text(bare, letters, texts)) is not None:
        return alone
    body = bare[_PREFIX.match(bare).end() :]  # type: ignore[union-attr] # it matches the empty text, too
    found = _LETTER.match(body)
    if _DENIED.match(body):
        return _HEDGED
    if found is None or found[2].upper() not in letters:
        return _by_text(body, letters, texts)
    letter, rest = found[2].upper(), body[found.end() :].strip(" *_`\"'$.")
    bracketed = bool(found[1] or found[3])
    reason = prose and found[2] == "A" and re.match(r"(?:because|since|as|so|or|and)\b", rest)
    if rest and not bracketed and not reason and (found[2].islower() or found[2] in "AI") and re.match(r"\w", rest):
        return None  # "a dog" is no option
    if _offers_more(rest, letters):
        return _HEDGED
    other = _by_text(rest.strip(" :-–.,"), letters, texts)
    return _HEDGED if other not in (None, letter) else letter if prose or _may_follow(found, rest) else None


def _may_follow(letter: re.Match[str], rest: str) -> bool:
    """Whether the text after a letter may be its option's text, as in (B) apple, B. apple and B: apple."""
    return not rest or bool(letter[1] or letter[3]) or rest[0] in ":-–,("


_MORE = re.compile(
    r"(?:[,;/&+|\s(]|\b(?:and|or|but|then|also|maybe|perhaps|possibly|as well as|along with|option|"
    r"choice)\b)*+[(\[]?([A-Za-z])[)\]]?(?![\w'’])"
)


_HEDGE = re.compile(
    r"[,;\s]*(?:or\b|/)|\\(?:lor|vee|cup)|\?|[-–=]\s*[(\[]?[A-Z][)\]]?$|"
    r"(?:\(|is |was )(?:wrong|incorrect|not)\b",
    re.IGNORECASE,
)
"""Words or signs after a letter that take it back or add another: "or", a range, a question, a denial."""


def _offers_more(rest: str, letters: Sequence[str]) -> bool:
    """Whether the text after a letter adds another one: "or B", ", B", "and C"."""
    if _HEDGE.match(rest):
        return True
    found = _MORE.match(rest)
    return bool(found and found[1].upper() in letters and (found[1].isupper() or len(rest) <= found.end()))


def _by_text(text: str, letters: Sequence[str], texts: Sequence[str]) -> str | None:
    """The letter of the one option that has this text; None if there are none or several."""
    wanted = _key(text)
    found = [letter for letter, option in zip(letters, texts, strict=False) if wanted and _key(option) == wanted]
    return found[0] if len(found) == 1 else None


def _key(text: str) -> str:
    """A text in one spelling, for comparison with the text of an option."""
    return re.sub(r"\s+", " ", notation.plain(notation.respelled(text)).casefold().strip(" .*_`\"'$"))
