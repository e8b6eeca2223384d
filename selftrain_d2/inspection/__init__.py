"""Judging and showing labels: of boxes and of masks, counts, quality, sheets of pictures, and the report."""
