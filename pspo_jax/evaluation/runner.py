"""One benchmark on one set of weights: sampled in batches, verified meanwhile, written problem by problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import NamedTuple, Protocol, TypedDict

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from pspo_jax.arrays.state import Prompts, Rollouts
from pspo_jax.checkpoint.params_folder import set_aside
from pspo_jax.config.fields import ConfigError
from pspo_jax.data.image_batches import BatchRoom, gather
from pspo_jax.data.task import CompletionBatch, PromptDataset, RewardFn, RewardResult, Tokenizer, prompt_text
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import batch_sharding
from pspo_jax.evaluation.statistics import Summary, summarise
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.system.storage import append_whole, write_whole, writing


class Sampler(Protocol):
    """Samples completions of a batch of prompts."""

    def __call__(
        self,
        params: PyTree,
        prompts: Prompts,
        key: Key[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""],
        /,
    ) -> Rollouts:
        """`first_row` is the number of the batch's first completion, which its random numbers follow."""


class Header(TypedDict):
    """The first line of a file of results, which says what they belong to."""

    weights: str
    """Hash of the weights."""
    benchmark: str
    problems: int
    samples: int
    """Completions per problem."""
    data: str
    """Fingerprint of the prompts."""


class Work(NamedTuple):
    """A benchmark, ready to be sampled."""

    name: str
    prompts: PromptDataset
    reward_fn: RewardFn
    tokenizer: Tokenizer
    samples: int
    """Completions a problem."""
    batch: int
    """Problems a call of the sampler."""
    sample: Sampler
    """Samples `samples` completions of each prompt."""
    settings: SamplingParams
    key: Key[Array, ""]
    mesh: Mesh
    room: Callable[[PyTree], BatchRoom | None] = lambda _: None
    """A function from the weights to the room for the problems' images; it gives None where no problem has any. Room
    for embeddings of images depends on the weights, which compute them."""

    def header(self, identity: str) -> Header:
        """The first line of the file of results: what they belong to. `identity` is a hash of the weights."""
        return {
            "weights": identity,
            "benchmark": self.name,
            "problems": len(self.prompts.lengths),
            "samples": self.samples,
            "data": self.prompts.fingerprint(),
        }


class StoppedError(Exception):
    """A stop was asked for; all results so far are on disk."""


