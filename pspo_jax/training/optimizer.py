"""The optax optimizer that a config describes, and the learning rate of an update."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from pspo_jax.arrays.state import OptState, Params
from pspo_jax.config.schema import Config, OptimizerConfig, SftConfig


def updates_per_step(config: Config) -> int:
    """Number of optimizer updates in a training step."""
    return config.loss.num_iterations * config.loss.minibatches


def schedule(config: OptimizerConfig | SftConfig, updates: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to final_fraction of the peak, or a constant, over `updates` updates in all."""
    peak = config.learning_rate
    if isinstance(config, OptimizerConfig) and config.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(peak / (config.warmup + 1), peak, config.warmup)
    # The ramp does not begin at 0: the first update would change nothing.
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / (config.warmup + 1),
        peak_value=peak,
        warmup_steps=config.warmup,
        decay_steps=max(updates, config.warmup + 1),
        end_value=peak * config.final_fraction,
    )


def adamw(config: OptimizerConfig | SftConfig, updates: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, in float32 whatever type the weights have; only matrices decay (see `decays`).

    Args:
      updates: number of updates that the learning rate's schedule runs over.
    """
    b1, eps = (config.b1, config.eps) if isinstance(config, OptimizerConfig) else (0.9, 1e-8)
    return in_float32(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(
                schedule(config, updates),
                b1=b1,
                b2=config.b2,
                eps=eps,
                weight_decay=config.weight_decay,
                mask=decays,
            ),
        )
    )


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its state, its arithmetic and its updates in float32, whatever type the weights have.

    In bfloat16 a decay of 0.999 is 1, so that a second moment would never decay. `optax.apply_updates` then adds in
    float32 and rounds once, to the weights' type. Applying this function twice is the same as once.
    """

    def init(params: Params) -> OptState:
        return optimizer.init(float32(params))

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        updates, state = optimizer.update(float32(grads), state, float32(params))
        return updates, state

    return optax.GradientTransformation(init, update)


def float32(tree: PyTree) -> PyTree:
    """The tree with floating-point arrays of fewer than 32 bits as float32."""

    def one(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


_NORM = re.compile(r"(\w*norm|ln)(_?[a-z])?(_?\d+)?")
"""Names of norms, such as attn_norm, LayerNorm_0, input_layernorm, ln_1 and ln_f."""
_VECTOR = re.compile(rf"{_NORM.pattern}|(\w*_)?(bias|scale|gamma|beta)")
"""Names of the scales of norms, and of biases."""


def decays(params: Params) -> PyTree:
    """Whether each leaf decays, as a pytree of bools like `params`, which is a mask for optax: only matrices do.

    A leaf with fewer than two dimensions is a norm's scale or a bias. Where layers are stacked, such a leaf has more
    dimensions, so names decide: the leaf's own, or that of the module right above it. Indices, and the attributes in
    which a framework wraps an array, are not names.
    """

    def one(path: tuple[object, ...], x: Array) -> bool:
        found = [str(getattr(key, "key", getattr(key, "name", ""))).lower() for key in path]
        names = [name for name in found if name and not name.isdecimal() and name not in ("value", "raw_value")]
        own, module = (names or [""])[-1], (names[-2:-1] or [""])[0]
        return np.ndim(x) >= 2 and not _VECTOR.fullmatch(own) and not _NORM.fullmatch(module)

    return jax.tree_util.tree_map_with_path(one, params)
