#!/usr/bin/env python
"""Write pseudo labels on unlabeled images: ``selftrain-d2 label``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
