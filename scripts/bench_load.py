"""Peak memory and time of reading a checkpoint: `python scripts/bench_load.py FOLDER [--dtype bfloat16]`.

Prints one JSON line: parameter bytes as held, peak resident memory of the process, their ratio, seconds.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from pspo_jax.config.schema import Config, ModelConfig
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.distributed.runtime import keep_freed_memory
from pspo_jax.model.huggingface.load import load_params, read_source
from pspo_jax.model.weights import is_weight, table, weight_axes
from pspo_jax.system.one_line_parser import OneLineParser


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="type in memory")
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    began = time.monotonic()
    source = read_source(ModelConfig(source=str(args.folder), param_dtype=args.dtype))
    weights = table(source.architecture)
    mesh = make_mesh(Config(), source.architecture)
    params = load_params(source, weights, params_shardings(mesh, weights, weight_axes(weights)), args.dtype)
    jax.block_until_ready(params)
    seconds = time.monotonic() - began
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = max(math.prod(w.hf_shape) for w in jax.tree.leaves(weights, is_leaf=is_weight))
    result = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "held_gib": round(held / 2**30, 3),
        "peak_rss_gib": round(peak / 2**30, 3),
        "ratio": round(peak / held, 3),
        "largest_tensor_gib": round(largest * jnp.dtype(args.dtype).itemsize / 2**30, 3),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
