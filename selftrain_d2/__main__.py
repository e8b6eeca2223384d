"""``python -m selftrain_d2 COMMAND``: the same as ``selftrain-d2 COMMAND``, for a certain Python."""

import sys

from selftrain_d2.cli import main

if __name__ == "__main__":
    sys.exit(main())
