"""A small state, and a small disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def tree(seed=0, size=64):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(size, size)), jnp.float32), "n": jnp.int32(seed)}


def abstract(value):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value)


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of so many kilobytes, or a skip where none may be mounted."""
    folder.mkdir(parents=True)
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    call = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(call, capture_output=True).returncode:
        pytest.skip("no small disk may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave no room; returns the file that takes it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for block in (4096, 512, 1):
            try:
                while True:
                    file.write(bytes(block))
            except OSError:
                continue
    return path
