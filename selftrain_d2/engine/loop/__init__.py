"""The loop: a teacher, its pseudo labels, a student of both, and what to compare the student with."""
