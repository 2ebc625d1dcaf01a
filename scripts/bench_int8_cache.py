"""What a cache of keys and values in int8 would save and cost, on this machine: bytes, time, and log-probs.

    python scripts/bench_int8_cache.py bytes
    python scripts/bench_int8_cache.py time --runs 7
    python scripts/bench_int8_cache.py gap --model weights/smollm2

`bytes` is arithmetic: what a token's step of a recipe reads on one device, of weights and of the cache, averaged over
the completions' length, every completion at its longest and every prompt at 200 tokens. `time` is one layer's attention
of new tokens over a full cache, with the keys and values in float32, in bfloat16, and in int8, whose scales multiply
scores and weights instead of the cache; the median of --runs. `gap` draws completions of a few prompts, and computes
their log-probs by the decoder in float32 with an exact cache, with a cache rounded to int8, and in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import make_mesh, replicated
from pspo_jax.model import transformer
from pspo_jax.model.attention.xla import Prefix, Suffix, attend_shared_prefix
from pspo_jax.model.decoding import SlotCache
from pspo_jax.model.huggingface.load import load_params, read_source
from pspo_jax.model.weights import is_weight, table

PROMPT_TOKENS = 200
SCALE_BYTES = 2
QUESTIONS = (
    "Question: A baker sells 12 loaves in the morning and 9 in the afternoon. How many loaves does she sell?\nAnswer:",
    "Question: What is the capital of France, and which river runs through it?\nAnswer:",
    "def is_prime(n):\n    ",
    "Question: Tom has 3 boxes with 14 pencils each and gives away 5. How many pencils are left?\nAnswer:",
)


class Recipe(NamedTuple):
    """The shape of a recipe's model, and what one device decodes at a time."""

    layers: int
    kv_heads: int
    head_dim: int
    weights: float
    """Number of weights that a token's step reads."""
    prompts: int
    group_size: int
    new_tokens: int


RECIPES = {
    "pspo_qwen25_math_1p5b": Recipe(28, 2, 128, 1.54e9, 8, 6, 3072),
    "pspo_qwen25_math_7b_lora": Recipe(28, 4, 128, 7.07e9, 2, 6, 1024),
    "pspo_qwen25_vl_3b_geo3k, 1 of 8 devices": Recipe(36, 2, 128, 3.09e9, 64, 8, 1024),
    "smollm2_135m_grpo": Recipe(30, 3, 64, 0.135e9, 8, 8, 16),
}


def count_bytes() -> None:
    print("recipe: MB a token's step reads: weights, cache in bfloat16, cache in int8; share that int8 saves")
    for name, r in RECIPES.items():
        values = 2 * r.layers * r.kv_heads * r.head_dim
        columns = r.prompts * (PROMPT_TOKENS + r.group_size * r.new_tokens / 2)
        weights, wide = 2 * r.weights, 2 * values * columns
        narrow = values * columns * (1 + SCALE_BYTES / r.head_dim)
        share = (wide - narrow) / (weights + wide)
        print(f"{name}: {weights / 1e6:,.0f}  {wide / 1e6:,.0f}  {narrow / 1e6:,.0f}  {share:.1%}")


def rounded(x: Array) -> tuple[Array, Array]:
    """int8 numbers and the scale of each head and column."""
    scale = jnp.maximum(jnp.abs(x).max(-1).astype(jnp.float32), 1e-30) / 127
    return jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8), scale


