"""How a verifier grades gold answers and wrong ones: the table of docs/tasks.md.

    python scripts/check_gold.py gsm8k_test.jsonl math500.jsonl minerva.jsonl ...

Each gold answer is submitted as \\boxed{gold}. A wrong one is the gold answer with one digit changed or, where there
is no digit, with 1 added (at most 500, of rows with one alternative). Misses are printed.
"""

from __future__ import annotations

import argparse
import random

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.config.schema import TaskConfig
from pspo_jax.data.loading import from_data
from pspo_jax.system.one_line_parser import OneLineParser
from pspo_jax.verifiers.math_answer import ALTERNATIVES
from pspo_jax.verifiers.workers.pool import Pool, Reply, Request


def perturbed(gold: str, rng: random.Random) -> str:
    digits = [i for i, c in enumerate(gold) if c.isdigit()]
    if not digits:
        return gold + "+1"
    i = rng.choice(digits)
    return gold[:i] + rng.choice([d for d in "123456789" if d != gold[i]]) + gold[i + 1 :]


def judged(pool: Pool, pairs: list[tuple[str, str]]) -> list[Reply]:
    """Verdicts of (gold, answer) pairs. Pairs that exceed the deadline are graded once more, alone."""
    requests = [Request("math", {"gold": gold, "answer": "\\boxed{" + answer + "}"}) for gold, answer in pairs]
    replies = pool.submit(requests).result()
    for i, reply in enumerate(replies):
        if reply.score is None:
            replies[i] = pool.submit([requests[i]]).result()[0]
    return replies


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", help="rows with gold answers")
    try:
        check(parser.parse_args().files)
    except ConfigError as error:
        parser.error(str(error))


def check(files: list[str]) -> None:
    """Print a table of the files, then the composition of each of its figures."""
    print("| Data | Gold accepted | Wrong accepted | Wrong without a verdict |\n|---|---|---|---|")
    notes = []
    with Pool(VerifierConfig(workers=2)) as pool:
        for path in files:
            name = path.rpartition("/")[2].removesuffix(".jsonl")
            task = TaskConfig(name="gsm8k" if name.startswith("gsm8k") else "math")
            source = from_data(path, "argument", "test", task)
            rows = [source.convert(record) for record in source.records]
            golds = [row.answer for row in rows if not row.reason]
            alternatives = [gold.split(ALTERNATIVES) for gold in golds]
            own = judged(pool, [(gold, options[0]) for gold, options in zip(golds, alternatives, strict=True)])
            rng = random.Random(0)
            picked = [(g, perturbed(o[0], rng)) for g, o in zip(golds, alternatives, strict=True) if len(o) == 1][:500]
            wrong = judged(pool, picked)
            right = sum(reply.score == 1 for reply in own)
            lies = sum(reply.score == 1 for reply in wrong)
            silent = sum(reply.score is None for reply in wrong)
            print(f"| {name} | {right:,} of {len(golds):,} | {lies} of {len(picked)} | {silent} |", flush=True)
            notes += [f"{name}: row without an answer ({row.reason})" for row in rows if row.reason]
            notes += [f"{name}: gold not accepted: {g!r}" for g, r in zip(golds, own, strict=True) if r.score != 1]
            notes += [f"{name}: accepted {p!r}" for p, r in zip(picked, wrong, strict=True) if r.score == 1]
    print("\n".join(notes))


if __name__ == "__main__":
    main()
