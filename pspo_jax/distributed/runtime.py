"""What speeds up a backend: settings of the process, applied before any array exists, and of its compiler."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make glibc reuse large freed blocks instead of unmapping them; False where the allocator is another one.

    XLA's CPU backend allocates its temporaries anew at each call, and by default glibc maps and unmaps blocks of that
    size every time. The gradient of one transformer block alone fell from 27 to 16.5 ms with this; whole supervised
    steps of the default policy gained little (medians 31.6 to 29.8 and 33.1 to 31.7 ms, spreads overlapping). The
    process keeps its peak memory. It changes nothing on accelerators.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_MAX, 0))


def jit_once(fn: Callable[..., Any], platform: str, out_shardings: Any = None) -> Callable[..., Any]:
    """A jitted function that will be called once: a CPU's compiler need not try hard.

    The first state of a transformer of 1 M parameters compiled in 0.9 s instead of 2.5; its weights were the same bits.
    """
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return jax.jit(fn, out_shardings=out_shardings, compiler_options=options)
