"""Time and memory of choosing and observing 512 of N prompts, against N, compared with the usual methods.

    python scripts/bench_selection.py [--sizes 10000 100000 1000000 10000000] [--out selection.json]

This package: `select` and `observe` of each selector as the training loop runs them, jitted, with the state donated.
Peers, in the same process: a sum-tree of Python lists, as in most prioritised samplers, `np.random.choice(p=...)`, and
in JAX one `top_k` over all priorities and Gumbel noise over all of them. Contenders are measured one after the other.
Prints a Markdown table; --out keeps every repetition.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.defaults import replace
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.selection import SCORERS, PromptMetadata, SelectorContext, selector
from pspo_jax.system.one_line_parser import OneLineParser

GROUP = 8
Timed = dict[str, Callable[[], Any]]


class SumTree:
    """A binary tree of sums in Python lists."""

    def __init__(self, weights: np.ndarray):
        self.size = 1 << (len(weights) - 1).bit_length()
        level = np.zeros(self.size)
        level[: len(weights)] = weights
        levels = [level]
        while len(levels[-1]) > 1:
            levels.append(levels[-1].reshape(-1, 2).sum(1))
        self.nodes = np.concatenate([[0.0], *levels[::-1]]).tolist()

    def update(self, row: int, weight: float) -> None:
        node = row + self.size
        change = weight - self.nodes[node]
        while node:
            self.nodes[node] += change
            node //= 2

    def draw(self, target: float) -> int:
        node = 1
        while node < self.size:
            node *= 2
            if target > self.nodes[node]:
                target -= self.nodes[node]
                node += 1
        return node - self.size

    def batch(self, rng: np.random.Generator, count: int) -> list[int]:
        """Distinct rows, each drawn in proportion to its weight among the remaining ones."""
        rows, held = [], []
        for _ in range(count):
            row = self.draw(rng.uniform(0, self.nodes[1]))
            rows.append(row)
            held.append(self.nodes[row + self.size])
            self.update(row, 0.0)
        for row, weight in zip(rows, held, strict=True):
            self.update(row, weight)
        return rows


class Ours:
    """A selector and its state, stepped as in the training loop."""

    def __init__(self, name: str, size: int, batch: int):
        config = resolve(replace(Config(), {"selection.name": name}))
        self.strategy = selector(config.selection, config.forgetting, SelectorContext(batch, GROUP, 1000, 0))
        metadata = PromptMetadata(np.zeros(size, np.int8), np.random.default_rng(0).random(size, np.float32))
        self.state = jax.jit(lambda known: self.strategy.init(size, known))(metadata)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state)
        step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
        ids = jax.ShapeDtypeStruct((batch,), jnp.int32)
        groups = jax.ShapeDtypeStruct((batch, GROUP), jnp.float32)
        outcome = RolloutOutcome(groups, groups, groups, 0.0)
        self._select = jax.jit(self._choose, donate_argnums=0, static_argnums=3).lower(spec, key, step, batch).compile()
        self._observe = jax.jit(self.strategy.observe, donate_argnums=0).lower(spec, ids, outcome, step).compile()
        self.temporary = {"select": _temporary(self._select), "observe": _temporary(self._observe)}
        self.batch, self.step, self.rng = batch, 0, np.random.default_rng(1)
        self._draw_outcomes()
        self.ids = jnp.arange(batch, dtype=jnp.int32)

    def _choose(self, state: Any, key: Any, step: Any, batch: int) -> Any:
        return self.strategy.select(state, key, step, batch)

    def _draw_outcomes(self) -> None:
        chance = self.rng.random((self.batch, 1))
        rewards = (self.rng.random((self.batch, GROUP)) < chance).astype(np.float32)
        advantages = rewards - rewards.mean(1, keepdims=True)
        self.outcome = jax.device_put(RolloutOutcome(rewards, advantages, advantages, np.float32(0)))

    def select(self) -> Any:
        self.ids, weight, self.state = self._select(self.state, jax.random.key(self.step), jnp.int32(self.step))
        return self.ids, weight

    def observe(self) -> Any:
        self.state = self._observe(self.state, self.ids, self.outcome, jnp.int32(self.step))
        self.step += 1
        return self.state.now


def _temporary(compiled: Any) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def peers(size: int, batch: int) -> Timed:
    """Alternatives; they draw from the distribution of pps."""
    rng = np.random.default_rng(2)
    weights = rng.random(size) ** 0.6
    out: Timed = {}
    tree = SumTree(weights)
    out["Python sum-tree: draw"] = lambda: tree.batch(rng, batch)
    out["Python sum-tree: update"] = lambda: [tree.update(int(i), 0.5) for i in rng.integers(0, size, batch)]
    p = weights / weights.sum()
    out["np.random.choice(p, replace=False)"] = lambda: rng.choice(size, batch, replace=False, p=p)
    device = jnp.asarray(weights, jnp.float32)
    best = jax.jit(lambda w: jax.lax.top_k(w, batch))
    noisy = jax.jit(lambda w, key: jax.lax.top_k(jnp.log(w) + jax.random.gumbel(key, w.shape), batch))
    out["lax.top_k over all"] = lambda: best(device)
    out["Gumbel noise over all"] = lambda: noisy(device, jax.random.key(0))
    return out


def measure(size: int, batch: int, runs: int, names: list[str]) -> list[dict[str, Any]]:
    """One line for each contender and phase."""
    times: dict[tuple[str, str], list[float]] = {}
    lines = []
    for name in names:
        ours = Ours(name, size, batch)
        for turn in range(runs + 3):
            # Making the outcomes of a step is not timed.
            ours._draw_outcomes()
            took = {"select": seconds(ours.select), "observe": seconds(ours.observe)}
            if turn >= 3:
                for phase, value in took.items():
                    times.setdefault((name, phase), []).append(value)
        for phase in ("select", "observe"):
            extra = {"bytes": ours.bytes, "bytes_per_prompt": ours.bytes / size, "temporary": ours.temporary[phase]}
            lines.append({"contender": name, "phase": phase, **extra})
    for name, work in peers(size, batch).items():
        work()
        times[name, "peer"] = [seconds(work) for _ in range(min(runs, 7))]
        lines.append({"contender": name, "phase": "peer"})
    for line in lines:
        found = times[line["contender"], line["phase"]]
        line |= {"prompts": size, "batch": batch, "ms": [round(1e3 * t, 4) for t in found]}
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Median milliseconds against N; bytes a prompt at the largest N."""
    sizes = sorted({line["prompts"] for line in lines})
    rows = [
        "| | " + " | ".join(f"N = {size:,}" for size in sizes) + " | spread | bytes a prompt | temporary, KiB |",
        "|---|" + "---:|" * (len(sizes) + 3),
    ]
    for key in dict.fromkeys((line["contender"], line["phase"]) for line in lines):
        own = {line["prompts"]: line for line in lines if (line["contender"], line["phase"]) == key}
        cells = [f"{statistics.median(own[s]['ms']):.3g}" if s in own else "" for s in sizes]
        last = own[max(own)]
        spread = f"{min(last['ms']):.3g} to {max(last['ms']):.3g}"
        held = f"{last['bytes_per_prompt']:.1f}" if "bytes" in last else ""
        scratch = f"{last['temporary'] / 1024:,.0f}" if "bytes" in last else ""
        name = key[0] if key[1] == "peer" else f"`{key[0]}` {key[1]}"
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {spread} | {held} | {scratch} |")
    return "\n".join(rows)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--selectors", nargs="+", default=list(SCORERS), choices=list(SCORERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = []
    for size in args.sizes:
        lines += measure(size, args.batch, args.runs, args.selectors)
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, {platform.machine()}, jax {jax.__version__}, batch {args.batch}\n")
    print(table(lines))
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
