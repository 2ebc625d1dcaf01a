"""Seconds of a training step of SmolLM2-135M's shape with adapters, part by part, on this machine.

    python scripts/bench_real_step.py
    python scripts/bench_real_step.py --model FOLDER --effective 8,3,0 --set loss.microbatch_rows=4
    python scripts/bench_real_step.py --embedded --effective 32,19,11,6,0 --parts= --runs 9

The step draws 8 completions of each of 8 prompts and trains LoRA adapters of rank 16, in float32. With --embedded it is
the step of GRPO on the embedded task: its small model, of which all weights train, and its own settings. The parts are
the rollout, the scoring (one forward pass over all completions, which `loss.old_log_probs=trainer` or a KL term would
need), and the update. The cost of an update depends on how many groups have a signal, that is rewards that
differ. Rewards are set so that `--effective` of the groups have one. The numbers of groups take turns, and each line
has the median over --runs steps, in elapsed time and in processor time, which other programs disturb less. Weights are
random unless --model names a Hugging Face folder of this or another model.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import _bench

from pspo_jax.system.one_line_parser import OneLineParser

if TYPE_CHECKING:
    import argparse

    from jax.stages import Compiled

    from pspo_jax.arrays.state import Prompts, Rollouts, TrainState
    from pspo_jax.config.schema import Config
    from pspo_jax.model.architecture import Architecture
    from pspo_jax.model.interface import Model

P = ParamSpec("P")
R = TypeVar("R")
SMOLLM2: dict[str, Any] = {
    "model.layers": 30,
    "model.width": 576,
    "model.heads": 9,
    "model.kv_heads": 3,
    "model.head_dim": 64,
    "model.mlp_width": 1536,
    "model.rope_theta": 100_000.0,
    "model.tied": True,
}
VOCABULARY = 49_152
PROMPT_BUCKET = 16


class Repetition(NamedTuple):
    """A step."""

    parts: dict[str, tuple[float, float]]
    """Seconds, and seconds of processor time, of each part."""
    useful: float
    """Share of the update's token positions that the loss needs."""
    gradient: float
    """Norm of the gradient."""


class Built(NamedTuple):
    """The config of the measured step, its model, and the weights."""

    config: Config
    model: Model
    architecture: Architecture
    params: Any
    frozen: Any


def settings(options: argparse.Namespace) -> Config:
    """The config of the step, with the fields that --set gives."""
    from pspo_jax.config.defaults import replace
    from pspo_jax.config.presets import resolve
    from pspo_jax.config.schema import Config
    from pspo_jax.training.machine_defaults import ENOUGH_TOKENS

    if options.embedded:
        return resolve(replace(Config(), {"algorithm.name": "grpo", **_bench.parsed(options.set)}))
    fields: dict[str, Any] = {
        "algorithm.name": "grpo",
        "lora.rank": 16,
        "lora.alpha": 32,
        "rollout.prompts": options.prompts,
        "rollout.group_size": options.group_size,
        "rollout.max_new_tokens": options.new_tokens,
        "rollout.temperature": 0.7,
        "loss.packing": True,
        "loss.microbatch_rows": 8,
        "loss.microbatch_tokens": ENOUGH_TOKENS,
        "model.remat": "none",
        "model.param_dtype": "float32",
        "model.compute_dtype": "float32",
        "optimizer.learning_rate": 3e-4,
    }
    fields |= {} if options.model else SMOLLM2
    fields |= _bench.parsed(options.set)
    return resolve(replace(Config(), fields))


def build(options: argparse.Namespace) -> Built:
    """The config, the model and its weights."""
    import jax
    import jax.numpy as jnp

    from pspo_jax.config.defaults import replace
    from pspo_jax.data.synthetic.arithmetic import TOKENIZER
    from pspo_jax.distributed.mesh import make_mesh, replicated
    from pspo_jax.model import built_in, transformer
    from pspo_jax.model.architecture import lora_of
    from pspo_jax.model.huggingface.load import load_params, read_source
    from pspo_jax.model.weights import init_weights, is_weight, table

    config = settings(options)
    if options.embedded:
        a = built_in(config.model, TOKENIZER.vocab_size, TOKENIZER.forbidden)
        model = transformer(a)
        return Built(config, model, a, model.init(jax.random.key(0)), None)
    source = None
    if options.model:
        source = read_source(dataclasses.replace(config.model, source=options.model), True)
        a = source.architecture
    else:
        a = built_in(config.model, VOCABULARY)
    a = dataclasses.replace(a, lora=lora_of(config.lora), remat=config.model.remat or "none")
    weights = table(a)
    if source is None:
        base = init_weights(weights, jax.random.key(0), jnp.dtype("float32"))
    else:
        mesh = make_mesh(replace(config, {"mesh.data": 1}), a)
        whole = jax.tree.map(lambda _: replicated(mesh), weights, is_leaf=is_weight)
        base = load_params(source, weights, whole, "float32")
    model = transformer(a)
    adapters = model.init(jax.random.key(1)) if a.lora is not None else base
    if a.lora is not None:  # B is not 0, as after a few steps
        adapters = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(jax.random.key(2), x.shape), adapters)
    return Built(config, model, a, adapters, base if a.lora is not None else None)


