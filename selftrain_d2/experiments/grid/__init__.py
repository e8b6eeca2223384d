"""Grids of runs of the public commands."""
