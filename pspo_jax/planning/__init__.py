"""The memory that a run would need and the least time of its steps, before it is started."""
