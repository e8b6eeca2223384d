#!/usr/bin/env python
"""Real tree imagery for the demo: ``selftrain-d2 prepare-neon-trees``."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-neon-trees", *sys.argv[1:]]))
