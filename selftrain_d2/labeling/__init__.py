"""The teacher at work, and how good its labels are."""
