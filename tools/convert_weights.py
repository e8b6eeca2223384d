#!/usr/bin/env python
"""Convert published weights to a starting point: ``selftrain-d2 convert``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
