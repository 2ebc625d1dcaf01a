"""Samples of completions with their rewards, for the run folder and the screen."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pspo_jax.data.task import CompletionBatch, RewardResult, Task, prompt_pictures, prompt_text
from pspo_jax.system.json_values import json_number
from pspo_jax.system.storage import write_whole, writing

Line = dict[str, Any]


def completion_lines(
    task: Task,
    batch: CompletionBatch,
    scores: RewardResult,
    advantages: Float[np.ndarray, "B G"],
    weights: Float[np.ndarray, "B"],
    groups: int,
) -> list[Line]:
    """One record per completion of the first `groups` groups.

    `verdict` is the accuracy in [0, 1], None without one; `reward` is the sum of all terms that training uses. If the
    data has images, `images` of each group's first record holds those of the prompt, and is empty in the others.
    """
    lines = []
    for i in range(min(groups, len(batch.rows))):
        row = int(batch.rows[i])
        prompt = prompt_text(batch.prompts, row, task.tokenizer)
        pictures = prompt_pictures(batch.prompts, row)
        for j in range(batch.lengths.shape[1]):
            lines.append(
                {
                    "step": batch.step,
                    "prompt_id": row,
                    "prompt": prompt,
                    **({} if batch.prompts.images is None else {"images": [] if j else pictures}),
                    "answer": batch.prompts.answers[row],
                    "completion": task.tokenizer.decode(batch.tokens[i, j, : batch.lengths[i, j]].tolist()),
                    "found": scores.answers[i][j],
                    "verdict": json_number(scores.verdicts[i, j]),
                    "reward": json_number(scores.reward[i, j]),
                    **{f"rewards/{name}": json_number(value[i, j]) for name, value in scores.terms.items()},
                    **{f"logged/{name}": rows[i][j] for name, rows in scores.columns.items()},
                    "advantage": float(advantages[i, j]),
                    "weight": float(weights[i]),
                    "length": int(batch.lengths[i, j]),
                    "end": "stop" if batch.ended[i, j] else "length",
                }
            )
    return lines


def write_completions(folder: Path, step: int, lines: list[Line], file_format: str) -> Path:
    """Write `step_000010.jsonl`, or the same as parquet, in `folder`; returns its path.

    Raises:
      StorageError: it cannot be written.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}.{file_format}"
    if file_format == "parquet":
        import pyarrow
        import pyarrow.parquet

        data = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), data)
        write_whole(path, data.getvalue())
    else:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def print_completions(console: Console, lines: list[Line], most: int = 4, characters: int = 300) -> None:
    """A table of the first completions, long ones from their end, where the answer is."""
    shown = lines[:most]
    if not shown:
        return
    first = shown[0]
    table = Table(title=Text(f"step {first['step']}, prompt {first['prompt_id']}: {_end(first['prompt'], 160)}"))
    for name in ("completion", "found", "verdict", "reward", "advantage", "end"):
        table.add_column(name, overflow="fold")
    for line in shown:
        reward = "none" if line["reward"] is None else f"{line['reward']:.2f}"
        cells = (_end(line["completion"], characters), line["found"] or "", _verdict(line["verdict"]), reward)
        table.add_row(*(Text(cell) for cell in cells), f"{line['advantage']:.2f}", line["end"])
    console.print(table)


def _verdict(value: float | None) -> str:
    return "none" if value is None else "right" if value >= 1 else "wrong" if value <= 0 else f"{value:.2f}"


def _end(text: str, characters: int) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return text if len(text) <= characters else "… " + text[-characters:]
