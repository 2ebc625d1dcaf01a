"""Seconds of a GRPO step of a released model with adapters: this package's training loop beside TRL's, on CPU.

    python scripts/bench_real_trl.py --model weights/smollm2 --peer-python PYTHON_WITH_TRL --out bench.jsonl

Both train SmolLM2-135M-Instruct by the recipe smollm2_135m_grpo: the same weights and questions, 8 prompts x 8
completions of at most 16 tokens at temperature 0.7, LoRA adapters of rank 16 on all seven projections in float32, AdamW
at 3e-4, and the DAPO loss without a KL term. A step is a whole step of `pspo_jax.train` and of `GRPOTrainer`, the
answers' verification included. The rewards differ: this package takes the task's verifiers, and TRL's reward function
accepts an answer that stands anywhere in the completion. TRL's time does not depend on rewards, as it computes all
groups; this package's time depends on how many groups have rewards that differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _bench
from _bench import Channel, Contender
from bench_rollout import our_about, torch_about

if TYPE_CHECKING:
    from pspo_jax.config.schema import Config

OURS, PEER = "pspo_jax", "TRL GRPOTrainer"
RECIPE = Path(__file__).resolve().parents[1] / "pspo_jax" / "recipes" / "smollm2_135m_grpo.yaml"
MANY = 10_000
"""Steps that no measurement reaches."""


@dataclass(frozen=True)
class Step:
    """What a contender trains, as its worker receives it."""

    model: str
    """Folder of the model in Hugging Face's format."""
    rows: int = 64
    """The peer's completions in a forward and backward pass."""
    cache: str | None = None
    """Folder of XLA's persistent compilation cache; None = no cache."""


class Finished(Exception):
    """The parent has asked for no more steps."""


class Turns:
    """Sends the timings of as many steps as the parent asked for, then sleeps until it asks again."""

    def __init__(self, channel: Channel, about: dict[str, Any]) -> None:
        self._channel, self._wanted = channel, 1
        self._about: dict[str, Any] | None = about
        self._calls: list[dict[str, float]] = []

    def add(self, **timings: float) -> bool:
        """Add a step; returns whether the parent has asked for no more of them."""
        self._calls.append(timings)
        if len(self._calls) < self._wanted:
            return False
        message: dict[str, Any] = {"calls": self._calls} if self._about is None else {"about": self._about}
        self._channel.send(**message)
        self._about, self._calls = None, []
        self._wanted = self._channel.wait()
        return not self._wanted


def recipe(model: str, *words: str) -> Config:
    """The config of the recipe with these weights."""
    from pspo_jax.config import command_line

    return command_line.parse(["--config", str(RECIPE), "--model.source", model, *words], "bench", "")


def serve_ours(step: Step) -> None:
    """Measure this package's own loop; a callback sleeps after a step until the parent asks for the next one."""
    channel = Channel()
    import pspo_jax as pj

    turns = Turns(channel, our_about())

    def callback(number: int, metrics: dict[str, float | int]) -> bool:
        timings = {name: float(metrics[f"time/{name}"]) for name in ("rollout", "update")}
        tokens = float(metrics["completions/mean_length"]) * completions
        return turns.add(seconds=float(metrics["step_time"]), tokens=tokens, **timings)

    with tempfile.TemporaryDirectory() as folder:
        words = ["--run.dir", folder, "--run.steps", str(MANY), "--checkpoint.every", str(MANY)]
        config = recipe(step.model, *words, "--log.report", "false", "--task.heldout_prompts", "8")
        completions = config.rollout.prompts * config.rollout.group_size
        pj.train(config, callbacks=[callback])


def answer_stands_in_it(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """TRL reward function: 1 if the gold answer stands in the completion."""
    return [float(gold in text[0]["content"]) for text, gold in zip(completions, answer, strict=True)]


def grpo_config(config: Config, step: Step, folder: str) -> Any:
    from trl import GRPOConfig

    r, completions = config.rollout, config.rollout.prompts * config.rollout.group_size
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=step.rows,
        gradient_accumulation_steps=completions // step.rows,
        num_generations=r.group_size,
        max_completion_length=r.max_new_tokens,
        max_steps=MANY,
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.optimizer.warmup,
        adam_beta2=config.optimizer.b2,
        max_grad_norm=1.0,
        loss_type="dapo",
        epsilon_high=0.28,
        beta=0.0,
        temperature=r.temperature,
        top_p=1.0,
        top_k=0,
        disable_dropout=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def serve_peer(step: Step) -> None:
    """Measure TRL's own loop; a callback sleeps after a step until the parent asks for the next one."""
    channel = Channel()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from pspo_jax.data.synthetic.text_suite import source

    turns = Turns(channel, torch_about("trl", "peft", "accelerate"))
    marks = {"start": 0.0, "rollout": 0.0, "tokens": 0.0}

    class Timer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks["start"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - marks["start"]
            rollout = marks["rollout"]
            if turns.add(seconds=seconds, rollout=rollout, update=seconds - rollout, tokens=marks["tokens"]):
                raise Finished

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            marks["rollout"] = time.perf_counter() - start
            marks["tokens"] = float(sum(len(ids) for ids in out[0]))
            return out

    config = recipe(step.model)
    rows = source(config, config.task.seed, config.task.train_prompts).records
    questions = [
        {"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows.to_list()
    ]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=step.model,
            reward_funcs=answer_stands_in_it,
            args=grpo_config(config, step, folder),
            train_dataset=Dataset.from_list(questions),
            peft_config=LoraConfig(
                r=config.lora.rank, lora_alpha=int(config.lora.alpha), target_modules=targets, task_type="CAUSAL_LM"
            ),
            callbacks=[Timer()],
        )
        try:
            trainer.train()
        except Finished:
            return


def main() -> None:
    parser = _bench.options(__doc__.splitlines()[0], shapes=False)
    parser.add_argument("--model", default="weights/smollm2", help="Hugging Face folder (default weights/smollm2)")
    parser.add_argument(
        "--peer-rows", type=int, nargs="+", default=[64], help="the peer's rows a pass, a contender each (default 64)"
    )
    options: argparse.Namespace = parser.parse_args()
    if not Path(options.model, "config.json").exists():
        parser.error(f"--model {options.model}: holds no config.json; scripts/real_weights.py writes such a folder")
    contenders = [Contender(OURS, "ours", sys.executable, Step(options.model), ours=True)]
    if not _bench.lacks(PEER, options.peer_python, ["torch", "trl", "peft", "datasets", "jax"], "--peer-python"):
        contenders += [
            Contender(PEER, "peer", options.peer_python, Step(options.model, rows), f"({rows} rows a pass)")
            for rows in options.peer_rows
        ]
    group = _bench.compare(__file__, contenders, options)
    lines = []
    for result in group:
        values = {f"{k}_s": result.median(k) for k in ("rollout", "update")}
        tokens_per_s = result.median("tokens") / result.median()
        lines.append(_bench.measurement("real", "SmolLM2-135M, LoRA", result, tokens_per_s=tokens_per_s, **values))
    _bench.emit(lines, options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        import json

        {"ours": serve_ours, "peer": serve_peer}[sys.argv[2]](Step(**json.loads(sys.argv[3])))
    else:
        main()
