"""Hooks of MkDocs, which make one site of the pages in docs/ and of the files of the repository that they link to.

The pages are written for readers of the repository. A link may lead out of docs/, to a recipe or an example; the site
then has a page with that file's text. Lists and code within lists are laid out as GitHub reads them, and MkDocs' parser
wants them a little different.

MkDocs is imported where it is called, so that tests of the rest need not have it.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[1]
COPIED = "repository"
"""Folder of the site with files from outside of docs/."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".sh": "bash", ".sbatch": "bash"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s#]+)(?=[)#])")
FENCE = re.compile(r"^ *(```|~~~)")
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that GitHub gives them."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside of docs/ that a page links to, or that one of these links to."""
    from mkdocs.structure.files import File

    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen: set[str] = set()
    while waiting:
        origin = waiting.pop()
        for target in targets(as_page(origin), origin) if origin.endswith((".md", ".ipynb")) else ():
            if not target.startswith("docs/") and target not in seen:
                seen.add(target)
                waiting.append(target)
                files.append(File.generated(config, copied_page(target), content=as_page(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to the copies, and lay lists out for MkDocs' parser."""
    here = page.file.src_uri
    origin = here.removeprefix(f"{COPIED}/") if here.startswith(f"{COPIED}/") else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        target = resolved(link[1], origin)
        if target is None:
            return link[1]
        there = target.removeprefix("docs/") if target.startswith("docs/") else copied_page(target)
        return posixpath.relpath(there, posixpath.dirname(here))

    return laid_out(LINK.sub(moved, markdown))


def resolved(link: str, origin: str) -> str | None:
    """Path of a linked file from the root of the repository; None if there is no such file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return path if (REPO / path).is_file() else None


def targets(text: str, origin: str) -> Iterator[str]:
    """Paths of the files that a page links to."""
    for link in LINK.findall(text):
        if path := resolved(link, origin):
            yield path


def copied_page(path: str) -> str:
    """Place in the site of a file outside of docs/."""
    return f"{COPIED}/{path}" if path.endswith(".md") else f"{COPIED}/{path}.md"


def as_page(path: str) -> str:
    """The text of a file as a page."""
    text = (REPO / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
        return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)
    return f"# {path}\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n```\n"


def laid_out(markdown: str) -> str:
    """A page of GitHub's Markdown as Python-Markdown reads it.

    A list that follows a paragraph gets a blank line before it. What belongs to a numbered item is indented by four
    spaces, where three are enough for GitHub.
    """
    lines: list[str] = []
    fenced = numbered = False
    for line in markdown.split("\n"):
        item = ITEM.match(line)
        if not fenced:
            before = lines[-1] if lines else ""
            if item and before and not ITEM.match(before) and not before.startswith(" "):
                lines.append("")
            numbered = line[0].isdigit() and bool(item) if line[:1].strip() else numbered
        fenced ^= bool(FENCE.match(line))
        lines.append(f" {line}" if numbered and line.startswith("   ") else line)
    return "\n".join(lines)
