"""The parts that all benchmarks share: model shapes, worker processes, waiting for a quiet machine, lines of JSON.

A contender runs in its own process, under the interpreter that has its packages. It makes its first call (imports,
compilation, warm-up) and then sleeps on stdin; each request makes it run a number of timed calls. The parent asks one
contender at a time, in turns, and only while the machine is quiet. This file and the top level of the scripts that use
it need only the standard library, because each interpreter lacks the other's packages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

QUIET_CORES = 0.15
"""A repetition starts only when everything on the machine uses less than this many cores."""
NOISY_CORES = 0.30
"""A repetition counts as noisy if other processes used more than this on average while it ran."""
FIRST_CALL_SECONDS = 900.0


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer with a tied head."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "tiny": Shape(4, 128, 512, 4, 2, 32, 512),  # 1.05 M parameters
    "small": Shape(12, 512, 1536, 8, 2, 64, 32_768),  # 53 M
}


@dataclass(frozen=True)
class Work:
    """The work of a contender, as its worker receives it."""

    shape: Shape
    dtype: str
    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    microbatch_rows: int = 0
    scan_unroll: int = 1
    slots: int = 0
    """Completions of the greatest length for which there is cache memory; 0 = all rows."""
    stages: int = 1
    """Stages of a rollout in slots."""
    longest_first: bool = False
    """Whether the prompts with the longest completions come first."""
    decode_attention: str = "xla"
    """Implementation of attention in decoding."""
    packing: bool = False
    share_prompts: bool = True
    mean_tokens: int = 0
    """Mean length of ragged completions; 0 = no row ends early."""
    cache: str | None = None
    """Folder of XLA's persistent compilation cache; None = no cache."""

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @staticmethod
    def parse(text: str) -> Work:
        fields = json.loads(text)
        return Work(**{**fields, "shape": Shape(**fields["shape"])})


def prompt_ids(work: Work) -> list[list[int]]:
    """The prompts of every contender; their ids are arbitrary, as they do not change the cost."""
    v, n = work.shape.vocab, work.prompt_tokens
    return [[(7919 * (b * n + i) + 13) % v for i in range(n)] for b in range(work.prompts)]


def transformers_fields(work: Work) -> dict[str, Any]:
    """Fields of a transformers config with this shape, for Llama and Qwen2 alike; no id ends a row."""
    s = work.shape
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "intermediate_size": s.mlp_width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": work.prompt_tokens + work.new_tokens,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


# Worker side


class Channel:
    """Requests on stdin, answers on stdout. All other output of the process goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def wait(self) -> int:
        """Sleep until a request arrives; returns the number of calls that it asks for, 0 = end."""
        line = sys.stdin.readline()
        return int(line) if line.strip() else 0


def serve(channel: Channel, call: Callable[[], dict[str, float]], about: dict[str, Any], warm_up: bool = True) -> None:
    """Make the first call, then the number of calls that each request asks for. `call` returns its own timings,
    "seconds" among them.

    Args:
      warm_up: whether there is a first call; False = the calls take so long that it would not change them.
    """
    if warm_up:
        call()
    channel.send(about=about)
    while count := channel.wait():
        channel.send(calls=[call() for _ in range(count)])


# The machine


def busy_seconds() -> float:
    """CPU seconds that all processes have used since boot, including time that the host has stolen."""
    with open("/proc/stat") as f:
        user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """CPU seconds of a process with its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return math.nan


def wait_quiet(patience: float) -> bool:
    """Sleep until the machine is quiet for half a second; False after `patience` seconds without such a window.

    Workers sleep meanwhile, so that a contender whose threads spin while idle is noticed as well.
    """
    deadline = time.monotonic() + patience
    while True:
        start, before = time.monotonic(), busy_seconds()
        time.sleep(0.5)
        if (busy_seconds() - before) / (time.monotonic() - start) < QUIET_CORES:
            return True
        if time.monotonic() > deadline:
            return False


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    memory = math.nan
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) / 2**20
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
    }


# Parent side


@dataclass
class Repetition:
    calls: list[dict[str, float]]
    foreign_cores: float
    quiet: bool

    def mean(self, key: str = "seconds") -> float:
        return statistics.fmean(call[key] for call in self.calls)


