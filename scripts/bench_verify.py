"""Time the verification of completions as long as a reasoning model's, and of completions that hang.

    python scripts/bench_verify.py --rows math500.jsonl [--workers 2] [--json FILE]

Completions are the problem, repeated to 2,000 characters of text with formulas, and an answer: the gold one in half of
them, another row's in the rest. Requests have no key, so that no verdict is reused.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.data.task import json_lines
from pspo_jax.system.one_line_parser import OneLineParser
from pspo_jax.verifiers.math_answer import final_answer
from pspo_jax.verifiers.workers.pool import Pool, Request

HANGING = (
    "$9^{9^{9^{9}}}$",
    "$(x+1)^{100000}$",
    "$123456789^{987654321}$",
    "(" * 60 + "1" + ")" * 60,
    "\\boxed{10000000!}",
    "\\boxed{\\sum_{i=1}^{10^9} i^i}",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{\\binom{10^9}{10^8}}",
)


def completions(rows: list[dict[str, str]], count: int) -> list[tuple[str, str, bool]]:
    """(gold, completion, whether it is correct) for each row."""
    out = []
    for i in range(count):
        row, other = rows[i % len(rows)], rows[(i * 7 + 1 + i // len(rows)) % len(rows)]
        right = i % 2 == 0
        text = (f"Let us see: {row['problem']} " * 50)[:1900]
        answer = row["answer"] if right else other["answer"]
        boxed = "\\boxed{" + answer + "}"
        out.append((row["answer"], f"{text}\nTherefore the answer is ${boxed}$.", right))
    return out


def requests(items: list[tuple[str, str, bool]]) -> list[Request]:
    return [Request("math", {"gold": gold, "answer": final_answer(text)}) for gold, text, _ in items]


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with columns problem and answer, as MATH-500")
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in json_lines(args.rows.read_text(encoding="utf-8"))]
    items = completions(rows, args.count)
    seconds, hang = [], []
    wrong = 0
    for _ in range(args.runs):
        with Pool(VerifierConfig(workers=args.workers, deadline=args.deadline)) as pool:
            pool.submit(requests(items[:8])).result()
            began = time.monotonic()
            replies = pool.submit(requests(items)).result()
            seconds.append(time.monotonic() - began)
            wrong = sum(reply.score != 1 for reply, (_, _, right) in zip(replies, items, strict=True) if right)
    for _ in range(args.runs):
        with Pool(VerifierConfig(workers=4, deadline=args.deadline)) as pool:
            batch = requests(items[:56]) + [
                Request("math", {"gold": "42", "answer": final_answer(text)}) for text in HANGING
            ]
            began = time.monotonic()
            pool.submit(batch).result()
            hang.append(time.monotonic() - began)
    result = {
        "completions": args.count,
        "workers": args.workers,
        "seconds": {"median": sorted(seconds)[len(seconds) // 2], "min": min(seconds), "max": max(seconds)},
        "right ones without reward": wrong,
        "64 with 8 hanging, deadline": args.deadline,
        "hang_seconds": {"median": sorted(hang)[len(hang) // 2], "min": min(hang), "max": max(hang)},
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
