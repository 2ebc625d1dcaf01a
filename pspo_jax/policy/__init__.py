"""The language model: what the sampler and the trainer need of it, the built-in transformer, and a user's own model."""

from pspo_jax.policy.adapter import from_logits, from_nnx
from pspo_jax.policy.base import Policy
from pspo_jax.policy.transformer import Architecture, transformer

__all__ = ["Architecture", "Policy", "from_logits", "from_nnx", "transformer"]