class HasCache(Protocol):
    """A dataclass that describes a contender's work."""

    @property
    def cache(self) -> str | None:
        """Folder of XLA's persistent compilation cache; None = no cache."""


@dataclass
class Contender:
    """How to start a worker: its role in the script, its interpreter, and the work."""

    name: str
    role: str
    python: str
    work: HasCache
    note: str = ""
    ours: bool = False
    """Peers are divided by this one."""


@dataclass
class Result:
    name: str
    note: str
    ours: bool
    about: dict[str, Any]
    first_call_cold: float
    first_call_cached: float | None
    repetitions: list[Repetition] = field(default_factory=list)
    peak_rss_mib: float = math.nan

    def used(self) -> list[Repetition]:
        """The quiet repetitions, or all of them if none was quiet."""
        return [r for r in self.repetitions if r.quiet] or self.repetitions

    def median(self, key: str = "seconds") -> float:
        return statistics.median(r.mean(key) for r in self.used())

    def least(self, key: str = "seconds") -> float:
        return min(r.mean(key) for r in self.used())

    def noisy(self) -> bool:
        return not any(r.quiet for r in self.repetitions)

    def spread(self, key: str = "seconds") -> float:
        values = [r.mean(key) for r in self.used()]
        return (max(values) - min(values)) / statistics.median(values)


class Worker:
    """A running contender."""

    def __init__(self, script: str, contender: Contender, platform: str = "cpu") -> None:
        self.contender = contender
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if platform == "cpu":
            env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        else:
            # Several workers share one device.
            env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        start = time.monotonic()
        self._process = subprocess.Popen(
            [contender.python, script, "--worker", contender.role, json.dumps(asdict(contender.work))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self.about = self._answer()["about"]
        self.first_call = time.monotonic() - start

    def run(self, count: int, quiet: bool = True) -> Repetition:
        """One repetition of `count` timed calls."""
        pid = self._process.pid
        start, before, own = time.monotonic(), busy_seconds(), process_seconds(pid)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        calls = self._answer()["calls"]
        foreign = busy_seconds() - before - (process_seconds(pid) - own)
        share = max(0.0, foreign / (time.monotonic() - start))
        return Repetition(calls, round(share, 3), quiet and share < NOISY_CORES)

    def peak_rss_mib(self) -> float:
        return peak_rss_mib(self._process.pid)

    def close(self) -> None:
        self._process.communicate()  # closes stdin, which ends the worker
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"{self.contender.name} ended:\n{self._log.read()[-4000:]}")


def missing(python: str, modules: Sequence[str]) -> list[str]:
    """Names of the modules that an interpreter cannot find."""
    code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    return subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, check=True).stdout.split()


def compare(script: str, contenders: list[Contender], options: argparse.Namespace) -> list[Result]:
    """Start the contenders one after another, then measure them in turns.

    A round gives each one repetition. Rounds go on until everyone has options.runs quiet repetitions, at most
    twice as many times; without patience there are options.runs of them, quiet or not.
    """
    workers: list[Worker] = []
    try:
        results = []
        for worker, result in _start_all(script, contenders, options):
            workers.append(worker)
            results.append(result)
        counts = [1] * len(workers)
        if options.seconds:
            # A second warm-up, which shows how many calls make a repetition long enough.
            counts = [max(1, math.ceil(options.seconds / w.run(2).calls[-1]["seconds"])) for w in workers]
        for _ in range((2 if options.patience else 1) * options.runs):
            for worker, result, count in zip(workers, results, counts, strict=True):
                result.repetitions.append(worker.run(count, wait_quiet(options.patience)))
            if all(sum(r.quiet for r in result.repetitions) >= options.runs for result in results):
                break
        for worker, result in zip(workers, results, strict=True):
            result.peak_rss_mib = worker.peak_rss_mib()
        return results
    finally:
        for worker in workers:
            worker.close()


def _start_all(
    script: str, contenders: list[Contender], options: argparse.Namespace
) -> Iterator[tuple[Worker, Result]]:
    """The contenders, started one after another on a CPU, and at once on a GPU, which compiles on the host's cores."""
    if options.platform == "cpu":
        yield from (_start(script, contender, options.patience) for contender in contenders)
        return
    with ThreadPoolExecutor(len(contenders)) as pool:
        for worker in pool.map(lambda contender: Worker(script, contender, options.platform), contenders):
            one = worker.contender
            yield worker, Result(one.name, one.note, one.ours, worker.about, worker.first_call, None)


