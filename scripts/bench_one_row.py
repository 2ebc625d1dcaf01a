"""Ways to compute the products of one row on CPU, which is what decoding a single completion is.

    python scripts/bench_one_row.py
    python scripts/bench_one_row.py --runs 30

A token is the products of the small shape of _bench.py (12 layers and the head, float32) without attention, in a loop
inside one program. The ways take turns. Each line has the processor time of a token over all threads, which other
programs disturb less, and the elapsed time. Two devices are two CPU devices of XLA, each with half of the columns of
every matrix.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from _bench import SHAPES

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pspo_jax.distributed.runtime import keep_freed_memory
from pspo_jax.system.one_line_parser import OneLineParser

TOKENS = 8
"""Tokens of a call."""
SHAPE = SHAPES["small"]
Product = Callable[[Array, Any], Array]
"""(x [r, D], a weight in some form) -> x W [r, F]"""


class Way(NamedTuple):
    """A way to compute the products."""

    product: Product
    form: Callable[[Float[Array, "D F"]], Any]
    """How a weight is held."""
    rows: int = 1
    devices: int = 1


def weights(key: Array) -> list[Float[Array, "D F"]]:
    """q, k and v together, o, gate, up and down of each layer, then the head."""
    attention, kv = SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    layer = [
        (SHAPE.width, attention + 2 * kv),
        (attention, SHAPE.width),
        (SHAPE.width, SHAPE.mlp_width),
        (SHAPE.width, SHAPE.mlp_width),
        (SHAPE.mlp_width, SHAPE.width),
    ]
    shapes = layer * SHAPE.layers + [(SHAPE.width, SHAPE.vocab)]
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, shape) / shape[0] ** 0.5 for k, shape in zip(keys, shapes, strict=True)]


def plain(x: Array, w: Array) -> Array:
    return x @ w


def weights_first(x: Array, w: Float[Array, "F D"]) -> Array:
    return jnp.einsum("fd,rd->fr", w, x).T


def row_first(x: Array, w: Float[Array, "F D"]) -> Array:
    return jnp.einsum("rd,fd->rf", x, w)


def halves(x: Array, w: tuple[Array, Array]) -> Array:
    return jnp.concatenate([x @ half for half in w], axis=1)


def multiply_and_sum(x: Float[Array, "1 D"], w: Float[Array, "D F"]) -> Array:
    return (x[0, :, None] * w).sum(axis=0)[None]


def on_two_devices(x: Array, w: Float[Array, "D f"]) -> Array:
    joined: Array = jax.lax.all_gather(x @ w, "columns", axis=1, tiled=True)
    return joined


def cut(w: Array) -> tuple[Array, Array]:
    middle = w.shape[1] // 2
    return jnp.copy(w[:, :middle]), jnp.copy(w[:, middle:])


def transposed(w: Array) -> Array:
    return jnp.copy(w.T)


WAYS = {
    "one row": Way(plain, jnp.copy),
    "two equal rows": Way(plain, jnp.copy, rows=2),
    "eight equal rows": Way(plain, jnp.copy, rows=8),
    "one row, transposed weights first": Way(weights_first, transposed),
    "one row, transposed weights second": Way(row_first, transposed),
    "one row, two halves of the columns": Way(halves, cut),
    "one row, multiplied and summed": Way(multiply_and_sum, jnp.copy),
    "one row, half of the columns on each of two devices": Way(on_two_devices, jnp.copy, devices=2),
}


def tokens(product: Product, x: Float[Array, "r D"], held: list[Any]) -> Float[Array, "r D"]:
    """The row after TOKENS tokens; each depends on the one before."""
    attention = SHAPE.heads * SHAPE.head_dim

    def token(_: Array, x: Array) -> Array:
        for i in range(SHAPE.layers):
            qkv, o, gate, up, down = held[5 * i : 5 * i + 5]
            x = x + product(jnp.tanh(product(x, qkv)[:, :attention]), o)
            x = x + product(jax.nn.silu(product(x, gate)) * product(x, up), down)
            x = x / jnp.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6)
        drawn = jnp.argmax(product(x, held[-1]), axis=1)
        return x + 1e-3 * drawn[:, None] / SHAPE.vocab

    found: Array = jax.lax.fori_loop(0, TOKENS, token, x)
    return found


def prepared(way: Way, plain_weights: list[Array], x: Float[Array, "1 D"]) -> Callable[[], Array]:
    """A call that computes TOKENS tokens."""
    held = [way.form(w) for w in plain_weights]
    x = jnp.repeat(x, way.rows, axis=0)
    run = functools.partial(tokens, way.product)
    if way.devices > 1:
        mesh = jax.make_mesh((way.devices,), ("columns",))
        whole, columns = PartitionSpec(), PartitionSpec(None, "columns")
        held = [jax.device_put(w, NamedSharding(mesh, columns)) for w in held]
        x = jax.device_put(x, NamedSharding(mesh, whole))
        run = jax.shard_map(run, mesh=mesh, in_specs=(whole, columns), out_specs=whole, check_vma=False)
    jitted = jax.jit(run)
    return lambda: jax.block_until_ready(jitted(x, held))


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=15, help="calls of each way (default 15)")
    options = parser.parse_args()
    keep_freed_memory()
    key = jax.random.key(0)
    found, x = weights(key), jax.random.normal(key, (1, SHAPE.width))
    calls = {name: prepared(way, found, x) for name, way in WAYS.items()}
    # Over many tokens of random weights, rounding grows without bound; so the ways are compared in one product.
    for name, way in WAYS.items():
        rows = jnp.repeat(x, way.rows, axis=0)
        if way.devices == 1 and not jnp.allclose(way.product(rows, way.form(found[0])), rows @ found[0], atol=1e-4):
            raise SystemExit(f"{name}: the product is another")
    for call in calls.values():
        call()
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(options.runs):
        for name, call in calls.items():
            start, before = time.perf_counter(), time.process_time()
            call()
            seen[name].append((time.process_time() - before, time.perf_counter() - start))
    for name, both in seen.items():
        busy, elapsed = (sorted(one[i] / TOKENS * 1e3 for one in both) for i in (0, 1))
        print(
            f"{name}: {statistics.median(busy):.1f} ms of a core ({busy[0]:.1f} to {busy[-1]:.1f}), elapsed "
            f"{statistics.median(elapsed):.1f} ms ({elapsed[0]:.1f} to {elapsed[-1]:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
