"""pspo_jax: RL post-training of language models with verifiable rewards, in pure JAX.

Names are imported on first use: verifier workers import this package and must never start JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pspo_jax.arrays.state import Prompts, RolloutOutcome, Rollouts, TrainState
    from pspo_jax.config.defaults import replace
    from pspo_jax.config.fields import ConfigError
    from pspo_jax.config.schema import Config
    from pspo_jax.config.validation import validate
    from pspo_jax.data.char_tokenizer import CharTokenizer
    from pspo_jax.data.task import CompletionBatch, PromptDataset, RewardFn, RewardResult, Task, Tokenizer
    from pspo_jax.model import Architecture, Model, built_in, from_logits, from_nnx, transformer
    from pspo_jax.rewards.own_task import RewardFunction, function_reward, own_task
    from pspo_jax.rollout import SamplingParams, make_sampler
    from pspo_jax.runs.verdicts import NoVerdictError
    from pspo_jax.selection import PromptMetadata, Scorer, Selector, SelectorContext
    from pspo_jax.system.storage import StorageError
    from pspo_jax.training.algorithm import Algorithm, build
    from pspo_jax.training.loop import train
    from pspo_jax.training.optimizer import adamw
    from pspo_jax.training.prompt_features import prompt_features
    from pspo_jax.training.run_end import Callback, NotFiniteError, TrainResult
    from pspo_jax.training.step import init_state, make_collect, make_train_step, make_update

__version__ = "0.1.0"

_HOMES = {
    "training.algorithm": ("Algorithm", "build"),
    "training.loop": ("train",),
    "training.run_end": ("Callback", "NotFiniteError", "TrainResult"),
    "data.task": ("CompletionBatch", "PromptDataset", "RewardFn", "RewardResult", "Task", "Tokenizer"),
    "rewards.own_task": ("RewardFunction", "function_reward", "own_task"),
    "runs.verdicts": ("NoVerdictError",),
    "system.storage": ("StorageError",),
    "data.char_tokenizer": ("CharTokenizer",),
    "config.defaults": ("replace",),
    "config.fields": ("ConfigError",),
    "config.schema": ("Config",),
    "training.optimizer": ("adamw",),
    "training.prompt_features": ("prompt_features",),
    "model": ("Architecture", "Model", "built_in", "from_logits", "from_nnx", "transformer"),
    "rollout": ("SamplingParams", "make_sampler"),
    "selection": ("PromptMetadata", "Scorer", "Selector", "SelectorContext"),
    "arrays.state": ("RolloutOutcome", "Prompts", "Rollouts", "TrainState"),
    "training.step": ("init_state", "make_collect", "make_train_step", "make_update"),
    "config.validation": ("validate",),
}

__all__ = [
    "Algorithm",
    "Architecture",
    "Callback",
    "CharTokenizer",
    "CompletionBatch",
    "Config",
    "ConfigError",
    "Model",
    "NoVerdictError",
    "NotFiniteError",
    "PromptDataset",
    "PromptMetadata",
    "Prompts",
    "RewardFn",
    "RewardFunction",
    "RewardResult",
    "RolloutOutcome",
    "Rollouts",
    "SamplingParams",
    "Scorer",
    "Selector",
    "SelectorContext",
    "StorageError",
    "Task",
    "Tokenizer",
    "TrainResult",
    "TrainState",
    "adamw",
    "build",
    "built_in",
    "from_logits",
    "from_nnx",
    "function_reward",
    "init_state",
    "make_collect",
    "make_sampler",
    "make_train_step",
    "make_update",
    "own_task",
    "prompt_features",
    "replace",
    "train",
    "transformer",
    "validate",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"pspo_jax.{module}"), name)
    raise AttributeError(f"module 'pspo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
