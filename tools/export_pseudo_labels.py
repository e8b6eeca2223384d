#!/usr/bin/env python
"""Write pseudo labels as COCO JSON: ``selftrain-d2 export``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
