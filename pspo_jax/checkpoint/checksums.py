"""A checksum of every array of a tree, the same on any number of devices, and the tree's layout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

from pspo_jax.distributed import processes


@jax.jit
def checksums(tree: PyTree) -> list[UInt32[Array, ""]]:
    """A 32-bit checksum of each leaf, over its bits and positions; a sum of integers, the same on any topology."""

    def one(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, bits)
        words = x.astype(jnp.uint32).ravel()
        weight = jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
        return (words * weight).sum(dtype=jnp.uint32)

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def named_checksums(tree: PyTree) -> dict[str, int]:
    """Path of each array -> its checksum."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(names, (int(x) for x in processes.to_host(checksums(tree))), strict=True))


def verify(tree: PyTree, expected: dict[str, int]) -> None:
    """Raise ValueError unless the arrays have these checksums."""
    found = named_checksums(tree)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong or len(found) != len(expected):
        raise ValueError(f"checksum of {', '.join(wrong[:3]) or 'the tree'} differs")


def files_identity(folder: Path) -> str:
    """Hash of the contents of a folder's safetensors files."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def layout(tree: PyTree) -> dict[str, str]:
    """Path of each array -> its type and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}
