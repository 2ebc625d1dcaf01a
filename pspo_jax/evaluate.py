"""Entry point: benchmark tables over the checkpoints of a run, or of a Hugging Face checkpoint.

    python -m pspo_jax.evaluate --run RUN [--steps all]
    python -m pspo_jax.evaluate --run RUN --benchmarks math500,mine --data mine=FILE [--task.answer_column NAME]
    python -m pspo_jax.evaluate --model FOLDER_OR_HUB_ID --out DIR

It writes one JSONL file per checkpoint and benchmark, results.json, table.md and curve.png. After a kill the same
command carries on. Fields of the config (`--prompt.template`, `--mesh.fsdp`, ...) may follow. It uses the devices that
are there, whatever the run was trained on; several processes, started as in training, share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pspo_jax.arrays.lora import join
from pspo_jax.checkpoint.checksums import files_identity, verify
from pspo_jax.checkpoint.store import params_identity, read_params
from pspo_jax.config import command_line
from pspo_jax.config.schema import Config, ConfigError, embedded, replace
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.text import benchmark_prompts, why
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import make_mesh, params_shardings, smallest_fsdp
from pspo_jax.evaluation import tables
from pspo_jax.evaluation.benchmarks import FIVE, HELDOUT, NAMES, benchmark_source
from pspo_jax.evaluation.runner import StoppedError, Work, read_summary, run_benchmark
from pspo_jax.model import Architecture, transformer
from pspo_jax.model.architecture import beyond_context
from pspo_jax.model.huggingface.load import Source, load_params
from pspo_jax.model.weights import table
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import text_judge
from pspo_jax.rollout.sampler import SamplingParams, make_sampler, tokens_per_test
from pspo_jax.runs.access import choose_steps, read_config
from pspo_jax.runs.run_date import with_date
from pspo_jax.runs.run_folder import write_json
from pspo_jax.system.interrupts import stop_requests
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import unread, write_whole, writing
from pspo_jax.training.machine import with_type
from pspo_jax.training.setup import architecture_for, configure_runtime, device_bytes, verifiers
from pspo_jax.verifiers.workers.pool import Pool

LONGEST_PROMPT = 8192
"""Tokens; a benchmark is evaluated whole, whatever training left out."""


class Candidate(NamedTuple):
    """Weights to be evaluated."""

    label: str
    step: int
    identity: str
    """Hash of the weights, which results belong to."""
    load: Callable[[], Any]


def main(argv: Sequence[str]) -> int:
    args, overrides = _arguments(argv)
    data = _data(args)
    config = _config(args, overrides, data)
    names = _benchmarks(args, config, data)
    steps = _steps(args)
    out: Path = args.out or args.run / "evaluation"
    with verifiers(config) as pool:
        processes.initialize(config)
        progress = Progress(processes.leads(), quiet=not processes.leads())
        interrupted = f"interrupted; what is done is in {out}, and the same command carries on"
        try:
            with stop_requests() as stop, processes.failing_together():
                if args.model:
                    config = with_date(config, out / "settings.json")
                try:
                    return _run(args, config, names, data, steps, out, progress, stop, pool)
                except StoppedError:  # on all processes at once
                    progress.say(interrupted)
                    return 130
        except KeyboardInterrupt:
            progress.say(interrupted)
            return 130


def _run(
    args: argparse.Namespace,
    config: Config,
    names: list[str],
    data: dict[str, str],
    steps: list[int],
    out: Path,
    progress: Progress,
    stop: Callable[[], bool],
    pool: Pool | None,
) -> int:
    configure_runtime(config)
    config, chosen = with_type(config, on_cpu=jax.default_backend() == "cpu")
    for words in chosen:
        progress.say(f"default of this machine: {words}")
    if processes.leads():
        _check_settings(out, config, args)
    source, tokenizer, architecture = architecture_for(config)
    config = _on_devices(config, architecture, len(jax.devices()))
    mesh = make_mesh(config, architecture)
    with jax.set_mesh(mesh):
        policy = transformer(architecture)
        longest, platform = config.rollout.max_new_tokens, mesh.devices.flat[0].platform
        chunk = tokens_per_test(platform, longest)
        sample = make_sampler(policy, args.samples, longest, tokenizer.pad_token_id, chunk=chunk)
        works = [_work(name, data.get(name), config, args, tokenizer, pool, sample, mesh, progress) for name in names]
        if not isinstance(tokenizer, CharTokenizer):
            progress.say(tokenizer.stop_line())
        for work in works:
            if line := beyond_context(architecture, int(work.prompts.lengths.max()), longest):
                progress.say(f"{work.name}: {line}")
            if work.prompts.left_out:
                progress.say(f"{work.name}: {why(work.prompts.left_out)} left out")
        candidates = _candidates(args, steps, source, architecture, policy, mesh)
        rows: dict[str, dict[str, tables.Summary]] = {}
        for candidate in candidates:
            rows[candidate.label] = _evaluate(candidate, works, out, args.k, progress, stop)
            if processes.leads():
                _write(out, rows, {c.label: c.step for c in candidates})
    if processes.leads():
        progress.say((out / "table.md").read_text(encoding="utf-8"))
        progress.say(f"written to {out}")
    return 0


def _on_devices(config: Config, architecture: Architecture, devices: int) -> Config:
    """`config` with weights split as far as these devices' memory needs, and a batch that they divide.

    The last batch is filled up anyway, and a completion does not depend on its batch.
    """
    m = config.mesh
    weights = jax.eval_shape(transformer(dataclasses.replace(architecture, lora=None)).init, jax.random.key(0))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    fsdp = m.fsdp or smallest_fsdp(held, device_bytes(), devices // (m.tensor * m.context) or 1, architecture.width)
    shards = (devices // m.tensor) if m.data == -1 else m.data * fsdp * m.context
    batch = -(-config.rollout.prompts // max(shards, 1)) * max(shards, 1)
    return replace(config, {"mesh.fsdp": fsdp, "rollout.prompts": batch})


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.Parser(
        prog="python -m pspo_jax.evaluate",
        description="Evaluate checkpoints on benchmarks. Fields of the config, such as --prompt.template, may follow.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="RUN", type=Path, help="run folder, as run.dir in training")
    what.add_argument("--model", metavar="SOURCE", help="folder in Hugging Face's format, or hub id")
    parser.add_argument("--steps", default="all", help="of a run: all (default), latest, best, or some: 50,100")
    parser.add_argument(
        "--benchmarks",
        help=(
            f"some of {','.join(NAMES)}, or of --data; default: those of --data, else {HELDOUT} for a run (its own "
            f"held-out prompts) and {','.join(FIVE)} for a model"
        ),
    )
    parser.add_argument(
        "--data",
        metavar="NAME=DATA",
        action="append",
        default=[],
        help="a benchmark's file or hub id; a name of your own must stand in --benchmarks too",
    )
    parser.add_argument("--samples", type=int, default=1, help="completions a problem, n (default 1)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 = greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's; 4096 for a model. Papers take 32768")
    parser.add_argument("--limit", type=int, default=0, help="only the first problems of each benchmark; 0 = all")
    parser.add_argument(
        "--batch", type=int, default=8, help="problems sampled at a time (default 8), rounded up for the devices"
    )
    parser.add_argument("--k", default="1", help="k of pass@k and maj@k, such as 1,8 (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/evaluation")
    args, rest = parser.parse_known_args(argv)
    for name in ("samples", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit}: must be at least 0")
    if not 0 <= args.seed < 2**31:
        raise ConfigError(f"--seed {args.seed}: must be from 0 to {2**31 - 1}")
    if not 0 < args.top_p <= 1 or not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature {args.temperature} --top-p {args.top_p}: needs T >= 0 and 0 < p <= 1")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.model and args.out is None:
        raise ConfigError("--out: --model needs a folder for its results")
    try:
        args.k = sorted({int(k) for k in args.k.split(",")})
    except ValueError as error:
        raise ConfigError(f"--k {args.k}: must be numbers, separated by commas") from error
    if args.k[0] < 1 or args.k[-1] > args.samples:
        raise ConfigError(f"--k {','.join(map(str, args.k))}: must be from 1 to --samples {args.samples}")
    return args, rest


def _config(args: argparse.Namespace, overrides: list[str], data: dict[str, str]) -> Config:
    """The run's config, or one for a model, with what this evaluation changes."""
    if args.run is not None:
        config = read_config(args.run, overrides, prog="evaluate")
        longest = args.max_new_tokens or config.rollout.max_new_tokens
    else:
        # The task reads a set of one's own, if there is one, and is else one that needs no data.
        own = next((where for name, where in data.items() if name not in NAMES), None)
        task = ["--task.name=countdown"] if own is None else ["--task.name=math", f"--task.train_data={own}"]
        config = command_line.parse(
            [*task, f"--policy.source={args.model}", *overrides], "python -m pspo_jax.evaluate", ""
        )
        longest = args.max_new_tokens or 4096
    return replace(
        config,
        {
            "rollout.prompts": args.batch,
            "rollout.chunks": 1,
            "rollout.slots": None,
            "rollout.max_rounds": 1,
            "rollout.oversampling": 1.0,
            "rollout.group_size": args.samples,
            "rollout.max_new_tokens": longest,
            "rollout.temperature": args.temperature or 1.0,
            "rollout.top_p": args.top_p if args.temperature else 1.0,
            "rollout.top_k": 0,
            "objective.minibatches": 1,
            "sft.steps": 0,
            "reward.terms": "accuracy",
            "reward.require_end": False,  # as lighteval: what was written counts
        },
    )


