"""The site of the documentation: its map and reference are complete, and MkDocs builds it without a warning."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import pspo_jax
from pspo_jax.config.schema import Config
from tests.conftest import REPO

DOCS = REPO / "docs"
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
builds = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mkdocs") is None, reason="MkDocs is not installed: pip install -e '.[docs]'"),
]


@pytest.fixture(scope="module")
def hooks():
    """The module of scripts/_site.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        yield importlib.import_module("_site")


def directives(page: str) -> list[str]:
    """Dotted names of which a page shows the docstrings."""
    return re.findall(r"^::: ([\w.]+)$", (DOCS / page).read_text(encoding="utf-8"), re.M)


def test_the_map_and_the_menu_have_every_page():
    menu = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [page for entry in menu for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))]
    assert sorted(listed) == sorted(PAGES)
    linked = re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert set(linked) == PAGES - {"index.md"}


def test_the_reference_has_every_public_name_once():
    found = {}
    for path in directives("reference.md"):
        module, _, name = path.rpartition(".")
        assert name not in found, path
        found[name] = getattr(importlib.import_module(module), name)
        assert found[name].__doc__, path
    missing = {name for name in pspo_jax.__all__ if found.get(name) is not getattr(pspo_jax, name)}
    assert missing == set()


def test_the_page_of_fields_has_every_stage():
    stages = {f.name: type(getattr(Config(), f.name)) for f in fields(Config)}
    text = (DOCS / "fields.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)\n\n::: ([\w.]+)$", text, re.M) == [
        (name, f"{stage.__module__}.{stage.__qualname__}") for name, stage in stages.items() if is_dataclass(stage)
    ]


@pytest.mark.parametrize(
    ("github", "ours"),
    [
        ("Text:\n- a\n- b", "Text:\n\n- a\n- b"),
        ("- a\n  more of a\n- b", "- a\n  more of a\n- b"),
        ("1. a\n   ```bash\n   ls\n   ```\n2. b\n\nText", "1. a\n    ```bash\n    ls\n    ```\n2. b\n\nText"),
        ("```text\na\n- b\n```", "```text\na\n- b\n```"),
    ],
)
def test_lists_are_laid_out_for_the_parser(hooks, github, ours):
    assert hooks.laid_out(github) == ours


def test_links_out_of_the_docs_lead_to_copies(hooks):
    assert hooks.resolved("../CONTRIBUTING.md", "docs/index.md") == "CONTRIBUTING.md"
    assert hooks.resolved("../ABSENT.md", "docs/index.md") is None
    assert list(hooks.targets("[a](tasks.md#data), [b](https://x.org/a.md), [c](#here)", "docs/index.md")) == [
        "docs/tasks.md"
    ]
    assert hooks.copied_page("CONTRIBUTING.md") == "repository/CONTRIBUTING.md"
    assert hooks.as_page("examples/own_task.py").startswith("# examples/own_task.py\n\n```python\n")


class Links(HTMLParser):
    """Reads the links of a page, and the ids that links can lead to."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [link for key in ("href", "src") if (link := values.get(key))]
        self.ids |= {name for key in ("id", "name") if (name := values.get(key))}


def build(repo: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=repo, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(log of the build, folder of the site)."""
    out = tmp_path_factory.mktemp("site")
    done = build(REPO, out)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, out


@pytest.mark.parametrize("kind", [pytest.param("build", marks=builds)])
def test_the_site_is_built_without_a_warning_and_every_link_leads_somewhere(site, kind):
    """Links of the HTML are followed, to files and to ids within them."""
    log, out = site
    assert "WARNING" not in log and "ERROR" not in log
    pages = {path: Links(path) for path in out.rglob("*.html")}
    assert len(pages) >= len(PAGES)
    broken = []
    for page, found in pages.items():
        for link in found.links if page.name != "404.html" else ():
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            there = there / "index.html" if there.is_dir() else there
            known = pages[there].ids if there in pages else None
            if not there.is_file() or (parts.fragment and known is not None and unquote(parts.fragment) not in known):
                broken.append(f"{page.relative_to(out)}: {link}")
    assert broken == []


@pytest.mark.parametrize("link", [pytest.param(link, marks=builds) for link in ("absent.md", "tasks.md#absent")])
def test_a_broken_link_fails_the_build(tmp_path, link):
    left_out = shutil.ignore_patterns(".*", "__pycache__", "pspo_jax", "tests", "runs", "weights", "site")
    shutil.copytree(REPO, tmp_path, ignore=left_out, dirs_exist_ok=True)
    (tmp_path / "pspo_jax").symlink_to(REPO / "pspo_jax")
    with (tmp_path / "docs" / "quickstart.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[somewhere]({link})\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and link in done.stderr