def prompts_of(options: argparse.Namespace, vocabulary: int) -> Prompts:
    """Prompts of arbitrary ids, padded to a whole number of buckets."""
    import jax.numpy as jnp

    from pspo_jax.arrays.state import Prompts

    b, n = options.prompts, options.prompt_tokens
    padded = -(-n // PROMPT_BUCKET) * PROMPT_BUCKET
    ids = (jnp.arange(b * padded).reshape(b, padded) * 7919 + 13) % (vocabulary - 2)
    tokens = jnp.where(jnp.arange(padded) < n, ids, vocabulary - 1).astype(jnp.int32)
    return Prompts(jnp.arange(b), tokens, jnp.full(b, n, jnp.int32), jnp.ones(b, jnp.float32))


def rewards_of(effective: int, prompts: int, group_size: int) -> Any:
    """Rewards of 0 and 1 in turn for the groups that have a signal, 0 for the others."""
    import numpy as np

    rewards = np.zeros((prompts, group_size), np.float32)
    rewards[:effective, ::2] = 1
    return rewards


def timed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[float, float, R]:
    """Seconds of a call, its seconds of processor time over all threads, and its result."""
    import jax

    start, before = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(function(*args, **kwargs))
    return time.perf_counter() - start, time.process_time() - before, found


def cut(rollouts: Rollouts, mean_tokens: int, new_tokens: int) -> Rollouts:
    """The rollouts as if rows had ended after a geometric number of tokens; 0 = as they are."""
    import numpy as np

    if not mean_tokens:
        return rollouts
    lengths = np.clip(np.random.default_rng(0).geometric(1 / mean_tokens, rollouts.lengths.shape), 1, new_tokens)
    mask = np.arange(new_tokens) < lengths[..., None]
    return rollouts.replace(lengths=lengths.astype(np.int32), mask=mask)


def measure(options: argparse.Namespace) -> None:
    """Print a line for each number of effective groups."""
    import jax
    import jax.numpy as jnp

    from pspo_jax.arrays.groups import groups_of
    from pspo_jax.rollout.sampler import make_sampler
    from pspo_jax.rollout.token_loop import SamplingParams
    from pspo_jax.training.algorithm import build as algorithm_of
    from pspo_jax.training.optimizer import adamw
    from pspo_jax.training.scoring import rows_of, score
    from pspo_jax.training.step import init_state, make_train_step

    config, model, a, params, frozen = build(options)
    r = config.rollout
    prompts = prompts_of(options, a.vocab_size)
    algorithm, optimizer = algorithm_of(config), adamw(config.optimizer, 1000)
    length = prompts.tokens.shape[1]
    state = init_state(params, optimizer, algorithm, config, 64, length, jax.random.key(0), frozen=frozen)
    sample = make_sampler(model, r.group_size, r.max_new_tokens, a.vocab_size - 1)
    sampling = SamplingParams.of(r, [-1])
    key = jax.random.key(3)
    _, _, rollouts = timed(sample, state.weights, prompts, key, sampling)
    rollouts = cut(rollouts, options.mean_tokens, r.max_new_tokens)
    rewards = jnp.asarray(rewards_of(r.prompts, r.prompts, r.group_size))
    seconds, _, step = timed(make_train_step(model, optimizer, algorithm, config).lower, state, rollouts, rewards)
    compiling, _, compiled = timed(step.compile)
    rows = rows_of(groups_of(rollouts, rewards, rewards, state.step), state.step, config)
    scoring = jax.jit(lambda weights, rows: score(model, weights, rows, jnp.float32(0.7), config)[0])
    timed(scoring, state.weights, rows)
    print(f"traced in {seconds:.1f} s, compiled in {compiling:.1f} s; {memory(compiled)}")
    args = sample, sampling, scoring, compiled, prompts, rows, rollouts
    seen: dict[int, list[Repetition]] = {effective: [] for effective in options.effective}
    for run in range(options.runs):
        for effective, of_number in seen.items():
            state, found = repetition(options, effective, run, *args, state)
            of_number.append(found)
    for effective, of_number in seen.items():
        report(options, effective, int(rollouts.lengths.sum()), of_number)


def memory(compiled: Compiled) -> str:
    """The step's temporary memory by the compiler."""
    found = compiled.memory_analysis()
    return f"{found.temp_size_in_bytes / 2**20:.0f} MiB of temporary memory in the step" if found else "memory unknown"


def repetition(
    options: argparse.Namespace,
    effective: int,
    run: int,
    sample: Any,
    sampling: Any,
    scoring: Any,
    compiled: Compiled,
    prompts: Prompts,
    rows: Any,
    rollouts: Rollouts,
    state: TrainState,
) -> tuple[TrainState, Repetition]:
    """The state after a step with so many effective groups, which donates it, and what the step's parts took."""
    import jax

    rewards = rewards_of(effective, options.prompts, options.group_size)
    parts: dict[str, tuple[float, float]] = {}
    if "rollout" in options.parts:
        parts["rollout"] = timed(sample, state.weights, prompts, jax.random.key(run), sampling)[:2]
    if "scoring" in options.parts:
        parts["scoring"] = timed(scoring, state.weights, rows)[:2]
    *parts["update"], (state, metrics) = timed(compiled, state, rollouts, jax.device_put(rewards))
    return state, Repetition(parts, float(metrics["update/useful_tokens"]), float(metrics["grad_norm"]))


def report(options: argparse.Namespace, effective: int, tokens: int, seen: list[Repetition]) -> None:
    """Print the line of a number of effective groups."""
    found, words = {}, []
    for name in seen[0].parts:
        seconds, busy = (sorted(one.parts[name][i] for one in seen) for i in (0, 1))
        found[name] = statistics.median(seconds)
        median, least, most = (x * 1e3 for x in (statistics.median(busy), busy[0], busy[-1]))
        words.append(f"{name} {found[name] * 1e3:,.0f} ms ({median:,.0f} of a core, {least:,.0f} to {most:,.0f})")
    step = found["update"] + found.get("rollout", 0.0)
    print(
        f"{effective} of {options.prompts} groups with a signal: {', '.join(words)}; {tokens / step:,.0f} tokens/s of "
        f"rollout and update; useful tokens {seen[-1].useful:.2f}, gradient {seen[-1].gradient:.6g}",
        flush=True,
    )


def with_sizes(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the sizes of the embedded task's step, if it is to be measured.

    Raises:
      ConfigError: a field has no such value.
    """
    r = settings(options).rollout
    if options.embedded:
        sizes = {"prompts": r.prompts, "group_size": r.group_size, "new_tokens": r.max_new_tokens, "prompt_tokens": 15}
        vars(options).update(sizes)
    return options


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="Hugging Face folder (default: SmolLM2-135M's shape with random weights)")
    parser.add_argument("--embedded", action="store_true", help="the step of GRPO on the embedded task")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step (default 8)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=50, help="tokens of a prompt (default 50)")
    parser.add_argument("--new-tokens", type=int, default=12, help="longest completion (default 12)")
    parser.add_argument("--mean-tokens", type=int, default=0, help="mean length; 0 = all at their longest")
    parser.add_argument(
        "--effective",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[8, 3, 1, 0],
        help="groups that have a signal, a line for each number (default 8,3,1,0)",
    )
    parser.add_argument("--parts", default="rollout,scoring", help="parts to time beside the update")
    parser.add_argument("--runs", type=int, default=3, help="steps for each line (default 3)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="value as JSON, or text")
    options = parser.parse_args()
    from pspo_jax.config.fields import ConfigError
    from pspo_jax.distributed.runtime import keep_freed_memory

    keep_freed_memory()
    if options.embedded and options.model:
        parser.error("--embedded: the embedded task has a model of its own; leave --model out")
    try:
        options = with_sizes(options)
    except ConfigError as error:
        parser.error(str(error))
    if max(options.effective) > options.prompts:
        parser.error(f"--effective: {max(options.effective)} is more than the {options.prompts} groups of a step")
    measure(options)


if __name__ == "__main__":
    sys.exit(main())
