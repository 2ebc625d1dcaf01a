"""Attention kernels beside XLA on one accelerator: their errors, and their time for whole rows and for a token.

    python scripts/bench_attention.py --out bench.jsonl           # on a GPU
    python scripts/bench_attention.py --smoke                     # tiny shapes on CPU, XLA alone: does it run?

Whole rows: 8,192 tokens in rows of each length, forward and backward, with the heads of Qwen2.5-1.5B (12 of 128
numbers, 2 of them for keys), plain and packed four to a row. A token: one layer's attention of 32 groups of 8
completions to prompts of 512 tokens and caches of each size, of which the first tenth, three tenths or all columns are
live. Every kernel is first checked as a run checks it at its start (`pspo_jax/model/attention/probe.py`); one that the
check drops is not timed, and its line gives the reason.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import _bench

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree

    from pspo_jax.model.architecture import Architecture

ROW_TOKENS = 8192
GROUPS, GROUP_SIZE, PROMPT_TOKENS = 32, 8, 512
LIVE = (0.1, 0.3, 1.0)
"""Shares of the cache's columns that hold a token."""
TOKENS_IN_A_CALL = 64
"""Tokens whose attention is computed in one call, each after the one before."""


def architecture(dtype: str) -> Architecture:
    from pspo_jax.config.schema import ModelConfig
    from pspo_jax.model import built_in

    heads = ModelConfig(layers=1, width=1536, mlp_width=64, heads=12, kv_heads=2, head_dim=128, compute_dtype=dtype)
    return built_in(heads, 32)


def seconds_of(call: Callable[[], PyTree], runs: int) -> list[float]:
    """Seconds of each of the timed calls; some are in flight at a time, so that launching them costs nothing."""
    import jax

    jax.block_until_ready(call())
    found, in_flight = [], 5
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(in_flight)])
        found.append((time.perf_counter() - start) / in_flight)
    return found


def line(case: str, name: str, seconds: list[float] | None, reason: str | None, **values: float) -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    found = {
        "bench": "attention",
        "case": case,
        "contender": name,
        "values": values,
        "machine": _bench.machine() | {"accelerator": f"{device.device_kind} ({device.platform})"},
        "versions": {"jax": jax.__version__},
    }
    if seconds is None:
        return found | {"skipped": reason}
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / middle
    return found | {"seconds": {"median": middle, "best": min(seconds), "spread": spread}, "repetitions": seconds}


