"""Entry point of evaluation: benchmark tables for the checkpoints of a run, or for a Hugging Face checkpoint.

    python -m pspo_jax.evaluate --run RUN [--steps all]
    python -m pspo_jax.evaluate --run RUN --benchmarks math500,mine --data mine=FILE [--task.answer_column NAME]
    python -m pspo_jax.evaluate --model FOLDER_OR_HUB_ID --out DIR

It writes one JSONL file for each checkpoint and benchmark, results.json, table.md and, with matplotlib, curve.png.
After a kill the same command carries on. Fields of the config (`--prompt.template`, `--mesh.fsdp`, ...) may follow. It
uses the devices of this machine, whatever the run was trained on; several processes, started as in training, share the
work.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pspo_jax.commands.evaluate import evaluate_checkpoints
from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed import processes
from pspo_jax.evaluation.benchmarks import FIVE, HELDOUT, NAMES
from pspo_jax.evaluation.runner import StoppedError
from pspo_jax.runs.access import choose_steps, read_config
from pspo_jax.runs.home import local_path, shown
from pspo_jax.runs.mirror import reading
from pspo_jax.runs.run_date import with_date
from pspo_jax.system.interrupts import stop_requests
from pspo_jax.system.progress import Progress
from pspo_jax.training.setup import verifiers


def main(argv: Sequence[str]) -> int:
    args, overrides = _arguments(argv)
    local_path("--out", args.out)
    if args.run is None:
        return _evaluate(args, overrides, lambda: None)
    with reading(args.run) as (args.run, keep):
        return _evaluate(args, overrides, keep)


def _evaluate(args: argparse.Namespace, overrides: list[str], keep: Callable[[], None]) -> int:
    """Evaluate what the arguments name; returns the exit code.

    Args:
      keep: copies results to the bucket of a run that is in one.
    """
    data = _data(args)
    config = _config(args, overrides, data)
    names = _benchmarks(args, config, data)
    steps = _steps(args)
    out: Path = args.out or args.run / "evaluation"
    with verifiers(config) as pool:
        processes.initialize(config)
        progress = Progress(processes.is_primary(), quiet=not processes.is_primary())
        place = out if args.run is None else shown(out, args.run)
        interrupted = f"interrupted; finished results are in {place}, and the same command carries on"
        try:
            with stop_requests() as stop, processes.fail_together():
                if args.model:
                    config = with_date(config, out / "settings.json")
                try:
                    return evaluate_checkpoints(args, config, names, data, steps, out, progress, stop, pool, keep)
                except StoppedError:  # all processes raise it together
                    if processes.is_primary():
                        keep()
                    progress.say(interrupted)
                    return 130
        except KeyboardInterrupt:
            progress.say(interrupted)
            return 130


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The evaluation's own arguments, and the words of the command line that are left."""
    parser = command_line.Parser(
        prog=command_line.program("evaluate"),
        description="Evaluate checkpoints on benchmarks. Fields of the config, such as --prompt.template, may follow.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="run folder or gs:// URL, as run.dir in training")
    source.add_argument("--model", metavar="SOURCE", help="folder in Hugging Face's format, or hub id")
    parser.add_argument("--steps", default="all", help="all (default), latest, best, or steps such as 50,100")
    parser.add_argument(
        "--benchmarks",
        help=(
            f"benchmarks, separated by commas: {','.join(NAMES)}, or names from --data. Default: those of --data, "
            f"else {HELDOUT} (the run's held-out prompts) for a run and {','.join(FIVE)} for a model"
        ),
    )
    parser.add_argument(
        "--data",
        metavar="NAME=DATA",
        action="append",
        default=[],
        help="file or hub id of a benchmark; --benchmarks must list a name of your own too",
    )
    parser.add_argument("--samples", type=int, default=1, help="completions for each problem, n (default 1)")
    parser.add_argument("--temperature", type=float, default=0.6, help="sampling temperature; 0 = greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="probability of nucleus sampling (default 0.95)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="tokens (default: the run's, or 4096); papers take 32768",
    )
    parser.add_argument("--limit", type=int, default=0, help="first problems of each benchmark; 0 = all")
    parser.add_argument(
        "--batch", type=int, default=8, help="problems sampled at a time (default 8), rounded up for the devices"
    )
    parser.add_argument("--k", default="1", help="values of k for pass@k and maj@k, such as 1,8 (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the results (default: RUN/evaluation)")
    args, rest = parser.parse_known_args(argv)
    for name in ("samples", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit}: must be at least 0")
    if not 0 <= args.seed < 2**31:
        raise ConfigError(f"--seed {args.seed}: must be from 0 to {2**31 - 1}")
    if not 0 < args.top_p <= 1 or not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"--temperature {args.temperature} --top-p {args.top_p}: must be >= 0, and within (0, 1]")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.model and args.out is None:
        raise ConfigError("--out: is missing; name a folder for the results of --model")
    try:
        args.k = sorted({int(k) for k in args.k.split(",")})
    except ValueError as error:
        raise ConfigError(f"--k {args.k}: must be numbers, separated by commas") from error
    if args.k[0] < 1 or args.k[-1] > args.samples:
        raise ConfigError(f"--k {','.join(map(str, args.k))}: must be from 1 to --samples {args.samples}")
    return args, rest


