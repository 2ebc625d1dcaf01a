"""`python -m pspo_jax.report --prompts RUN`: a run's statistics of each prompt, as a parquet file and a page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pspo_jax.checkpoint.reading import read_part
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.runs.access import choose_steps, read_config
from pspo_jax.runs.home import home_of
from pspo_jax.training.setup import Setup, prepare, verifiers

Column = Sequence[str] | np.ndarray
"""The values of a column."""
HEAD = 120
"""Characters of a prompt's text that are shown, at most."""
PAGE_ROWS = 500
"""Prompts on the page, at most; the parquet file has all."""


def write_prompts(run: Path, wanted: str = "latest") -> tuple[Path, Path]:
    """Write prompts.parquet and prompts.html to a run folder, from a checkpoint; return their paths.

    Args:
      wanted: the checkpoint's step, latest or best.
    Raises:
      ConfigError: no run folder, no such checkpoint, or the data is not what it was.
    """
    config = read_config(run, flag="--prompts", prog="report")
    # No model runs here, one device is enough, and the machine may lack the one that the run's kernel is for.
    config = replace(
        config, {"model.attention": "xla", "model.decode_attention": "xla", "mesh.data": 1, "mesh.fsdp": 1}
    )
    step = choose_steps(run, wanted)[-1]
    with verifiers(config) as pool:
        setup = prepare(config, weights=False, pool=pool)
        columns = _columns(setup, run, step)
    return _parquet(columns, run / "prompts.parquet"), _page(columns, run, step)


def _columns(setup: Setup, run: Path, step: int) -> dict[str, Column]:
    """Values by column name, a row per prompt."""
    prompts = setup.task.train
    n = len(prompts.lengths)
    with jax.set_mesh(setup.mesh):
        state, metadata = read_part(home_of(run) / "checkpoints", step, "selector", lambda _: setup.abstract.selector)
        if metadata["dataset"] != prompts.fingerprint():
            raise ConfigError(
                f"--prompts {run}: its data is not what checkpoint {step} was trained on; restore it, or carry the run "
                "on with --allow-data-change first"
            )
        found = jax.device_get(jax.jit(setup.algorithm.selector.to_table)(state, jnp.int32(step)))
    decode = setup.task.tokenizer.decode
    if prompts.texts is None:
        texts = [_head(decode(list(prompts.tokens[i][: prompts.lengths[i]]))) for i in range(n)]
    else:
        texts = [_head(text) for text in prompts.texts[:]]
    kinds = [str(setup.config.task.name)] * n if prompts.labels is None else list(prompts.labels)
    columns: dict[str, Column] = {"id": np.arange(n, dtype=np.int64), "text": texts, "task": kinds}
    return columns | {name: np.asarray(values)[:n] for name, values in found.items()}


def _head(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= HEAD else line[: HEAD - 1] + "…"


def _parquet(columns: dict[str, Column], path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    def column(values: Column) -> pyarrow.Array:
        floats = isinstance(values, np.ndarray) and values.dtype.kind == "f"
        return pyarrow.array(values, from_pandas=True) if floats else pyarrow.array(values)

    pyarrow.parquet.write_table(pyarrow.table({name: column(v) for name, v in columns.items()}), path)
    return path


def _page(columns: dict[str, Column], run: Path, step: int) -> Path:
    """The prompts with the most visits, by priority where these are equal, as a page that sorts by its columns."""
    n = len(columns["id"])
    priority = np.nan_to_num(np.asarray(columns["priority"]), nan=-np.inf)
    visits = np.asarray(columns["visits"])
    order = np.lexsort((-priority, -visits))[:PAGE_ROWS]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(values[i]))}</td>" for values in columns.values()) + "</tr>"
        for i in order
    )
    seen = int((visits > 0).sum())
    some = f"the {len(order):,} most visited are shown, all are in prompts.parquet"
    shown = some if n > len(order) else "all are shown"
    caption = f"{run.resolve().name}, step {step}: {n:,} prompts, {seen:,} visited; {shown}"
    page = resources.files("pspo_jax.reporting").joinpath("prompts.html").read_text(encoding="utf-8")
    page = page.replace("__CAPTION__", html.escape(caption)).replace("__HEAD__", head).replace("__ROWS__", body)
    path = run / "prompts.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _cell(value: str | np.generic) -> str:
    if isinstance(value, str):
        return value
    number = float(value)
    if math.isnan(number):
        return ""
    return str(int(number)) if number == int(number) and not isinstance(value, np.floating) else f"{number:.4g}"
