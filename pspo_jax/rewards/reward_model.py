"""The reward term reward_model: the score of a sequence-classification model on the run's devices.

The model is one of transformers' `...ForSequenceClassification` with one label: a language model whose head is a
vector, multiplied with the hidden state of the last token. It reads prompt and completion in its own chat template.

Letters: n texts, r rows that are computed together, S their padded length, D the width of the hidden states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree
from jinja2 import TemplateError

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.conversations import Conversation
from pspo_jax.data.tokenizer import read_tokenizer
from pspo_jax.distributed.mesh import AXES, params_shardings
from pspo_jax.model import Architecture, transformer
from pspo_jax.model.huggingface.load import Classifier, load_params, read_classifier, read_tensor
from pspo_jax.model.weights import table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 64
"""Length in tokens to which the shortest rows are padded; longer ones are padded to its doubles."""


class Scorer(Protocol):
    """Scores completions. The call hands the work to the devices and returns at once; its result waits."""

    def __call__(
        self, prompts: Sequence[Conversation], completions: Sequence[str], /
    ) -> Callable[[], Float[np.ndarray, "n"]]:
        """A function that waits for the score of each completion; NaN = it is longer than reward.model_tokens."""
        ...


class _Loaded(NamedTuple):
    """A reward model on its devices."""

    mesh: Mesh
    weights: PyTree
    head: Float[Array, "D"]
    score: Callable[[PyTree, Array, Array, Array], Array]


def make_scorer(config: Config) -> Scorer:
    """The scorer of reward.model. Its files are checked now, and its weights are read when it is first called.

    Raises:
      ConfigError: the checkpoint cannot be read, or is no reward model; the message says why.
    """
    found = read_classifier(config.reward.model or "", config.model, "reward.model")
    tokenizer = read_tokenizer(found.source.folder, f"reward.model={config.reward.model}")
    rows, longest = config.reward.model_rows, config.reward.model_tokens
    load = functools.cache(functools.partial(_load, found))

    def scorer(prompts: Sequence[Conversation], completions: Sequence[str]) -> Callable[[], Float[np.ndarray, "n"]]:
        ids = [row_of(tokenizer, *pair, found.pad_id) for pair in zip(prompts, completions, strict=True)]
        parts = [(places, _dispatch(load(), ids, places, rows)) for places in batches(ids, rows, longest)]

        def result() -> Float[np.ndarray, "n"]:
            out = np.full(len(ids), np.nan, np.float32)
            for places, scores in parts:
                out[places] = np.asarray(scores)[: len(places)]
            return out

        return result

    return scorer


def row_of(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, completion: str, pad_id: int | None) -> list[int]:
    """Ids of a prompt with its completion in the reward model's own template, up to the last token that is no padding.

    Without a template they are the texts one behind the other, and an EOS.

    Raises:
      ConfigError: the template refuses the prompt.
    """
    if tokenizer.chat_template:
        turns = cast(list[dict[str, str]], [*prompt, {"role": "assistant", "content": completion}])
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"reward.model: its chat template refuses a prompt ({reason}); name another model, or other prompts"
            ) from error
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    else:
        words = "".join(str(turn["content"]) for turn in prompt) + completion
        ids, end = list(tokenizer.encode(words)), tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(int(end))
    # transformers takes the score at the last token that is not padding, and an EOS may be the token of padding.
    while len(ids) > 1 and ids[-1] == pad_id:
        ids.pop()
    return ids


def batches(ids: Sequence[list[int]], rows: int, longest: int) -> list[list[int]]:
    """Places of texts of similar length that are computed together, without those that are longer than `longest`."""
    order = sorted((i for i in range(len(ids)) if 0 < len(ids[i]) <= longest), key=lambda i: len(ids[i]))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def scores(
    a: Architecture, weights: PyTree, head: Float[Array, "D"], tokens: Int[Array, "r S"], lengths: Int[Array, "r"]
) -> Float[Array, "r"]:
    """The score of each row, at its last token."""
    hidden = transformer(a).hidden(weights, tokens)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last.astype(jnp.float32) @ head


def _load(found: Classifier) -> _Loaded:
    """The model on this process's devices of the mesh in context, or on all of its devices if there is no mesh."""
    a = found.source.architecture
    outer = jax.sharding.get_mesh()
    all_devices = [] if outer.empty else list(np.asarray(outer.devices).flat)
    mine = [d for d in all_devices if d.process_index == jax.process_index()] or jax.local_devices()
    mesh = _mesh_of(a, mine)
    shardings = jax.tree.map(lambda x: x.sharding, _abstract_weights(a, mesh))
    with jax.set_mesh(mesh):
        weights = load_params(found.source, table(a), shardings, a.param_dtype)
        head = jnp.asarray(read_tensor(found.score).reshape(-1).astype(np.float32))
        return _Loaded(mesh, weights, head, jax.jit(functools.partial(scores, a)))


def abstract_weights(config: Config, devices: Sequence[jax.Device]) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes, types and shardings of reward.model's weights; no weight is read.

    Args:
      devices: those of a process.
    Raises:
      ConfigError: see `make_scorer`.
    """
    a = read_classifier(config.reward.model or "", config.model, "reward.model").source.architecture
    return _abstract_weights(a, _mesh_of(a, devices))


def _abstract_weights(a: Architecture, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
    plain = transformer(a)
    shapes = jax.eval_shape(plain.init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(a.param_dtype), sharding=sharding),
        shapes,
        params_shardings(mesh, shapes, plain.axes),
    )


def _mesh_of(a: Architecture, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh on which a process scores: as many of its devices split the weights as divide their number and D."""
    shards = max(n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and a.width % n == 0)
    grid = np.array(devices).reshape(1, len(devices) // shards, shards, 1, 1)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _dispatch(loaded: _Loaded, ids: Sequence[list[int]], places: list[int], rows: int) -> Array:
    """The scores of some texts, padded to as many rows as the devices divide."""
    most = max(len(ids[i]) for i in places)
    length = _SHORTEST
    while length < most:
        length *= 2
    devices = loaded.mesh.devices.size
    count = -(-rows // devices) * devices
    tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for row, i in enumerate(places):
        tokens[row, : len(ids[i])], lengths[row] = ids[i], len(ids[i])
    with jax.set_mesh(loaded.mesh):
        return loaded.score(loaded.weights, loaded.head, jnp.asarray(tokens), jnp.asarray(lengths))