def _benchmarks(args: argparse.Namespace, config: Config, data: dict[str, str]) -> list[str]:
    if embedded(config):
        wanted = args.benchmarks or config.task.name
        if wanted not in (config.task.name, HELDOUT):
            raise ConfigError(f"--benchmarks {wanted}: this policy speaks the alphabet of {config.task.name} alone")
        return [config.task.name]
    usual = list(data) or ([HELDOUT] if args.run is not None else list(FIVE))
    names = list(dict.fromkeys(args.benchmarks.split(","))) if args.benchmarks else usual
    known = [*(n for n in NAMES if n != "arithmetic"), *([HELDOUT] if args.run is not None else []), *data]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--benchmarks {name}: choose among {', '.join(dict.fromkeys(known))}, or give --data {name}=FILE"
            )
    if unused := [name for name in data if name not in names]:
        raise ConfigError(
            f"--data {unused[0]}={data[unused[0]]}: --benchmarks does not name it; add it there, or drop it"
        )
    return names


def _steps(args: argparse.Namespace) -> list[int]:
    """Checkpoints of the run that --steps means."""
    if args.run is None:
        return []
    wanted = args.steps.split(",") if args.steps[:1].isdecimal() else [args.steps]
    return sorted({step for item in wanted for step in choose_steps(args.run, item, "--steps")})


