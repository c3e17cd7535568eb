"""`python -m clip_pgs` is the command `clip-pgs`."""

import sys

from clip_pgs.cli import main

if __name__ == "__main__":
    sys.exit(main())
