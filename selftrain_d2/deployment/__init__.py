"""The student at work: outside of training."""
