#!/usr/bin/env python
"""Make a pseudo-label folder of a COCO JSON: ``selftrain-d2 import``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
