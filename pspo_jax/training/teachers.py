"""The teacher that a config names: found and compared with the policy first, loaded when its weights are needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from pspo_jax.checkpoint.params_folder import folder_settings, is_there
from pspo_jax.checkpoint.reading import params_identity
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.tokenizer import TextTokenizer, read_tokenizer
from pspo_jax.model import Architecture, Model, transformer
from pspo_jax.model.huggingface.load import errors_of, read_source
from pspo_jax.runs.access import choose_steps, read_config
from pspo_jax.runs.home import home_of
from pspo_jax.training.architectures import architecture_for
from pspo_jax.training.saved_weights import abstract_weights, cold_start_weights, source_weights, step_weights


class Teacher(NamedTuple):
    """A teacher whose weights have not been read."""

    name: str
    """teacher.source, as the user gave it."""
    architecture: Architecture
    fingerprint: str
    """Hash of what its weights come from, by which processes compare what they found."""
    read: Callable[[Architecture, Mesh], PyTree]
    """(architecture, mesh) -> the weights, in any type"""

    @property
    def model(self) -> Model:
        """The functions of the teacher."""
        return transformer(self.architecture)

    def abstract(self, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of its weights on a mesh."""
        return abstract_weights(self.architecture, mesh)

    def load(self, mesh: Mesh, say: Callable[[str], None] = lambda _: None) -> PyTree:
        """Its weights on a mesh, in the types of `abstract`.

        Args:
          say: is told how many there are.
        Raises:
          ConfigError: they cannot be read, or are not finite.
        """
        wanted = self.abstract(mesh)
        say(f"teacher: {sum(x.size for x in jax.tree.leaves(wanted)):,} parameters, from {self.name}")
        with errors_of("teacher.source", self.name):
            found = self.read(self.architecture, mesh)
        return jax.tree.map(lambda x, a: x.astype(a.dtype), found, wanted)


def find_teacher(
    config: Config, vocabulary: Mapping[str, int] | None, policy: Architecture, weights: bool = True
) -> Teacher | None:
    """The teacher that teacher.source names, once it is known to have the policy's tokens; None = there is none.

    Args:
      vocabulary: token -> id of the policy's tokenizer; None = the tokenizer does not say.
      policy: the policy's architecture, with the ids that are never drawn.
      weights: whether the teacher's tensors must be there; a plan needs their shapes alone.
    Raises:
      ConfigError: it cannot be read, or does not fit the policy; the message names the difference.
    """
    name = config.teacher.source
    if name is None:
        return None
    folder = Path(name).expanduser()
    is_run = (folder / "config.yaml").is_file()
    if config.teacher.step != "latest" and not is_run:
        raise ConfigError(
            f"teacher.step={config.teacher.step}: teacher.source={name} is no folder of a training run, so that it has "
            "no steps; drop it"
        )
    with errors_of("teacher.source", name):
        found, tokens = (_of_run if is_run else _of_checkpoint)(config, name, weights)
    if vocabulary is None:
        raise ConfigError(
            f"teacher.source={name}: the task's own tokenizer has no get_vocab() by which its tokens could be compared "
            "with the teacher's; add that method, or drop teacher.source"
        )
    _check_tokens(name, vocabulary, tokens, found.architecture.vocab_size, policy)
    drawn = {*range(policy.vocab_size)} - {*policy.forbidden}
    never = tuple(i for i in range(found.architecture.vocab_size) if i not in drawn)
    dtype = config.teacher.param_dtype or config.model.compute_dtype or "float32"
    architecture = dataclasses.replace(
        found.architecture,
        forbidden=never,
        param_dtype=dtype,
        compute_dtype=policy.compute_dtype,
        scan_unroll=policy.scan_unroll,
        remat="none",
    )
    return found._replace(architecture=architecture)


def vocabulary_of(tokenizer: object) -> dict[str, int] | None:
    """Token -> id; None if the tokenizer does not say."""
    if isinstance(tokenizer, TextTokenizer):
        return dict(tokenizer.hf.get_vocab())
    if isinstance(tokenizer, CharTokenizer):
        return {character: i for i, character in enumerate(tokenizer.characters)}
    get = getattr(tokenizer, "get_vocab", None)
    return dict(get()) if callable(get) else None


