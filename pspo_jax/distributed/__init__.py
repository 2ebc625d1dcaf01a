"""Meshes, and which mesh axis holds which logical axis."""
