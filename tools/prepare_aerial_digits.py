#!/usr/bin/env python
"""Handwritten digits on aerial photographs, a benchmark: ``selftrain-d2 prepare-aerial-digits``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-aerial-digits", *sys.argv[1:]]))
