"""The weights that a model's functions take, as a Hugging Face checkpoint or a run folder holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from pspo_jax.arrays.split_params import merge_params
from pspo_jax.checkpoint.checksums import verify
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.params_folder import folder_settings, load_folder
from pspo_jax.checkpoint.reading import read_params
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed.mesh import params_shardings
from pspo_jax.model import Architecture, transformer
from pspo_jax.model.huggingface.load import Source, load_params
from pspo_jax.model.weights import init_weights, table, trained_and_frozen, weight_axes
from pspo_jax.runs.home import home_of


def abstract_weights(a: Architecture, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the weights that the functions of `transformer(a)` take."""
    trained, frozen = trained_and_frozen(a)

    def of_table(shapes: PyTree, axes: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
        shardings = params_shardings(mesh, shapes, axes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    found = of_table(jax.eval_shape(transformer(a).init, jax.random.key(0)), weight_axes(trained))
    if frozen is None:
        return found
    dtype = jnp.dtype(a.param_dtype)
    shapes = jax.eval_shape(lambda: init_weights(frozen, jax.random.key(0), dtype))
    return merge_params(found, of_table(shapes, weight_axes(frozen)))


def source_weights(source: Source, a: Architecture, mesh: Mesh) -> PyTree:
    """All weights of a Hugging Face checkpoint on the mesh, without adapters."""
    plain = transformer(a.whole())
    shapes = jax.eval_shape(plain.init, jax.random.key(0))
    return load_params(source, table(a), params_shardings(mesh, shapes, plain.axes), a.param_dtype)


def step_weights(
    run: Path, step: int, source: Source | None, a: Architecture, mesh: Mesh, whole: Callable[[], PyTree]
) -> PyTree:
    """The weights of a run's checkpoint, on top of those that its source holds.

    Args:
      a: the architecture of the run, with its adapters.
      whole: gives `source_weights`; it is called only if some weights of the run did not train.
    Raises:
      ConfigError: the checkpoint is damaged, or `source` is not the one that the run began from.
    """
    axes = transformer(a).axes
    params, metadata = read_params(
        home_of(run) / "checkpoints", step, lambda shapes: params_shardings(mesh, shapes, axes)
    )
    if source is not None and metadata.get("source") != source.fingerprint():
        raise ConfigError(f"model.source={source.name}: is not the checkpoint that this run began from")
    frozen = _frozen(a, whole)
    if frozen is not None:
        try:
            verify(frozen, metadata["base"])
        except ValueError as error:
            raise ConfigError(
                f"model.source={source.name if source else None}: its frozen weights differ from those this run "
                f"was trained with ({error})"
            ) from error
    return merge_params(params, frozen)


def cold_start_weights(
    run: Path, source: Source | None, a: Architecture, mesh: Mesh, whole: Callable[[], PyTree]
) -> PyTree:
    """The weights of a run's cold start; the arguments and errors are those of `step_weights`."""
    place = home_of(run) / "cold_start"
    abstract = abstract_weights(a, mesh)
    try:
        if folder_settings(place).get("source") != (source.fingerprint() if source else None):
            raise ConfigError(f"model.source={source.name if source else None}: is not the one that {place} began from")
        params = load_folder(place, abstract if trained_and_frozen(a)[1] is None else abstract.trained)
    except DamageError as error:
        raise ConfigError(f"{place}: is damaged or holds another model ({error}); choose another step") from error
    return merge_params(params, _frozen(a, whole))


def _frozen(a: Architecture, whole: Callable[[], PyTree]) -> PyTree | None:
    """The weights of a run that did not train; None = all did."""
    if trained_and_frozen(a)[1] is None:
        return None
    return whole() if a.lora is not None else {"vision": whole()["vision"]}
