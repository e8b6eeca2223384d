#!/usr/bin/env python
"""Teacher, pseudo labels, student on your own data: ``selftrain-d2 self-train``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["self-train", *sys.argv[1:]]))
