"""What a completion is worth: verifiers in killable worker processes, and rewards that shape.

Nothing here imports JAX: `worker.py` and what it imports run in processes that must never see the accelerator.
"""
