#!/usr/bin/env python
"""Train a teacher or a student from a config file: ``selftrain-d2 train``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
