"""Attention: the reference in plain JAX, kernels, and their trial at the start of a run."""
