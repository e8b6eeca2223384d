#!/usr/bin/env python
"""Draw and tabulate what a grid of experiments found: ``selftrain-d2 report``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
