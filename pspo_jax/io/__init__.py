"""Checkpoints, metrics, progress and reports."""
