"""Supervised fine-tuning before RL (the cold start): the loss is on completions only.

Data comes through grain, and many steps run in one jitted call. Letters: K steps of a call.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from pspo_jax import __version__
from pspo_jax.arrays.images import Images
from pspo_jax.arrays.rows import RowImages
from pspo_jax.arrays.split_params import merge_params
from pspo_jax.arrays.state import OptState, Params
from pspo_jax.config.defaults import flatten
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, PromptConfig
from pspo_jax.data.demonstrations import read_examples, read_text
from pspo_jax.data.image_batches import ImageRoom
from pspo_jax.data.images.prompt_images import PromptImages, joined_images
from pspo_jax.data.task import Demonstrations, Task, pad_rows
from pspo_jax.losses.log_probs import compact_images, completion_log_probs
from pspo_jax.model.interface import ImageTokens, Model
from pspo_jax.system.json_values import Json
from pspo_jax.system.progress import Progress
from pspo_jax.training.optimizer import adamw, in_float32
from pspo_jax.training.step import Jitted

Batch: TypeAlias = dict[str, PyTree]
"""Columns of `Demonstrations` as arrays; `images`, where prompts have any, is an `Images`."""

_MAX_STEPS_A_CALL = 60
"""Largest number of training steps in one jitted call."""


class _Examples:
    """A source for grain: random access over demonstrations."""

    def __init__(self, data: Demonstrations):
        self._data = data

    def __len__(self) -> int:
        return len(self._data.prompts)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        columns = {name: column[i] for name, column in self._data._asdict().items() if name != "images"}
        return columns if self._data.images is None else columns | {"images": np.int64(i)}


def dataset(config: Config, task: Task) -> tuple[grain.MapDataset, PromptImages | None]:
    """Demonstrations by index: those of the task, each used once, or of a JSONL file, reshuffled in each epoch.

    Where there are images, they come beside the data, whose column `images` has their prompts' indices.

    Raises:
      ConfigError: the file has fewer lines than a batch.
    """
    s = config.sft
    if s.data is None:
        blocks = list(task.demonstrations(config.run.seed, s.steps * s.batch))
        prompts, prompt_lengths, completions, completion_lengths = (
            np.concatenate(columns) for columns in zip(*(block[:4] for block in blocks), strict=True)
        )
        of_blocks = [block.images for block in blocks if block.images is not None]
        images = joined_images(of_blocks) if of_blocks else None
        whole = Demonstrations(prompts, prompt_lengths, completions, completion_lengths, images)
        return grain.MapDataset.source(_Examples(whole)), images
    examples = _Examples(read_jsonl(Path(s.data), task, config.rollout.max_new_tokens, config.prompt))
    if len(examples) < s.batch:
        raise ConfigError(f"sft.batch={s.batch}: sft.data={s.data} has only {len(examples)} lines; lower it")
    return grain.MapDataset.source(examples).seed(config.run.seed).shuffle().repeat(), None


def _with_images(
    batch: dict[str, np.ndarray], images: PromptImages | None, room: ImageRoom | None
) -> dict[str, np.ndarray | Images]:
    """A batch of examples with its images in place of their prompts' indices."""
    if images is None:
        return dict(batch)
    assert room is not None
    prompts, lengths = batch["prompts"], batch["prompt_lengths"]
    rows = zip(batch["images"].tolist(), prompts, lengths, strict=True)
    found = [images.of(row, ids[:n].tolist()) for row, ids, n in rows]
    return {**batch, "images": room.laid_out(found, lengths, prompts.shape[1])}


