"""Patches on disk: whole files under keys of content and settings, whoever writes them at the same time."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from pspo_jax.data.images.cache import keep_all, patch_cache
from pspo_jax.data.images.processor import ImageError, ImageProcessor, patches_of
from pspo_jax.system.storage import StorageError
from tests.data.made_images import picture

WRITER = """
import hashlib, sys
from pathlib import Path
from pspo_jax.data.images.cache import patch_cache
from pspo_jax.data.images.processor import ImageProcessor
data = Path(sys.argv[2]).read_bytes()
cache, key = patch_cache(Path(sys.argv[1]), ImageProcessor()), hashlib.sha256(data).hexdigest()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    cache.keep(key, data)
"""


@pytest.fixture
def cache(tmp_path):
    return patch_cache(tmp_path, ImageProcessor())


def key_of(data):
    return hashlib.sha256(data).hexdigest()


def test_images_are_kept_once_and_broken_ones_are_named(cache):
    files = {key_of(data): data for data in [picture(60, 90, i) for i in range(6)]}
    broken = picture(90, 90)[:-3000]
    files[key_of(broken)] = broken
    grids = {key: (4, 6) for key in files} | {key_of(broken): (6, 6)}
    asked = []

    def read(key):
        asked.append(key)
        return files[key]

    found = keep_all(cache, grids, read)
    assert list(found) == [key_of(broken)] and "broken" in str(found[key_of(broken)])
    assert sorted(asked) == sorted(files)
    asked.clear()
    assert list(keep_all(cache, grids, read)) == [key_of(broken)] and asked == [key_of(broken)]
    for key, data in files.items():
        if data is not broken:
            patches = cache.find(key, (4, 6))
            assert isinstance(patches, np.memmap)
            np.testing.assert_array_equal(patches, patches_of(data, cache.processor)[0])
    assert cache.find(key_of(broken), (6, 6)) is None


def test_settings_have_folders_of_their_own(cache, tmp_path):
    assert patch_cache(tmp_path, ImageProcessor()).folder == cache.folder
    for other in (ImageProcessor(max_pixels=9999), ImageProcessor(patch_size=16), ImageProcessor(merge_size=1)):
        assert patch_cache(tmp_path, other).folder != cache.folder
    # These do not change the patches.
    assert patch_cache(tmp_path, ImageProcessor(mean=(0.5, 0.5, 0.5))).folder == cache.folder


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_damaged_files_are_not_read(cache, damage):
    data = picture(60, 90)
    cache.keep(key_of(data), data)
    path = cache.path(key_of(data))
    if damage == "other":
        np.save(path, np.zeros((3, 3), np.uint8))
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "cut" else b"")
    assert cache.find(key_of(data), (4, 6)) is None
    cache.keep(key_of(data), data)
    assert cache.find(key_of(data), (4, 6)).shape == (24, 588)


def test_a_folder_that_cannot_be_written_is_named(cache):
    data = picture(60, 90)
    cache.folder.parent.mkdir(parents=True)
    cache.folder.write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        cache.keep(key_of(data), data)
    with pytest.raises(ImageError):
        cache.keep("x", b"no image")


@pytest.mark.slow
def test_processes_write_the_same_file(cache, tmp_path):
    data = picture(300, 300)
    (tmp_path / "x.png").write_bytes(data)
    words = [sys.executable, "-c", WRITER, str(tmp_path), str(tmp_path / "x.png")]
    writers = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    expected, reads = patches_of(data, cache.processor)[0], 0
    while any(writer.poll() is None for writer in writers) or not reads:
        if (found := cache.find(key_of(data), (22, 22))) is not None:
            np.testing.assert_array_equal(found, expected)
            reads += 1
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.stdin.close(), writer.stdout.close()
    assert [path.suffix for path in cache.path(key_of(data)).parent.iterdir()] == [".npy"]
