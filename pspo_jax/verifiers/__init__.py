"""Whether an answer is right, as plain functions of text.

Nothing here imports JAX: `workers/process.py` and what it imports run in processes that must never see the
accelerator.
"""
