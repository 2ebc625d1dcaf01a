"""What a run would need of a device, before it is started: memory, and the least time of a step."""
