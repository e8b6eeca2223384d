"""The teacher at work: it writes pseudo labels."""
