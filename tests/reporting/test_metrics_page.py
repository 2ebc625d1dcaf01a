"""docs/metrics.md has an entry for every key that a run writes, and names only fields that exist."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields, is_dataclass
from functools import cache

from pspo_jax.config.schema import Config
from pspo_jax.runs.accounting import PHASES
from tests.conftest import REPO

PAGE = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
KEY = re.compile(r"[a-z_]+(?:/(?:[a-z_]|\{[a-z_]+\})+)*")
NOT_METRICS = {"rewards/{name}", "terms/{name}", "failed/{name}"}
"""Columns of completion dumps, and names under which scores travel between processes."""


def documented(section: str) -> set[str]:
    """Keys in the first column of a section's tables."""
    _, _, rest = PAGE.partition(f"## {section}")
    rows = [line for line in rest.split("\n## ")[0].split("\n") if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row.split("|")[1])}


@cache
def written() -> dict[str, str]:
    """Keys that the package's code gives to dictionaries, with the file: those with a slash wherever they stand, others
    in functions that return metrics. A formatted part is its expression's name in braces."""
    found: dict[str, str] = {}
    for path in sorted((REPO / "pspo_jax").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_metrics = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and _writes_metrics(n)]
        names = {key for key in _keys(tree) if "/" in key} | {key for n in of_metrics for key in _keys(n)}
        found |= {key: str(path.relative_to(REPO)) for key in names if KEY.fullmatch(key) and key not in NOT_METRICS}
    return found


METRICS = re.compile(r"\b(?:Metrics|Values)\b")


def _writes_metrics(function: ast.FunctionDef) -> bool:
    """Whether a function returns metrics, or is given a dictionary of them, to which it may add."""
    arguments = {argument.arg: ast.unparse(argument.annotation or ast.Constant("")) for argument in function.args.args}
    given = (arguments.get(name, "") for name in ("values", "metrics"))
    if "self" not in arguments and any(METRICS.search(kind) or kind.startswith("dict") for kind in given):
        return True
    return function.returns is not None and bool(METRICS.search(ast.unparse(function.returns)))


def _keys(tree: ast.AST) -> set[str]:
    out: set[str] = set()
    for node in ast.walk(tree):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.DictComp):
            keys = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            keys = [node.slice]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                out.add(key.value)
            elif isinstance(key, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in key.values)
                out.add("".join(str(part) for part in parts))
    return out


def missing(keys: set[str], section: str = "metrics.jsonl") -> set[str]:
    """Keys that neither an entry nor a family of entries covers."""
    entries = documented(section)
    families = [re.compile(re.sub(r"\\{\w+\\}", r"[^/]+", re.escape(entry))) for entry in entries if "{" in entry]
    return {key for key in keys if key not in entries and not any(family.fullmatch(key) for family in families)}


def test_every_key_that_the_code_writes_has_an_entry():
    keys = set(written())
    assert {"loss", "updates", "rollouts/total", "groups/effective", "eval/{name}"} <= keys, "the search finds keys"
    evaluation = {"eval/greedy", "eval/sampled", "eval/no_verdict", "eval/greedy/add", "eval/sampled/add"}
    absent = missing((keys - {"eval/{name}"}) | evaluation)
    assert absent == set(), {key: written().get(key) for key in absent}


def test_no_entry_is_of_a_key_that_nothing_writes():
    """Families count as what writes them."""
    families = {re.sub(r"\{[^}]*\}", "{}", key) for key in written()}
    evaluation = {"eval/greedy", "eval/sampled", "eval/no_verdict", "eval/greedy/{}", "eval/sampled/{}"}
    evaluation |= {"eval/greedy_other_images"}
    known = families | evaluation | {"learning_rate", "step_time", "step"}
    stale = {key for key in documented("metrics.jsonl") if re.sub(r"\{[^}]*\}", "{}", key) not in known}
    assert stale == set()


def test_every_entry_says_what_the_key_means():
    rows = [line.strip("| ").split("|") for line in PAGE.split("\n") if line.startswith("| `")]
    assert rows and all(len(row) >= 2 and len(row[1].strip()) > 5 for row in rows)


def test_the_phases_of_a_run_have_entries():
    assert all(f"`{phase}`" in PAGE for phase in (*PHASES, "total"))
    assert {"eval", "steps", "rollouts", "tokens", "seconds"} == documented("summary.json")
    assert {"step", "visits", "priority"} == documented("strategy.jsonl")


def test_every_field_that_the_page_names_exists():
    config = Config()
    stages = {stage.name: {f.name for f in fields(getattr(config, stage.name))} for stage in fields(config)
              if is_dataclass(getattr(config, stage.name))}  # fmt: skip
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)(?: [^`]*)?`", PAGE)
    assert {f"{stage}.{field}" for stage, field in named if stage in stages and field not in stages[stage]} == set()
    assert len(named) > 30


def test_a_run_s_own_lines_are_covered():
    """Names as they stood in a run's metrics.jsonl, with families filled in."""
    line = json.loads('{"step": 1, "rewards/accuracy/mean": 0.5, "time/select": 0.1, "replay/age_2": 0.0, "loss": 0.0}')
    assert missing(set(line) - {"step"}) == set()
    assert missing({"rewards/new_number"}) == {"rewards/new_number"}