def _config(args: argparse.Namespace, overrides: list[str], data: dict[str, str]) -> Config:
    """The config of the run, or of the model, with the fields that this evaluation changes."""
    if args.run is not None:
        config = read_config(args.run, overrides, prog="evaluate")
        longest = args.max_new_tokens or config.rollout.max_new_tokens
    else:
        # The task reads the user's own benchmark if there is one; else it is a task that needs no data.
        own = next((where for name, where in data.items() if name not in NAMES), None)
        task = ["--task.name=countdown"] if own is None else ["--task.name=math", f"--task.train_data={own}"]
        config = command_line.parse(
            [*task, f"--model.source={args.model}", *overrides], command_line.program("evaluate"), ""
        )
        longest = args.max_new_tokens or 4096
    return replace(
        config,
        {
            "rollout.prompts": args.batch,
            "rollout.chunks": 1,
            "rollout.slots": None,
            "rollout.stages": None,
            "rollout.longest_first": False,
            "rollout.dynamic_sampling_rounds": 1,
            "rollout.oversampling": 1.0,
            "rollout.group_size": args.samples,
            "rollout.max_new_tokens": longest,
            "rollout.temperature": args.temperature or 1.0,
            "rollout.top_p": args.top_p if args.temperature else 1.0,
            "rollout.top_k": 0,
            "loss.minibatches": 1,
            "replay.extra": 0,
            "sft.steps": 0,
            "reward.terms": "accuracy",
            "reward.require_end": False,  # as in lighteval: an answer counts in a cut-off completion too
        },
    )


def _benchmarks(args: argparse.Namespace, config: Config, data: dict[str, str]) -> list[str]:
    """Names of the benchmarks to run."""
    if uses_char_tokenizer(config):
        wanted = args.benchmarks or config.task.name
        if wanted not in (config.task.name, HELDOUT):
            raise ConfigError(f"--benchmarks {wanted}: this model knows {config.task.name} alone; name it")
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
    """The steps of the checkpoints that --steps names."""
    if args.run is None:
        return []
    wanted = args.steps.split(",") if args.steps[:1].isdecimal() else [args.steps]
    return sorted({step for item in wanted for step in choose_steps(args.run, item, "--steps")})


def _data(args: argparse.Namespace) -> dict[str, str]:
    """Benchmark -> its data. --benchmarks must list names that are not built in, so that a misspelt one is refused."""
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


def command() -> None:
    """`pspo-evaluate`, which is `python -m pspo_jax.evaluate`."""
    command_line.run_command(main, "evaluate")


if __name__ == "__main__":
    command()
