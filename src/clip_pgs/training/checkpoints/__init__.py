"""Checkpoints: their content, their files, and writing them in the background."""
