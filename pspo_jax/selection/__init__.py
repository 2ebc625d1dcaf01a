"""Which prompts are rolled out next. A selector is a set of pure functions over its own per-prompt state.

A `Scorer` is what distinguishes one selector from another. `make` adds what all selectors have in common: visits,
cooldown, quotas, exploration, and a choice that does not pass over all prompts. A user's own scorer needs no edit here:
`selection.name` takes module:function, see docs/extending/selector.md.
"""

from collections.abc import Callable
from functools import partial

from pspo_jax.config.plugins import load_plugin
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.draw import select
from pspo_jax.selection.engine.longest_first import longest_first
from pspo_jax.selection.engine.selector import LOWEST_SCORE, SelectorState, follow, init, make_engine, observe
from pspo_jax.selection.engine.summary import batch_metrics, outcome_metrics, summary, to_table
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

ScorerFactory = Callable[[SelectionConfig, ForgettingConfig, SelectorContext], Scorer]
"""The function that `selection.name` names."""

SCORERS: dict[str, ScorerFactory] = {
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
    """Whether the selector that `config.name` names draws prompts in proportion to weights."""
    assert config.name is not None
    scorer = _factory(config.name)(config, ForgettingConfig(mode="fixed"), SelectorContext(1, 2, 1, 0))
    return scorer.mode == "draw"


def make(scorer: Scorer, config: SelectionConfig, context: SelectorContext) -> Selector:
    """The selector of a scorer, with the options that all selectors share.

    Raises:
      ConfigError: selection.quotas name a task that the run does not have.
    """
    engine = make_engine(scorer, config, context)
    return Selector(
        init=partial(init, engine),
        select=partial(select, engine),
        observe=partial(observe, engine),
        follow=partial(follow, engine),
        batch_metrics=partial(batch_metrics, engine),
        outcome_metrics=partial(outcome_metrics, engine),
        summary=partial(summary, engine),
        to_table=partial(to_table, engine),
    )


def selector(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Selector:
    """The selector that `config.name` names.

    Raises:
      ConfigError: there is no such selector, or selection.quotas name a task that the run does not have.
    """
    assert config.name is not None
    return make(_factory(config.name)(config, forgetting, context), config, context)


def _factory(name: str) -> ScorerFactory:
    return load_plugin("selection.name", name) if name not in SCORERS else SCORERS[name]


__all__ = [
    "LOWEST_SCORE",
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
