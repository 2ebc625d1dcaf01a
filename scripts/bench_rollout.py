"""Rollout tokens/s: this package's sampler beside Hugging Face `generate` and Tunix, on CPU.

    python scripts/bench_rollout.py --peer-python PYTHON_WITH_TORCH --tunix-python PYTHON_WITH_TUNIX --out bench.jsonl

Each draws 64 new tokens for 8 samples of each of 8 prompts of 64 tokens, at temperature 1 and with no stop
token, from random weights of the same shape. docs/performance.md describes the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import _bench
from _bench import SHAPES, Channel, Contender, Work
from _tunix import NAME as TUNIX
from _tunix import serve_rollout as serve_tunix

if TYPE_CHECKING:
    from pspo_jax.arrays.state import Prompts
    from pspo_jax.config.schema import Config
    from pspo_jax.model.interface import Model

OURS, PEER = "pspo_jax", "Hugging Face generate"


def our_setup(work: Work) -> tuple[Config, Model, Prompts]:
    """Config, model and prompts of a piece of work, after the process settings of the entry points."""
    from pspo_jax.distributed.runtime import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp

    from pspo_jax.arrays.state import Prompts
    from pspo_jax.config.defaults import replace
    from pspo_jax.config.presets import resolve
    from pspo_jax.config.schema import Config
    from pspo_jax.config.validation import validate
    from pspo_jax.distributed import xla_flags
    from pspo_jax.model import built_in, transformer

    if work.cache:
        jax.config.update("jax_compilation_cache_dir", work.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)  # as entry points set it
    shape = {k: v for k, v in asdict(work.shape).items() if k != "vocab"}
    fields = {f"model.{k}": v for k, v in shape.items()} | {
        "algorithm.name": "grpo",
        "model.tied": True,
        "model.compute_dtype": work.dtype,
        "model.scan_unroll": work.scan_unroll,
        "rollout.prompts": work.prompts,
        "rollout.group_size": work.group_size,
        "rollout.max_new_tokens": work.new_tokens,
        "loss.microbatch_rows": work.microbatch_rows,
        "loss.packing": work.packing,
        "loss.share_prompts": work.share_prompts if work.packing else None,
    }
    settings = resolve(replace(Config(), fields))
    validate(settings)
    xla_flags.apply(settings)
    a = dataclasses.replace(built_in(settings.model, work.shape.vocab), decode_attention=work.decode_attention)
    model = transformer(a)
    tokens = jnp.asarray(_bench.prompt_ids(work), jnp.int32)
    n = work.prompts
    return settings, model, Prompts(jnp.arange(n), tokens, jnp.full(n, work.prompt_tokens), jnp.ones(n))


def llama(work: Work) -> Any:
    """A transformers model of the same shape, random weights, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**_bench.transformers_fields(work), head_dim=work.shape.head_dim)
    return LlamaForCausalLM(config)


def torch_about(*packages: str) -> dict[str, Any]:
    """Versions and threads of a torch process."""
    import importlib.metadata as metadata

    import torch

    versions = {name: metadata.version(name) for name in ("torch", "transformers", *packages)}
    return versions | {"torch threads": torch.get_num_threads()}


def our_about() -> dict[str, Any]:
    import importlib.metadata as metadata

    import jax

    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    try:
        versions["pspo_jax"] = metadata.version("pspo_jax")
    except metadata.PackageNotFoundError:
        versions["pspo_jax"] = "source tree"
    device = jax.devices()[0]
    return versions | ({} if device.platform == "cpu" else {"on": f"{device.device_kind} ({device.platform})"})


def serve_ours(work: Work) -> None:
    channel = Channel()
    settings, model, prompts = our_setup(work)
    import jax

    from pspo_jax.rollout.sampler import make_sampler
    from pspo_jax.rollout.token_loop import SamplingParams

    params = model.init(jax.random.key(0))
    sample = make_sampler(model, work.group_size, work.new_tokens, pad_id=0)
    sampling = SamplingParams.of(settings.rollout, [-1])
    key, count = jax.random.key(1), 0

    def call() -> dict[str, float]:
        nonlocal count
        count += 1
        start = time.perf_counter()
        rollouts = jax.block_until_ready(sample(params, prompts, jax.random.fold_in(key, count), sampling))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": int(rollouts.lengths.sum())}

    _bench.serve(channel, call, our_about())


def serve_peer(work: Work) -> None:
    channel = Channel()
    import torch
    from transformers import GenerationConfig

    torch_model = llama(work).to(getattr(torch, work.dtype)).eval()
    ids = torch.tensor(_bench.prompt_ids(work)).repeat_interleave(work.group_size, dim=0)
    settings = GenerationConfig(
        max_new_tokens=work.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
    )

    @torch.no_grad()
    def call() -> dict[str, float]:
        start = time.perf_counter()
        out = torch_model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": out[:, ids.shape[1] :].numel()}

    _bench.serve(channel, call, torch_about())


def contenders(shape: str, dtype: str, peers: list[str], options: argparse.Namespace, cache: str) -> list[Contender]:
    """This package, then the peers that are installed."""
    work = Work(SHAPES[shape], dtype)
    interpreters = {PEER: ("peer", options.peer_python), TUNIX: ("tunix", options.tunix_python)}
    ours = Contender(OURS, "ours", sys.executable, dataclasses.replace(work, cache=cache), ours=True)
    return [ours, *(Contender(name, *interpreters[name], work) for name in peers)]


def main() -> None:
    options = _bench.options(__doc__.splitlines()[0], tunix=True).parse_args()
    peers = []
    if not _bench.lacks(PEER, options.peer_python, ["torch", "transformers"], "--peer-python"):
        peers.append(PEER)
    if not _bench.lacks(TUNIX, options.tunix_python, ["tunix"], "--tunix-python"):
        peers.append(TUNIX)
    for shape in _bench.chosen(options.shape, list(SHAPES)):
        for dtype in _bench.chosen(options.dtype, ["float32", "bfloat16"]):
            with tempfile.TemporaryDirectory() as cache:
                chosen = contenders(shape, dtype, peers, options, cache)
                group = _bench.compare(__file__, chosen, options)
            tokens = chosen[0].work.rows * chosen[0].work.new_tokens
            _bench.check_tokens(group, tokens)
            case = f"{shape} {dtype}"
            rates = [{"tokens_per_s": tokens / r.median(), "best_tokens_per_s": tokens / r.least()} for r in group]
            lines = [_bench.measurement("rollout", case, r, **v) for r, v in zip(group, rates, strict=True)]
            _bench.emit(lines, options.out)
            print(f"{case} done", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        {"ours": serve_ours, "peer": serve_peer, "tunix": serve_tunix}[sys.argv[2]](Work.parse(sys.argv[3]))
    else:
        main()
