"""Entry point: benchmark tables over the checkpoints of a run, or of a Hugging Face checkpoint.

    python -m pspo_jax.evaluate --run RUN [--steps all] [--benchmarks math500,aime24 --data math500=FILE ...]
    python -m pspo_jax.evaluate --model FOLDER_OR_HUB_ID --out DIR

It writes one JSONL file per checkpoint and benchmark, results.json, table.md and curve.png. Killed, the same command
carries on. Fields of the config (`--prompt.template`, `--mesh.fsdp`, ...) may follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pspo_jax import cli
from pspo_jax.config import Config, ConfigError, embedded, replace
from pspo_jax.evaluation import tables
from pspo_jax.evaluation.benchmarks import FIVE, NAMES, benchmark_source
from pspo_jax.evaluation.runner import StoppedError, Work, read_summary, run_benchmark
from pspo_jax.export import choose_steps
from pspo_jax.io.checkpoint import read_params
from pspo_jax.io.progress import Progress
from pspo_jax.io.run_folder import write_json
from pspo_jax.io.stop import stop_requests
from pspo_jax.parallel.mesh import make_mesh, params_shardings
from pspo_jax.policy import transformer
from pspo_jax.policy.base import join
from pspo_jax.policy.context import context_line
from pspo_jax.policy.pretrained import Source, load_params
from pspo_jax.policy.weights import table
from pspo_jax.rewards.judge import text_judge
from pspo_jax.rewards.pool import Pool
from pspo_jax.rollout.sampler import SamplingParams, make_sampler, tokens_per_test
from pspo_jax.run_date import with_date
from pspo_jax.setup import architecture_for, configure_runtime, verifiers
from pspo_jax.tasks import CharTokenizer, make_task
from pspo_jax.tasks.text import benchmark_prompts, why

LONGEST_PROMPT = 8192
"""Tokens; a benchmark is evaluated whole, whatever training left out."""


class Candidate(NamedTuple):
    """Weights to be evaluated."""

    label: str
    step: int
    load: Callable[[], Any]


def main(argv: Sequence[str]) -> int:
    args, overrides = _arguments(argv)
    config = _config(args, overrides)
    names = _benchmarks(args, config)
    data = _data(args.data)
    steps = _steps(args)
    out: Path = args.out or args.run / "evaluation"
    if args.model:
        config = with_date(config, out / "settings.json", joined=False)
    _check_settings(out, config, args)
    progress = Progress(True)
    try:
        with stop_requests() as stop:
            return _run(args, config, names, data, steps, out, progress, stop)
    except (StoppedError, KeyboardInterrupt):
        progress.say(f"interrupted; what is done is in {out}, and the same command carries on")
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
) -> int:
    with verifiers(config) as pool:
        configure_runtime(config)
        source, tokenizer, architecture = architecture_for(config)
        mesh = make_mesh(config, architecture)
        with jax.set_mesh(mesh):
            policy = transformer(architecture)
            longest, platform = config.rollout.max_new_tokens, mesh.devices.flat[0].platform
            chunk = tokens_per_test(platform, longest)
            sample = make_sampler(policy, args.samples, longest, tokenizer.pad_token_id, chunk=chunk)
            works = [
                _work(name, data.get(name), config, args, tokenizer, pool, sample, mesh, progress) for name in names
            ]
            if not isinstance(tokenizer, CharTokenizer):
                progress.say(tokenizer.stop_line())
            for work in works:
                sizes = int(work.prompts.lengths.max()), longest
                if source and (line := context_line(source.name, source.context, *sizes)):
                    progress.say(f"{work.name}: {line}")
                if work.prompts.left_out:
                    progress.say(f"{work.name}: {why(work.prompts.left_out)} left out")
            candidates = _candidates(args, steps, source, architecture, policy, mesh)
            rows: dict[str, dict[str, tables.Summary]] = {}
            for candidate in candidates:
                rows[candidate.label] = _evaluate(candidate, works, out, args.k, progress, stop)
                _write(out, rows, {c.label: c.step for c in candidates})
    progress.say((out / "table.md").read_text())
    progress.say(f"written to {out}")
    return 0


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser(
        prog="python -m pspo_jax.evaluate",
        description="Evaluate checkpoints on benchmarks. Fields of the config, such as --prompt.template, may follow.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="RUN", type=Path, help="run folder, as run.dir in training")
    what.add_argument("--model", metavar="SOURCE", help="folder in Hugging Face's format, or hub id")
    parser.add_argument("--steps", default="all", help="of a run: all (default), latest, best, or some: 50,100")
    parser.add_argument("--benchmarks", help=f"some of {','.join(NAMES)}; default: {','.join(FIVE)}")
    parser.add_argument("--data", metavar="NAME=DATA", action="append", default=[], help="a benchmark's file or hub id")
    parser.add_argument("--samples", type=int, default=1, help="completions a problem, n (default 1)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 = greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's; 4096 for a model. Papers take 32768")
    parser.add_argument("--limit", type=int, default=0, help="only the first problems of each benchmark; 0 = all")
    parser.add_argument("--batch", type=int, default=8, help="problems sampled at a time (default 8)")
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


def _config(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The run's config, or one for a model, with what this evaluation changes."""
    prog = "python -m pspo_jax.evaluate"
    if args.run is not None:
        path = args.run / "config.yaml"
        if not path.exists():
            raise ConfigError(f"--run {args.run}: holds no config.yaml; name the run.dir of a training run")
        config = cli.parse(["--config", str(path), *overrides], prog, "")
        longest = args.max_new_tokens or config.rollout.max_new_tokens
    else:
        # A task of text that needs no data; the benchmarks bring their own.
        config = cli.parse(["--task.name=countdown", f"--policy.source={args.model}", *overrides], prog, "")
        longest = args.max_new_tokens or 4096
    return replace(
        config,
        {
            "rollout.prompts": args.batch,
            "rollout.chunks": 1,
            "rollout.group_size": args.samples,
            "rollout.max_new_tokens": longest,
            "rollout.temperature": args.temperature or 1.0,
            "rollout.top_p": args.top_p if args.temperature else 1.0,
            "rollout.top_k": 0,
            "objective.minibatches": 1,
            "sft.steps": 0,
            "prompt.max_tokens": max(config.prompt.max_tokens, LONGEST_PROMPT),
            "reward.terms": "accuracy",
            "reward.require_end": False,  # as lighteval: what was written counts
        },
    )


