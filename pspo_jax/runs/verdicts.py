"""Completions without a verdict: they are counted term by term, and too many of them stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.task import RewardResult

_VALUES = "values/"
"""Prefix of the counts of values that a term has given since the run began."""


class NoVerdictError(Exception):
    """Too many completions could not be verified; the message says how many and why."""


def check(scores: RewardResult, done: int, config: Config, counts: dict[str, int]) -> None:
    """Stop a run whose verifier or whose reward term fails too often, or whose term never has a value.

    Every process of a run comes to the same conclusion, as each has the whole batch.

    Args:
      counts: how many values each term has given since the run began; those of this step are added.
    Raises:
      NoVerdictError: the share of one term is above verifier.max_no_verdict, or a term has not given any value.
    """
    limit = config.verifier.max_no_verdict
    for name, share in shares(scores).items():
        if share > limit:
            what = "have no verdict" if name == "accuracy" else f"have no verdict of {name} (reward.terms)"
            raise NoVerdictError(
                f"stopped in step {done}: {share:.0%} of the completions {what} ({_why(scores, name)}), more than "
                f"verifier.max_no_verdict={limit:g}"
            )
    for name, value in scores.terms.items():
        key = _VALUES + name
        counts[key] = counts.get(key, 0) + int((~np.isnan(value)).sum())
        if not counts[key] and value.size and limit < 1:
            raise NoVerdictError(
                f"stopped in step {done}: {name} (reward.terms) has no value for any of the {value.size} completions "
                f"({_why(scores, name)}); mend it or drop it from reward.terms, or set verifier.max_no_verdict 1 "
                "where it seldom has one"
            )


def check_sign(scores: RewardResult, done: int, config: Config) -> None:
    """Stop a run whose advantages are not defined for its rewards: MaxRL divides by their mean in a group.

    Raises:
      ConfigError: advantage.name=maxrl, and a reward is below 0.
    """
    known = scores.reward[~np.isnan(scores.reward)]
    if config.advantage.name == "maxrl" and (known < 0).any():
        raise ConfigError(
            f"advantage.name=maxrl: needs rewards of at least 0, and a completion of step {done} has "
            f"{float(known.min()):g}; change the reward, or choose advantage.name=group"
        )


def shares(scores: RewardResult) -> dict[str, float]:
    """Share of the completions without a verdict, of accuracy and of each user's function among the terms."""
    found = {"accuracy": np.isnan(scores.verdicts)} | {k: v for k, v in scores.failed.items() if k != "accuracy"}
    return {name: float(missing.mean()) for name, missing in found.items()}


def _why(scores: RewardResult, name: str) -> str:
    reasons = scores.missing.get(name) or scores.reasons
    return "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3)) or "of another process's rows"


def metrics(scores: RewardResult) -> dict[str, float | int]:
    """Metrics of a step's rewards.

    `rewards/no_verdict` is the share of completions without a reward, whatever the cause; `rewards/NAME/no_verdict` is
    the share for which the verifier (`accuracy`) or a function among the terms gave no verdict; mean and std of a term
    are over the completions that have a value. What functions logged is averaged over the completions of this process.
    """
    values: dict[str, float | int] = {"rewards/no_verdict": float(np.isnan(scores.reward).mean())}
    values |= {f"rewards/{name}/no_verdict": share for name, share in shares(scores).items()}
    for name, reward in scores.terms.items():
        known = reward[~np.isnan(reward)]
        values[f"rewards/{name}/mean"] = float(known.mean()) if known.size else float("nan")
        values[f"rewards/{name}/std"] = float(known.std()) if known.size else float("nan")
    return values | {f"logged/{name}": float(np.mean(found)) for name, found in scores.logged.items()}


def lines(missing: Mapping[str, Counter[str]]) -> Iterator[tuple[tuple[str, str], str]]:
    """For each term and each kind of reason for a missing value: the two, and a line that says so.

    A kind is what stands before the first colon, such as the name of an exception: its text may hold each row's values.
    """
    for name, reasons in missing.items():
        kinds: dict[str, list[tuple[int, str]]] = {}
        for reason, n in reasons.items():
            kinds.setdefault(reason.partition(":")[0], []).append((n, reason))
        for kind, found in kinds.items():
            n, example = sum(n for n, _ in found), max(found)[1]
            yield (name, kind), f"{name} has no value for {n} completions: {example}"
