"""The run folder: its lock, its logs, its history, and what commands read from it."""
