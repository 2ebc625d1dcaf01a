"""Completions of very different lengths, on CPU: refilled slots beside a static batch, packed updates beside padded.

    python scripts/bench_ragged.py --shape tiny --out bench.jsonl

Each token ends a row with a probability that makes lengths geometric, with a mean of 0.3 of the longest. All
contenders of a case draw the same rows from the same keys. docs/performance.md describes the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import _bench
from _bench import SHAPES, Channel, Contender, Result, Work
from bench_rollout import our_about, our_setup

STATIC, SLOTS = "static batch", "refilled slots"
PADDED, PACKED, SHARED = "padded update", "packed update", "packed update, shared prompts"


def stop_ids(work: Work) -> list[int]:
    """Number of ids that end a row so that a model of random weights draws `mean_tokens` tokens on average; 0 = no row
    ends."""
    if not work.mean_tokens:
        return [-1]
    return list(range(max(1, round(work.shape.vocab / work.mean_tokens))))


def serve_rollout(work: Work) -> None:
    channel = Channel()
    settings, model, prompts = our_setup(work)
    import jax

    from pspo_jax.rollout import SamplingParams, counting_sampler

    params = model.init(jax.random.key(0))
    sample = jax.jit(counting_sampler(model, work.group_size, work.new_tokens, 0, work.slots or None))
    sampling = SamplingParams.of(settings.rollout, stop_ids(work))

    def call() -> dict[str, float]:
        start = time.perf_counter()
        rollouts, computed = jax.block_until_ready(sample(params, prompts, jax.random.key(1), sampling))
        seconds = time.perf_counter() - start
        tokens = int(rollouts.lengths.sum())
        return {"seconds": seconds, "tokens": tokens, "useful": tokens / int(computed)}

    _bench.serve(channel, call, our_about())


def serve_update(work: Work) -> None:
    channel = Channel()
    settings, model, prompts = our_setup(work)
    import jax
    import jax.numpy as jnp

    from pspo_jax.rollout import SamplingParams, make_sampler
    from pspo_jax.training.algorithm import build
    from pspo_jax.training.optimizer import adamw
    from pspo_jax.training.step import init_state, make_train_step

    optimizer = adamw(settings.optimizer, settings.run.steps)
    algorithm = build(settings)
    params = model.init(jax.random.key(0))
    state = init_state(
        params, optimizer, algorithm, settings, settings.task.train_prompts, work.prompt_tokens, jax.random.key(1)
    )
    sample = make_sampler(model, work.group_size, work.new_tokens, 0)
    rollouts = sample(params, prompts, jax.random.key(1), SamplingParams.of(settings.rollout, stop_ids(work)))
    rewards = jax.random.normal(jax.random.key(2), rollouts.lengths.shape)
    train_step = make_train_step(model, optimizer, algorithm, settings)
    del params

    def call() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(train_step(state, rollouts, jnp.copy(rewards)))
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens": int(rollouts.lengths.sum()),
            "useful": float(metrics["update/useful_tokens"]),
        }

    _bench.serve(channel, call, our_about())


def contests(work: Work, options: argparse.Namespace) -> list[list[Contender]]:
    """The contenders of each case: without and with refilled slots; without and with packing and shared prompts."""
    slots, rows = options.slots, options.microbatch_rows
    static = Contender(STATIC, "rollout", sys.executable, work, f"({work.rows} rows)")
    refilled = dataclasses.replace(work, slots=slots)
    padded = dataclasses.replace(work, microbatch_rows=rows)
    shared = dataclasses.replace(padded, packing=True)
    packed = dataclasses.replace(shared, share_prompts=False)
    bins = f"({rows} bins a microbatch)"
    return [
        [static, Contender(SLOTS, "rollout", sys.executable, refilled, f"({slots} of {work.rows} rows)", ours=True)],
        [
            Contender(PADDED, "update", sys.executable, padded, f"({rows} rows a microbatch)"),
            Contender(PACKED, "update", sys.executable, packed, bins),
            Contender(SHARED, "update", sys.executable, shared, bins, ours=True),
        ],
    ]


def values(result: Result) -> dict[str, float]:
    return {"tokens_per_s": result.median("tokens") / result.median(), "useful": result.median("useful")}


def main() -> None:
    parser = _bench.options(__doc__.splitlines()[0], peers=False)
    parser.add_argument("--prompts", type=int, default=32, help="prompts, each with 8 completions (default 32)")
    parser.add_argument("--new-tokens", type=int, default=256, help="longest completion (default 256)")
    parser.add_argument("--slots", type=int, default=16, help="rollout.slots (default 16)")
    parser.add_argument("--microbatch-rows", type=int, default=8, help="loss.microbatch_rows (default 8)")
    options = parser.parse_args()
    t = options.new_tokens
    for shape in _bench.chosen(options.shape, list(SHAPES)):
        for dtype in _bench.chosen(options.dtype, ["float32", "bfloat16"]):
            layers = SHAPES[shape].layers
            work = Work(SHAPES[shape], dtype, options.prompts, 8, 64, t, mean_tokens=round(0.3 * t), scan_unroll=layers)
            for contest in contests(work, options):
                case = f"{shape} {dtype}, {work.rows} x at most {t}, {contest[0].role}"
                group = _bench.compare(__file__, contest, options)
                _bench.emit([_bench.measurement("ragged", case, r, **values(r)) for r in group], options.out)
                print(f"{case} done", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        {"rollout": serve_rollout, "update": serve_update}[sys.argv[2]](Work.parse(sys.argv[3]))
    else:
        main()
