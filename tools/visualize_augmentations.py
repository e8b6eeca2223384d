#!/usr/bin/env python
"""Draw what the augmentation policies do to a data set: ``selftrain-d2 visualize-augmentations``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["visualize-augmentations", *sys.argv[1:]]))
