#!/usr/bin/env python
"""Draw the course of training runs: ``selftrain-d2 plot-metrics``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot-metrics", *sys.argv[1:]]))
