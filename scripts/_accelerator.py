"""This package's parts of bench_accelerator.py. Each runs in its own process and prints lines of JSON as it measures.

A line holds the work in products and bytes; the parent process knows the ceilings and derives shares from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _bench
from _arithmetic import cache_bytes, decode_flops, train_flops, weight_bytes
from _bench import Shape, Work

if TYPE_CHECKING:
    from pspo_jax.arrays.state import Prompts, Rollouts
    from pspo_jax.config.schema import Config
    from pspo_jax.model.interface import Model

BEGAN = time.perf_counter()
OURS = "pspo_jax"


@dataclass(frozen=True)
class Job:
    """The settings of a part, as its process receives them."""

    work: Work
    """Rollouts and whole steps."""
    train: Work
    """Updates alone."""
    gap: Work
    """Log-probs of the sampler beside the trainer's."""
    product: int
    """Size of the matrices of the ceiling."""
    read_mib: int
    dataset: int
    """Prompts that the selector chooses from."""
    platform: str
    """What JAX has to run on."""
    calls: int = 3
    """Timed calls of each part."""
    limit: float = 60.0
    """Seconds that the part may take."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of our config that are not at the values chosen here."""
    turns: str = ""
    """Folder by which parts that run together take turns; empty = each part runs alone."""
    parties: int = 1
    """Number of parts that run together."""

    @staticmethod
    def parse(text: str) -> Job:
        found = json.loads(text)
        works = {k: Work(**{**found[k], "shape": Shape(**found[k]["shape"])}) for k in ("work", "train", "gap")}
        return Job(**{**found, **works})

    def left(self) -> float:
        """Seconds until the time limit."""
        return self.limit - (time.perf_counter() - BEGAN)

    def ours(self) -> str:
        """This package's name in the results, with the fields that were set."""
        return OURS + "".join(f", {k}={v}" for k, v in self.fields.items())


def named(work: Work) -> str:
    return f"{work.prompts} x {work.group_size}, {work.prompt_tokens} + {work.new_tokens} tokens"


def emit(case: str, contender: str, seconds: list[float], about: dict[str, Any], note: str = "", **more: Any) -> None:
    """Print a line of JSON. `more` holds "values" (numbers to show), "work" (products and bytes) or "first" (seconds of
    the first call)."""
    first = more.pop("first", None)
    middle = statistics.median(seconds)
    line = {
        "bench": "accelerator",
        "case": case,
        "contender": contender,
        "note": note,
        "ours": contender == OURS,
        "seconds": {"median": middle, "best": min(seconds), "spread": (max(seconds) - min(seconds)) / middle},
        **{"values": {}, **more},
        "first_call": None if first is None else {"cold": first, "cached": None},
        "repetitions": seconds,
        "machine": _bench.machine() | {"accelerator": about.pop("accelerator")},
        "versions": about,
    }
    print(json.dumps(_bench.rounded(line)), flush=True)


@contextlib.contextmanager
def turn(job: Job) -> Iterator[None]:
    """The time in which this part has the device to itself, once every part has compiled or ended."""
    if not job.turns:
        yield
        return
    folder = Path(job.turns)
    (folder / f"{os.getpid()}.ready").touch()
    while len(list(folder.glob("*.ready"))) < job.parties and job.left() > job.limit / 5:
        time.sleep(0.2)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def repeat(job: Job, call: Callable[[], dict[str, float]]) -> tuple[float, list[dict[str, float]]]:
    """Seconds from the start of the process to the end of the first call, and of each later call.

    Near the time limit there are fewer calls than requested, but at least one.
    """
    call()
    first = time.perf_counter() - BEGAN
    with turn(job):
        found = [call()]
        while len(found) < job.calls and job.left() > 2 * found[-1]["seconds"]:
            found.append(call())
    return first, found


def middle(calls: list[dict[str, float]], key: str) -> float:
    return statistics.median(call[key] for call in calls)


# Ours


def jax_about() -> dict[str, Any]:
    import importlib.metadata as metadata

    import jax

    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    try:
        versions["pspo_jax"] = metadata.version("pspo_jax")
    except metadata.PackageNotFoundError:
        versions["pspo_jax"] = "source tree"
    return versions | {"accelerator": f"{device.device_kind} ({device.platform})"}


