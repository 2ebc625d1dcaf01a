"""What a completion is worth: the verdict on its answer, and the terms that shape a reward."""
