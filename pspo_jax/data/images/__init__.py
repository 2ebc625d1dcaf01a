"""Images of prompts: reading, resizing, patches, their cache, and their places among a prompt's tokens."""
