"""Flags of XLA's compilers for GPUs and TPUs, which are set before JAX starts a backend.

A flag that the environment already sets stays as it is.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from typing import NamedTuple

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config

VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
"""Backend -> environment variable with its flags. XLA_FLAGS is read by every backend, and a flag that XLA does not know
ends the process."""
_PACKAGES = {"gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"), "tpu": ("libtpu",)}


class Flag(NamedTuple):
    """A compiler flag with the reason for its value."""

    platform: str
    """gpu or tpu."""
    name: str
    value: str
    reason: str


_LAYER_BYTES = str(2**29)
"""Upper bound of the weights of one layer in bytes, as a flag's value."""
TABLE = (
    Flag(
        "gpu",
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "FSDP's gathers run beside the products of the layer before; off by default",
    ),
    Flag(
        "gpu",
        "xla_gpu_enable_while_loop_double_buffering",
        "true",
        "the scan over layers: the next layer's weights are gathered while this one is computed",
    ),
    Flag(
        "gpu",
        "xla_gpu_dot_merger_threshold_mb",
        "0",
        "products that are merged, as of gate and up, join their weights in a slow kernel: a decoding step of 1.5B "
        "parameters took 5.3 ms on an H100, and takes 4.8",
    ),
    Flag(
        "gpu",
        "xla_gpu_enable_pipelined_all_gather",
        "true",
        "moves a loop's gather of weights to the iteration before",
    ),
    Flag(
        "gpu",
        "xla_gpu_enable_pipelined_reduce_scatter",
        "true",
        "moves a loop's scatter of gradients to the iteration after",
    ),
    Flag(
        "gpu",
        "xla_gpu_all_gather_combine_threshold_bytes",
        _LAYER_BYTES,
        "a layer's weights travel as one message: 512 MiB hold a layer of 7B parameters in bfloat16",
    ),
    Flag(
        "gpu",
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        _LAYER_BYTES,
        "the same for a layer's gradients",
    ),
    Flag(
        "gpu",
        "xla_gpu_all_reduce_combine_threshold_bytes",
        _LAYER_BYTES,
        "the same for gradients of replicated weights",
    ),
)


def apply(config: Config, environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Add the flags of `TABLE` and of the config to the environment.

    Returns:
      Environment variable -> flags that were added to it.

    Raises:
      ConfigError: runtime.xla_flags or runtime.libtpu_flags is not a list of flags.
    """
    added = {}
    from_config = {
        "gpu": ("runtime.xla_flags", config.runtime.xla_flags),
        "tpu": ("runtime.libtpu_flags", config.runtime.libtpu_flags),
    }
    for platform, variable in VARIABLES.items():
        field, text = from_config[platform]
        words = text.split()
        for word in words:
            if not word.startswith("--") or "=" not in word:
                raise ConfigError(f"{field}={word}: write flags as --name=value, separated by spaces")
        if config.runtime.flags and any(importlib.util.find_spec(package) for package in _PACKAGES[platform]):
            words = [f"--{f.name}={f.value}" for f in TABLE if f.platform == platform] + words
        before = environment.get(variable, "")
        named = {word.partition("=")[0] for word in before.split()}
        # The config's flags come later and override those of the table.
        last = {word.partition("=")[0]: word for word in words}
        new = " ".join(word for name, word in last.items() if name not in named)
        if new:
            environment[variable] = f"{before} {new}".strip()
            added[variable] = new
    return added