def read_jsonl(path: Path, task: Task, max_completion: int, prompt: PromptConfig | None = None) -> Demonstrations:
    """Tokenised examples of a JSONL file; EOS is added to completions that lack it.

    Args:
      max_completion: largest number of tokens of a completion.
      prompt: for rows of messages, the date and the mode of thinking that the chat template is given.

    Raises:
      ConfigError: an example is empty, too long, or has a token that the model does not know.
    """
    prompts, completions = [], []
    width = task.train.tokens.shape[1]
    examples = read_examples(path, task.tokenizer, task.encode_prompt, task.stop_ids, prompt or PromptConfig())
    for number, example in enumerate(examples, 1):
        prompts.append(example[0])
        completions.append(example[1])
        pairs = (
            ("prompt", prompts[-1], width, "the longest prompt of the task and prompt.max_tokens"),
            ("completion", completions[-1], max_completion, "rollout.max_new_tokens"),
        )
        for name, tokens, limit, field in pairs:
            if not 0 < len(tokens) <= limit:
                raise ConfigError(
                    f"sft.data={path} line {number}: {name} has {len(tokens)} tokens, allowed 1..{limit} ({field})"
                )
            if max(tokens) >= task.vocab_size:
                raise ConfigError(
                    f"sft.data={path} line {number}: {name} has the token {max(tokens)}, and the embedding only "
                    f"{task.vocab_size:,} rows; remove the line"
                )
    pad = task.tokenizer.pad_token_id
    longest = max(map(len, completions))
    return Demonstrations(*pad_rows(prompts, width, pad), *pad_rows(completions, longest, pad))


def sft_loss(model: Model, params: PyTree, batch: Batch, logits_mib: int) -> Float[Array, ""]:
    """Mean negative log-prob of the completions' tokens, in nats."""
    prompts, completions = batch["prompts"], batch["completions"]
    log_probs, _ = completion_log_probs(
        model,
        params,
        prompts,
        batch["prompt_lengths"],
        completions,
        logits_mib=logits_mib,
        images=_image_tokens(model, params, batch.get("images"), completions.shape[1]),
    )
    mask = jnp.arange(log_probs.shape[1]) < batch["completion_lengths"][:, None]
    return -jnp.where(mask, log_probs, 0).sum() / jnp.maximum(mask.sum(), 1)


def _image_tokens(model: Model, params: PyTree, images: Images | None, t: int) -> ImageTokens | None:
    """The tokens of images in rows whose completions have t tokens; None = all tokens are text."""
    if images is None:
        return None
    assert model.encode_images is not None
    rows = RowImages(
        prompt=jnp.arange(images.delta.shape[0]), unit=images.unit, positions=images.positions, delta=images.delta
    )
    return compact_images(rows, model.encode_images(params, images), t)


class SftSteps(Jitted, Protocol):
    """Several supervised steps in one jitted call; see `make_sft_steps`."""

    def __call__(
        self, params: Params, opt_state: OptState, batches: Batch, frozen: Params | None = None, /
    ) -> tuple[Params, OptState, Float[Array, "K"]]:
        """The weights and the optimizer's state after the steps, and the loss of each step, in nats per token."""
        ...


def make_sft_steps(
    model: Model, optimizer: optax.GradientTransformation, logits_mib: int, shardings: PyTree = None
) -> SftSteps:
    """`steps(params, opt_state, batches [K, ...], frozen=None) -> (params, opt_state, losses [K])`, jitted: K steps.

    It donates params and opt_state.
    """

    def steps(
        params: Params, opt_state: OptState, batches: Batch, frozen: Params | None = None
    ) -> tuple[Params, OptState, Float[Array, "K"]]:
        def one(carry: tuple[Params, OptState], batch: Batch) -> tuple[tuple[Params, OptState], Float[Array, ""]]:
            params, opt_state = carry
            loss, grads = jax.value_and_grad(lambda p: sft_loss(model, merge_params(p, frozen), batch, logits_mib))(
                params
            )
            updates, opt_state = in_float32(optimizer).update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(one, (params, opt_state), batches)
        return params, opt_state, losses

    return jax.jit(steps, donate_argnums=(0, 1), out_shardings=shardings)


class Kept(Protocol):
    """The place where a cold start that was stopped is kept."""

    def load(self, template: PyTree) -> tuple[PyTree, int]:
        """Weights and optimizer state with the template's structure, and how many calls of the steps led to them."""

    def save(self, tree: PyTree, calls: int) -> None:
        """Keep weights and optimizer state after this many calls of the jitted steps."""


