"""``python -m adaptive``: the command line."""

import sys

from adaptive.cli import main

if __name__ == "__main__":
    sys.exit(main())
