"""What is asked for: every field, its type, range and default, and what is refused."""