def _benchmarks(args: argparse.Namespace, config: Config) -> list[str]:
    if embedded(config):
        wanted = args.benchmarks or config.task.name
        if wanted != config.task.name:
            raise ConfigError(f"--benchmarks {wanted}: this policy speaks the alphabet of {config.task.name} alone")
        return [wanted]
    names = list(dict.fromkeys((args.benchmarks or ",".join(FIVE)).split(",")))
    for name in names:
        if name not in NAMES or name == "arithmetic":
            raise ConfigError(f"--benchmarks {name}: choose among {', '.join(n for n in NAMES if n != 'arithmetic')}")
    return names


def _steps(args: argparse.Namespace) -> list[int]:
    """Checkpoints of the run that --steps means."""
    if args.run is None:
        return []
    wanted = args.steps.split(",") if args.steps[:1].isdigit() else [args.steps]
    return sorted({step for item in wanted for step in choose_steps(args.run, item, "--steps")})


def _data(items: list[str]) -> dict[str, str]:
    out = {}
    for item in items:
        name, equals, where = item.partition("=")
        if not equals or not where or name not in NAMES:
            raise ConfigError(f"--data {item}: must be NAME=FILE, the name one of {', '.join(NAMES)}")
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
    else:
        prompts = benchmark_prompts(
            benchmark_source(name, data, config), config, tokenizer, pool, args.limit, progress.say
        )
        judge, stop_ids = text_judge(pool, tokenizer, config), tokenizer.stop_ids
    return Work(
        name=name,
        prompts=prompts,
        judge=judge,
        tokenizer=tokenizer,
        samples=args.samples,
        batch=args.batch,
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
        return join(params, load_source() if architecture.lora is not None else None)

    if args.run is None:
        assert source is not None
        return [Candidate(Path(args.model).name if Path(args.model).is_dir() else args.model, 0, load_source)]
    return [Candidate(f"step {step}", step, lambda step=step: load_step(step)) for step in steps]  # type: ignore[misc]


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
        before = json.loads(path.read_text()) if begun else settings
    except ValueError as error:
        raise ConfigError(f"--out {out}: its settings.json is damaged; name another folder") from error
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
        with progress.phase(f"{candidate.label} {work.name}", len(work.prompts.lengths)) as bar:
            run_benchmark(work, weights, path, bar, stop)
        found[work.name] = read_summary(path, ks)
    return found


def _write(out: Path, rows: dict[str, dict[str, tables.Summary]], steps: dict[str, int]) -> None:
    results = {label: {name: tables.to_json(s) for name, s in found.items()} for label, found in rows.items()}
    write_json(out / "results.json", results)
    partial = out / "table.md.partial"
    partial.write_text(tables.markdown(rows, FIVE), encoding="utf-8")
    partial.rename(out / "table.md")
    tables.curve(out / "curve.png", rows, {k: steps[k] for k in rows}, "Accuracy over training", FIVE)


if __name__ == "__main__":
    cli.run(main, "pspo_jax.evaluate")
