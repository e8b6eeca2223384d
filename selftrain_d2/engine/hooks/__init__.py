"""Hooks of the trainer: what has its turn between the steps."""
