"""Messages that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import REPO

PAGE = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CHANGES = "…"
"""Stands for the parts of a message that change."""


def quoted(page: str) -> list[str]:
    """Messages in the first column of a table: what is in backticks and is more than one word."""
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| (`.*)", page, re.M)]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell) if " " in span]


def texts(source: str) -> list[str]:
    """Strings of a module; what an f-string fills in is left out."""
    return [
        "".join(part.value if isinstance(part, ast.Constant) else CHANGES for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]


def says(text: str, message: str) -> bool:
    """Whether the fixed parts of a message occur in a text, in their order."""
    parts = [re.escape(part) for part in message.split(CHANGES) if part.strip()]
    return re.search(".*".join(parts), text, re.S) is not None


@pytest.fixture(scope="module")
def all_texts() -> list[str]:
    modules = sorted((REPO / "pspo_jax").rglob("*.py"))
    return [text for module in modules for text in texts(module.read_text(encoding="utf-8"))]


MESSAGES = quoted(PAGE)


def test_the_page_quotes_messages():
    assert len(MESSAGES) > 25 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_of_the_code(message, all_texts):
    assert any(says(text, message) for text in all_texts), message


def test_another_message_is_not_one_of_the_code(all_texts):
    (text,) = texts('f"{path}: is held by {holder}; wait"')[:1]
    assert says(text, "…: is held by …; wait") and not says(text, "wait … is held by")
    assert not any(says(text, "the dog of … has eaten the checkpoint") for text in all_texts)
