#!/usr/bin/env python
"""Labeled fractions of a COCO file: ``selftrain-d2 splits``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["splits", *sys.argv[1:]]))
