"""Draw docs/architecture.svg from the package's own imports: `python scripts/draw_architecture.py [--check]`.

A box is a folder of the package, in the order that pyproject.toml's import contract gives, with the first sentence of
its docstring. An arrow leads from a folder to one that it imports. Where a chain of other arrows says the same, the
arrow is left out, so that the picture can be read. `--check` writes nothing and fails if the file is out of date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
LEFT, WIDTH, LINE, PADDING, GAP, LANE = 16, 640, 17, 8, 16, 15
"""Pixels: the boxes' left edge and width, a line of text, the padding of a box, between boxes, between lanes."""
PURPOSE = 110
"""Pixels from a box's edge to its second column, the purpose."""
WRAP = 88
"""Characters in a line of a purpose."""
COLOURS = ("#4269d0", "#c76b00", "#c7342c", "#2f8f83", "#3a8a3a", "#8a5fb0", "#9c6b4e")

Arrow = tuple[int, int]
"""A folder that imports and one that it imports, as places in the order of the picture."""


def layers() -> list[list[str]]:
    """The names on each layer of the contract, the one that imports no other first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (listed,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip(" ()") for name in layer.split("|")] for layer in reversed(listed)]


def imports(package: Path, order: list[list[str]]) -> set[Arrow]:
    """Every pair of layers of which one imports the other, at whatever depth and in whatever function."""
    place = {name: i for i, names in enumerate(order) for name in names}
    found: set[Arrow] = set()
    for path in sorted(package.rglob("*.py")):
        importer = place.get(path.relative_to(package).parts[0].removesuffix(".py"))
        if importer is None:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            targets = {name.split(".")[1] for name in names if name.startswith(f"{package.name}.")}
            found |= {(importer, place[target]) for target in targets & place.keys()}
    return {(a, b) for a, b in found if a != b}


def needed(arrows: set[Arrow], count: int) -> list[Arrow]:
    """The arrows without those that a chain of others implies."""
    reach: dict[int, set[int]] = {}
    kept: list[Arrow] = []
    for a in range(count):
        reach[a] = set()
        # The nearest first: a folder further up may be reached through it.
        for b in sorted((b for x, b in arrows if x == a), reverse=True):
            if b not in reach[a]:
                kept.append((a, b))
                reach[a] |= {b} | reach.get(b, set())
    return kept


def lanes(arrows: list[Arrow]) -> dict[Arrow, int]:
    """A vertical lane for each arrow between boxes that are not neighbours; arrows in one lane do not overlap."""
    taken: list[list[Arrow]] = []
    found: dict[Arrow, int] = {}
    for a, b in sorted(arrows, key=lambda arrow: (arrow[0] - arrow[1], arrow)):
        if a - b == 1:
            continue
        free = (i for i, lane in enumerate(taken) if all(b >= c or a <= d for c, d in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((a, b))
        found[a, b] = lane
    return found


def purpose(package: Path, names: list[str]) -> list[str]:
    """The first sentence of a folder's docstring, in lines; none for the entry points."""
    if len(names) > 1:
        return []
    text = ast.get_docstring(ast.parse((package / names[0] / "__init__.py").read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]
    return textwrap.wrap(sentence, WRAP)


def draw(package: Path) -> str:
    """The picture as SVG."""
    order = layers()
    arrows = needed(imports(package, order), len(order))
    lane_of = lanes(arrows)
    texts = [purpose(package, names) for names in order]
    heights = [2 * PADDING + LINE * max(1, len(text)) for text in texts]
    tops = [LEFT + sum(heights[:i]) + GAP * i for i in range(len(order))]
    right = LEFT + WIDTH
    width = right + LANE * (2 + max(lane_of.values(), default=0)) + LEFT
    height = tops[-1] + heights[-1] + LEFT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        "<title>The folders of pspo_jax, and which imports which</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for names, text, top, size in zip(order, texts, tops, heights, strict=True):
        out.append(
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{size}" rx="6" fill="#f4f6fa" stroke="#8a94a6"/>'
        )
        y, alone = top + PADDING + 13, len(names) == 1
        title = names[0] if alone else f"python -m pspo_jax.({' | '.join(names)})"
        out.append(f'<text x="{LEFT + 12}" y="{y}" fill="#1c2430" font-weight="bold">{escape(title)}</text>')
        for i, line in enumerate(text):
            out.append(f'<text x="{LEFT + PURPOSE}" y="{y + LINE * i}" fill="#1c2430">{escape(line)}</text>')
    for arrow in arrows:
        out += _arrow(arrow, arrows, lane_of, tops, heights, right)
    return "\n".join([*out, "</svg>", ""])


def _arrow(
    arrow: Arrow, arrows: list[Arrow], lane_of: dict[Arrow, int], tops: list[int], heights: list[int], right: int
) -> list[str]:
    """A line with its head: straight up to a neighbour, else out to a lane, up it and back to the box."""
    a, b = arrow
    if arrow not in lane_of:
        x, start, end = LEFT + 40, tops[a], tops[b] + heights[b]
        colour = "#5b6575"
        points = [(x, start), (x, end + 6)]
        head = f"{x},{end} {x - 4},{end + 8} {x + 4},{end + 8}"
    else:
        leaving = sorted((other for other in lane_of if other[0] == a), key=lambda other: lane_of[other])
        entering = sorted((other for other in lane_of if other[1] == b), key=lambda other: -lane_of[other])
        # Those that leave a box stand in its upper part, and those that enter it in the lower.
        start = tops[a] + heights[a] * (1 + leaving.index(arrow)) // (2 * len(leaving) + 2)
        end = tops[b] + heights[b] // 2 + heights[b] * (1 + entering.index(arrow)) // (2 * len(entering) + 2)
        x = right + LANE * (1 + lane_of[arrow])
        colour = COLOURS[a % len(COLOURS)]
        points = [(right, start), (x, start), (x, end), (right + 6, end)]
        head = f"{right},{end} {right + 8},{end - 4} {right + 8},{end + 4}"
    path = " ".join(f"{x},{y}" for x, y in points)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>',
        f'<polygon points="{head}" fill="{colour}"/>',
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the picture is out of date")
    check = parser.parse_args().check
    picture = draw(ROOT / "pspo_jax")
    there = PICTURE.read_text(encoding="utf-8") if PICTURE.exists() else ""
    if picture == there:
        return 0
    if check:
        print(f"{PICTURE.relative_to(ROOT)} is out of date; run: python scripts/draw_architecture.py", file=sys.stderr)
        return 1
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
