"""The language model: what the sampler and the trainer need of it, the built-in transformer, and a user's own model."""

from pspo_jax.policy.architecture import Architecture, built_in
from pspo_jax.policy.base import Adapted, Policy, join
from pspo_jax.policy.own_model import from_logits, from_nnx
from pspo_jax.policy.transformer import transformer

__all__ = ["Adapted", "Architecture", "Policy", "built_in", "from_logits", "from_nnx", "join", "transformer"]
