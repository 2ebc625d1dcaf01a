"""Rewards of completions: the verdict on the answer, and the terms that shape the reward."""
