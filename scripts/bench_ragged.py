"""Completions of very different lengths, on CPU: rollouts in refilled slots and in stages, and packed updates.

    python scripts/bench_ragged.py --shape tiny --out bench.jsonl
    python scripts/bench_ragged.py --shape tiny --rollouts 0.3:1024 0.3:4096 --runs 3 --out bench.jsonl

Rollouts, of which each is named by the mean length as a share of the longest, and by the longest: lengths are
log-normal, with most of the variance between prompts (_ragged_lengths.py). Slots and stages have the same cache memory.
Updates: each token ends a row with a probability that makes lengths geometric, with a mean of 0.3 of the longest.
docs/performance.md describes the method.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import _bench
from _bench import SHAPES, Channel, Contender, Result, Work
from _ragged_lengths import log_medians, with_lengths
from bench_rollout import our_about, our_setup

STATIC, SLOTS, STAGES = "static batch", "refilled slots", "stages"
END = 1
"""Token that ends the rows of rollouts."""
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
    from pspo_jax.rollout.sampler import tokens_per_test

    medians = log_medians(work.prompts, work.mean_tokens, work.new_tokens, work.longest_first)
    model = with_lengths(model, medians, END)
    params = model.init(jax.random.key(0))
    chunk = tokens_per_test(jax.default_backend(), work.new_tokens)
    sample = counting_sampler(model, work.group_size, work.new_tokens, 0, work.slots or None, chunk, work.stages)
    args = (params, prompts, jax.random.key(1), SamplingParams.of(settings.rollout, [END]))
    start = time.perf_counter(), time.process_time()
    compiled = jax.jit(sample).lower(*args).compile()
    compilation = {"compile_s": time.perf_counter() - start[0], "compile_cpu_s": time.process_time() - start[1]}
    memory = compiled.memory_analysis()
    assert memory is not None
    shape = work.shape
    column_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * (4 if work.dtype == "float32" else 2)

    def call() -> dict[str, float]:
        start = time.perf_counter(), time.process_time()
        rollouts, computed = jax.block_until_ready(compiled(*args))
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        lengths = [int(n) for n in rollouts.lengths.ravel()]
        # Token t > 0 of a row is drawn after a look at t columns; the first is drawn from the prompt alone.
        needed = sum(n * (n - 1) / 2 for n in lengths)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens": sum(lengths),
            "useful": sum(lengths) / int(computed.tokens),
            "useful_columns": needed / float(computed.columns),
            "cache_read_gb": float(computed.columns) * column_bytes / 1e9,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            **compilation,
        }

    _bench.serve(channel, call, our_about(), warm_up=work.rows * work.new_tokens < 2**17)


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


def updates(work: Work, rows: int) -> list[Contender]:
    """Padded and packed updates, with `rows` rows or bins a microbatch."""
    padded = dataclasses.replace(work, microbatch_rows=rows)
    shared = dataclasses.replace(padded, packing=True)
    packed = dataclasses.replace(shared, share_prompts=False)
    bins = f"({rows} bins a microbatch)"
    return [
        Contender(PADDED, "update", sys.executable, padded, f"({rows} rows a microbatch)"),
        Contender(PACKED, "update", sys.executable, packed, bins),
        Contender(SHARED, "update", sys.executable, shared, bins, ours=True),
    ]


def rollouts(work: Work, slots: int, stages: int) -> list[Contender]:
    """A static batch, and the memory of `slots` completions of the greatest length, used in one and in more stages."""
    refilled = dataclasses.replace(work, slots=slots)
    staged = dataclasses.replace(refilled, stages=stages)
    note = f"(memory of {slots} of {work.rows} rows)"

    def contender(name: str, work: Work, note: str, ours: bool = False) -> Contender:
        return Contender(name, "rollout", sys.executable, work, note, ours)

    first = {"longest_first": True}
    return [
        contender(STATIC, work, f"({work.rows} rows)"),
        contender(SLOTS, refilled, note),
        contender(f"{SLOTS}, longest first", dataclasses.replace(refilled, **first), note),
        contender(STAGES, staged, f"({stages}; memory of {slots} rows)", ours=True),
        contender(f"{STAGES}, longest first", dataclasses.replace(staged, **first), f"({stages}; memory of {slots})"),
    ]


def update_values(result: Result) -> dict[str, float]:
    return {"tokens_per_s": result.median("tokens") / result.median(), "useful": result.median("useful")}


def rollout_values(result: Result) -> dict[str, float]:
    names = ("cpu_seconds", "useful", "useful_columns", "cache_read_gb", "temporary_mib", "compile_s", "compile_cpu_s")
    return {"tokens_per_s": result.median("tokens") / result.median()} | {name: result.median(name) for name in names}


def main() -> None:
    parser = _bench.options(__doc__.splitlines()[0], peers=False)
    parser.add_argument("--prompts", type=int, default=32, help="prompts, each with 8 completions (default 32)")
    parser.add_argument("--new-tokens", type=int, default=256, help="longest completion of updates (default 256)")
    parser.add_argument(
        "--rollouts",
        nargs="*",
        default=["0.3:1024"],
        metavar="MEAN:LONGEST",
        help="lengths of rollouts, the mean as a share of the longest (default 0.3:1024)",
    )
    parser.add_argument("--slots", type=int, default=32, help="rollout.slots (default 32)")
    parser.add_argument("--stages", type=int, default=4, help="rollout.stages (default 4)")
    parser.add_argument(
        "--microbatch-rows", type=int, default=8, help="loss.microbatch_rows; 0 = no updates (default 8)"
    )
    parser.add_argument(
        "--decode-attention", default="xla", help="model.decode_attention of rollouts, without the check (default xla)"
    )
    parser.add_argument("--only", nargs="*", help="names of the rollouts to measure (default: all)")
    options = parser.parse_args()
    for shape in _bench.chosen(options.shape, list(SHAPES)):
        for dtype in _bench.chosen(options.dtype, ["float32", "bfloat16"]):
            work = Work(SHAPES[shape], dtype, options.prompts, 8, 64, scan_unroll=SHAPES[shape].layers)
            work = dataclasses.replace(work, decode_attention=options.decode_attention)
            for lengths in options.rollouts:
                share, _, longest = lengths.partition(":")
                t = int(longest)
                ragged = dataclasses.replace(work, new_tokens=t, mean_tokens=round(float(share) * t))
                contest = rollouts(ragged, options.slots, options.stages)
                contest = [one for one in contest if not options.only or one.name in options.only]
                case = f"{shape} {dtype}, {work.rows} x at most {t}, mean {share}"
                case += "" if options.decode_attention == "xla" else f", {options.decode_attention}"
                group = _bench.compare(__file__, contest, options)
                lines = [_bench.measurement("stages", case, r, **rollout_values(r)) for r in group]
                _bench.emit(lines, options.out)
                print(f"{case} done", file=sys.stderr)
            if options.microbatch_rows:
                t = options.new_tokens
                ragged = dataclasses.replace(work, new_tokens=t, mean_tokens=round(0.3 * t))
                case = f"{shape} {dtype}, {work.rows} x at most {t}, update"
                group = _bench.compare(__file__, updates(ragged, options.microbatch_rows), options)
                _bench.emit([_bench.measurement("ragged", case, r, **update_values(r)) for r in group], options.out)
                print(f"{case} done", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        {"rollout": serve_rollout, "update": serve_update}[sys.argv[2]](Work.parse(sys.argv[3]))
    else:
        main()
