"""`python -m curvops` is the command `curvops`."""

import sys

from curvops.cli import main

if __name__ == "__main__":
    sys.exit(main())
