"""Verifiers: plain functions of text that say whether an answer is right.

Nothing here imports JAX: `workers/process.py` and the modules that it imports run in processes that must never see the
accelerator.
"""
