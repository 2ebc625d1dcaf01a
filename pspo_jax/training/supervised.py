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
from pspo_jax.arrays.images import ImageWindows
from pspo_jax.arrays.rows import RowImages
from pspo_jax.arrays.split_params import merge_params
from pspo_jax.arrays.state import OptState, Params
from pspo_jax.config.defaults import flatten
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, PromptConfig, logits_mib
from pspo_jax.data.demonstrations import example_images, example_patches, read_examples, read_text
from pspo_jax.data.image_batches import ImageRoom
from pspo_jax.data.images.cache import PatchCache
from pspo_jax.data.images.prompt_images import PromptImages, joined_images
from pspo_jax.data.task import Demonstrations, Task, pad_rows
from pspo_jax.losses.log_probs import compact_images, completion_log_probs
from pspo_jax.model.interface import ImageTokens, Model
from pspo_jax.system.json_values import Json
from pspo_jax.system.progress import Progress
from pspo_jax.training.optimizer import adamw, in_float32
from pspo_jax.training.splitting import encoded
from pspo_jax.training.step import Jitted

Batch: TypeAlias = dict[str, PyTree]
"""Columns of `Demonstrations` as arrays; `images`, where prompts have any, is an `ImageWindows`."""

_MAX_STEPS_A_CALL = 60
"""Largest number of training steps in one jitted call."""
_MAX_PATCHES_A_CALL = 2**28
"""Largest size of the patches of images in one jitted call of several steps, in bytes."""
_ENCODED_AT_ONCE = 2**20
"""Largest size of the patches of a batch, in bytes, whose images are all encoded at the same time."""


class _Examples:
    """A source for grain: random access over demonstrations."""

    def __init__(self, data: Demonstrations):
        self._data = data

    def __len__(self) -> int:
        return len(self._data.prompts)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        columns = {name: column[i] for name, column in self._data._asdict().items() if name != "images"}
        return columns if self._data.images is None else columns | {"images": np.int64(i)}


def dataset(
    config: Config, task: Task, examples: Demonstrations | None = None
) -> tuple[grain.MapDataset, PromptImages | None]:
    """Demonstrations by index: those of the task, each used once, or of a JSONL file, reshuffled in each epoch.

    Where there are images, they come beside the data, whose column `images` has their prompts' indices.

    Args:
      examples: those of the file; None = the task's.
    """
    s = config.sft
    if examples is None:
        blocks = list(task.demonstrations(config.run.seed, s.steps * s.batch))
        prompts, prompt_lengths, completions, completion_lengths = (
            np.concatenate(columns) for columns in zip(*(block[:4] for block in blocks), strict=True)
        )
        of_blocks = [block.images for block in blocks if block.images is not None]
        images = joined_images(of_blocks) if of_blocks else None
        whole = Demonstrations(prompts, prompt_lengths, completions, completion_lengths, images)
        return grain.MapDataset.source(_Examples(whole)), images
    shuffled = grain.MapDataset.source(_Examples(examples)).seed(config.run.seed).shuffle()
    return shuffled.repeat(), examples.images


def _with_images(
    batch: dict[str, np.ndarray], images: PromptImages | None, room: ImageRoom | None
) -> dict[str, np.ndarray | ImageWindows]:
    """A batch of examples with its images in place of their prompts' indices."""
    if images is None:
        return dict(batch)
    assert room is not None
    prompts, lengths = batch["prompts"], batch["prompt_lengths"]
    rows = zip(batch["images"].tolist(), prompts, lengths, strict=True)
    found = [images.of(row, ids[:n].tolist()) for row, ids, n in rows]
    return {**batch, "images": room.laid_out(found, lengths, prompts.shape[1])}


def file_examples(config: Config, task: Task) -> Demonstrations | None:
    """The examples of sft.data, whose images are decoded; None = the cold start has the task's own, or there is none.

    Raises:
      ConfigError: a line of the file is refused, or it has fewer lines than a batch.
    """
    s = config.sft
    if not s.steps or s.data is None:
        return None
    patches = example_patches(config, task.tokenizer)
    examples = read_jsonl(Path(s.data), task, config.rollout.max_new_tokens, config.prompt, patches)
    if len(examples.prompts) < s.batch:
        raise ConfigError(f"sft.batch={s.batch}: sft.data={s.data} has only {len(examples.prompts)} lines; lower it")
    return examples


