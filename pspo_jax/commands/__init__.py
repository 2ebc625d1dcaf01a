"""The work of the entry points, after they have read their arguments."""
