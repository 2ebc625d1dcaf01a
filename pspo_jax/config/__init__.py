"""The configuration: every field with its type, range and default, and the checks that refuse a config."""
