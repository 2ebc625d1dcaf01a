"""Settings of the process that speed up a backend; entry points apply them before any array exists."""

from __future__ import annotations

import ctypes
import sys

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
