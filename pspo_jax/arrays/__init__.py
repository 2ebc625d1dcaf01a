"""The pytrees that flow through a step: the train state, and batches of prompts, rollouts, groups and rows."""
