"""Rollouts, whole PSPO steps and updates of a 1.5B model on one GPU, beside the same GPU's ceilings and PyTorch.

    python scripts/bench_accelerator.py --h200 --out bench.jsonl        # a GPU with 80 GB or more
    python scripts/bench_accelerator.py --smoke                         # tiny shapes on CPU: does it run?

Weights are random, in the shape of Qwen2.5-1.5B; products are bfloat16. Every part is a process of its own with a time
limit. The most important parts come first, and a part that does not fit before the deadline is reported as skipped.
Lines of JSON appear as they are measured, and again where the final ceilings change them; a table on stderr comes last.
--set FIELD=VALUE changes a field of this package's config in all of its parts, which then have their own name in the
table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import bench_tables
from _accelerator import Job
from _bench import Shape, Work

from pspo_jax.system.one_line_parser import OneLineParser

QWEN = Shape(28, 1536, 8960, 12, 2, 128, 151_936)
SMALL = Shape(2, 64, 128, 4, 2, 16, 512)
FOLDER = Path(__file__).parent


class Part(NamedTuple):
    name: str
    limit: float
    """Seconds at most."""
    least: float
    """It is not started with less time than this before the deadline."""
    torch: bool = False


PARTS = [
    Part("ceilings", 60, 20),
    Part("decode", 180, 60),
    Part("step", 210, 90),
    Part("generate", 90, 40, torch=True),
    Part("train", 130, 60),
    Part("autocast", 80, 40, torch=True),
    Part("gap", 80, 40),
    Part("ceilings", 45, 25),
]
"""The most wanted first; the ceilings again at the end, for which time is kept back."""


def h200(cache: str) -> Job:
    work = Work(QWEN, "bfloat16", 32, 8, 512, 512, microbatch_rows=8, cache=cache)
    train = dataclasses.replace(work, prompts=2, new_tokens=1536)
    gap = dataclasses.replace(work, prompts=4, prompt_tokens=128, new_tokens=128)
    return Job(work, train, gap, product=8192, read_mib=4096, dataset=4096, platform="gpu")


def smoke(cache: str) -> Job:
    work = Work(SMALL, "bfloat16", 2, 2, 8, 16, microbatch_rows=2, cache=cache)
    return Job(work, work, work, product=256, read_mib=16, dataset=16, platform="cpu", calls=2)


def environment(on_cpu: bool) -> dict[str, str]:
    """Parts follow each other on one device: none may hold memory that it does not use."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # A checkout need not be installed.
    env["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env | ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def run(part: Part, job: Job, python: str, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Lines of a part as they come; the last one says so if it failed or ran out of time."""
    script = FOLDER / ("_accelerator_torch.py" if part.torch else "_accelerator.py")
    command = [python, str(script), part.name, json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        late = threading.Event()
        timer = threading.Timer(job.limit, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith("{") and text.endswith("\n"):  # a killed process can leave half a line
                    yield json.loads(text) | {"part": part.name}
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        log.seek(0)
        said = log.read()
    if job.turns:
        # The others do not wait for a part that failed before its turn.
        (Path(job.turns) / f"{process.pid}.ready").touch()
    if late.is_set():
        yield skipped(part.name, f"ended at its limit of {job.limit:.0f} s")
    elif code:
        print(said[-3000:], file=sys.stderr)
        last = said.strip().splitlines()[-1:] or [f"exit status {code}"]
        yield skipped(part.name, f"failed: {last[0][:200]}")


def skipped(name: str, reason: str) -> dict[str, Any]:
    print(f"{name}: {reason}", file=sys.stderr)
    return {"bench": "accelerator", "case": name, "contender": "", "skipped": reason}


def rates_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The best of each ceiling that has been measured."""
    best: dict[str, float] = {}
    for line in lines:
        if line["case"] == "ceilings":
            for name, value in line.get("values", {}).items():
                best[name] = max(best.get(name, 0.0), value)
    return best


def complete(line: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """A line with what its work takes at the ceilings' rates, and the share that it reached."""
    work = line.get("work")
    if not work or "flops_per_s" not in rates or "bytes_per_s" not in rates:
        return line
    seconds, values = line["seconds"]["median"], dict(line["values"])
    values["flops_per_s"] = work["flops"] / seconds
    products = work["flops"] / rates["flops_per_s"]
    if "weight_bytes" in work:
        weights, cache = (work[k] / rates["bytes_per_s"] for k in ("weight_bytes", "cache_bytes"))
        values["bytes_per_s"] = (work["weight_bytes"] + work["cache_bytes"]) / seconds
        # A block's attention does not run beside its products: the second floor lets none of it overlap.
        values["share_apart"] = (max(products, weights) + cache) / seconds
        products = max(products, weights + cache)
    values |= {"floor_s": products, "share": products / seconds}
    return {**line, "values": values}


def best_ceiling(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each ceiling the line with the higher rate."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["case"] == "ceilings" and line.get("values"):
            old = found.get(line["contender"])
            if old is None or max(line["values"].values()) > max(old["values"].values()):
                found[line["contender"]] = line
    return list(found.values())


def lacking(options: argparse.Namespace) -> set[str]:
    """Parts whose packages are not there."""
    needed = {"generate": ["torch", "transformers"], "autocast": ["torch", "transformers"]}
    return {n for n, modules in needed.items() if _bench.lacks(n, options.peer_python, modules, "--peer-python")}


def measure(job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All parts that fit, in order; each line is printed with the shares that are known by then."""
    end = time.monotonic() + options.deadline
    gone, env = lacking(options), environment(options.smoke)
    lines: list[dict[str, Any]] = []
    for place, part in enumerate(PARTS):
        if part.name in gone or (options.parts and part.name not in options.parts):
            continue
        kept = 0.0 if options.parts or place == len(PARTS) - 1 else PARTS[-1].least
        left = end - time.monotonic() - kept
        if left < (5 if options.smoke else part.least):
            found: Any = [skipped(part.name, f"{max(0.0, left):.0f} s were left for it")]
        else:
            limited = dataclasses.replace(job, limit=min(part.limit, left))
            found = run(part, limited, options.peer_python if part.torch else sys.executable, env)
        for line in found:
            lines.append(line)
            _bench.emit([complete(line, rates_of(lines))], options.out)
        print(f"{part.name} done, {end - time.monotonic():.0f} s left", file=sys.stderr)
    return lines


def measure_together(job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts start and compile together, and time their calls one after another: minutes of a GPU are saved.

    All of their memory is needed at once.
    """
    gone, env = lacking(options), environment(options.smoke)
    chosen = {part.name: part for part in PARTS if part.name in options.parts and part.name not in gone}
    with tempfile.TemporaryDirectory() as turns, ThreadPoolExecutor(len(chosen)) as pool:
        shared = dataclasses.replace(job, limit=options.deadline, turns=turns, parties=len(chosen))

        def lines_of(part: Part) -> list[dict[str, Any]]:
            return list(run(part, shared, options.peer_python if part.torch else sys.executable, env))

        found = [line for lines in pool.map(lines_of, chosen.values()) for line in lines]
    _bench.emit([complete(line, rates_of(found)) for line in found], options.out)
    return found


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--h200", action="store_true", help="1.5B parameters, on a GPU")
    size.add_argument("--smoke", action="store_true", help="tiny shapes, on CPU")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds for all parts (default 540)")
    parser.add_argument("--parts", nargs="+", choices=[*dict.fromkeys(p.name for p in PARTS)], help="these alone")
    parser.add_argument("--together", action="store_true", help="start --parts at once, and time them in turns")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="value as JSON, or text")
    parser.add_argument("--out", type=Path, help="append the lines to this .jsonl file; see bench_tables.py")
    options = parser.parse_args()
    if options.together and not options.parts:
        parser.error("--together needs --parts, whose memory must fit at once")
    gone = _bench.missing(sys.executable, ["jax", "flax", "optax", "jaxtyping", "rich", "yaml"])
    if gone:
        raise SystemExit(f"{sys.executable} has no {', '.join(gone)}, which this package needs")
    with tempfile.TemporaryDirectory() as cache:
        job = dataclasses.replace((h200 if options.h200 else smoke)(cache), fields=_bench.parsed(options.set))
        lines = (measure_together if options.together else measure)(job, options)
    rates = rates_of(lines)
    rest = [complete(line, rates) for line in lines if line.get("work")]
    final = [_bench.rounded(line) for line in best_ceiling(lines) + rest]
    _bench.emit(final, options.out)
    print("\n" + bench_tables.tables(bench_tables.latest([*lines, *final]))["accelerator"], file=sys.stderr)


if __name__ == "__main__":
    main()
