"""Tokens from a policy: prefill, decode, token sampling."""

from pspo_jax.rollout.sampler import SamplingParams, make_sampler

__all__ = ["SamplingParams", "make_sampler"]