def _data(args: argparse.Namespace) -> dict[str, str]:
    """Benchmark -> its data. A name of one's own must be one of --benchmarks, so that a misspelt one is found out."""
    wanted = (args.benchmarks or "").split(",")
    out = {}
    for item in args.data:
        name, equals, where = item.partition("=")
        own = name in wanted and re.fullmatch(r"[\w.-]+", name) and name != HELDOUT
        if not equals or not where or not (name in NAMES or own):
            raise ConfigError(
                f"--data {item}: must be NAME=FILE, the name one of {', '.join(NAMES)}, or one that --benchmarks names"
            )
        if name in out:
            raise ConfigError(f"--data {item}: {name} has data already; give each name once")
        out[name] = where
    return out


def _work(
    name: str,
    data: str | None,
    config: Config,
    args: argparse.Namespace,
    tokenizer: Any,
    pool: Pool | None,
    sample: Any,
    mesh: Any,
    progress: Progress,
) -> Work:
    if isinstance(tokenizer, CharTokenizer):
        task = make_task(config, tokenizer)
        prompts, judge = task.heldout, task.judge
        stop_ids: tuple[int, ...] = task.stop_ids
        if args.limit:
            raise ConfigError("--limit: an embedded task has task.heldout_prompts problems; leave it out")
    elif name == HELDOUT:
        few = args.limit or config.task.heldout_prompts
        # As training splits the data; how many prompts it draws does not matter here.
        fields = {"task.heldout_prompts": min(few, config.task.heldout_prompts), "rollout.prompts": 1}
        task = make_task(replace(config, fields), tokenizer, pool, progress.say)
        prompts, judge, stop_ids = task.heldout, task.judge, task.stop_ids
    else:
        whole = replace(config, {"prompt.max_tokens": max(config.prompt.max_tokens, LONGEST_PROMPT)})
        source = benchmark_source(name, data, whole)
        prompts = benchmark_prompts(source, whole, tokenizer, pool, args.limit, progress.say)
        judge, stop_ids = text_judge(pool, tokenizer, config), tokenizer.stop_ids
    return Work(
        name=name,
        prompts=prompts,
        judge=judge,
        tokenizer=tokenizer,
        samples=args.samples,
        batch=config.rollout.prompts,
        sample=sample,
        settings=SamplingParams.of(config.rollout, stop_ids, temperature=args.temperature),
        key=jax.random.key(args.seed),
        mesh=mesh,
    )


