"""pspo_jax: RL post-training of language models with verifiable rewards, in pure JAX."""

from pspo_jax.algorithms import Algorithm, build
from pspo_jax.config import Config, ConfigError, replace
from pspo_jax.optimizer import adamw
from pspo_jax.policy import Architecture, Policy, built_in, from_logits, from_nnx, transformer
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.state import Outcome, Prompts, Rollouts, TrainState
from pspo_jax.step import init_state, make_train_step

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Architecture",
    "Config",
    "ConfigError",
    "Outcome",
    "Policy",
    "Prompts",
    "Rollouts",
    "SamplingParams",
    "TrainState",
    "adamw",
    "build",
    "built_in",
    "from_logits",
    "from_nnx",
    "init_state",
    "make_sampler",
    "make_train_step",
    "replace",
    "transformer",
]
