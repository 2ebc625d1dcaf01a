"""The only uses of JAX's private modules.

JAX has no public name for three things: the cluster that `jax.distributed.initialize()` would join by itself, which a
run of one process must know so as not to wait for others; the barriers with a time limit and the key-value store of its
coordination service; and cuDNN's attention with its log-sum-exp in float32. The public barrier,
`multihost_utils.sync_global_devices`, waits for ever and runs a program on the devices. The public attention,
`jax.nn.dot_product_attention`, rounds the log-sum-exp to the type of the queries, and takes keys in a layout that the
cache would have to be copied to. tests/distributed/test_jax_internals.py fails where a new release of JAX has moved one
of them.
"""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class CoordinationClient(Protocol):
    """The part of JAX's coordination service that the package uses; all times are in milliseconds."""

    def wait_at_barrier(self, name: str, timeout: int, /) -> None: ...

    def key_value_set(self, key: str, value: str, /, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, prefix: str, /) -> list[tuple[str, str]]: ...

    def blocking_key_value_get(self, key: str, timeout: int, /) -> str: ...


def cluster_processes() -> int:
    """Processes of the cluster that `jax.distributed.initialize()` would join by itself; 1 = it knows none."""
    from jax._src.clusters import ClusterEnv

    known = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present())
    found = next(known, None)
    return 1 if found is None else int(found.get_process_count())


def coordination_client() -> CoordinationClient:
    """The client of the coordination service.

    Raises:
      ValueError: `jax.distributed.initialize()` has not been called.
    """
    from jax._src.distributed import global_state

    client: CoordinationClient | None = global_state.client
    if client is None:
        raise ValueError("jax.distributed.initialize() has not been called")
    return client


def cudnn_attention(
    q: Float[Array, "R K q h"],
    k: Float[Array, "R K S h"],
    v: Float[Array, "R K S h"],
    lengths: Int[Array, "R"],
    scale: float,
) -> tuple[Float[Array, "R K q h"], Float[Array, "R K q"]]:
    """cuDNN's attention of q queries for each head over the first keys of each row, and its log-sum-exp in float32.

    Args:
      lengths: number of keys of each row, int32.
      scale: factor of the products of queries and keys.
    Raises:
      RuntimeError: there is no cuDNN.
      NotImplementedError: cuDNN does not take these shapes or types.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    queries = jnp.full_like(lengths, q.shape[2])
    out, log_sum = cudnn.dot_product_attention(
        *(q, k, v),
        q_seqlen=queries,
        kv_seqlen=lengths,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING,
        qkv_layout="BNTH",
        return_residual=True,
    )
    return out, log_sum