def whole_rows(a: Architecture, length: int, tokens: int, names: list[str], runs: int) -> Iterator[dict[str, Any]]:
    """Forward and backward pass over rows of `length` tokens."""
    import jax
    import jax.numpy as jnp

    from pspo_jax.model.attention.kernels import KERNELS, obstacle
    from pspo_jax.model.attention.probe import difference
    from pspo_jax.model.attention.xla import attend
    from pspo_jax.model.interface import Packed

    rows, platform = tokens // length, jax.devices()[0].platform
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = zip(keys, (a.heads, a.kv_heads, a.kv_heads, a.heads), strict=True)
    q, k, v, g = (jax.random.normal(key, (rows, length, n, a.head_dim), a.compute_dtype) for key, n in sizes)
    bins = jnp.broadcast_to(jnp.arange(length) * 4 // length, (rows, length))
    for packed in (False, True):
        case = f"{rows} rows of {length:,} tokens{', packed' if packed else ''}"
        for name in ["xla", *names]:
            if packed and name != "xla" and not KERNELS[name].packs:
                continue
            reason = None
            if name != "xla":
                reason = obstacle(name, platform, a, 1) or difference(name, a, length, packed)
            if reason is not None:
                yield line(case, name, None, reason)
                continue
            layout = Packed(bins, jnp.broadcast_to(jnp.arange(length), bins.shape)) if packed else None

            def both(q: Array, k: Array, v: Array, g: Array, layout: Packed | None, name: str = name) -> PyTree:
                out, back = jax.vjp(lambda q, k, v: attend(q, k, v, a.attention_scale, None, layout, name), q, k, v)
                return out, back(g)

            compiled = jax.jit(both).lower(q, k, v, g, layout).compile()
            memory = compiled.memory_analysis()
            found = seconds_of(lambda run=compiled, x=layout: run(q, k, v, g, x), runs)
            yield line(case, name, found, None, temporary_mib=memory.temp_size_in_bytes / 2**20)


def tokens_of(a: Architecture, columns: int, groups: int, names: list[str], runs: int) -> Iterator[dict[str, Any]]:
    """Attention of new tokens, with caches of `columns` columns."""
    import jax
    import jax.numpy as jnp

    from pspo_jax.model.attention.decode import PART_KERNELS, attend_by_parts
    from pspo_jax.model.attention.kernels import obstacle
    from pspo_jax.model.attention.probe import decode_difference
    from pspo_jax.model.attention.xla import Prefix, Suffix, attend_shared_prefix

    keys = jax.random.split(jax.random.key(0), 5)
    of_prompt, own = (
        (groups, a.kv_heads, PROMPT_TOKENS, a.head_dim),
        (groups, GROUP_SIZE, a.kv_heads, columns, a.head_dim),
    )
    shapes = ((groups, GROUP_SIZE, a.heads, a.head_dim), of_prompt, of_prompt, own, own)
    q, k, v, own_k, own_v = (
        jax.random.normal(key, shape, a.compute_dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    width = 2 if a.compute_dtype == "bfloat16" else 4
    column_bytes = groups * GROUP_SIZE * 2 * a.kv_heads * a.head_dim * width
    prompt_bytes = groups * PROMPT_TOKENS * 2 * a.kv_heads * a.head_dim * width
    for name in ["xla", *names]:
        reason = None
        if name != "xla":
            reason = obstacle(name, jax.devices()[0].platform, a, 1)
            reason = reason or decode_difference(PART_KERNELS[name], a, GROUP_SIZE, PROMPT_TOKENS, columns)

        def attend(q: Array, cache: tuple[Array, ...], t: Array, name: str = name) -> Array:
            prefix = Prefix(cache[0], cache[1], jnp.full(groups, PROMPT_TOKENS, jnp.int32))
            suffix = Suffix(cache[2], cache[3], t)
            if name == "xla":
                return attend_shared_prefix(q, prefix, suffix, a.attention_scale)
            return attend_by_parts(PART_KERNELS[name], q, prefix, suffix, a.attention_scale)

        def many(q: Array, cache: tuple[Array, ...], t: Array, attend: Any = attend) -> Array:
            return jax.lax.fori_loop(0, TOKENS_IN_A_CALL, lambda _, q: attend(q, cache, t), q)

        compiled = None
        for share in LIVE:
            live = max(1, round(share * columns))
            case = f"a token of {groups} x {GROUP_SIZE}, {columns:,} columns, {share:g} live"
            if reason is not None:
                yield line(case, name, None, reason)
                continue
            args = q, (k, v, own_k, own_v), jnp.int32(live - 1)
            compiled = compiled or jax.jit(many).lower(*args).compile()
            found = [s / TOKENS_IN_A_CALL for s in seconds_of(lambda run=compiled, args=args: run(*args), runs)]
            middle = statistics.median(found)
            rate = (prompt_bytes + live * column_bytes) / middle
            yield line(case, name, found, None, live_bytes_per_s=rate)


def main() -> None:
    parser = _bench.options(__doc__.splitlines()[0], peers=False, shapes=False)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, XLA alone, on any device")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096], help="tokens of rows")
    parser.add_argument("--columns", type=int, nargs="*", default=[512, 4096], help="columns of the caches")
    options = parser.parse_args()
    import jax

    from pspo_jax.model.attention.decode import PART_KERNELS
    from pspo_jax.model.attention.kernels import KERNELS, candidates

    here = [name for name in candidates() if KERNELS[name].platform == jax.default_backend()]
    if not options.smoke and jax.default_backend() == "cpu":
        raise SystemExit("there is no accelerator here; --smoke runs tiny shapes on CPU")
    a = architecture("float32" if options.smoke else "bfloat16")
    if options.smoke:
        a = dataclasses.replace(a, heads=4, kv_heads=2, head_dim=16)
    lengths, tokens = ([64], 128) if options.smoke else (options.lengths, ROW_TOKENS)
    columns, groups = ([64], 2) if options.smoke else (options.columns, GROUPS)
    rows, decode = ([], []) if options.smoke else (here, list(PART_KERNELS))
    for size in columns:
        for found in tokens_of(a, size, groups, decode, options.runs):
            _bench.emit([found], options.out)
    for length in lengths:
        for found in whole_rows(a, length, tokens, rows, options.runs):
            _bench.emit([found], options.out)
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
