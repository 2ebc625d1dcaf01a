"""The README's example runs as it stands and learns; what README and docs name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest

import pspo_jax
from pspo_jax.config.schema import Config
from tests.conftest import REPO
from tests.project.pages import PAGES, name_of, prose

FOLDERS = tuple(path.name for base in (REPO, REPO / "pspo_jax") for path in base.iterdir() if path.is_dir())
"""First parts of paths, from the root or from the package."""
PATH = re.compile(r"[\w./-]+?(?:/|\.(?:py|md|yaml|sh|svg|jsonl|sbatch))")
"""A folder, or a file of a kind that this repository has."""


def example() -> str:
    """The README's Python example of a training loop."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    (code,) = (block for block in blocks if "make_train_step" in block)
    return code


def test_example_learns():
    names: dict = {}
    history = []
    code = example().replace(
        "    state, metrics = train_step",
        "    history.append(reward.mean())\n    state, metrics = train_step",
    )
    exec(compile(code, "README.md", "exec"), names | {"history": history})
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 0.2, history


def code_spans(page: Path) -> list[str]:
    """What stands in backticks outside of code blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_of_the_repository_exist(page: Path):
    """Paths may be written from the repository's root or from the package."""
    named = {
        span.split(" ")[0]
        for span in code_spans(page)
        if PATH.fullmatch(span.split(" ")[0]) and "/" in span.split(" ")[0]
    }
    ours = {name for name in named if name.split("/")[0] in FOLDERS}
    ours |= set(re.findall(r"(?<![\w./-])(?:configs|scripts|examples)/[\w./-]+\.\w+", page.read_text(encoding="utf-8")))
    absent = {name for name in ours if not (REPO / name).exists() and not (REPO / "pspo_jax" / name).exists()}
    assert absent == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fields_exist(page: Path):
    """A field is a stage and a name, in prose and in the flags of commands."""
    stages = {
        stage.name: {f.name for f in fields(getattr(Config(), stage.name))}
        for stage in fields(Config)
        if is_dataclass(getattr(Config(), stage.name))
    }
    text = page.read_text(encoding="utf-8")
    flags = re.findall(r"--([a-z_]+)\.([a-z_]+)", text)
    named = [
        match.groups() for span in code_spans(page) if (match := re.match(r"([a-z_]+)\.([a-z_]+)(?![\w/.])", span))
    ]
    unknown = {f"{stage}.{name}" for stage, name in flags if name not in stages.get(stage, ())}
    unknown |= {
        f"{stage}.{name}"
        for stage, name in named
        if stage in stages and name not in stages[stage] and name not in ("py", "md", "yaml", "log", "lock", "jsonl")
    }
    assert unknown == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_public_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bpj\.([A-Za-z_]+)", text)) <= set(pspo_jax.__all__)


def test_the_picture_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/draw_architecture.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_map_has_every_folder():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (REPO / "pspo_jax").glob("*/__init__.py")}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()