def peak_mib() -> dict[str, float]:
    """The largest memory of arrays and temporaries on the device, in MiB, if its driver reports it."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_device_mib": stats["peak_bytes_in_use"] / 2**20} if "peak_bytes_in_use" in stats else {}


def check_platform(job: Job) -> None:
    """Exit unless there is a GPU: JAX would fall back to the CPU, which would take too long."""
    import jax

    if jax.default_backend() != job.platform:
        raise SystemExit(f"JAX runs on {jax.default_backend()} here, not on {job.platform}")


def our_setup(job: Job, work: Work) -> tuple[Config, Model]:
    """Config and model. The compiler's flags are set before JAX touches the device, as in the entry points.

    model.attention is the kernel that passed the check on this machine.
    """
    from pspo_jax.config.defaults import replace
    from pspo_jax.config.presets import resolve
    from pspo_jax.config.schema import Config
    from pspo_jax.distributed import xla_flags

    shape = {k: v for k, v in asdict(work.shape).items() if k != "vocab"}
    fields = {f"model.{k}": v for k, v in shape.items()} | {
        "algorithm.name": "pspo",
        "model.tied": True,
        "model.qkv_bias": True,
        "model.compute_dtype": work.dtype,
        "model.scan_unroll": 1,
        "model.remat": "full",
        "rollout.prompts": work.prompts,
        "rollout.group_size": work.group_size,
        "rollout.max_new_tokens": work.new_tokens,
        "loss.microbatch_rows": work.microbatch_rows,
        "optimizer.learning_rate": 1e-6,
    }
    settings = resolve(replace(Config(), fields | job.fields))
    xla_flags.apply(settings)
    import jax

    from pspo_jax.config.validation import validate
    from pspo_jax.model import built_in, transformer
    from pspo_jax.model.attention.probe import with_decode_kernel, with_kernels
    from pspo_jax.training.machine_defaults import with_logits

    check_platform(job)
    validate(settings)
    if work.cache:
        jax.config.update("jax_compilation_cache_dir", work.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    one = {"context": 1, "tensor": 1}
    length = work.prompt_tokens + work.new_tokens
    a = built_in(settings.model, work.shape.vocab)
    a = with_kernels(
        a,
        settings.model.attention,
        job.platform,
        length,
        one,
        probe=True,
        say=lambda s: print(s, file=sys.stderr),
        share_prompts=settings.loss.share_prompts,
    )
    mesh = jax.make_mesh((1, 1), ("context", "tensor"), devices=jax.devices()[:1])
    a = with_decode_kernel(a, settings, mesh, work.prompt_tokens, True, lambda s: print(s, file=sys.stderr))
    capacity = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    settings, _ = with_logits(settings, capacity, job.platform == "cpu")
    return replace(settings, {"model.attention": a.attention}), transformer(a)


def our_sampler(settings: Config, model: Model, work: Work, platform: str) -> Callable[..., Rollouts]:
    from pspo_jax.rollout import make_sampler
    from pspo_jax.rollout.sampler import tokens_per_test

    chunk = tokens_per_test(platform, work.new_tokens)
    return make_sampler(model, work.group_size, work.new_tokens, 0, settings.rollout.slots, chunk)


def our_training(settings: Config, model: Model, num_prompts: int, prompt_tokens: int) -> tuple[Any, Any, Any]:
    """Algorithm, first state and step. Only the state holds its arrays, since the step donates them."""
    import jax

    from pspo_jax.training.algorithm import build
    from pspo_jax.training.optimizer import adamw
    from pspo_jax.training.step import init_state, make_train_step

    optimizer = adamw(settings.optimizer, settings.run.steps)
    algorithm = build(settings)
    params = jax.jit(model.init)(jax.random.key(0))
    state = init_state(params, optimizer, algorithm, settings, num_prompts, prompt_tokens, jax.random.key(1))
    return algorithm, state, make_train_step(model, optimizer, algorithm, settings)


def our_prompts(work: Work) -> Prompts:
    import jax.numpy as jnp

    from pspo_jax.arrays.state import Prompts

    n = work.prompts
    tokens = jnp.asarray(_bench.prompt_ids(work), jnp.int32)
    return Prompts(jnp.arange(n), tokens, jnp.full(n, work.prompt_tokens), jnp.ones(n))


def check(tokens: int, work: Work) -> None:
    if tokens != work.rows * work.new_tokens:
        raise SystemExit(f"{tokens} tokens were drawn, not {work.rows * work.new_tokens}")


def serve_ceilings(job: Job) -> None:
    """Measure bfloat16 products and the reading of an array. Several calls are in flight, so that launching them costs
    nothing."""
    import jax
    import jax.numpy as jnp

    check_platform(job)
    n, count = job.product, 10
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    whole = jnp.ones((job.read_mib * 2**18,), jnp.float32)
    total = jax.jit(jnp.sum)

    def timed(call: Callable[[], Any]) -> list[float]:
        jax.block_until_ready(call())
        found = []
        for _ in range(job.calls):
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(count)])
            found.append((time.perf_counter() - start) / count)
        return found

    with turn(job):
        products, reads = timed(lambda: product(a, b)), timed(lambda: total(whole))
    rates = {"flops_per_s": 2 * n**3 / min(products)}
    emit("ceilings", f"bfloat16 product {n:,}^3", products, jax_about(), values=rates)
    rates = {"bytes_per_s": whole.nbytes / min(reads)}
    emit("ceilings", f"read of {job.read_mib:,} MiB", reads, jax_about(), values=rates)


def low_limit(work: Work) -> int:
    """The shorter of the two lengths whose difference gives the time of a token's step."""
    return max(1, work.new_tokens // 8)


def decode_work(work: Work, low: int, high: int) -> dict[str, float]:
    """Products and bytes of one token of all rows, on average between two lengths."""
    own, width = (low + high) / 2, 2 if work.dtype == "bfloat16" else 4
    return {
        "flops": decode_flops(work.shape, work.rows, work.prompt_tokens + own),
        "weight_bytes": weight_bytes(work.shape, width),
        "cache_bytes": cache_bytes(work.shape, work.rows, work.prompts, work.prompt_tokens, own, width),
    }


def serve_decode(job: Job) -> None:
    work = job.work
    settings, model = our_setup(job, work)
    import jax
    import numpy as np

    from pspo_jax.rollout import SamplingParams

    params = jax.jit(model.init)(jax.random.key(0))
    prompts = our_prompts(work)
    sample = our_sampler(settings, model, work, job.platform)
    sampling = SamplingParams.of(settings.rollout, [-1])
    low, high = low_limit(work), work.new_tokens

    def timed(limit: int) -> float:
        settings = sampling._replace(max_new_tokens=jax.device_put(np.int32(limit)))
        start = time.perf_counter()
        rollouts: Rollouts = jax.block_until_ready(sample(params, prompts, jax.random.key(1), settings))
        seconds = time.perf_counter() - start
        check(int(rollouts.lengths.sum()), dataclasses.replace(work, new_tokens=limit))
        return seconds

    def call() -> dict[str, float]:
        short, long = timed(low), timed(high)
        return {"seconds": short + long, "call": long, "step": (long - short) / (high - low)}

    first, calls = repeat(job, call)
    note, values = f"(slope from {low} to {high})", {"tokens_per_s": work.rows / middle(calls, "step")}
    found = {"first": first, "work": decode_work(work, low, high)}
    emit(f"decode, {named(work)}", job.ours(), [c["step"] for c in calls], jax_about(), note, values=values, **found)
    values = {"tokens_per_s": work.rows * high / middle(calls, "call")} | peak_mib()
    emit(f"rollout, {named(work)}", job.ours(), [c["call"] for c in calls], jax_about(), "", values=values)


def serve_step(job: Job) -> None:
    """Measure whole PSPO steps: choice of prompts and rollout, a reward on the host, update."""
    work = job.work
    settings, model = our_setup(job, work)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pspo_jax.arrays.state import ROLLOUT, SELECT, Prompts, purpose_key
    from pspo_jax.rollout import SamplingParams

    n, p, b = job.dataset, work.prompt_tokens, work.prompts
    data = jax.random.randint(jax.random.key(2), (n, p), 0, work.shape.vocab)
    algorithm, state, train_step = our_training(settings, model, n, p)
    select = jax.jit(
        lambda selector, key, step: algorithm.selector.select(selector, purpose_key(key, step, SELECT), step, b),
        donate_argnums=0,
    )
    sample = our_sampler(settings, model, work, job.platform)
    sampling = SamplingParams.of(settings.rollout, [-1])

    def call() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        ids, weight, selector = select(state.selector, state.key, state.step)
        state = dataclasses.replace(state, selector=selector)
        prompts = Prompts(ids, data[ids], jnp.full(b, p), weight)
        rollouts = sample(state.params, prompts, purpose_key(state.key, state.step, ROLLOUT), sampling)
        tokens = np.asarray(rollouts.tokens)
        drawn = time.perf_counter()
        rewards = (tokens % 2 == 0).mean(axis=-1, dtype=np.float32)
        rewarded = time.perf_counter()
        count = int(rollouts.lengths.sum())
        state, _ = jax.block_until_ready(train_step(state, rollouts, jnp.asarray(rewards)))
        end = time.perf_counter()
        check(count, work)
        return {"seconds": end - start, "rollout": drawn - start, "reward": rewarded - drawn, "update": end - rewarded}

    first, calls = repeat(job, call)
    values = {f"{k}_s": middle(calls, k) for k in ("rollout", "reward", "update")} | peak_mib()
    values["tokens_per_s"] = work.rows * work.new_tokens / middle(calls, "seconds")
    note = f"({work.microbatch_rows} rows a microbatch)"
    seconds = [c["seconds"] for c in calls]
    emit(f"PSPO step, {named(work)}", job.ours(), seconds, jax_about(), note, values=values, first=first)


def train_case(work: Work) -> str:
    return f"train step, {work.rows} rows of {work.prompt_tokens + work.new_tokens:,} tokens"


def train_work(work: Work) -> dict[str, float]:
    length = work.prompt_tokens + work.new_tokens
    return {"flops": train_flops(work.shape, work.rows, length, work.new_tokens)}


def full_rollouts(work: Work) -> Rollouts:
    """Completions of the largest length, made without sampling."""
    import jax
    import jax.numpy as jnp

    from pspo_jax.arrays.state import Rollouts

    b, g, t = work.prompts, work.group_size, work.new_tokens
    log_probs = jnp.full((b, g, t), -jnp.log(work.shape.vocab))
    return Rollouts(
        prompts=our_prompts(work),
        tokens=jax.random.randint(jax.random.key(3), (b, g, t), 0, work.shape.vocab),
        mask=jnp.ones((b, g, t), bool),
        log_probs=log_probs,
        sampling_log_probs=log_probs,
        lengths=jnp.full((b, g), t),
        ended=jnp.zeros((b, g), bool),
        temperature=jnp.float32(1),
    )


def serve_train(job: Job) -> None:
    work = job.train
    settings, model = our_setup(job, work)
    import jax

    _, state, train_step = our_training(settings, model, work.prompts, work.prompt_tokens)
    rollouts = full_rollouts(work)
    rewards = jax.random.normal(jax.random.key(4), rollouts.lengths.shape)

    def call() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, rollouts, rewards))
        return {"seconds": time.perf_counter() - start}

    first, calls = repeat(job, call)
    tokens = work.rows * (work.prompt_tokens + work.new_tokens)
    values = {"tokens_per_s": tokens / middle(calls, "seconds")} | peak_mib()
    chosen = f"remat {settings.model.remat}, attention {settings.model.attention}"
    note = f"({work.microbatch_rows} rows a microbatch, {chosen})"
    more = {"values": values, "work": train_work(work), "first": first}
    emit(train_case(work), job.ours(), [c["seconds"] for c in calls], jax_about(), note, **more)


