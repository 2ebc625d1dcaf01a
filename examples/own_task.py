"""A task of your own: reverse a word. Run it with `python examples/own_task.py [RUN_FOLDER]`.

The model is a small transformer that begins from random weights. A language model's folder or hub id in model.source
takes its place; then give its transformers tokenizer, with vocab_size=len(tokenizer).
"""

import random
import sys

import pspo_jax as pj

TOKENIZER = pj.CharTokenizer("abcd=$_", vocab_size=8)  # $ ends a completion, _ pads


def examples(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts such as `abd=`, each with its gold answer, `dba`."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcd", k=3)) for _ in range(count)]
    return [(f"{word}=", word[::-1]) for word in words]


def letters_in_place(completions: list[str], answers: list[str]) -> list[float]:
    """The share of letters that stand where they should; 0 for a completion of another length."""
    return [
        sum(a == b for a, b in zip(text, gold, strict=True)) / len(gold) if len(text) == len(gold) else 0.0
        for text, gold in zip(completions, answers, strict=True)
    ]


def main(folder: str, **fields: float | str | bool) -> pj.TrainResult:
    task = pj.own_task("reverse", TOKENIZER, examples(64, seed=0), examples(32, seed=1), letters_in_place, vocab_size=8)
    small = {"model.layers": 1, "model.width": 32, "model.heads": 4, "model.kv_heads": 4, "model.mlp_width": 64}
    settings = {
        "run.dir": folder,
        "run.steps": 60,
        "rollout.prompts": 16,
        "rollout.max_new_tokens": 6,
        "optimizer.learning_rate": 3e-3,
        "log.report": False,
    }
    config = pj.replace(pj.Config(), small | settings | {k.replace("__", "."): v for k, v in fields.items()})
    return pj.train(config, task=task)


if __name__ == "__main__":
    result = main(*sys.argv[1:] or ["runs/own_task"])
    print(f"step {result.step}: {result.scores}")
