"""The one parser of \\boxed{...}, which LaTeX and most prompts put around a final answer."""

from __future__ import annotations

import re

BOX = "\\boxed{"
MOST_BOXES = 20
"""Boxes of one text that are read; the ones beyond are ignored."""
LONGEST_BOX = 8000
"""Characters of a box's content with its closing brace, for readers that bound it."""
_BRACES = re.compile(r"\\boxed\{|[{}]")


def box_ends(text: str) -> dict[int, int]:
    """Finds every complete box: the index at which it starts -> the index after its closing brace.

    Boxes may be nested. The search is one pass over the text from its first box on, however the braces nest.
    """
    first = text.find(BOX)
    if first < 0:
        return {}
    ends: dict[int, int] = {}
    open_starts: list[int] = []  # -1 stands for a brace that opens no box
    for match in _BRACES.finditer(text, first):
        if match[0] != "}":
            open_starts.append(match.start() if match[0] == BOX else -1)
        elif open_starts and (start := open_starts.pop()) >= 0:
            ends[start] = match.end()
    return ends


def content(text: str, start: int, end: int) -> str:
    """The content of the box that starts at `start` and whose closing brace stands before `end`."""
    return text[start + len(BOX) : end - 1]


def last_complete(text: str) -> str | None:
    """The content of the complete box that starts last; None without one."""
    ends = box_ends(text)
    if not ends:
        return None
    start = max(ends)
    return content(text, start, ends[start])


def last_if_complete(text: str) -> str | None:
    """The content of the last box, if its closing brace is there; None otherwise."""
    start = text.rfind(BOX)
    end = box_ends(text).get(start)
    return None if end is None else content(text, start, end)


def unboxed(text: str) -> str:
    """The contents of a text's boxes, joined by commas; a text without a box unchanged.

    Reading stops at the first box that is not closed within LONGEST_BOX characters, and after MOST_BOXES boxes.
    """
    ends = box_ends(text)
    inner: list[str] = []
    start = text.find(BOX)
    while start >= 0 and len(inner) < MOST_BOXES:
        end = ends.get(start)
        if end is None or end - start - len(BOX) > LONGEST_BOX:
            break
        inner.append(content(text, start, end))
        start = text.find(BOX, end)
    return ", ".join(inner) if inner else text