def _candidates(
    args: argparse.Namespace, steps: list[int], source: Source | None, architecture: Any, policy: Any, mesh: Any
) -> list[Candidate]:
    """The checkpoints that the arguments name."""
    base: list[Any] = []

    def load_source() -> Any:
        assert source is not None
        if not base:
            plain = transformer(dataclasses.replace(architecture, lora=None))
            shapes = jax.eval_shape(plain.init, jax.random.key(0))
            shardings = params_shardings(mesh, shapes, plain.axes)
            base.append(load_params(source, table(architecture), shardings, architecture.param_dtype))
        return base[0]

    def load_step(step: int) -> Any:
        params, metadata = read_params(
            args.run / "checkpoints", step, lambda shapes: params_shardings(mesh, shapes, policy.axes)
        )
        if source is not None and metadata.get("source") != source.fingerprint():
            raise ConfigError(f"policy.source={source.name}: is not the checkpoint that this run began from")
        if architecture.lora is None:
            return join(params, None)
        try:
            verify(load_source(), metadata["base"])
        except ValueError as error:
            raise ConfigError(
                f"policy.source={source.name if source else None}: its weights differ from those this run's adapters "
                f"were trained on ({error})"
            ) from error
        return join(params, load_source())

    if args.run is None:
        assert source is not None
        name = Path(args.model).name if Path(args.model).is_dir() else args.model
        return [Candidate(name, 0, files_identity(source.folder), load_source)]
    folder = args.run / "checkpoints"
    return [Candidate(f"step {s}", s, params_identity(folder, s), partial(load_step, s)) for s in steps]


def _check_settings(out: Path, config: Config, args: argparse.Namespace) -> None:
    """Refuse to mix results of different settings in one folder."""
    settings = {
        "policy": str(args.run or args.model),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": config.rollout.max_new_tokens,
        "samples": args.samples,
        "seed": args.seed,
        "prompt": dataclasses.asdict(config.prompt),
        "compute_dtype": config.policy.compute_dtype,
    }
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; name a folder that can be written") from error
    try:
        # Without results, as after a command that failed, any settings may begin.
        begun = path.exists() and any(out.glob("*/*.jsonl"))
        before = json.loads(path.read_text(encoding="utf-8")) if begun else settings
        if not isinstance(before, dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise ConfigError(f"--out {out}: its settings.json is damaged; name another folder") from error
    except OSError as error:
        raise unread(path, error) from error
    if before != settings:
        differs = [f"{k}={before.get(k)} there, {v} now" for k, v in settings.items() if before.get(k) != v]
        raise ConfigError(f"--out {out}: holds results of other settings ({'; '.join(differs)}); name another folder")
    write_json(path, settings)


def _evaluate(
    candidate: Candidate, works: list[Work], out: Path, ks: list[int], progress: Progress, stop: Callable[[], bool]
) -> dict[str, tables.Summary]:
    loaded: list[Any] = []

    def weights() -> Any:
        if not loaded:
            loaded.append(candidate.load())
        return loaded[0]

    folder = out / candidate.label.replace(" ", "_").replace("/", "--")
    found = {}
    for work in works:
        path = folder / f"{work.name}.jsonl"
        began = time.monotonic()
        with progress.phase(f"{candidate.label} {work.name}", len(work.prompts.lengths)) as bar:
            tokens = run_benchmark(work, weights, candidate.identity, path, bar, stop, progress.say)
        seconds = time.monotonic() - began
        rate = f"{seconds:.1f} s, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s" if tokens else f"was in {path}"
        progress.say(f"{candidate.label} {work.name}: {rate}")
        if processes.leads():
            found[work.name] = read_summary(path, ks)
    return found


def _write(out: Path, rows: dict[str, dict[str, tables.Summary]], steps: dict[str, int]) -> None:
    results = {label: {name: tables.to_json(s) for name, s in found.items()} for label, found in rows.items()}
    write_json(out / "results.json", results)
    write_whole(out / "table.md", tables.markdown(rows, FIVE).encode())
    with writing(out / "curve.png"):
        tables.curve(out / "curve.png", rows, {k: steps[k] for k in rows}, "Accuracy over training", FIVE)


if __name__ == "__main__":
    command_line.run(main, "pspo_jax.evaluate")
