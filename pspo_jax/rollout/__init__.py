"""Completions sampled from a model: prefill, decoding, and the draw of each token."""

from pspo_jax.rollout.sampler import counting_sampler, make_sampler
from pspo_jax.rollout.token_loop import SamplingParams

__all__ = ["SamplingParams", "counting_sampler", "make_sampler"]