def serve_gap(job: Job) -> None:
    """Measure
    log-prob of the sampler - log-prob of the trainer
    of the sampled tokens, and the seconds that the trainer takes."""
    work = job.gap
    settings, model = our_setup(job, work)
    import jax
    import jax.numpy as jnp

    from pspo_jax.losses.log_probs import completion_log_probs
    from pspo_jax.rollout import SamplingParams

    params = jax.jit(model.init)(jax.random.key(0))
    sample = our_sampler(settings, model, work, job.platform)
    rollouts = sample(params, our_prompts(work), jax.random.key(1), SamplingParams.of(settings.rollout, [-1]))
    check(int(rollouts.lengths.sum()), work)

    @jax.jit
    def score(params: Any, rollouts: Rollouts) -> Any:
        p = jax.tree.map(lambda x: jnp.repeat(x, work.group_size, axis=0), rollouts.prompts)
        tokens = rollouts.tokens.reshape(work.rows, -1)
        return completion_log_probs(model, params, p.tokens, p.lengths, tokens)[0].reshape(rollouts.tokens.shape)

    gap = jnp.abs(score(params, rollouts) - rollouts.log_probs)
    start = time.perf_counter()
    jax.block_until_ready(score(params, rollouts))
    values = {"gap_max": float(gap.max()), "gap_mean": float(gap.mean())}
    seconds = [time.perf_counter() - start]
    emit(f"log-prob gap, {work.dtype}, {named(work)}", job.ours(), seconds, jax_about(), values=values)


PARTS: dict[str, Callable[[Job], None]] = {
    "ceilings": serve_ceilings,
    "decode": serve_decode,
    "step": serve_step,
    "train": serve_train,
    "gap": serve_gap,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](Job.parse(sys.argv[2]))
