"""Embeddings on disk: what is read is what was written, and a file that is not whole counts as none."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.data.images.embedding_cache import digest_of, embedding_cache
from pspo_jax.system.storage import StorageError

TOKENS, WIDTH = 3, 5


def numbers(seed=0, dtype="bfloat16"):
    return np.random.default_rng(seed).standard_normal((TOKENS, WIDTH)).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_kept_is_found(tmp_path, dtype):
    cache = embedding_cache(tmp_path, "tower", WIDTH, dtype)
    assert cache.find("a" * 64, TOKENS) is None and cache.checksum("a" * 64, TOKENS) == 0
    right = numbers(dtype=dtype)
    cache.keep("a" * 64, right)
    found = cache.find("a" * 64, TOKENS)
    assert found.dtype == jnp.dtype(dtype) and not found.flags.writeable
    np.testing.assert_array_equal(found, right)
    assert cache.find("a" * 64, TOKENS + 1) is None
    assert not list(tmp_path.glob("**/*.partial"))
    cache.keep("b" * 64, numbers(1, dtype))
    assert len({0, cache.checksum("a" * 64, TOKENS), cache.checksum("b" * 64, TOKENS)}) == 3
    for other in (("tower 2", WIDTH, dtype), ("tower", WIDTH + 1, dtype)):
        assert embedding_cache(tmp_path, *other).find("a" * 64, TOKENS) is None


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_that_is_not_whole_counts_as_none(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    cache, digest = embedding_cache(folder, "tower", WIDTH, "bfloat16"), "c" * 64
    cache.keep(digest, numbers())
    path = cache.path(digest)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut off"):
        changed = bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        changed = bytes(whole)
    path.write_bytes(changed)
    assert cache.find(digest, TOKENS) is None and cache.checksum(digest, TOKENS) == 0
    cache.keep(digest, numbers())
    np.testing.assert_array_equal(cache.find(digest, TOKENS), numbers())
    shutil.rmtree(folder)


def test_an_image_is_known_by_its_patches_and_its_grid():
    patches = np.arange(24, dtype=np.uint8).reshape(8, 3)
    found = {digest_of(patches, (2, 4)), digest_of(patches, (4, 2)), digest_of(patches[::-1], (2, 4))}
    assert len(found) == 3 and digest_of(patches.copy(), (2, 4)) in found


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "image_embeddings").write_text("")
    with pytest.raises(StorageError, match="image_embeddings"):
        embedding_cache(tmp_path, "tower", WIDTH, "float32").keep("a" * 64, numbers(dtype="float32"))
