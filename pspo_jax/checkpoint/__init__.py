"""Checkpoints: written whole, verified when read, and never deleted because of an error that passes."""
