#!/usr/bin/env python
"""Handwritten digits by class, for joint training: ``selftrain-d2 prepare-digit-classes``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-digit-classes", *sys.argv[1:]]))