def measure_time(runs: int) -> None:
    print("B G K H/K T h: type, ms of processor time, ms elapsed (medians)")
    for b, g, kv, m, t, h in ((8, 8, 3, 3, 256, 64), (8, 6, 2, 6, 1024, 128), (8, 6, 2, 6, 3072, 128)):
        keys = jax.random.split(jax.random.key(0), 3)
        made = [jax.random.normal(key, (b, g, kv, t, h)) for key in keys[:2]]
        q = jax.random.normal(keys[2], (b, g, kv * m, h))

        def plain(q: Array, k: Array, v: Array) -> Array:
            empty = jnp.zeros((q.shape[0], k.shape[2], 1, k.shape[-1]), k.dtype)
            prefix = Prefix(empty, empty, jnp.ones(q.shape[0], jnp.int32))
            return attend_shared_prefix(q, prefix, Suffix(k, v, jnp.asarray(k.shape[3] - 1)), 0.1)

        def narrow(q: Array, k: Array, k_scale: Array, v: Array, v_scale: Array) -> Array:
            rows = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
            scores = jnp.einsum("bgkth,bgkmh->bgktm", k.astype(q.dtype), rows, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(0.1 * scores * k_scale[..., None], axis=3) * v_scale[..., None]
            return jnp.einsum("bgktm,bgkth->bgkmh", weights.astype(q.dtype), v.astype(q.dtype))

        contenders = {
            "float32": (jax.jit(plain), (q, *made)),
            "bfloat16": (jax.jit(plain), tuple(x.astype(jnp.bfloat16) for x in (q, *made))),
            "int8, products in float32": (jax.jit(narrow), (q, *rounded(made[0]), *rounded(made[1]))),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for run in range(runs + 1):
            for name, (call, operands) in contenders.items():
                begun, busy = time.perf_counter(), time.process_time()
                jax.block_until_ready(call(*operands))
                if run:
                    found[name].append((time.process_time() - busy, time.perf_counter() - begun))
        for name, pairs in found.items():
            busy, elapsed = (1e3 * statistics.median(x) for x in zip(*pairs, strict=True))
            print(f"{b} {g} {kv} {m} {t} {h}: {name}, {busy:.2f}, {elapsed:.2f}")


def measure_gap(folder: str, new_tokens: int) -> None:
    from tokenizers import Tokenizer

    config = Config()
    source = read_source(dataclasses.replace(config.model, source=folder), True)
    a = source.architecture
    mesh = make_mesh(config, a, jax.devices()[:1])
    whole = jax.tree.map(lambda _: replicated(mesh), table(a), is_leaf=is_weight)
    params = load_params(source, table(a), whole, "float32")
    ids = [Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode(text).ids for text in QUESTIONS]
    lengths = jnp.asarray([len(x) for x in ids])
    prompts = jnp.asarray([x + [0] * (max(map(len, ids)) - len(x)) for x in ids], jnp.int32)
    rows = len(ids)

    def rounded_as(form: Array, x: Array, of_prompt: Array) -> Array:
        """Keys or values of a layer, as a cache of this form (an index of `forms`) gives them back."""
        numbers, scale = rounded(x)
        of_head = jnp.abs(of_prompt).max((-2, -1), keepdims=True) / 127
        by_head = jnp.clip(jnp.round(x / of_head), -127, 127) * of_head
        return jnp.where(form == 1, numbers * scale[..., None], jnp.where(form == 2, by_head, x)).astype(x.dtype)

    def decode(dtype: str) -> Callable[..., tuple[Array, Array]]:
        """A function of the params, tokens, whether greedy tokens take their place, and the form of the cache. It
        returns the tokens and their log-probs."""
        model = transformer(dataclasses.replace(a, compute_dtype=dtype))

        def run(params: PyTree, tokens: Array, greedy: Array, form: Array) -> tuple[Array, Array]:
            decoder = model.slots(params, prompts, lengths, 1)
            cache = decoder.slots(rows, new_tokens)
            for row in range(rows):
                of_shard = jnp.asarray([row])
                cache = decoder.load(cache, of_shard, of_shard, None, jnp.asarray([0]))
            read = cache.prompts.layers
            in_prompt = [(rounded_as(form, k, k), rounded_as(form, v, v)) for k, v in read]

            def one(carry: tuple[Array, PyTree], t: Array) -> tuple[tuple[Array, PyTree], tuple[Array, Array]]:
                logits, completions = carry
                token = jnp.where(greedy, logits.argmax(-1), tokens[:, t]).astype(jnp.int32)
                log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
                held = SlotCache(cache.prompts._replace(layers=in_prompt), completions)
                logits, new = decoder.step(held, token[None], jnp.full((1, rows), t))
                pairs = zip(new.completions, read, strict=True)
                kept = [(rounded_as(form, k, of_k), rounded_as(form, v, of_v)) for (k, v), (of_k, of_v) in pairs]
                return (logits[0], kept), (token, log_p)

            first = (decoder.logits, cache.completions)
            _, (drawn, found) = jax.lax.scan(one, first, jnp.arange(new_tokens))
            return drawn.T, found.T

        return jax.jit(run)

    in_float32, empty = decode("float32"), jnp.zeros((rows, new_tokens), jnp.int32)
    tokens, expected = in_float32(params, empty, True, 0)
    print(f"{rows} prompts x {new_tokens} greedy tokens; |difference of log-prob|: mean, 99 %, largest", flush=True)
    forms = ("bfloat16, exact cache", "int8, a scale for each head and column", "int8, a scale for each head")
    for form in (1, 2, 0):
        run = in_float32 if form else decode("bfloat16")
        off = np.abs(np.asarray(run(params, tokens, False, form)[1] - expected, np.float64))
        print(f"{forms[form]}: {off.mean():.5f}  {np.quantile(off, 0.99):.4f}  {off.max():.4f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["bytes", "time", "gap"])
    parser.add_argument("--runs", type=int, default=7, help="timed repetitions of `time`")
    parser.add_argument("--model", help="Hugging Face folder for `gap`")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of each completion in `gap`")
    options = parser.parse_args(argv)
    if options.part == "gap" and not options.model:
        parser.error("gap needs --model, a Hugging Face folder")
    if options.part == "bytes":
        count_bytes()
    elif options.part == "time":
        measure_time(options.runs)
    else:
        measure_gap(options.model, options.new_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
