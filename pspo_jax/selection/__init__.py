"""Which prompts next. A selector is pure functions over its own per-prompt state.

What makes one differ from another is a `Scorer`; a new one is a file and a line. `make` adds what all share: visits,
cooldown, quotas, exploration, and a choice that does not pass over all prompts.
"""

from collections.abc import Callable
from functools import partial

from pspo_jax.config.plugins import load_plugin
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.draw import select
from pspo_jax.selection.engine.longest_first import longest_first
from pspo_jax.selection.engine.selector import SelectorState, engine, follow, init, observe
from pspo_jax.selection.engine.summary import batch_metrics, summary, to_table
from pspo_jax.selection.greso import greso
from pspo_jax.selection.interface import (
    PromptMetadata,
    PromptStats,
    Ranked,
    Scorer,
    Selector,
    SelectorContext,
    VisitUpdate,
)
from pspo_jax.selection.pools import curriculum, difficulty_pools
from pspo_jax.selection.posterior import mopps, posterior_mixed, spo
from pspo_jax.selection.pps import pps
from pspo_jax.selection.prioritized_replay import prioritized_replay
from pspo_jax.selection.uniform import uniform

SCORERS: dict[str, Callable[[SelectionConfig, ForgettingConfig, SelectorContext], Scorer]] = {
    "uniform": uniform,
    "pps": pps,
    "prioritized_replay": prioritized_replay,
    "mopps": mopps,
    "posterior_mixed": posterior_mixed,
    "spo": spo,
    "greso": greso,
    "difficulty_pools": difficulty_pools,
    "curriculum": curriculum,
}


def draws_by_weight(config: SelectionConfig) -> bool:
    """Whether the selector that `config.name` names draws in proportion to weights."""
    assert config.name is not None
    return _maker(config.name)(config, ForgettingConfig(mode="fixed"), SelectorContext(1, 2, 1, 0)).mode == "draw"


def make(scorer: Scorer, config: SelectionConfig, sizes: SelectorContext) -> Selector:
    """The selector of a scorer, with the options that all selectors share.

    Raises:
      ConfigError: selection.quotas names a task that is not there.
    """
    e = engine(scorer, config, sizes)
    return Selector(
        init=partial(init, e),
        select=partial(select, e),
        observe=partial(observe, e),
        follow=partial(follow, e),
        batch_metrics=partial(batch_metrics, e),
        summary=partial(summary, e),
        to_table=partial(to_table, e),
    )


def selector(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Selector:
    """The selector that `config.name` names."""
    assert config.name is not None
    return make(_maker(config.name)(config, forgetting, sizes), config, sizes)


def _maker(name: str) -> Callable[[SelectionConfig, ForgettingConfig, SelectorContext], Scorer]:
    return load_plugin("selection.name", name) if name not in SCORERS else SCORERS[name]


__all__ = [
    "SCORERS",
    "PromptMetadata",
    "PromptStats",
    "Ranked",
    "Scorer",
    "Selector",
    "SelectorContext",
    "SelectorState",
    "VisitUpdate",
    "draws_by_weight",
    "longest_first",
    "make",
    "selector",
]
