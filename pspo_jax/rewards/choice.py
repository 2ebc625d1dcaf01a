"""Multiple choice: the letter that a completion settles on."""

from __future__ import annotations

import re

_TAGGED = (
    re.compile(r"\\boxed\{\s*+(?:\\text\{)?\s*+\(?([A-Z])\)?[.:]?\s*\}"),
    re.compile(r"<answer>\s*\(?([A-Z])\)?[.:]?\s*(?:[.:)]\s[^<]{0,500})?</answer>"),
    re.compile(r"(?i:answer)(?i:\s+is)?\s*+:?\s*+\**+\s*+\(?([A-Z])\)?(?![A-Za-z])"),
)
_LAST_LINE = re.compile(r"\(?([A-Z])\)?[.:]?")


def chosen(completion: str, options: int) -> str | None:
    """The letter in the last `\\boxed{}`, `<answer>`, "answer is", or alone on the last line; None if there is none.

    Args:
      options: letters beyond the number of options are no answer.
    """
    text = completion.rpartition("</think>")[2][-4000:]
    letters = {chr(ord("A") + i) for i in range(options)}
    for pattern in _TAGGED:
        found = [letter for letter in pattern.findall(text) if letter in letters]
        if found:
            return str(found[-1])
    last = text.strip().rpartition("\n")[2].strip()
    alone = _LAST_LINE.fullmatch(last)
    return alone[1] if alone and alone[1] in letters else None
