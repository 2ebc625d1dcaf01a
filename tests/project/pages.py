"""The pages of the documentation, and the commands on them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPO

PAGES = sorted([REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").rglob("*.md")])
MARK = re.compile(r"# Needs: (.+)\.\n")
"""First line of a block whose commands no test runs."""


class Fence(NamedTuple):
    """A block of code on a page."""

    language: str
    text: str

    @property
    def needs(self) -> list[str]:
        """What the block needs beyond a laptop with a clone; empty = a test runs it."""
        mark = MARK.match(self.text)
        return mark[1].split(", ") if mark else []


def name_of(page: Path) -> str:
    """A page's path from the root of the repository."""
    return page.relative_to(REPO).as_posix()


def fences(page: Path) -> list[Fence]:
    """Blocks of code, also those within lists, without the list's indent."""
    blocks = re.findall(r"^( *)```([^\n]*)\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [Fence(language, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, language, text in blocks]


def shell_blocks(page: Path) -> list[Fence]:
    return [fence for fence in fences(page) if fence.language in ("bash", "sh")]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def files_written(script: str) -> dict[str, str]:
    """Name -> text of the files that a script writes by `cat > NAME <<'END'`."""
    return dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", script, re.S | re.M))


def commands(script: str) -> list[list[str]]:
    """The words of each command of a script. Quotes may not span lines; what a shell would replace stays as it is."""
    script = re.sub(r"<<'END'\n.*?^END$", "", script, flags=re.S | re.M).replace("\\\n", " ")
    found: list[list[str]] = []
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        found.append([])
        for word in lexer:
            if word[0] in ";&|<>":
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def module_call(words: list[str]) -> list[str]:
    """[NAME, argument, ...] of a command `python -m pspo_jax.NAME argument ...`; empty for any other."""
    for i, word in enumerate(words[:-2]):
        if word.endswith("python") and words[i + 1] == "-m" and words[i + 2].startswith("pspo_jax."):
            return [words[i + 2].removeprefix("pspo_jax."), *words[i + 3 :]]
    return []
