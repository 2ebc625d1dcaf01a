"""The decoding steps and the stale tokens of carry-over, by a simulation of lengths; nothing is decoded.

    python scripts/simulate_carry.py --mean 0.3 0.1 --budget 2 4 8

Lengths are log-normal, four fifths of their variance between prompts, and cut at the longest. A decoding step computes
one token of every row of a round, so that steps compare runs whose rows are decoded at once.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from _ragged_lengths import BETWEEN_PROMPTS, SIGMA, log_medians


class Simulated(NamedTuple):
    """Means over the steps of a run."""

    rounds: float
    """Rounds of a training step."""
    decoding_steps: float
    """Decoding steps of a training step, as a share of the longest completion."""
    useful: float
    """Share of the decoded tokens that belong to a row."""
    stale: float
    """Share of the trained tokens that an older policy drew."""
    stale_groups: float
    """Share of the trained groups that hold such a token."""
    oldest: float
    """Largest age of a token in steps."""


class Group(NamedTuple):
    """A group that has begun."""

    lengths: np.ndarray
    """Tokens of each completion in the end."""
    began: list[int]
    """Step of each segment."""


def simulate(mean: float, budget: int, prompts: int, group_size: int, longest: int, steps: int) -> Simulated:
    """A run of so many steps; its first tenth does not count."""
    rng = np.random.default_rng(0)
    medians = log_medians(1000, mean * longest, longest)
    within = SIGMA * (1 - BETWEEN_PROMPTS) ** 0.5
    pending: list[Group] = []
    rounds, decoding, useful, stale, stale_groups, oldest = 0, 0, 0.0, 0.0, 0.0, 0
    counted = steps - steps // 10

    def whole(group: Group) -> bool:
        return bool(group.lengths.max() <= budget * len(group.began))

    for step in range(steps):
        counts = step >= steps // 10
        while sum(map(whole, pending)) < prompts:
            rolled = [group for group in pending if not whole(group)]
            while len(rolled) < prompts:
                drawn = np.exp(rng.choice(medians) + within * rng.normal(size=group_size))
                pending.append(Group(np.clip(np.ceil(drawn), 1, longest), []))
                rolled.append(pending[-1])
            tokens = [np.clip(group.lengths - budget * len(group.began), 0, budget) for group in rolled]
            for group in rolled:
                group.began.append(step)
            if counts:
                rounds, decoding = rounds + 1, decoding + int(max(x.max() for x in tokens))
                useful += sum(x.sum() for x in tokens)
        batch = [group for group in pending if whole(group)][:prompts]
        pending = [group for group in pending if not any(group is one for one in batch)]
        if counts:
            ages = [step - np.repeat(group.began, budget)[: int(n)] for group in batch for n in group.lengths]
            stale += sum((x > 0).sum() for x in ages) / sum(len(x) for x in ages)
            stale_groups += sum(group.began[0] < step for group in batch) / prompts
            oldest = max(oldest, *(int(x.max()) for x in ages))
    rows = prompts * group_size
    return Simulated(
        rounds / counted, decoding / counted / longest, useful / decoding / rows, stale / counted,
        stale_groups / counted, oldest,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean", type=float, nargs="+", default=[0.3, 0.1], help="mean length / longest")
    parser.add_argument("--budget", type=int, nargs="+", default=[1, 2, 4, 8], help="longest length / rollout.budget")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a batch (default 32)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default 8)")
    parser.add_argument("--longest", type=int, default=4096, help="longest completion in tokens (default 4096)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    args = parser.parse_args()
    head = (
        "mean length / T",
        "budget",
        "rounds a step",
        "decoding steps / T",
        "useful",
        "stale tokens",
        "stale groups",
    )
    print("|", " | ".join([*head, "oldest"]), "|")
    print("|", " | ".join(["---:"] * (len(head) + 1)), "|")
    for mean in args.mean:
        for parts in args.budget:
            budget = -(-args.longest // parts)
            found = simulate(mean, budget, args.prompts, args.group_size, args.longest, args.steps)
            name = "T" if parts == 1 else f"T/{parts}"
            numbers = [f"{x:.2f}" for x in found[:-1]]
            print("|", " | ".join([f"{mean:g}", name, *numbers, f"{found.oldest:d}"]), "|", flush=True)


if __name__ == "__main__":
    main()
