"""Killable processes that run verifiers and reward functions, each with a deadline."""
