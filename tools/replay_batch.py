#!/usr/bin/env python
"""Look at a batch whose loss was not finite: ``selftrain-d2 replay``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
