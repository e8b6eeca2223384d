#!/usr/bin/env python
"""Speed of augmentation, backbones, training and labeling: ``selftrain-d2 benchmark``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
