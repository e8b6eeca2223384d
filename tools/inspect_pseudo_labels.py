#!/usr/bin/env python
"""Judge a folder of pseudo labels, in one HTML page: ``selftrain-d2 inspect``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