def read_jsonl(
    path: Path,
    task: Task,
    max_completion: int,
    prompt: PromptConfig | None = None,
    patches: PatchCache | None = None,
) -> Demonstrations:
    """Tokenised examples of a JSONL file; EOS is added to completions that lack it.

    Args:
      max_completion: largest number of tokens of a completion.
      prompt: for rows of messages, the date and the mode of thinking that the chat template is given.
      patches: the cache of the images' patches; None = the model reads text alone.

    Raises:
      ConfigError: an example is empty, too long, has a token that the model does not know, or is refused.
    """
    width = task.train.tokens.shape[1]
    examples = read_examples(path, task.tokenizer, task.encode_prompt, task.stop_ids, prompt or PromptConfig(), patches)
    images = example_images(examples, task.tokenizer, patches)
    of_images = np.zeros(len(examples), np.int64) if images is None else images.tokens()
    for number, example in enumerate(examples, 1):
        share = f", {of_images[number - 1]} of them for images" if of_images[number - 1] else ""
        pairs = (
            ("prompt", example.prompt, width, share, "the longest prompt of the task and prompt.max_tokens"),
            ("completion", example.completion, max_completion, "", "rollout.max_new_tokens"),
        )
        for name, tokens, limit, share, field in pairs:
            if not 0 < len(tokens) <= limit:
                raise ConfigError(
                    f"sft.data={path} line {number}: {name} has {len(tokens)} tokens{share}, allowed 1..{limit} "
                    f"({field})"
                )
            if max(tokens) >= task.vocab_size:
                raise ConfigError(
                    f"sft.data={path} line {number}: {name} has the token {max(tokens)}, and the embedding only "
                    f"{task.vocab_size:,} rows; remove the line"
                )
    pad = task.tokenizer.pad_token_id
    completions = [example.completion for example in examples]
    return Demonstrations(
        *pad_rows([example.prompt for example in examples], width, pad),
        *pad_rows(completions, max(map(len, completions)), pad),
        images,
    )


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


def _image_tokens(model: Model, params: PyTree, images: ImageWindows | None, t: int) -> ImageTokens | None:
    """The tokens of images in rows whose completions have t tokens; None = all tokens are text."""
    if images is None:
        return None
    rows = RowImages(
        prompt=jnp.arange(images.delta.shape[0]), unit=images.unit, positions=images.positions, delta=images.delta
    )
    if model.encode_images is not None and images.patches.size <= _ENCODED_AT_ONCE:
        return compact_images(rows, model.encode_images(params, images), t)
    return compact_images(rows, encoded(model, params, images), t)


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
    examples: Demonstrations | None = None,
) -> Params | None:
    """`params` (donated) after sft.steps of training on top of `frozen`; None if `stop()` became true on the way.

    With `kept`, weights and optimizer state are then saved, and the next call continues from them, equal to the bit to
    a run that was not stopped.

    Args:
      room: room for the images of a batch; None = no prompt has any.
      examples: `file_examples`; None = the demonstrations of the task.
    Raises:
      FloatingPointError: the loss is not finite.
    """
    s = config.sft
    per_call = _steps_a_call(s.steps, s.batch, room)
    optimizer = adamw(s, s.steps)
    source, images = dataset(config, task, examples)
    batches = source.batch(s.batch * per_call)
    steps = make_sft_steps(model, optimizer, logits_mib(config))
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


def _steps_a_call(steps: int, batch: int, room: ImageRoom | None) -> int:
    """Number of steps in one jitted call, a divisor of all steps."""
    size = 0 if room is None else batch * room.windows * room.layout.patches * room.patch_numbers
    most = min(_MAX_STEPS_A_CALL, max(1, _MAX_PATCHES_A_CALL // max(size, 1)))
    return max(k for k in range(1, most + 1) if steps % k == 0)


_TRAINING_PROMPTS = ("task.train_prompts", "task.strata", "task.wrong_labels")
"""Fields that change a generated task's training prompts; its held-out prompts are there by their contents."""


def settings(
    config: Config, task: Task, source: str | None = None, images: PromptImages | None = None
) -> dict[str, Json]:
    """The settings that decide the result of a cold start.

    Data, tokenizer and checkpoint are there by their contents, and not by their places.

    Args:
      source: fingerprint of the checkpoint that the cold start begins from; None = there is none.
      images: images of the examples of sft.data; None = they have none.
    """
    stages = ("model.", "lora.", "prompt.", "sft.", "task.")
    places = ("task.train_data", "task.heldout_data", "model.source", "model.revision", "model.tokenizer")
    free = ("sft.share", "task.allow_change", "task.cache", "prompt.date", *places)
    flat = flatten(config)
    fields: dict[str, Json] = {k: v for k, v in flat.items() if k.startswith(stages) and k not in free}
    for name in ("run.seed", "rollout.prompt_bucket", "rollout.max_new_tokens"):
        fields[name] = flat[name]
    fields["loss.logits_mib"] = logits_mib(config)
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
    if images is not None:
        fields["sft.images"] = images.identity()
    return fields
