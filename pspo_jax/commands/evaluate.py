"""Benchmarks over the checkpoints of a run, or over one model, on the devices that are there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from pspo_jax.checkpoint.checksums import files_identity
from pspo_jax.checkpoint.reading import params_identity
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.image_batches import BatchRoom, embedding_room, image_room
from pspo_jax.data.loading import cache_folder
from pspo_jax.data.task import PromptDataset
from pspo_jax.data.text import benchmark_prompts, why
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import check_tower, make_mesh, smallest_fsdp, split_into_slices
from pspo_jax.evaluation import tables
from pspo_jax.evaluation.benchmarks import FIVE, HELDOUT, benchmark_source
from pspo_jax.evaluation.runner import Sampler, Work, read_summary, run_benchmark
from pspo_jax.model import transformer
from pspo_jax.model.architecture import Architecture, beyond_context
from pspo_jax.model.huggingface.load import Source
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import text_reward
from pspo_jax.rollout.sampler import make_sampler, tokens_per_test
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.runs.home import home_of, shown
from pspo_jax.runs.run_folder import write_json
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import unread, write_whole, writing
from pspo_jax.training.architectures import architecture_for
from pspo_jax.training.image_table import fill
from pspo_jax.training.machine_defaults import with_type
from pspo_jax.training.saved_weights import source_weights, step_weights
from pspo_jax.training.setup import configure_runtime, device_bytes
from pspo_jax.verifiers.workers.pool import Pool

LONGEST_PROMPT = 8192
"""Tokens; a benchmark is evaluated whole, whatever training left out."""


class Candidate(NamedTuple):
    """Weights to be evaluated."""

    label: str
    step: int
    identity: str
    """Hash of the weights, which results belong to."""
    load: Callable[[], PyTree]


def evaluate_checkpoints(
    args: argparse.Namespace,
    config: Config,
    names: list[str],
    data: dict[str, str],
    steps: list[int],
    out: Path,
    progress: Progress,
    stop: Callable[[], bool],
    pool: Pool | None,
    keep: Callable[[], None],
) -> int:
    """Evaluate the checkpoints that the arguments name, and write problems, tables and a curve to `out`.

    Args:
      names: benchmarks.
      data: benchmark -> its data, where it is not where it is published.
      steps: checkpoints of the run, if there is one.
      stop: says whether a stop was asked for.
      keep: copies results to the bucket of a run that is in one.
    Returns:
      The exit code.
    Raises:
      StoppedError: `stop()` became true; the same command carries on.
    """
    configure_runtime(config)
    config, chosen = with_type(config, on_cpu=jax.default_backend() == "cpu")
    for words in chosen:
        progress.say(f"default of this machine: {words}")
    if processes.is_primary():
        _check_settings(out, config, args)
    source, tokenizer, architecture = architecture_for(config)
    config = _on_devices(config, architecture, jax.devices())
    mesh = make_mesh(config, architecture)
    check_tower(config, architecture.vision)
    with jax.set_mesh(mesh):
        model = transformer(architecture)
        longest, platform = config.rollout.max_new_tokens, mesh.devices.flat[0].platform
        chunk = tokens_per_test(platform, longest)
        sample = make_sampler(model, args.samples, longest, tokenizer.pad_token_id, chunk=chunk)
        works = [
            _work(name, data.get(name), config, args, tokenizer, architecture, pool, sample, mesh, progress)
            for name in names
        ]
        if not isinstance(tokenizer, CharTokenizer):
            progress.say(tokenizer.stop_line())
        _say_what_does_not_fit(works, architecture, longest, progress)
        candidates = _candidates(args, steps, source, architecture, mesh)
        rows: dict[str, dict[str, tables.Summary]] = {}
        for candidate in candidates:
            rows[candidate.label] = _evaluate(candidate, works, out, args, progress, stop)
            if processes.is_primary():
                _write(out, rows, {c.label: c.step for c in candidates})
                keep()
    if processes.is_primary():
        progress.say((out / "table.md").read_text(encoding="utf-8"))
        progress.say(f"written to {_shown(out, args)}")
        if not tables.can_draw():
            progress.say("curve.png is left out, as matplotlib is not installed: pip install 'pspo-jax[plot]'")
    return 0


def _say_what_does_not_fit(works: list[Work], architecture: Architecture, longest: int, progress: Progress) -> None:
    """Name the benchmarks whose prompts are too long for the model's context, and how many problems are left out."""
    for work in works:
        if line := beyond_context(architecture, int(work.prompts.lengths.max()), longest):
            progress.say(f"{work.name}: {line}")
        if work.prompts.left_out:
            progress.say(f"{work.name}: {why(work.prompts.left_out)} left out")