def cold_start(
    config: Config,
    task: Task,
    model: Model,
    params: Params,
    progress: Progress,
    stop: Callable[[], bool],
    frozen: Params | None = None,
    kept: Kept | None = None,
    room: ImageRoom | None = None,
) -> Params | None:
    """`params` (donated) after sft.steps of training on top of `frozen`; None if `stop()` became true on the way.

    With `kept`, weights and optimizer state are then saved, and the next call continues from them, equal to the bit to
    a run that was not stopped.

    Args:
      room: room for the images of a batch; None = no prompt has any.
    Raises:
      FloatingPointError: the loss is not finite.
    """
    s = config.sft
    per_call = max(k for k in range(1, _MAX_STEPS_A_CALL + 1) if s.steps % k == 0)
    optimizer = adamw(s, s.steps)
    source, images = dataset(config, task)
    batches = source.batch(s.batch * per_call)
    steps = make_sft_steps(model, optimizer, config.loss.logits_mib)
    opt_state = jax.jit(optimizer.init)(params)
    tree, begun = {"params": params, "opt_state": opt_state}, 0
    if kept is not None:
        tree, begun = kept.load(tree)
    params, opt_state = tree["params"], tree["opt_state"]
    del tree
    with progress.phase("cold start", s.steps, begun * per_call) as bar:
        for i in range(begun, s.steps // per_call):
            batch = _with_images(batches[i], images, room)
            block = jax.tree.map(lambda v: v.reshape(per_call, s.batch, *v.shape[1:]), batch)
            params, opt_state, losses = steps(params, opt_state, block, frozen)
            loss = float(losses.mean())
            if not math.isfinite(loss):
                raise FloatingPointError(f"cold start: loss {loss} at step {i * per_call}; lower sft.learning_rate")
            bar(per_call, f"loss {loss:.4f}")
            if stop() and (i + 1) * per_call < s.steps:
                if kept is not None:
                    kept.save({"params": params, "opt_state": opt_state}, i + 1)
                return None
    return params


_TRAINING_PROMPTS = ("task.train_prompts", "task.strata", "task.wrong_labels")
"""Fields that change a generated task's training prompts; its held-out prompts are there by their contents."""


def settings(config: Config, task: Task, source: str | None = None) -> dict[str, Json]:
    """The settings that decide the result of a cold start.

    Data, tokenizer and checkpoint are there by their contents, and not by their places.

    Args:
      source: fingerprint of the checkpoint that the cold start begins from; None = there is none.
    """
    stages = ("model.", "lora.", "prompt.", "sft.", "task.")
    places = ("task.train_data", "task.heldout_data", "model.source", "model.revision", "model.tokenizer")
    free = ("sft.share", "task.allow_change", "task.cache", "prompt.date", *places)
    flat = flatten(config)
    fields: dict[str, Json] = {k: v for k, v in flat.items() if k.startswith(stages) and k not in free}
    for name in ("run.seed", "rollout.prompt_bucket", "rollout.max_new_tokens", "loss.logits_mib"):
        fields[name] = flat[name]
    fields["version"] = __version__
    fields["train"] = task.train.fingerprint()
    fields["heldout"] = task.heldout.fingerprint()
    fields["source"] = source
    if config.task.name in ("arithmetic", "segments", "countdown"):
        # Demonstrations are fresh problems without the held-out ones, so the training prompts decide nothing.
        fields = {k: v for k, v in fields.items() if k not in ("train", *_TRAINING_PROMPTS)}
    if config.sft.data is not None:
        # Only the rows of the file are learnt, so the task decides nothing.
        fields = {k: v for k, v in fields.items() if not k.startswith("task.") and k not in ("heldout", "train")}
        fields["sft.data"] = hashlib.sha256(read_text(Path(config.sft.data)).encode()).hexdigest()
    return fields