def check_images(teacher: Teacher, policy: Architecture) -> None:
    """Raise ConfigError unless the teacher can read the images that the policy reads."""
    ours, theirs = policy.vision, teacher.architecture.vision
    assert ours is not None
    if theirs is None:
        raise ConfigError(
            f"teacher.source={teacher.name}: reads text alone, and the prompts have images; name a model with a vision "
            "tower"
        )
    for field in ("layout", "patch", "channels", "frames", "mean", "std"):
        one, other = getattr(ours, field), getattr(theirs, field)
        if one != other:
            raise ConfigError(
                f"teacher.source={teacher.name}: prepares images otherwise than the policy ({field} {other} there, "
                f"{one} here); name a model of the same processor"
            )


def _of_checkpoint(config: Config, name: str, weights: bool) -> tuple[Teacher, dict[str, int]]:
    """A teacher in Hugging Face's format, and the ids of its tokens."""
    model = dataclasses.replace(config.model, source=name, revision=config.teacher.revision)
    source = read_source(model, weights)
    tokens = read_tokenizer(source.folder, f"teacher.source={name}").get_vocab()

    def read(a: Architecture, mesh: Mesh) -> PyTree:
        return source_weights(source, a, mesh)

    return Teacher(name, source.architecture, source.fingerprint(), read), dict(tokens)


def _of_run(config: Config, name: str, weights: bool) -> tuple[Teacher, dict[str, int]]:
    """A teacher that a training run has made, and the ids of its tokens."""
    run, wanted = Path(name).expanduser(), config.teacher.step
    own = read_config(run, flag="teacher.source")
    source, tokenizer, architecture = architecture_for(own, weights)
    tokens = vocabulary_of(tokenizer)
    assert tokens is not None
    held = architecture.param_dtype  # the type in which the run's folder holds its weights

    def as_held(a: Architecture) -> Architecture:
        return dataclasses.replace(a, param_dtype=held)

    def whole(a: Architecture, mesh: Mesh) -> PyTree:
        assert source is not None
        return source_weights(source, as_held(a), mesh)

    if not weights:
        return Teacher(name, architecture, "", whole), tokens
    if wanted == "cold_start":
        place = home_of(run) / "cold_start"
        if not is_there(place):
            raise ConfigError(f"teacher.step=cold_start: {place} is not there; choose another step")
        identity = json.dumps(folder_settings(place), sort_keys=True)

        def read(a: Architecture, mesh: Mesh) -> PyTree:
            return cold_start_weights(run, source, as_held(a), mesh, partial(whole, a, mesh))

        return Teacher(name, architecture, hashlib.sha256(identity.encode()).hexdigest()[:16], read), tokens
    (step,) = choose_steps(run, wanted, "teacher.step", "teacher.source")

    def read_step(a: Architecture, mesh: Mesh) -> PyTree:
        return step_weights(run, step, source, as_held(a), mesh, partial(whole, a, mesh))

    return Teacher(name, architecture, params_identity(home_of(run) / "checkpoints", step), read_step), tokens


def _check_tokens(
    name: str, ours: Mapping[str, int], theirs: Mapping[str, int], rows: int, policy: Architecture
) -> None:
    """Raise ConfigError unless every token of the policy has the same id in the teacher, and a row of its embedding."""
    own = {i: token for token, i in ours.items() if i < policy.vocab_size}
    other = {i: token for token, i in theirs.items()}
    wrong = sorted(i for i, token in own.items() if other.get(i) != token)
    if wrong:
        there = repr(other[wrong[0]]) if wrong[0] in other else "no token"
        raise ConfigError(
            f"teacher.source={name}: its tokenizer is not the policy's: {len(wrong):,} of {len(own):,} ids are other "
            f"tokens, such as {wrong[0]}, which is {there} there and {own[wrong[0]]!r} here; name a teacher with the "
            "same tokens"
        )
    if max(own) >= rows:
        raise ConfigError(
            f"teacher.source={name}: its embedding has {rows:,} rows, and the policy's tokens have ids up to "
            f"{max(own):,}; name a teacher whose embedding has them all"
        )
