"""What the entry points do once they have read their arguments."""
