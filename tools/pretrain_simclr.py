#!/usr/bin/env python
"""Pre-train a detector's backbone on images without labels: ``selftrain-d2 pretrain-simclr``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain-simclr", *sys.argv[1:]]))