def run_benchmark(
    work: Work,
    weights: Callable[[], PyTree],
    identity: str,
    path: Path,
    tick: Callable[[int, str], None],
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Complete `path`, a JSONL file of a header and a line per problem; results of these weights in it are kept.

    Completion s of problem i draws with row number i n + s of one key, so that a continued evaluation draws the same
    completions as an uninterrupted one. All processes must call; the leading one verifies and writes.

    Returns the number of tokens that were sampled.

    Args:
      weights: loads them; called only if something is left to do.
      identity: a hash of them; results of other weights are set aside.
      tick: is told how many problems of each batch are done, and the benchmark's name.
      stop: says before each batch whether to stop.
      say: is told if results are set aside.
    Raises:
      StoppedError: stop() became true.
      StorageError: the file cannot be written; what it holds stays.
    """
    total, is_primary = len(work.prompts.lengths), processes.is_primary()
    done = int(processes.sum_over_processes(np.array(_recover(path, work.header(identity), say) if is_primary else 0)))
    tick(done, "")
    if done == total:
        return 0
    loaded, sampled = weights(), 0
    room = work.room(loaded)
    waiting: tuple[CompletionBatch, int, Callable[[], RewardResult]] | None = None

    def write(item: tuple[CompletionBatch, int, Callable[[], RewardResult]] | None) -> None:
        if item is None:
            return
        lines = problem_lines(work, item[0], item[2]())
        append_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        tick(item[1], work.name)

    for start in range(done, total, work.batch):
        if processes.any_process(stop()):
            write(waiting)
            raise StoppedError
        rows = np.minimum(np.arange(start, start + work.batch), total - 1).astype(np.int32)
        batch = gather(work.prompts, rows, np.ones(work.batch, np.float32), room)
        prompts = processes.to_global(batch, batch_sharding(work.mesh))
        rollouts = work.sample(loaded, prompts, work.key, work.settings, jnp.int32(start * work.samples))
        write(waiting)  # its verification has gone on while this batch is sampled
        tokens, lengths, ended = processes.to_host((rollouts.tokens, rollouts.lengths, rollouts.ended))
        real = min(work.batch, total - start)
        completions = CompletionBatch(
            work.prompts, rows[:real], tokens[:real], lengths[:real], ended[:real], step=0, wants_reward=False
        )
        sampled += int(lengths[:real].sum())
        waiting = (completions, real, work.reward_fn(completions)) if is_primary else None
    write(waiting)
    return sampled


def problem_lines(work: Work, batch: CompletionBatch, scores: RewardResult) -> list[dict[str, object]]:
    """A record per problem, with every completion and its verdict."""
    lines = []
    for i, row in enumerate(batch.rows):
        n = batch.lengths[i].tolist()
        lines.append(
            {
                "problem": int(row),
                "prompt": prompt_text(batch.prompts, int(row), work.tokenizer),
                "answer": batch.prompts.answers[int(row)],
                "task": "" if batch.prompts.labels is None else batch.prompts.labels[int(row)],
                "right": [None if np.isnan(x) else float(x) for x in scores.verdicts[i]],
                "found": scores.answers[i],
                "lengths": n,
                "truncated": (~batch.ended[i]).tolist(),
                "completions": [work.tokenizer.decode(batch.tokens[i, j, :m].tolist()) for j, m in enumerate(n)],
            }
        )
    return lines


def _recover(path: Path, header: Header, say: Callable[[str], None] = lambda _: None) -> int:
    """Problems that the file holds of these weights; a line that was cut off is dropped, another setting refused.

    Results of other weights, or of weights that they do not name, are set aside.
    """
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{json.dumps(header)}\n".encode())
        return 0
    kept: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if not kept and _of_other_weights(record, header):
                aside = set_aside(path)
                say(f"{path}: holds results of other weights; they are in {aside}, and all is evaluated anew")
                return _recover(path, header, say)
            if not kept and record != header:
                raise ConfigError(f"--out: {path} holds results of other data or samples; name another folder")
            if len(kept) > header["problems"] or (kept and not _whole(record, len(kept) - 1, header["samples"])):
                break
            kept.append(line if line.endswith("\n") else line + "\n")
    if not kept:
        kept = [json.dumps(header) + "\n"]
    write_whole(path, "".join(kept).encode())
    return len(kept) - 1


def _of_other_weights(found: object, header: Header) -> bool:
    """Whether a file's header differs from this one in its weights alone."""
    return isinstance(found, dict) and found != header and {**found, "weights": header["weights"]} == header


def _whole(record: object, problem: int, samples: int) -> bool:
    """Whether a line is the result of this problem, and nothing else."""
    if not isinstance(record, dict) or record.get("problem") != problem:
        return False
    kinds: dict[str, type | UnionType] = {
        "right": float | int | None,
        "found": str | None,
        "lengths": int,
        "truncated": bool,
    }
    columns = [record.get(name) for name in kinds]
    if not all(isinstance(column, list) and len(column) == samples for column in columns):
        return False
    return all(isinstance(x, kind) for column, kind in zip(columns, kinds.values(), strict=True) for x in column or ())


def read_summary(path: Path, ks: Sequence[int]) -> Summary:
    """Statistics of a finished file."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][1:]
    verdicts = np.array([[np.nan if x is None else x for x in line["right"]] for line in lines])
    lengths = np.array([line["lengths"] for line in lines])
    truncated = np.array([line["truncated"] for line in lines])
    return summarise(
        verdicts, [line["found"] for line in lines], lengths, truncated, ks, [line["task"] for line in lines]
    )
