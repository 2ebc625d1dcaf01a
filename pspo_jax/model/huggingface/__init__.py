"""Checkpoints of Hugging Face: reading their configs and tensors, and writing them."""