def _start(script: str, contender: Contender, patience: float) -> tuple[Worker, Result]:
    """Start a worker. A worker with a compilation cache is started twice, since the first start fills the cache."""
    wait_quiet(patience)
    worker = Worker(script, contender)
    cold, cached = worker.first_call, None
    if contender.work.cache:
        worker.close()
        wait_quiet(patience)
        worker = Worker(script, contender)
        cached = worker.first_call
    return worker, Result(contender.name, contender.note, contender.ours, worker.about, cold, cached)


# Output


def options(description: str, peers: bool = True, tunix: bool = False, shapes: bool = True) -> argparse.ArgumentParser:
    """Parser of the options that the benchmarks have in common."""
    from pspo_jax.system.one_line_parser import (
        OneLineParser,  # a peer's interpreter also imports this file and may lack it
    )

    parser = OneLineParser(description=description, allow_abbrev=False)
    if shapes:
        parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
        parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--runs", type=int, default=5, help="quiet repetitions per contender (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a repetition (default 1)")
    parser.add_argument(
        "--patience",
        type=float,
        default=120.0,
        help="seconds to wait for a quiet machine, 0 = none (default 120)",
    )
    if peers:
        parser.add_argument(
            "--peer-python",
            default=sys.executable,
            help="interpreter that has the peer's packages (default: this one)",
        )
    if tunix:
        parser.add_argument(
            "--tunix-python", default=sys.executable, help="interpreter that has google-tunix (default: this one)"
        )
    parser.add_argument("--platform", choices=["cpu", "gpu"], default="cpu", help="our own device (default cpu)")
    parser.add_argument("--out", type=Path, help="append the lines to this .jsonl file; see bench_tables.py")
    return parser


def parsed(settings: list[str]) -> dict[str, Any]:
    """FIELD=VALUE pairs, values as JSON where they are."""
    found: dict[str, Any] = {}
    for text in settings:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def chosen(value: str, every: Sequence[str]) -> list[str]:
    return list(every) if value == "both" else [value]


def lacks(name: str, python: str, modules: Sequence[str], option: str) -> bool:
    """Whether an interpreter lacks a contender's packages; if so, it prints that the contender is skipped."""
    try:
        gone = missing(python, modules)
    except OSError as error:
        gone = [f"interpreter ({error.strerror})"]
    if gone:
        print(f"{name} skipped: {python} has no {', '.join(gone)}; see {option}", file=sys.stderr)
    return bool(gone)


def measurement(bench: str, case: str, result: Result, key: str = "seconds", **values: float) -> dict[str, Any]:
    """A line of JSON: one contender at one piece of work.

    Args:
    key: name of the call's timing to report.
    values: numbers derived from the calls.
    """
    used = result.used()
    return {
        "bench": bench,
        "case": case,
        "contender": result.name,
        "note": result.note.strip(),
        "ours": result.ours,
        "seconds": {"median": result.median(key), "best": result.least(key), "spread": result.spread(key)},
        "values": values,
        "first_call": {"cold": result.first_call_cold, "cached": result.first_call_cached},
        "peak_rss_mib": result.peak_rss_mib,
        "foreign_cores": max(r.foreign_cores for r in used),
        "quiet_runs": sum(r.quiet for r in result.repetitions),
        "runs": len(result.repetitions),
        "repetitions": [r.mean(key) for r in result.repetitions],
        "machine": machine(),
        "versions": result.about,
    }


def emit(lines: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Print measurements, one a line, and append them to a file at once."""
    text = "".join(json.dumps(rounded(line)) + "\n" for line in lines)
    print(text, end="", flush=True)
    if out:
        with out.open("a") as f:
            f.write(text)


def rounded(value: Any) -> Any:
    """Values with floats rounded to six digits and NaN as None, which JSON can hold."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def check_tokens(group: Sequence[Result], tokens: int) -> None:
    """Check that every call has drawn every token; a row that stops early would look like speed."""
    for result in group:
        drawn = {call["tokens"] for repetition in result.repetitions for call in repetition.calls}
        if drawn != {tokens}:
            raise SystemExit(f"{result.name} drew {drawn} tokens, not {tokens}")
