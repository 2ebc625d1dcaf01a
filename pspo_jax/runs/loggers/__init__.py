"""Loggers beside the run folder: wandb, trackio and mlflow, each fed by a thread of its own."""
