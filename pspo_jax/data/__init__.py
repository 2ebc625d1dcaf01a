"""Prompts and their gold answers: read from files or generated, filtered, rendered and tokenised."""
