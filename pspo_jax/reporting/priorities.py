"""A picture of the priorities of all prompts over a run, for loggers that show images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from pspo_jax.reporting.page import read_histograms
from pspo_jax.system.storage import write_whole

_BINS = 64
"""Rows of the picture: bins of priority."""
_WIDTH, _HEIGHT = 640, 384
"""Pixels of the field of colours."""
_LEFT, _TOP, _RIGHT, _BOTTOM = 76, 34, 20, 40
"""Pixels around it."""
_MOST = (0, 114, 178)
"""Colour of the bin with the most prompts; empty ones are white."""


def write_priorities(folder: Path, path: Path) -> bool:
    """Write the picture of the histograms in a run's strategy.jsonl as a PNG file; False = it holds none.

    Its columns are the steps of the histograms, one beside the other, and its rows priorities. The darker, the more of
    the step's prompts have this priority.

    Raises:
      StorageError: the file cannot be written.
    """
    found = read_histograms(folder, "priority", [])
    if not found:
        return False
    edges = [np.asarray(one["edges"], float) for one in found]
    low, high = min(e[0] for e in edges), max(e[-1] for e in edges)
    rows = np.linspace(low, high, _BINS + 1)
    counts = [np.asarray(one["counts"], float) for one in found]
    field = np.stack([_shares(c, e, rows) for c, e in zip(counts, edges, strict=True)], axis=1)
    image = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM), "white")
    colours = Image.fromarray(_colours(field)).resize((_WIDTH, _HEIGHT), Image.Resampling.NEAREST)
    image.paste(colours, (_LEFT, _TOP))
    draw = ImageDraw.Draw(image)
    draw.rectangle((_LEFT - 1, _TOP - 1, _LEFT + _WIDTH, _TOP + _HEIGHT), outline=(120, 120, 120))
    draw.text((_LEFT, 10), "priority of the prompts; darker = more of them", "black")
    draw.text((_LEFT - 6, _TOP), f"{high:.3g}", "black", anchor="ra")
    draw.text((_LEFT - 6, _TOP + _HEIGHT), f"{low:.3g}", "black", anchor="rd")
    draw.text((_LEFT, _TOP + _HEIGHT + 8), f"step {found[0]['step']:.0f}", "black")
    draw.text((_LEFT + _WIDTH, _TOP + _HEIGHT + 8), f"step {found[-1]['step']:.0f}", "black", anchor="ra")
    data = io.BytesIO()
    image.save(data, "PNG")
    write_whole(path, data.getvalue())
    return True


def _shares(
    counts: Float[np.ndarray, "n"], edges: Float[np.ndarray, "n+1"], rows: Float[np.ndarray, "bins+1"]
) -> Float[np.ndarray, "bins"]:
    """Shares of a histogram's prompts in other bins, the largest priority first; within a bin they spread evenly."""
    if edges[0] == edges[-1]:  # All prompts have one priority.
        found = np.histogram(edges[:1], rows)[0].astype(float)
    else:
        found = np.diff(np.interp(rows, edges, np.concatenate([[0.0], np.cumsum(counts)])))
    return found[::-1] / max(found.sum(), 1.0)


def _colours(shares: Float[np.ndarray, "bins steps"]) -> UInt8[np.ndarray, "bins steps 3"]:
    """White for none and a full colour for the largest share; the root makes rare priorities visible."""
    depth = np.sqrt(shares / max(shares.max(), 1e-12))[..., None]
    return np.round(255 + depth * (np.asarray(_MOST) - 255)).astype(np.uint8)
