#!/usr/bin/env python
"""Run a grid of experiments: ``selftrain-d2 grid``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["grid", *sys.argv[1:]]))
