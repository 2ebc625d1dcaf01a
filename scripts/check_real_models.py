"""Compare a checkpoint here with transformers and torch on the same prompts: logits, greedy tokens, an evaluation.

    python scripts/check_real_models.py logits weights/smollm2 --rows gsm8k_test.jsonl --bfloat16
    python -m pspo_jax.evaluate --model weights/smollm2 --benchmarks gsm8k --data gsm8k=gsm8k_test.jsonl --limit 48 \\
      --temperature 0 --max-new-tokens 256 --out eval/smollm2
    python scripts/check_real_models.py evaluation weights/smollm2 --results eval/smollm2/smollm2/gsm8k.jsonl

`logits` computes the logits of the prompts, and `--new-tokens` greedy tokens of each, in float32.
`evaluation` completes the prompts of an evaluation's file with transformers' `generate` and judges both completions
with the same verifier. Both exit with code 1 if anything that should be equal differs. `--question`
is the text around a question for a base model; without it, the tokenizer's chat template is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _transformers import Answer, answers, greedy, load
from jaxtyping import Array, Float, PyTree

from pspo_jax.arrays.state import Prompts
from pspo_jax.config.command_line import parse
from pspo_jax.config.schema import Config
from pspo_jax.data.task import json_lines
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.model.huggingface.load import load_params
from pspo_jax.model.interface import Model
from pspo_jax.model.transformer import transformer
from pspo_jax.model.weights import table
from pspo_jax.rollout.sampler import make_sampler
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.system.one_line_parser import OneLineParser
from pspo_jax.training.architectures import architecture_for
from pspo_jax.verifiers.math_answer import final_answer, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE = 1e-4
"""Largest difference of two logits in float32 that counts as rounding, as a share of the largest logit."""


class Loaded(NamedTuple):
    """A checkpoint in this package."""

    model: Model
    params: PyTree
    tokenizer: TextTokenizer
    config: Config


class Gap(NamedTuple):
    """Differences of two sets of logits of the same tokens, over all positions of all prompts."""

    largest: float
    mean: float
    best: float
    """Share of positions with the same most probable token."""


def config_of(folder: Path, dtype: str, question: str | None) -> Config:
    """The config of a checkpoint; `question` is the text around a question, None = the chat template."""
    words = ["--task.name=countdown", f"--model.source={folder}", f"--model.compute_dtype={dtype}"]
    words += [] if question is None else ["--prompt.template=none", f"--prompt.question={question}"]
    return parse(words, "check_real_models", "")


def load_here(config: Config) -> Loaded:
    """The checkpoint of a config on one device."""
    source, tokenizer, architecture = architecture_for(config)
    assert source is not None and isinstance(tokenizer, TextTokenizer)
    model = transformer(architecture)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = params_shardings(make_mesh(config, architecture), shapes, model.axes)
    return Loaded(
        model, load_params(source, table(architecture), shardings, architecture.param_dtype), tokenizer, config
    )


def logits_here(loaded: Loaded, prompts: Sequence[Sequence[int]]) -> Iterator[Float[np.ndarray, "P V"]]:
    """The logits of each prompt, one after the other, since all of them together need gigabytes."""
    compute = jax.jit(lambda params, tokens: loaded.model.logits(params, loaded.model.hidden(params, tokens)))
    width = max(map(len, prompts))
    for prompt in prompts:  # padding on the right changes no logit before it
        tokens = np.pad(np.array([prompt], np.int32), ((0, 0), (0, width - len(prompt))))
        yield np.asarray(compute(loaded.params, tokens), np.float32)[0, : len(prompt)]


def logits_there(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Iterator[Float[np.ndarray, "P V"]]:
    """The logits of each prompt by transformers."""
    import torch

    for prompt in prompts:
        with torch.no_grad():
            yield model(torch.tensor([prompt])).logits[0].float().numpy()


def gap(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[Gap, float]:
    """The differences of pairs of logits, and the largest logit of the first members."""
    largest = total = places = count = same = 0.0
    scale = 0.0
    for a, b in pairs:
        difference = np.abs(a - b)
        largest, scale = max(largest, float(difference.max())), max(scale, float(np.abs(a).max()))
        total, count = total + float(difference.sum(dtype=np.float64)), count + difference.size
        same, places = same + int((a.argmax(-1) == b.argmax(-1)).sum()), places + len(a)
    return Gap(largest, total / count, same / places), scale


def greedy_here(loaded: Loaded, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """`new_tokens` greedy tokens of each prompt; a stop token does not end a completion."""
    width = max(map(len, prompts))
    tokens = np.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    batch = Prompts(jnp.arange(len(prompts)), jnp.asarray(tokens), jnp.asarray(lengths), jnp.ones(len(prompts)))
    settings = SamplingParams(0.0, 1.0, 0, jnp.array([-1]), new_tokens)
    sample = make_sampler(loaded.model, 1, new_tokens, loaded.tokenizer.pad_token_id)
    made: Array = sample(loaded.params, batch, jax.random.key(0), settings).tokens
    return np.asarray(made)[:, 0].tolist()


def check_logits(args: argparse.Namespace) -> int:
    """Print the lines of `logits`; 1 if logits differ by more than rounding, or a greedy token differs."""
    rows = [json.loads(line) for line in json_lines(args.rows.read_text(encoding="utf-8"))][: args.prompts]
    loaded = load_here(config_of(args.folder, "float32", args.question))
    prompts = [loaded.tokenizer.prompt(row[args.column], loaded.config.prompt) for row in rows]
    lengths = [len(prompt) for prompt in prompts]
    theirs, tokenizer = load(args.folder)
    same_ids = [tokenizer.encode(loaded.tokenizer.decode(p), add_special_tokens=False) == p for p in prompts]
    full, scale = gap(zip(logits_here(loaded, prompts), logits_there(theirs, prompts), strict=True))
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens; largest logit {scale:.1f}")
    print(f"prompts with equal ids: {sum(same_ids)} of {len(prompts)}")
    print_gap("float32: here and transformers", full)
    made = greedy_here(loaded, prompts, args.new_tokens)
    their_made = greedy(theirs, prompts, args.new_tokens, [], loaded.tokenizer.pad_token_id)
    equal = sum(a == b for a, b in zip(made, their_made, strict=True))
    print(f"prompts whose {args.new_tokens} greedy tokens are equal: {equal} of {len(prompts)}", flush=True)
    if args.bfloat16:
        print_bfloat16(args, loaded, theirs, prompts)
    return int(full.largest > CLOSE * scale or equal < len(prompts) or not all(same_ids))


def print_bfloat16(
    args: argparse.Namespace, loaded: Loaded, theirs: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> None:
    """Print how far bfloat16 is from float32, here and in transformers."""
    half = load_here(config_of(args.folder, "bfloat16", args.question))
    pairs = zip(logits_here(loaded, prompts), logits_here(half, prompts), strict=True)
    print_gap("here: float32 and bfloat16", gap(pairs)[0])
    del half
    their_half, _ = load(args.folder, "bfloat16")
    pairs = zip(logits_there(theirs, prompts), logits_there(their_half, prompts), strict=True)
    print_gap("transformers: float32 and bfloat16", gap(pairs)[0])


def print_gap(name: str, found: Gap) -> None:
    """Print what was compared and how far it differs."""
    print(
        f"{name}: logits differ by {found.largest:.2e} at most and {found.mean:.2e} on average; the most probable "
        f"token is the same at {found.best:.2%} of positions",
        flush=True,
    )


def verdict(answer: Answer, ends: Sequence[str]) -> float | None:
    """The verifier's score of transformers' completion, without the tokens that ended it."""
    text = answer.there
    for end in ends:
        text = text.removesuffix(end)
    found = final_answer(text)
    return 0.0 if found is None else score(answer.gold, found)[0]


def check_evaluation(args: argparse.Namespace) -> int:
    """Print the comparison of `evaluation`; 1 if a text or a verdict differs."""
    settings = json.loads((args.results.parents[1] / "settings.json").read_text(encoding="utf-8"))
    if settings["temperature"] != 0:
        print(f"error: --results {args.results}: was not sampled greedily; use --temperature 0", file=sys.stderr)
        return 2
    words = ["--task.name=countdown", f"--model.source={args.folder}", f"--rollout.stop={args.stop}"]
    config = parse(words, "check_real_models", "")
    prompt = dataclasses.replace(config.prompt, **settings["prompt"])
    _, tokenizer, _ = architecture_for(dataclasses.replace(config, prompt=prompt))
    assert isinstance(tokenizer, TextTokenizer)
    found = answers(args.folder, args.results, settings["max_new_tokens"], tokenizer.stop_ids)
    ends = [tokenizer.decode([i]) for i in tokenizer.stop_ids]
    verdicts = [verdict(answer, ends) for answer in found]
    texts = sum(answer.here == answer.there for answer in found)
    same = sum(answer.right == there for answer, there in zip(found, verdicts, strict=True))
    print(f"accuracy here {np.mean([answer.right or 0 for answer in found]):.4f}, ", end="")
    print(f"with transformers {np.mean([there or 0 for there in verdicts]):.4f}, {len(found)} problems")
    print(f"equal texts: {texts} of {len(found)}; equal verdicts: {same} of {len(found)}")
    for answer, there in zip(found, verdicts, strict=True):
        if answer.here != answer.there:
            print(
                f"problem {answer.problem}: verdicts {answer.right} and {there}, texts differ from character "
                f"{first_difference(answer.here, answer.there)} of {len(answer.here)} on"
            )
    return int(texts < len(found) or same < len(found))


def first_difference(a: str, b: str) -> int:
    """The index of the first character at which two texts differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    logits = commands.add_parser("logits", help="logits and greedy tokens of prompts")
    logits.add_argument("folder", type=Path, help="checkpoint in Hugging Face's format")
    logits.add_argument("--rows", type=Path, required=True, help="JSONL with questions")
    logits.add_argument("--column", default="question", help="column of the question (default question)")
    logits.add_argument("--question", help="text around a question, with {question} in its place; default: chat")
    logits.add_argument(
        "--prompts", type=int, default=20, help="number of rows that are used, from the first (default 20)"
    )
    logits.add_argument("--new-tokens", type=int, default=64, help="greedy tokens of each prompt (default 64)")
    logits.add_argument("--bfloat16", action="store_true", help="compare bfloat16 with float32 too; slow on most CPUs")
    evaluation = commands.add_parser("evaluation", help="completions and verdicts of an evaluation")
    evaluation.add_argument("folder", type=Path, help="checkpoint in Hugging Face's format")
    evaluation.add_argument("--results", type=Path, required=True, help="JSONL of an evaluation, problem by problem")
    evaluation.add_argument("--stop", default="", help="rollout.stop of the evaluation")
    args = parser.parse_args(argv)
    return check_logits(args) if args.command == "logits" else check_evaluation(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
