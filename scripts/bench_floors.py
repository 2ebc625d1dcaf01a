"""How close decoding and training come to the machine's ceilings, on CPU.

    python scripts/bench_floors.py --out bench.jsonl

A separate worker measures the rates of products and of memory reads before and after; the better of the two counts. A
token's step is the difference between two length limits, which leaves out the prompts and the call itself. Its floor is
the larger of its products at the measured rate and its reads at the measured bandwidth. In an update, only the products
of the model count, and no recomputation. docs/performance.md describes the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import _bench
from _arithmetic import Rates, decode_floor, train_flops
from _bench import SHAPES, Channel, Contender, Result, Work
from bench_ragged import serve_update
from bench_rollout import our_about, our_setup

SIZE = 2048
READ_BYTES = 512 * 2**20
WIDTH = {"float32": 4, "bfloat16": 2}


def fastest(call: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def serve_ceilings(work: Work) -> None:
    """Measure products of 2,048 x 2,048 with float32 results, and reading an array far larger than the caches."""
    channel = Channel()
    import jax
    import jax.numpy as jnp
    import numpy as np

    a, b = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE), jnp.dtype(work.dtype))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), cores)
    pool = ThreadPoolExecutor(cores)

    def call() -> dict[str, float]:
        start = time.perf_counter()
        products = fastest(lambda: product(a, b).block_until_ready())
        # NumPy's maximum runs without Python's lock, with vector instructions.
        reads = fastest(lambda: list(pool.map(np.max, parts)))
        return {"seconds": time.perf_counter() - start, "product": products, "read": reads}

    _bench.serve(channel, call, our_about())


def limits(work: Work) -> tuple[int, int]:
    """The two length limits whose difference gives the time of a token's step."""
    return max(1, work.new_tokens // 4), work.new_tokens


def serve_decode(work: Work) -> None:
    channel = Channel()
    # The group of a config has at least two rows; the sampler also takes one.
    settings, model, prompts = our_setup(dataclasses.replace(work, group_size=max(2, work.group_size)))
    import jax
    import numpy as np

    from pspo_jax.rollout import SamplingParams, make_sampler

    params = model.init(jax.random.key(0))
    sample = make_sampler(model, work.group_size, work.new_tokens, pad_id=0)
    sampling = SamplingParams.of(settings.rollout, [-1])
    low, high = (jax.device_put(sampling._replace(max_new_tokens=np.int32(n))) for n in limits(work))

    def timed(sampling: Any) -> tuple[float, int]:
        start = time.perf_counter()
        rollouts = jax.block_until_ready(sample(params, prompts, jax.random.key(1), sampling))
        return time.perf_counter() - start, int(rollouts.lengths.sum())

    def call() -> dict[str, float]:
        (short, _), (long, tokens) = timed(low), timed(high)
        first, last = limits(work)
        return {"seconds": short + long, "step": (long - short) / (last - first), "tokens": tokens}

    _bench.serve(channel, call, our_about())


def decoders(dtype: str, shape: str, rows: list[int]) -> list[Contender]:
    """Contenders with groups of 8, if there are as many rows."""
    found = []
    for b in rows:
        prompts = max(1, b // 8)
        work = Work(SHAPES[shape], dtype, prompts, b // prompts)
        found.append(Contender(f"decode, {b} rows", "decode", sys.executable, work, ours=True))
    return found


def ceilings(dtype: str, options: argparse.Namespace) -> Result:
    work = Work(SHAPES["small"], dtype)
    return _bench.compare(__file__, [Contender("ceilings", "ceilings", sys.executable, work)], options)[0]


def ceiling_lines(dtype: str, found: Result) -> tuple[Rates, list[dict[str, Any]]]:
    """Rates of the fastest repetition, and the lines that report them."""
    rates = Rates(2 * SIZE**3 / found.least("product"), READ_BYTES / found.least("read"))
    product = dataclasses.replace(found, name=f"{dtype} product {SIZE}^3")
    read = dataclasses.replace(found, name="read of 512 MiB", note=f"({len(os.sched_getaffinity(0))} threads)")
    return rates, [
        _bench.measurement("floors", f"ceilings, {dtype}", product, key="product", flops_per_s=rates.flops),
        _bench.measurement("floors", f"ceilings, {dtype}", read, key="read", bytes_per_s=rates.bandwidth),
    ]


def decode_line(case: str, work: Work, found: Result, rates: Rates) -> dict[str, Any]:
    # The difference covers the tokens between the two limits; this is the mean number of their rows' own keys.
    own = sum(limits(work)) / 2
    floor = decode_floor(work.shape, work.rows, work.prompts, work.prompt_tokens, own, WIDTH[work.dtype], rates)
    seconds = found.median("step")
    values = {"floor_s": floor, "share": floor / seconds, "tokens_per_s": work.rows / seconds}
    return _bench.measurement("floors", case, found, key="step", **values)


def update_line(case: str, work: Work, found: Result, rates: Rates) -> dict[str, Any]:
    flops = train_flops(work.shape, work.rows, work.prompt_tokens + work.new_tokens, work.new_tokens)
    rate = flops / found.median()
    values = {"flops_per_s": rate, "floor_s": flops / rates.flops, "share": rate / rates.flops}
    tokens = work.rows * (work.prompt_tokens + work.new_tokens) / found.median()
    return _bench.measurement("floors", case, found, tokens_per_s=tokens, **values)


def measure(shape: str, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the ceilings, decoding in turns, an update, and the ceilings again."""
    case = f"{shape} {dtype}"
    layers = SHAPES[shape].layers
    before = ceilings(dtype, options)
    decoding = decoders(dtype, shape, options.rows)
    decoded = _bench.compare(__file__, decoding, options)
    for contender, result in zip(decoding, decoded, strict=True):
        _bench.check_tokens([result], contender.work.rows * contender.work.new_tokens)
    work = Work(SHAPES[shape], dtype, microbatch_rows=4, scan_unroll=layers)
    note = f"(4 rows a microbatch, unroll {layers})"
    updating = Contender(f"update, {work.rows} rows", "update", sys.executable, work, note, ours=True)
    (updated,) = _bench.compare(__file__, [updating], options)
    after = ceilings(dtype, options)
    both = dataclasses.replace(before, repetitions=before.repetitions + after.repetitions)
    rates, lines = ceiling_lines(dtype, both)
    lines += [decode_line(case, c.work, r, rates) for c, r in zip(decoding, decoded, strict=True)]
    return [*lines, update_line(case, work, updated, rates)]


def main() -> None:
    parser = _bench.options(__doc__.splitlines()[0], peers=False)
    parser.set_defaults(shape="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="rows to decode")
    options = parser.parse_args()
    for shape in _bench.chosen(options.shape, list(SHAPES)):
        for dtype in _bench.chosen(options.dtype, list(WIDTH)):
            _bench.emit(measure(shape, dtype, options), options.out)
            print(f"{shape} {dtype} done", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        roles = {"ceilings": serve_ceilings, "decode": serve_decode, "update": serve_update}
        roles[sys.argv[2]](Work.parse(sys.argv[3]))
    else:
        main()
