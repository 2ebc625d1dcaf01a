"""Seconds per GRPO step, rollout and update: this package beside TRL's GRPOTrainer and Tunix, on CPU.

    python scripts/bench_step.py --peer-python PYTHON_WITH_TRL --tunix-python PYTHON_WITH_TUNIX --out bench.jsonl

A step draws 8 completions of 64 tokens for each of 8 prompts of 64 tokens, rewards them on the host (the
share of even ids), and makes one AdamW update of the DAPO-normalised loss without a KL term.
docs/performance.md describes the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from typing import Any

import _bench
from _bench import SHAPES, Channel, Contender, Work
from _tunix import LEARNER as TUNIX
from _tunix import serve_step as serve_tunix
from bench_rollout import llama, our_about, our_setup, torch_about

OURS, PEER = "pspo_jax", "TRL GRPOTrainer"
LEARNING_RATE = 1e-5


def serve_ours(work: Work) -> None:
    """Measure this package. The first weights are made while programs compile, as in the entry points."""
    channel = Channel()
    settings, model, prompts = our_setup(work)
    from concurrent.futures import ThreadPoolExecutor

    import jax
    import jax.numpy as jnp
    import numpy as np

    from pspo_jax.arrays.state import ROLLOUT, purpose_key
    from pspo_jax.distributed.runtime import jit_once
    from pspo_jax.rollout.sampler import make_sampler
    from pspo_jax.rollout.token_loop import SamplingParams
    from pspo_jax.training.algorithm import build
    from pspo_jax.training.optimizer import adamw
    from pspo_jax.training.step import init_state, make_train_step

    optimizer = adamw(settings.optimizer, settings.run.steps)
    algorithm = build(settings)
    n, length = settings.task.train_prompts, work.prompt_tokens

    def new_state() -> Any:
        params = model.init(jax.random.key(0))
        return init_state(params, optimizer, algorithm, settings, n, length, jax.random.key(1))

    sampling = SamplingParams.of(settings.rollout, [-1])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(jit_once(new_state, "cpu"))
        shapes = jax.eval_shape(new_state)
        args = shapes.params, prompts, shapes.key, sampling
        traced = jax.jit(make_sampler(model, work.group_size, work.new_tokens, pad_id=0)).lower(*args)
        sampler = pool.submit(traced.compile)
        update = make_train_step(model, optimizer, algorithm, settings)
        rewards = jax.ShapeDtypeStruct((work.prompts, work.group_size), jnp.float32)
        train_step = update.lower(shapes, traced.out_info, rewards).compile()
        state, sample = first.result(), sampler.result()

    def call() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        rollouts = sample(state.params, prompts, purpose_key(state.key, state.step, ROLLOUT), sampling)
        tokens = np.asarray(rollouts.tokens)
        drawn = time.perf_counter()
        rewards = jnp.asarray((tokens % 2 == 0).mean(axis=-1, dtype=np.float32))
        state, metrics = jax.block_until_ready(train_step(state, rollouts, rewards))
        end = time.perf_counter()
        return {
            "seconds": end - start,
            "rollout": drawn - start,
            "update": end - drawn,
            "tokens": int(rollouts.lengths.sum()),
            "loss": float(metrics["loss"]),
        }

    _bench.serve(channel, call, our_about())


def tokenizer(work: Work) -> Any:
    """A tokenizer whose words are the ids. The EOS id lies outside the vocabulary, so that no row ends early."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(work.shape.vocab)} | {"<eos>": work.shape.vocab}
    inner = Tokenizer(WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """TRL reward function: the share of even ids in each completion."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def grpo_config(work: Work, folder: str) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=work.dtype == "bfloat16",
        per_device_train_batch_size=work.rows,
        num_generations=work.group_size,
        max_completion_length=work.new_tokens,
        max_steps=1_000_000,
        learning_rate=LEARNING_RATE,
        max_grad_norm=1.0,
        loss_type="dapo",
        epsilon_high=0.28,
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Finished(Exception):
    """The parent has asked for no more steps."""


def serve_peer(work: Work) -> None:
    """Measure TRL's own loop; a callback sleeps before a step until the parent asks for it."""
    channel = Channel()
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    about = torch_about("trl", "accelerate")
    calls: list[dict[str, float]] = []
    marks = {"wanted": 1.0, "first": True}

    class Timer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if len(calls) == marks["wanted"]:
                message = {"about": about} if marks.pop("first", False) else {"calls": list(calls)}
                channel.send(**message)
                calls.clear()
                marks["wanted"] = channel.wait()
                if not marks["wanted"]:
                    raise Finished
            marks["start"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - marks["start"]
            calls.append(
                {
                    "seconds": seconds,
                    "rollout": marks["rollout"],
                    "update": seconds - marks["rollout"],
                    "tokens": marks["tokens"],
                }
            )

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            marks["rollout"] = time.perf_counter() - start
            marks["tokens"] = sum(len(ids) for ids in out[0])
            return out

    prompts = [{"prompt": " ".join(map(str, ids))} for ids in _bench.prompt_ids(work)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=llama(work),
            reward_funcs=even_share,
            args=grpo_config(work, folder),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer(work),
            callbacks=[Timer()],
        )
        try:
            trainer.train()
        except Finished:
            return


def case_of(shape: str, dtype: str, peer: str | None) -> str:
    """Name of the case. Peers are measured separately, as two would not fit into memory, and Tunix has a case of its
    own."""
    return f"{shape} {dtype}" + (" (beside Tunix)" if peer == TUNIX else "")


def measure(options: argparse.Namespace, shape: str, dtype: str, peer: str | None) -> list[dict[str, Any]]:
    """Measure this package and a peer at one shape and type; every step must have drawn every token."""
    unroll = options.scan_unroll or SHAPES[shape].layers
    note = f"({options.microbatch_rows or 'all'} rows a microbatch, unroll {unroll})"
    plain = Work(SHAPES[shape], dtype)
    with tempfile.TemporaryDirectory() as cache:
        work = dataclasses.replace(plain, microbatch_rows=options.microbatch_rows, scan_unroll=unroll, cache=cache)
        contenders = [Contender(OURS, "ours", sys.executable, work, note, ours=True)]
        if peer == PEER:
            contenders.append(Contender(PEER, "peer", options.peer_python, plain))
        elif peer == TUNIX:
            contenders.append(Contender(TUNIX, "tunix", options.tunix_python, plain))
        group = _bench.compare(__file__, contenders, options)
    _bench.check_tokens(group, work.rows * work.new_tokens)
    parts = [{f"{k}_s": r.median(k) for k in ("rollout", "update")} for r in group]
    case = case_of(shape, dtype, peer)
    return [_bench.measurement("step", case, r, **v) for r, v in zip(group, parts, strict=True)]


def main() -> None:
    parser = _bench.options(__doc__.splitlines()[0], tunix=True)
    parser.add_argument("--microbatch-rows", type=int, default=4, help="our loss.microbatch_rows; 0 = all (default 4)")
    parser.add_argument("--scan-unroll", type=int, default=0, help="our model.scan_unroll; 0 = all layers (default)")
    options = parser.parse_args()
    peers: list[str | None] = []
    if not _bench.lacks(PEER, options.peer_python, ["torch", "transformers", "trl", "datasets"], "--peer-python"):
        peers.append(PEER)
    if not _bench.lacks(TUNIX, options.tunix_python, ["tunix"], "--tunix-python"):
        peers.append(TUNIX)
    for shape in _bench.chosen(options.shape, list(SHAPES)):
        for dtype in _bench.chosen(options.dtype, ["float32", "bfloat16"]):
            for peer in peers or [None]:
                if peer == TUNIX and dtype == "bfloat16":
                    print(f"{TUNIX} skipped in bfloat16: its model computes in its weights' type", file=sys.stderr)
                    continue
                _bench.emit(measure(options, shape, dtype, peer), options.out)
                print(f"{case_of(shape, dtype, peer)} done", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        {"ours": serve_ours, "peer": serve_peer, "tunix": serve_tunix}[sys.argv[2]](Work.parse(sys.argv[3]))
    else:
        main()
