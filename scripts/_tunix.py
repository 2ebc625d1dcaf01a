"""Tunix as a contender: its sampler, and its GRPO learner with that sampler.

The interpreters of google-tunix and of this package both import it, so its top level needs only the standard library.
It is written for google-tunix 0.1.7.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import _bench
from _bench import Channel, Work

NAME, LEARNER = "Tunix Sampler", "Tunix GRPOLearner"


class Ids:
    """A tokenizer whose words are the ids. Pad and EOS lie outside the vocabulary, so that no row ends early."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def pad_id(self) -> int:
        return self.vocab

    def eos_id(self) -> int:
        return self.vocab + 1


def about() -> dict[str, Any]:
    import importlib.metadata as metadata

    return {"google-tunix": metadata.version("google-tunix"), "jax beside Tunix": metadata.version("jax")}


def model(work: Work) -> Any:
    """Tunix's Llama at the shape of the work, random weights; it computes in the type of its weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig

    s = work.shape
    config = ModelConfig(
        num_layers=s.layers,
        vocab_size=s.vocab,
        embed_dim=s.width,
        hidden_dim=s.mlp_width,
        num_heads=s.heads,
        head_dim=s.head_dim,
        num_kv_heads=s.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    llama = Llama3(config, rngs=nnx.Rngs(0))
    nnx.update(llama, jax.tree.map(lambda x: x.astype(jnp.dtype(work.dtype)), nnx.state(llama)))
    return llama


def texts(work: Work) -> list[str]:
    return [" ".join(map(str, ids)) for ids in _bench.prompt_ids(work)]


def serve_rollout(work: Work) -> None:
    channel = Channel()
    from tunix.generate.sampler import CacheConfig, Sampler

    s, length = work.shape, work.prompt_tokens + work.new_tokens
    sampler = Sampler(model(work), Ids(s.vocab), CacheConfig(length, s.layers, s.kv_heads, s.head_dim))
    # It has no option for samples per prompt; its learner repeats prompts too.
    prompts = [text for text in texts(work) for _ in range(work.group_size)]
    count = 0

    def call() -> dict[str, float]:
        nonlocal count
        count += 1
        start = time.perf_counter()
        out = sampler(
            prompts,
            max_generation_steps=work.new_tokens,
            max_prompt_length=work.prompt_tokens,
            temperature=1.0,
            top_p=1.0,
            seed=count,
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(len(ids) for ids in out.tokens)}

    _bench.serve(channel, call, about())


def even_share(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of even ids in each completion."""
    found = [[int(word) for word in text.split()] for text in completions]
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in found]


def cluster(work: Work, learning_rate: float) -> Any:
    """Actor and sampler with one set of weights on one device; no reference model."""
    import jax
    import numpy as np
    import optax
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.0)),
        eval_every_n_steps=1_000_000,
        max_steps=1_000_000,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=work.new_tokens,
        max_prompt_length=work.prompt_tokens,
        kv_cache_size=work.prompt_tokens + work.new_tokens,
        temperature=1.0,
        top_p=1.0,
    )
    config = ClusterConfig(
        role_to_mesh={role: mesh for role in (Role.ACTOR, Role.ROLLOUT, Role.REFERENCE)},
        rollout_engine="vanilla",
        training_config=training,
        rollout_config=rollout,
    )
    return RLCluster(actor=model(work), tokenizer=Ids(work.shape.vocab), cluster_config=config)


def serve_step(work: Work) -> None:
    """Measure Tunix's own loop. It asks the data set for the next prompts after each step, and waits there."""
    channel = Channel()
    import jax
    import numpy as np
    from flax import nnx
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    parts = cluster(work, 1e-5)
    marks: dict[str, float] = {}
    generate = parts.rollout.generate

    def timed(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        out = generate(*args, **named)
        marks["rollout"] = time.perf_counter() - start
        marks["tokens"] = sum(len(ids) for ids in out.tokens)
        return out

    parts.rollout.generate = timed
    prompts = np.array(texts(work))

    def step() -> dict[str, float]:
        """What the step since marks["start"] took, once its update has been computed."""
        jax.block_until_ready(jax.tree.leaves(nnx.state(parts.actor_trainer.model)))
        seconds = time.perf_counter() - marks["start"]
        rollout = marks["rollout"]
        return {"seconds": seconds, "rollout": rollout, "update": seconds - rollout, "tokens": marks["tokens"]}

    def data() -> Iterator[dict[str, Any]]:
        wanted, first, calls = 1, True, []
        while wanted:
            marks["start"] = time.perf_counter()
            yield {"prompts": prompts}
            calls.append(step())
            if len(calls) == wanted:
                channel.send(**({"about": about()} if first else {"calls": calls}))
                first, calls = False, []
                wanted = channel.wait()

    settings = GRPOConfig(num_generations=work.group_size, beta=0.0, epsilon=0.2, loss_agg_mode="token-mean")
    GRPOLearner(rl_cluster=parts, algo_config=settings, reward_fns=even_share).train(data())
