"""The language model: its contract with the sampler and the trainer, the built-in transformer, and a user's own."""

from pspo_jax.model.architecture import Architecture, built_in
from pspo_jax.model.custom import from_logits, from_nnx
from pspo_jax.model.interface import Model
from pspo_jax.model.transformer import transformer

__all__ = ["Architecture", "Model", "built_in", "from_logits", "from_nnx", "transformer"]
