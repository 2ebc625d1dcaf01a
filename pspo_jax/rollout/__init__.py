"""Tokens from a policy: prefill, decode, token sampling."""

from pspo_jax.rollout.sampler import SamplingParams, counting_sampler, make_sampler

__all__ = ["SamplingParams", "counting_sampler", "make_sampler"]