def _on_devices(config: Config, architecture: Architecture, devices: Sequence[jax.Device]) -> Config:
    """`config` with weights split as far as these devices' memory needs, and a batch that they divide.

    The last batch is filled up anyway, and a completion does not depend on its batch.
    """
    m = config.mesh
    weights = jax.eval_shape(transformer(architecture.whole()).init, jax.random.key(0))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    inside = len(split_into_slices(config, devices)[0]) // (m.tensor * m.context)
    fsdp = m.fsdp or smallest_fsdp(held, device_bytes(), inside or 1, architecture.split_width)
    shards = (len(devices) // m.tensor) if m.data == -1 else m.data * fsdp * m.context
    batch = -(-config.rollout.prompts // max(shards, 1)) * max(shards, 1)
    return replace(config, {"mesh.fsdp": fsdp, "rollout.prompts": batch})


def _work(
    name: str,
    data: str | None,
    config: Config,
    args: argparse.Namespace,
    tokenizer: TextTokenizer | CharTokenizer,
    architecture: Architecture,
    pool: Pool | None,
    sample: Sampler,
    mesh: Mesh,
    progress: Progress,
) -> Work:
    if isinstance(tokenizer, CharTokenizer):
        task = make_task(config, tokenizer)
        prompts, judge = task.heldout, task.reward_fn
        stop_ids: tuple[int, ...] = task.stop_ids
        if args.limit:
            raise ConfigError("--limit: an embedded task has task.heldout_prompts problems; leave it out")
    elif name == HELDOUT:
        few = args.limit or config.task.heldout_prompts
        # As training splits the data; how many prompts it draws does not matter here.
        fields = {"task.heldout_prompts": min(few, config.task.heldout_prompts), "rollout.prompts": 1}
        task = make_task(replace(config, fields), tokenizer, pool, progress.say)
        prompts, judge, stop_ids = task.heldout, task.reward_fn, task.stop_ids
    else:
        whole = replace(config, {"prompt.max_tokens": max(config.prompt.max_tokens, LONGEST_PROMPT)})
        source = benchmark_source(name, data, whole)
        prompts = benchmark_prompts(source, whole, tokenizer, pool, args.limit, progress.say)
        judge, stop_ids = text_reward(pool, tokenizer, config), tokenizer.stop_ids
    return Work(
        name=name,
        prompts=prompts,
        reward_fn=judge,
        tokenizer=tokenizer,
        samples=args.samples,
        batch=config.rollout.prompts,
        sample=sample,
        settings=SamplingParams.of(config.rollout, stop_ids, temperature=args.temperature),
        key=jax.random.key(args.seed),
        mesh=mesh,
        room=_room(config, architecture, prompts, mesh, progress),
    )


def _room(
    config: Config, architecture: Architecture, prompts: PromptDataset, mesh: Mesh, progress: Progress
) -> Callable[[PyTree], BatchRoom | None]:
    """`Work.room`: that of embeddings where the vision tower is frozen, so that candidates and runs share them."""
    patches, model = image_room(architecture.vision, prompts), transformer(architecture)
    width, dtype = architecture.width, architecture.compute_dtype
    embeddings = embedding_room(None if model.trains_encoder else patches, width, dtype, prompts)
    if embeddings is None:
        return lambda weights: patches

    def filled(weights: PyTree) -> BatchRoom | None:
        return fill(embeddings, model, architecture, weights, mesh, [prompts], cache_folder(config.task), progress)

    return filled


def _candidates(
    args: argparse.Namespace,
    steps: list[int],
    source: Source | None,
    architecture: Architecture,
    mesh: Mesh,
) -> list[Candidate]:
    """The checkpoints that the arguments name."""
    base: list[PyTree] = []

    def load_source() -> PyTree:
        assert source is not None
        if not base:
            base.append(source_weights(source, architecture, mesh))
        return base[0]

    def load_step(step: int) -> PyTree:
        return step_weights(args.run, step, source, architecture, mesh, load_source)

    if args.run is None:
        assert source is not None
        name = Path(args.model).name if Path(args.model).is_dir() else args.model
        return [Candidate(name, 0, files_identity(source.folder), load_source)]
    folder = home_of(args.run) / "checkpoints"
    return [Candidate(f"step {s}", s, params_identity(folder, s), partial(load_step, s)) for s in steps]


def _check_settings(out: Path, config: Config, args: argparse.Namespace) -> None:
    """Refuse to mix results of different settings in one folder."""
    settings = {
        "policy": args.model if args.run is None else shown(args.run, args.run),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": config.rollout.max_new_tokens,
        "samples": args.samples,
        "seed": args.seed,
        "prompt": dataclasses.asdict(config.prompt),
        "compute_dtype": config.model.compute_dtype,
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
    candidate: Candidate,
    works: list[Work],
    out: Path,
    args: argparse.Namespace,
    progress: Progress,
    stop: Callable[[], bool],
) -> dict[str, tables.Summary]:
    loaded: list[PyTree] = []

    def weights() -> PyTree:
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
        rate = (
            f"{seconds:.1f} s, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
            if tokens
            else f"was in {_shown(path, args)}"
        )
        progress.say(f"{candidate.label} {work.name}: {rate}")
        if processes.is_primary():
            found[work.name] = read_summary(path, args.k)
    return found


def _shown(path: Path, args: argparse.Namespace) -> str:
    """A path as the user knows it, who may have named a run in a bucket."""
    return str(path) if args.run is None else shown(path, args.run)


def _write(out: Path, rows: dict[str, dict[str, tables.Summary]], steps: dict[str, int]) -> None:
    results = {label: {name: tables.to_json(s) for name, s in found.items()} for label, found in rows.items()}
    write_json(out / "results.json", results)
    write_whole(out / "table.md", tables.markdown(rows, FIVE).encode())
    if tables.can_draw():
        with writing(out / "curve.png"):
            tables.curve(out / "curve.png", rows, {k: steps[k] for k in rows}, "Accuracy over training", FIVE)
